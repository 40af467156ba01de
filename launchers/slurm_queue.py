"""What Slurm says about jobs and partitions. Where it is missing or does not answer, nothing is concluded from that."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass

_TIMEOUT_S = 30


@dataclass(frozen=True)
class Queued:
    """A job that is in the queue.

    Attributes:
        state: ``PENDING``, ``RUNNING``, ``COMPLETING``, ...
        reason: why it waits: ``Resources``, ``Priority``, ``Dependency``, ``BeginTime``, ...
    """

    state: str
    reason: str

    @property
    def text(self) -> str:
        """The state in a user's words."""
        if self.state != "PENDING":
            return self.state.lower()
        about = {"BeginTime": "held back for a moment after a requeue", "Dependency": "waits for the stage before"}
        why = about.get(self.reason, self.reason)
        return "queued" if why in ("None", "") else f"queued ({why})"


@dataclass(frozen=True)
class Partition:
    """A partition: its nodes, and its time limit in minutes (None: there is none)."""

    name: str
    default: bool
    nodes: int
    limit_min: int | None


def queued(job_ids: Sequence[str]) -> dict[str, Queued] | None:
    """Those of the given jobs that wait or run; None where nobody answers, which says nothing about the jobs."""
    found: dict[str, Queued] = {}
    for job in job_ids:  # squeue fails as a whole for one number that it does not know
        out = _ask(["squeue", "-h", "-j", job, "-o", "%T|%r"], fine="Invalid job id")
        if out is None:
            return None
        if out.strip():
            state, _, reason = out.splitlines()[0].partition("|")
            found[job] = Queued(state.strip(), reason.strip())
    return found


def final_state(job: str) -> str | None:
    """State and exit code of a job that has ended, such as ``FAILED 1:0``; None where nobody knows."""
    out = _ask(["sacct", "-X", "-n", "-P", "-o", "State,ExitCode", "-j", job])
    lines = [line for line in (out or "").splitlines() if "|" in line and line.split("|")[0] != "State"]
    if lines:
        return " ".join(lines[-1].split("|")[:2])
    shown = _ask(["scontrol", "-o", "show", "job", job]) or ""
    values = dict(re.findall(r"(JobState|ExitCode)=(\S+)", shown))
    return f"{values['JobState']} {values['ExitCode']}" if len(values) == 2 else None


def partitions() -> list[Partition] | None:
    """The partitions of the cluster; None where nobody answers."""
    out = _ask(["sinfo", "-h", "-o", "%P|%D|%l"])
    if out is None:
        return None
    found = []
    for line in out.splitlines():
        fields = line.strip().split("|")
        if len(fields) == 3 and fields[1].isdigit():
            name = fields[0].rstrip("*")
            found.append(Partition(name, fields[0].endswith("*"), int(fields[1]), _minutes(fields[2])))
    return found


def _minutes(text: str) -> int | None:
    """Minutes of Slurm's ``days-hours:minutes:seconds``; None for ``infinite`` and what is not understood."""
    days, _, clock = text.rpartition("-")
    parts = clock.split(":")
    if not all(part.isdigit() for part in [*parts, days or "0"]) or len(parts) > 3:
        return None
    numbers = [int(part) for part in parts]
    if len(numbers) == 3:
        minutes = numbers[0] * 60 + numbers[1]
    elif days:
        minutes = numbers[0] * 60 + (numbers[1] if len(numbers) == 2 else 0)
    else:
        minutes = numbers[0]
    return int(days or 0) * 1440 + minutes


def _ask(command: list[str], fine: str = "") -> str | None:
    """Output of a command; None where it is missing, fails or does not end. ``fine``: an error that means nothing."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT_S)
    except (OSError, subprocess.TimeoutExpired):
        return None
    if done.returncode and not (fine and fine in done.stderr):
        return None
    return done.stdout
