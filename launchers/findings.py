"""What the files of a run directory say about trouble: errors, hangs, breaks, slow ranks, broken numbers."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median

from launchers.record import Record
from megatron_elva.training.attempts import Attempt, newest

_SLOW = 1.25
_TAIL_BYTES = 16_384


@dataclass(frozen=True)
class Findings:
    """One line each; empty where there is nothing.

    Attributes:
        error: of the last attempt that did not end as it should.
        log: where more of it stands.
        hang: what the newest hang's summary says.
        recovery: the last break.
        nonfinite: the last step that was not finite.
        slowest: the slowest rank of the last comparison.
    """

    error: str = ""
    log: str = ""
    hang: str = ""
    recovery: str = ""
    nonfinite: str = ""
    slowest: str = ""


def find(run: Path, attempts: Sequence[Attempt], failed: bool, sent: Record | None) -> Findings:
    """Look through a run directory.

    Args:
        run: the run directory.
        attempts: all starts of the run.
        failed: the run as a whole has failed, so that something is to be shown even if no rank said a word.
        sent: the newest submission.
    """
    bad = [attempt for attempt in attempts if attempt.outcome in ("failed", "hang", "lost", "refused")]
    log = _log(run, bad[-1], sent) if bad else (_any_log(run, sent) if failed else None)
    error = f"attempt {bad[-1].number}: {bad[-1].reason}" if bad else ""
    if not error and failed and log is not None:
        error = _last_line(log)
    return Findings(error, str(log or ""), _hang(run), _recovery(run), _nonfinite(run), _slowest(run))


def _log(run: Path, attempt: Attempt, sent: Record | None) -> Path | None:
    """The log of the rank that an attempt's reason names, else that of the first."""
    job = attempt.job.removeprefix("local-")
    named = re.match(r"rank (\d+)", attempt.reason)
    folders = [run / "logs", run.parent / "logs"]  # a local job of all stages has one folder of logs
    for rank in dict.fromkeys([named.group(1) if named else "0", "0"]):
        for folder in folders:
            path = folder / f"{job}_{rank}_log.err"
            if job and path.is_file():
                return path
    return _any_log(run, sent)


def _any_log(run: Path, sent: Record | None) -> Path | None:
    if sent is None:
        return None
    paths = [folder / f"{sent.job}_0_log.err" for folder in (run / "logs", run.parent / "logs")]
    return next((path for path in paths if path.is_file()), None)


def _last_line(path: Path) -> str:
    """The last line of a log that says something."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
        lines = file.read().decode(errors="replace").splitlines()
    return next((line.strip()[:300] for line in reversed(lines) if line.strip()), "")


def _hang(run: Path) -> str:
    summaries = sorted(run.glob("logs/hang_step_*/summary.json"), key=lambda path: path.stat().st_mtime)
    if not summaries:
        return ""
    try:
        reason = json.loads(summaries[-1].read_text()).get("reason", "")
    except (OSError, ValueError, AttributeError):
        reason = ""
    return f"{reason or 'stacks of all ranks'} ({summaries[-1].parent})"


def _recovery(run: Path) -> str:
    last = newest(run / "logs" / "recoveries.jsonl")
    try:
        return (
            f"{last['seconds']:.1f} s from step {last['last_step']} to step {last['step']}, "
            f"{last['done_again']} steps done again"
        )
    except (KeyError, TypeError, ValueError):
        return ""


def _nonfinite(run: Path) -> str:
    last = newest(run / "logs" / "nonfinite.jsonl")
    return f"step {last['step']} ({run / 'logs' / 'nonfinite.jsonl'})" if "step" in last else ""


def _slowest(run: Path) -> str:
    last = newest(run / "logs" / "ranks.jsonl")
    try:
        ranks = last["ranks"]
        worst = max(ranks, key=lambda rank: float(rank["own_s"]))
        usual = median(float(rank["own_s"]) for rank in ranks)
        if len(ranks) < 2 or usual <= 0 or worst["own_s"] < _SLOW * usual:
            return ""
        return (
            f"rank {worst['rank']} on {worst['host']}, {worst['own_s'] / usual:.1f} times the usual time of its own "
            f"(step {last['step']})"
        )
    except (KeyError, TypeError, ValueError):
        return ""
