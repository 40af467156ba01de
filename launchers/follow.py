"""Stay with a job: show how far it is, and when a rank fails say which one and why."""

from __future__ import annotations

import os
import pickle
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import psutil

from launchers import slurm_queue
from launchers.executors import Submission
from launchers.job import LOST_PEER
from launchers.progress import Display, progress_line
from launchers.slurm_queue import Queued
from launchers.status import status, text
from megatron_elva.training import attempts
from megatron_elva.training.attempts import Attempt

_TAIL_LINES = 25
_SLURM_EVERY_S = 10.0
_GRACE_S = 5.0
"""How long the other ranks get after a failure: the one that failed first may not be the one that reported first."""


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


def follow(submission: Submission, out: TextIO | None = None, every_s: float = 0.5) -> int:
    """Show progress until the last job ends.

    Args:
        submission: what `submit` returned.
        out: where to; standard output by default.
        every_s: seconds between looks.

    Returns:
        The exit code: 0 when all is done or the user left with Ctrl-C, 1 when a rank failed or somebody ended the job,
        2 when it refused its configuration or input.
    """
    display = Display(out or sys.stdout)
    display.show("waiting for the first step (Ctrl-C leaves, the job goes on)")
    try:
        for job in submission.jobs:
            watch = _WATCHES[submission.kind](submission, job)
            while not watch.ended():
                state = watch.waits() or _with_start(progress_line(submission.configs, submission.started), watch)
                if state:
                    display.show(state)
                time.sleep(every_s)
            code = watch.judge(display)
            if code:
                return code
    except KeyboardInterrupt:
        display.end(display.shown)
        print(f"the job goes on; stop it with: {how_to_stop(submission)}", file=display.out)
        return 0
    display.end(progress_line(submission.configs, submission.started) or "no step was done")
    print(f"done: {submission.run_dir}", file=display.out)
    return 0


def how_to_stop(submission: Submission) -> str:
    """The command that ends the jobs; their ranks save first."""
    ids = " ".join(str(job.job_id) for job in submission.jobs)
    # a local job's number is its process group; submitit's controller passes TERM on and waits for its ranks
    return f"kill -TERM -- -{ids}" if submission.kind == "local" else f"scancel {ids}"


def _with_start(line: str | None, watch: _Watch) -> str | None:
    """Progress, and how often the job has been started where that is more than once."""
    starts = len(watch.attempts())
    return f"{line}  (start {starts})" if line and starts > 1 else line


@dataclass
class _Watch:
    """One job as seen from outside."""

    submission: Submission
    job: Any
    started: bool = False
    since: float | None = None

    def waits(self) -> str | None:
        """What to show instead of progress, while the job waits."""
        return None

    def attempts(self) -> list[Attempt]:
        """The starts of this job in the run directory where it was last."""
        name = str(self.job.job_id) if self.submission.kind == "slurm" else f"local-{self.job.job_id}"
        found = [[a for a in attempts.read(run) if a.job == name] for run in self.submission.folders(self.job)]
        return next((own for own in reversed(found) if own), [])

    def judge(self, display: Display) -> int:
        """Say how the job ended, where not as it should. Returns the exit code."""
        tried = self.attempts()
        outcome = tried[-1].outcome if tried else None
        failure = self.failure() if outcome != "done" else None
        if failure is None and outcome in (None, "done"):
            return 0
        display.end(progress_line(self.submission.configs, self.submission.started) or "no step was done")
        self.stop()
        if outcome == "refused":
            print(f"error: {tried[-1].reason}", file=sys.stderr)
            return 2
        if outcome in ("stopped", "requeue"):
            print(f"{outcome}: {tried[-1].reason}", file=sys.stderr)
            return 1
        if outcome == "hang" or failure is None:
            print(f"{outcome}: {tried[-1].reason}", file=sys.stderr)
            return 1
        return _report(failure)

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
        errors = [r for r in errors if not any(echo in results[r][1] for echo in LOST_PEER)] or errors
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
        tried = self.attempts()
        if tried and tried[-1].outcome in ("done", "stopped", "requeue"):
            return False  # ranks leave one by one, the first waits for the tracking
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
    seen: Queued | None = None

    def ended(self) -> bool:
        if time.monotonic() - self.asked_at < _SLURM_EVERY_S and self.asked_at:
            return False
        self.asked_at = time.monotonic()
        name = str(self.job.job_id)
        found = slurm_queue.queued([name])
        if found is None:
            self.seen = Queued("UNKNOWN", "Slurm does not answer")
            return False
        self.seen = found.get(name)
        if self.seen is not None:
            self.since = None
            return False
        # what the job has written may come late over a network file system
        self.since = self.since or time.monotonic()
        return status(self.run).state in ("done", "stopped") or time.monotonic() - self.since > 2 * _SLURM_EVERY_S

    def waits(self) -> str | None:
        """While it does not run: why. A requeued job is one that waits again."""
        if self.seen is None or self.seen.state == "RUNNING":
            return None
        starts = len(self.attempts())
        again = f"  (start {starts + 1} to come)" if starts else ""
        return f"job {self.job.job_id}: {self.seen.text}{again}"

    def judge(self, display: Display) -> int:
        found = status(self.run)
        if found.state == "done":
            return 0
        display.end(progress_line(self.submission.configs, self.submission.started) or "no step was done")
        print(text(found), file=sys.stderr)
        refused = bool(found.attempts) and found.attempts[-1].outcome == "refused"
        return 2 if refused else 1

    @property
    def run(self) -> Path:
        """The stage's run directory."""
        return self.submission.folders(self.job)[0]


_WATCHES: dict[str, type[_Watch]] = {"local": _LocalWatch, "slurm": _SlurmWatch}


def _report(failure: Failure) -> int:
    """Say what failed, with the end of its log. Returns the exit code."""
    lines = failure.path.read_text(errors="replace").splitlines() if failure.path.is_file() else []
    how = "ended without a result (killed?)" if failure.killed else "failed"
    print(f"rank {failure.rank} {how}; last lines of {failure.path}:", file=sys.stderr)
    for line in lines[-_TAIL_LINES:]:
        print(f"  {line}", file=sys.stderr)
    return 1
