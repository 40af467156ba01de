"""What was submitted for a run directory, in its `logs/submission.json`, and what has become of that job."""

from __future__ import annotations

import getpass
import json
import socket
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import psutil

from launchers import slurm_queue
from launchers.slurm_queue import Queued
from megatron_elva.training.runs import write_atomic

_FILE = Path("logs", "submission.json")


@dataclass(frozen=True)
class Record:
    """The newest submission of a run directory.

    Attributes:
        kind: ``slurm``, ``local`` or ``debug``.
        job: Slurm's number; of a local job that of its first process, which leads its process group.
        jobs: those of the whole submission.
        command: the command line.
        code: what `snapshot.Code.about` says.
        submitted: unix time.
        host: where it was submitted, and where a local job runs.
        user: who did.
        process_started: start time of a local job's first process; its number may come again.
    """

    kind: str
    job: str
    jobs: list[str]
    command: list[str]
    code: dict[str, Any]
    submitted: float = field(default_factory=time.time)
    host: str = field(default_factory=socket.gethostname)
    user: str = field(default_factory=lambda: _user())
    process_started: float | None = None

    def write(self, run: Path) -> None:
        """Write it to a run directory; atomic."""
        path = run / _FILE
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(asdict(self), indent=1))

    @property
    def attempt_job(self) -> str:
        """What the log of attempts calls this job."""
        return {"slurm": self.job, "local": f"local-{self.job}"}.get(self.kind, "")

    @property
    def stop(self) -> str:
        """The command that ends the whole submission: ranks save and end."""
        return f"scancel {' '.join(self.jobs)}" if self.kind == "slurm" else f"kill -TERM -- -{self.job}"


def read(run: Path) -> Record | None:
    """The newest submission; None where there is none, or none that can be read."""
    try:
        found = Record(**json.loads((run / _FILE).read_text()))
    except (OSError, ValueError, TypeError):
        return None
    sound = found.kind in ("slurm", "local", "debug") and isinstance(found.job, str) and isinstance(found.jobs, list)
    return found if sound and isinstance(found.submitted, int | float) else None


def process_started(pid: int) -> float | None:
    """When a process was started; None where it is gone."""
    try:
        process = psutil.Process(pid)
        return None if process.status() == psutil.STATUS_ZOMBIE else float(process.create_time())
    except psutil.Error:
        return None


def queued(record: Record) -> Queued | bool | None:
    """Whether a job waits or runs: its state, False where it has gone, None where nobody here can say."""
    if record.kind == "slurm":
        found = slurm_queue.queued([record.job])
        return None if found is None else found.get(record.job, False)
    if record.host != socket.gethostname():
        return None
    started = process_started(int(record.job))
    same = started is not None and (record.process_started is None or abs(started - record.process_started) < 1)
    return Queued("RUNNING", "") if same else False


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):
        return "?"
