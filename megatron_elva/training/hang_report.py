"""The files of a hang, on the disk that all ranks share, and the finding which rank did not arrive.

Files and not torch's store: that one lives in rank 0, which may be the rank that hangs.

- ``logs/watch/rank_R.txt``, there while a rank trains: a line that says who it is and where it last was, and behind it
  what faulthandler wrote if the rank could not run Python any more.
- ``logs/hang_step_N/rank_R.json`` and ``.txt``: a rank's report and the stacks of all its threads.
- ``logs/hang_step_N/summary.json``: what the reports say together.
"""

from __future__ import annotations

import contextlib
import faulthandler
import json
import os
import shutil
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

from megatron_elva.training.runs import write_atomic
from megatron_elva.training.stacks import standing_in_dump

SUMMARY = "summary.json"
Phase = Literal["start", "data", "step", "sums", "checkpoint", "end"]
PHASES: tuple[str, ...] = get_args(Phase)
"""In the order in which a step passes through them."""
HEADER = 512


@dataclass(frozen=True)
class Report:
    """What a rank says of itself.

    Attributes:
        rank: global rank.
        host: where it runs.
        pid: its process there.
        step: the step that it is in.
        phase: one of `PHASES`.
        in_collective: what it waits in, None outside (see `stacks.Standing`).
        where: the innermost line of its main thread that belongs to no library.
        seconds: since the step, or the phase that has a limit of its own, began.
        left_s: seconds until its own limit; below 0 when that has run out.
        moved: it had reported, and then went on.
    """

    rank: int
    host: str
    pid: int
    step: int
    phase: str
    in_collective: str | None = None
    where: str = ""
    seconds: float = 0.0
    left_s: float = 0.0
    moved: bool = False


@dataclass(frozen=True)
class Missing:
    """A rank that did not arrive: where it last was, and why it is thought to be the one."""

    rank: int
    host: str
    step: int
    phase: str
    where: str
    why: str

    def line(self) -> str:
        """For people."""
        stood = f", in {self.where}" if self.where else ""
        return f"rank {self.rank} on {self.host} ({self.why}; step {self.step}, {self.phase}{stood})"


@dataclass
class Watch:
    """What the watch file of a rank that does not answer says."""

    header: dict[str, Any] = field(default_factory=dict)
    dump: str = ""


class WatchFile:
    """A rank's line about itself, kept fresh while it trains.

    Args:
        run: the run directory.
        rank: global rank.
        attempt: the same on all ranks, another one each time the job starts.
        thread: ident of the main thread.

    Raises:
        OSError: it cannot be written.
    """

    def __init__(self, run: Path, rank: int, attempt: str, thread: int) -> None:
        self.path = watch_path(run, rank)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self.stacks = os.open(self.path, os.O_WRONLY | os.O_APPEND | os.O_SYNC)
        """Where faulthandler writes; at once on the disk, as nothing that comes later could bring it there."""
        self._about = {
            "rank": rank,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            "thread": thread,
            "attempt": attempt,
        }

    def note(self, step: int, phase: str) -> None:
        """Say where the rank is."""
        text = json.dumps({**self._about, "step": step, "phase": phase})
        os.pwrite(self._file, text.encode().ljust(HEADER - 1)[: HEADER - 1] + b"\n", 0)

    def clear(self) -> None:
        """Forget stacks that turned out to be of no hang."""
        os.ftruncate(self._file, HEADER)

    def remove(self) -> None:
        """The rank is done."""
        os.close(self._file)
        os.close(self.stacks)
        with contextlib.suppress(OSError):
            self.path.unlink()
            self.path.parent.rmdir()


def watch_path(run: Path, rank: int) -> Path:
    """The watch file of a rank."""
    return run / "logs" / "watch" / f"rank_{rank}.txt"


def read_watch(run: Path, rank: int, attempt: str) -> Watch:
    """What a rank's watch file says; empty where it says nothing of this attempt."""
    try:
        data = watch_path(run, rank).read_bytes()
        header = json.loads(data[:HEADER])
        if header["attempt"] == attempt:
            return Watch(header, data[HEADER:].decode(errors="replace"))
    except (OSError, ValueError, KeyError, TypeError):
        pass
    return Watch()


class HangFolder:
    """The folder ``logs/hang_step_N`` of this attempt, which the ranks that hang share.

    Args:
        run: the run directory.
        attempt: as above.
        step: names the folder, unless a rank of this attempt was there before.

    Raises:
        OSError: it cannot be made.
    """

    def __init__(self, run: Path, attempt: str, step: int) -> None:
        self.run, self.attempt = run, attempt
        found = find_folder(run, attempt)
        self.path = found or self._make(run / "logs" / f"hang_step_{step}")

    def _make(self, path: Path) -> Path:
        """Bring the folder there with its mark in it; what an earlier attempt left at the same step makes way."""
        part = path.with_name(f".{path.name}.{socket.gethostname()}.{os.getpid()}")
        part.mkdir(parents=True)
        try:
            (part / "attempt").write_text(self.attempt)
            for number in range(1, 1000):
                with contextlib.suppress(OSError):
                    part.rename(path)
                    return path
                if _attempt_of(path) == self.attempt:  # another rank was quicker
                    return path
                with contextlib.suppress(OSError):
                    path.rename(path.with_name(f"{path.name}_before_{number}"))
            raise OSError(f"{path}: cannot be made")
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def write(self, report: Report) -> None:
        """Write or freshen a report. A file made in a folder also makes NFS look at the folder anew."""
        write_atomic(self.path / f"rank_{report.rank}.json", json.dumps(asdict(report), indent=1))

    def dump(self, rank: int) -> None:
        """Write the stacks of all threads of this process."""
        with (self.path / f"rank_{rank}.txt").open("w") as f:
            faulthandler.dump_traceback(f, all_threads=True)

    def reporting(self) -> list[int]:
        """Ranks that have reported."""
        return sorted({number for number, _ in self._reports()})

    def reports(self) -> dict[int, Report]:
        """All reports."""
        found: dict[int, Report] = {}
        for rank, path in self._reports():
            with contextlib.suppress(OSError, ValueError, TypeError):
                report = Report(**json.loads(path.read_text()))
                if rank not in found or not report.moved:
                    found[rank] = report
        return found

    def _reports(self) -> list[tuple[int, Path]]:
        """Also from the folder that a rank has made at the same moment which is in another step."""
        paths = [p for folder in folders(self.run, self.attempt) for p in folder.glob("rank_*.json")]
        numbers = [(p.stem.removeprefix("rank_"), p) for p in paths]
        return [(int(number), p) for number, p in numbers if number.isdigit()]

    @property
    def is_decided(self) -> bool:
        """Whether a rank has written the summary."""
        return any((folder / SUMMARY).is_file() for folder in folders(self.run, self.attempt))

    def leave(self, rank: int) -> None:
        """Take back a report; the last one takes the folder along."""
        for name in (f"rank_{rank}.json", f"rank_{rank}.txt"):
            (self.path / name).unlink(missing_ok=True)
        if [p.name for p in self.path.iterdir()] == ["attempt"]:
            with contextlib.suppress(OSError):
                (self.path / "attempt").unlink()
                self.path.rmdir()

    def collect(self, silent: Sequence[int]) -> None:
        """Bring everything here, the watch files of silent ranks too: what faulthandler writes later comes along."""
        moves = [(watch_path(self.run, rank), f"rank_{rank}.txt") for rank in silent]
        others = [folder for folder in folders(self.run, self.attempt) if folder != self.path]
        moves += [(path, path.name) for folder in others for path in folder.glob("rank_*")]
        for path, name in moves:
            with contextlib.suppress(OSError):
                path.rename(self.path / name)
        for folder in others:
            shutil.rmtree(folder, ignore_errors=True)


def _attempt_of(folder: Path) -> str | None:
    try:
        return (folder / "attempt").read_text()
    except OSError:
        return None


def folders(run: Path, attempt: str) -> list[Path]:
    """The hang folders of an attempt."""
    return [path for path in sorted((run / "logs").glob("hang_step_*")) if _attempt_of(path) == attempt]


def forget(run: Path, attempt: str) -> None:
    """At a start: hang folders that are there already belong to an earlier one, even if that had the same name."""
    for path in folders(run, attempt):
        write_atomic(path / "attempt", f"before {attempt}")


def find_folder(run: Path, attempt: str) -> Path | None:
    """The hang folder of an attempt in which some rank still hangs, None where there is none."""
    for path in folders(run, attempt):
        for report in path.glob("rank_*.json"):
            with contextlib.suppress(OSError, ValueError):
                if not json.loads(report.read_text()).get("moved"):
                    return path
    return None


def missing_ranks(reports: Mapping[int, Report], watches: Mapping[int, Watch], world: int) -> list[Missing]:
    """The ranks that did not arrive.

    Those that do not answer; else those outside of collectives that are furthest behind; else, as all wait for
    somebody, those that are behind. Empty when all wait alike, as for GPUs of which one hangs. With GPUs a rank that
    waits may also stand at a line that launches a kernel, when too many are queued, and be named beside the one that
    did not arrive: the stacks of all tell.

    Args:
        reports: by rank.
        watches: what is known of the ranks that have not reported.
        world: number of ranks.
    """
    silent = [rank for rank in range(world) if rank not in reports]
    if silent:
        return [_silent(rank, watches.get(rank, Watch())) for rank in silent]
    outside = [r for r in reports.values() if r.in_collective is None]
    some = outside or list(reports.values())
    progress = {r.rank: (r.step, PHASES.index(r.phase)) for r in some}
    behind = [r for r in some if progress[r.rank] == min(progress.values())]
    if not outside and len(behind) == world:
        return []
    why = "not in a collective" if outside else "behind the others"
    return [Missing(r.rank, r.host, r.step, r.phase, _stood(r), why) for r in behind]


def _stood(report: Report) -> str:
    return f"{report.in_collective} of {report.where}" if report.in_collective else report.where


def _silent(rank: int, watch: Watch) -> Missing:
    header = watch.header
    host = str(header.get("host", "an unknown host"))
    where = standing_in_dump(watch.dump, int(header.get("thread", 0))) or ""
    why = "does not answer, blocked in C code that holds the GIL" if where else _state(host, header.get("pid"))
    return Missing(rank, host, int(header.get("step", 0)), str(header.get("phase", "start")), where, why)


def _state(host: str, pid: int | None) -> str:
    """What the kernel says of a process of this host."""
    if pid is None or host != socket.gethostname():
        return "does not answer"
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        return "its process is gone"
    return {"T": "its process is stopped", "t": "its process is stopped", "Z": "its process has ended"}.get(
        state, f"does not answer, process state {state}"
    )


def summarise(folder: HangFolder, reports: Mapping[int, Report], world: int, step: int, limit: str) -> str:
    """Write the summary. Returns its reason, in one line.

    Args:
        folder: of this hang.
        reports: by rank.
        world: number of ranks.
        step: in which the deciding rank is.
        limit: what ran out, as text.
    """
    watches = {r: read_watch(folder.run, r, folder.attempt) for r in range(world) if r not in reports}
    missing = missing_ranks(reports, watches, world)
    if missing:
        who = "; ".join(m.line() for m in missing[:8]) + (f" and {len(missing) - 8} more" if len(missing) > 8 else "")
        reason = f"hang in step {step}, {limit}: did not arrive: {who}"
    else:
        waits = sorted({_stood(r) for r in reports.values()})
        reason = f"hang in step {step}, {limit}: all ranks wait in collectives: {'; '.join(waits)}"
    summary = {
        "step": step,
        "attempt": folder.attempt,
        "time": time.time(),
        "reason": reason,
        "missing": [asdict(m) for m in missing],
        "ranks": [asdict(r) for _, r in sorted(reports.items())],
    }
    # two ranks may decide at once where the lowest is slow
    write_atomic(folder.path / SUMMARY, json.dumps(summary, indent=1), f".{socket.gethostname()}.{os.getpid()}")
    folder.collect(sorted(watches))
    return reason
