"""Stay with a job: show how far it is, and when a rank fails say which one and why."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil  # type: ignore[import-untyped]

from launchers.executors import Submission
from launchers.progress import Display, progress_line

_TAIL_LINES = 25
_SLURM_EVERY_S = 10.0
_GRACE_S = 5.0
"""How long the other ranks get after a failure: the one that failed first may not be the one that reported first."""
_ECHOES = ("Connection closed by peer", "Connection reset by peer", "remote process exited")
"""What gloo and NCCL say on a rank whose peer has failed: never the cause."""


@dataclass(frozen=True)
class Failure:
    """A rank that failed.

    Attributes:
        rank: its number.
        killed: it ended without a word: killed by the system, or by hand.
        path: its log.
        error: its traceback, empty for one that was killed.
    """

    rank: int
    killed: bool
    path: Path
    error: str

    @property
    def refusal(self) -> str | None:
        """The one line of a bad configuration or input that only the job itself could find; None for a fault."""
        name, _, message = (self.error.strip().splitlines() or [""])[-1].partition(": ")
        return message if name.rpartition(".")[2] in ("ConfigError", "InputError") else None


def follow(submission: Submission, out: TextIO | None = None, every_s: float = 0.5) -> int:
    """Show progress until the last job ends.

    Args:
        submission: what `submit` returned.
        out: where to; standard output by default.
        every_s: seconds between looks.

    Returns:
        The exit code: 0 when all is done or the user left with Ctrl-C, 1 when a rank failed, 2 when it refused its
        configuration or input.
    """
    display = Display(out or sys.stdout)
    display.show("waiting for the first step (Ctrl-C leaves, the job goes on)")
    try:
        for job in submission.jobs:
            watch = _WATCHES[submission.kind](submission, job)
            while not watch.ended():
                state = progress_line(submission.configs, submission.started) or watch.state()
                if state:
                    display.show(state)
                time.sleep(every_s)
            failure = watch.failure()
            if failure is not None:
                display.end(progress_line(submission.configs, submission.started) or "no step was done")
                watch.stop()
                return _report(failure)
    except KeyboardInterrupt:
        display.end(display.shown)
        print(f"the job goes on; stop it with: {how_to_stop(submission)}", file=display.out)
        return 0
    display.end(progress_line(submission.configs, submission.started) or "no step was done")
    print(f"done: {submission.run_dir}", file=display.out)
    return 0


def how_to_stop(submission: Submission) -> str:
    """The command that ends the jobs."""
    ids = " ".join(str(job.job_id) for job in submission.jobs)
    # a local job's number is its process group; nothing gentler reaches submitit's tasks, and no checkpoint minds
    return f"kill -KILL -- -{ids}" if submission.kind == "local" else f"scancel {ids}"


@dataclass
class _Watch:
    """One job as seen from outside."""

    submission: Submission
    job: Any
    started: bool = False
    since: float | None = None

    def state(self) -> str:
        """What to show before the first step."""
        return ""

    def results(self) -> dict[int, tuple[str, str]]:
        """``success`` or ``error``, and the traceback, of the ranks that have ended."""
        results: dict[int, tuple[str, str]] = {}
        for rank in range(self.submission.ranks(self.job)):
            try:
                state, value = pickle.loads(self.submission.paths(self.job, rank).result_pickle.read_bytes())
            except (OSError, EOFError, pickle.UnpicklingError):
                continue
            results[rank] = (state, str(value))
        return results

    def failure(self) -> Failure | None:
        """The rank to blame once the job has ended: killed, else the first with an error of its own."""
        running = self.running()  # before the results: a rank writes its own and then ends
        results = self.results()
        killed = [r for r in range(self.submission.ranks(self.job)) if r not in results and r not in running]
        errors = [rank for rank, (state, _) in results.items() if state == "error"]
        errors = [r for r in errors if not any(echo in results[r][1] for echo in _ECHOES)] or errors
        if not errors and not killed:
            return None
        if killed:
            rank = killed[0]
        else:
            rank = min(errors, key=lambda r: self.submission.paths(self.job, r).result_pickle.stat().st_mtime)
        error = "" if killed else results[rank][1]
        return Failure(rank, bool(killed), self.submission.paths(self.job, rank).stderr, error)

    def ended(self) -> bool:
        """Whether there is nothing left to wait for."""
        raise NotImplementedError

    def stop(self) -> None:
        """End what is left of the job."""

    def running(self) -> set[int]:
        """Ranks that are known to run."""
        return set()


class _LocalWatch(_Watch):
    """A job on this machine: its controller is a process here, its ranks are that one's children."""

    def ended(self) -> bool:
        """The job has ended, or a rank has failed and the others had their time."""
        running = self.running()
        self.started = self.started or bool(running)
        if self.job.done():
            return True
        results = self.results()
        gone = [r for r in range(self.submission.ranks(self.job)) if r not in results and r not in running]
        failed = any(state == "error" for state, _ in results.values()) or (self.started and bool(gone))
        if not failed:
            self.since = None
            return False
        self.since = self.since or time.monotonic()
        return time.monotonic() - self.since > _GRACE_S

    def stop(self) -> None:
        if not self.job.done():
            os.killpg(int(self.job.job_id), signal.SIGKILL)  # the job leads its own session and group

    def running(self) -> set[int]:
        """Ranks whose process is there."""
        ranks: set[int] = set()
        try:
            tasks = psutil.Process(int(self.job.job_id)).children()
        except psutil.NoSuchProcess:
            return ranks
        for task in tasks:
            try:
                ranks.add(int(task.environ()["SUBMITIT_LOCAL_GLOBALID"]))
            except (psutil.Error, KeyError):
                continue
        return ranks


class _SlurmWatch(_Watch):
    """A Slurm job: in the queue or not. A rank's error says nothing before that, as the job may be requeued."""

    asked_at = 0.0
    queue_state = "PENDING"

    def ended(self) -> bool:
        if time.monotonic() - self.asked_at >= _SLURM_EVERY_S or not self.asked_at:
            self.asked_at = time.monotonic()
            self.queue_state = _queue_state(str(self.job.job_id))
        if self.queue_state:
            return False
        # result files may come late over a network file system
        self.since = self.since or time.monotonic()
        complete = len(self.results()) == self.submission.ranks(self.job)
        return complete or time.monotonic() - self.since > 2 * _SLURM_EVERY_S

    def state(self) -> str:
        return f"job {self.job.job_id}: {self.queue_state.lower()}"


_WATCHES: dict[str, type[_Watch]] = {"local": _LocalWatch, "slurm": _SlurmWatch}


def _queue_state(job_id: str) -> str:
    """State of a job in Slurm's queue; empty when it is no longer there."""
    asked = subprocess.run(["squeue", "-h", "-j", job_id, "-o", "%T"], capture_output=True, text=True, check=False)
    if asked.returncode and "Invalid job id" not in asked.stderr:
        return "UNKNOWN"  # the controller does not answer; that says nothing about the job
    return asked.stdout.strip()


def _report(failure: Failure) -> int:
    """Say what failed, in one line for a refusal, else with the end of the log. Returns the exit code."""
    if failure.refusal is not None:
        print(f"error: {failure.refusal}", file=sys.stderr)
        return 2
    lines = failure.path.read_text(errors="replace").splitlines() if failure.path.is_file() else []
    how = "ended without a result (killed?)" if failure.killed else "failed"
    print(f"rank {failure.rank} {how}; last lines of {failure.path}:", file=sys.stderr)
    for line in lines[-_TAIL_LINES:]:
        print(f"  {line}", file=sys.stderr)
    return 1
