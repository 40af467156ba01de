"""When checkpoints are written, and by whom: beside training, by a process of each rank; complete at the marker."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import time
from collections import deque
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from threading import Thread
from typing import Any

import torch.distributed as dist

from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config
from megatron_elva.parallel.collectives import sum_over_ranks
from megatron_elva.parallel.engine import Engine
from megatron_elva.parallel.optimizer_state import corrected
from megatron_elva.parallel.ranks import Ranks
from megatron_elva.training import checkpoint, runs
from megatron_elva.training.torch_dist import Share, TorchDist
from megatron_elva.training.writer import File, Outcome, Writer, attempt

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass(frozen=True)
class SaveReport:
    """A checkpoint that is complete.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        seconds: from the begin of the save to the marker.
        held_s: seconds of them that training stood still.
    """

    path: Path
    step: int
    seconds: float
    held_s: float


@dataclass
class _Pending:
    """A checkpoint that is being written; `outcome` is this rank's, once it has written its files."""

    path: Path
    meta: dict[str, Any]
    needed: int
    began: float
    held: float = 0.0
    outcome: Outcome | None = None


class Saver:
    """Writes the checkpoints of a run; all ranks make one.

    With `train.checkpoint_async`, `save` copies the state and returns, and a process of its own writes it. The caller
    then adds up `progress` over the ranks now and then and hands the sums to `settle`, which completes the checkpoint.

    Args:
        engine: what is trained.
        config: of the run.
        vocab: rows of the word embedding.
        ranks: this rank.
    """

    def __init__(self, engine: Engine, config: Config, vocab: int, ranks: Ranks) -> None:
        self._engine, self._config, self._vocab, self._ranks = engine, config, vocab, ranks
        self._format = TorchDist(ranks)
        self._writer = Writer(ranks.device)
        self._pending: _Pending | None = None
        self._reports: deque[SaveReport] = deque()
        self._deleting: Thread | None = None

    def save(self, step: int, samples: int, data_state: dict[str, Any] | None, wait: bool) -> float:
        """Write a checkpoint; all ranks call it. One that is still being written is waited for and completed first.

        A step whose checkpoint is complete is not written again.

        Args:
            step: steps done.
            samples: samples drawn.
            data_state: where this rank's data stream stands; None on ranks that read nothing, or where the step says
                it all.
            wait: return when the checkpoint is complete.

        Returns:
            Seconds that training stood still.

        Raises:
            InputError: it cannot be written, on all ranks alike; nothing is left of it then.
        """
        began = time.perf_counter()
        self._wait()
        path = Path(self._config.run_dir, "checkpoints", f"step_{step}")
        background = self._config.train.checkpoint_async and not wait
        with corrected(self._engine.optimizer):
            share = self._format.share(self._state())
            if self._prepare(path, share.total):
                return time.perf_counter() - began
            meta = checkpoint.meta_of(self._config, self._vocab, step, samples)
            self._pending = _Pending(path, meta, share.total, began)
            self._pending.outcome = self._write(self._files(path, share, data_state), background)
        self._pending.held = time.perf_counter() - began
        if not background:
            self._wait()
        return time.perf_counter() - began

    def _state(self) -> dict[str, Any]:
        gc.freeze()  # megatron-core collects garbage in there, which takes longer than all the rest
        try:
            return checkpoint.state_of(self._engine, loading=False)
        finally:
            gc.unfreeze()

    def _files(self, path: Path, share: Share, data_state: dict[str, Any] | None) -> list[File]:
        files = share.files(path)
        if data_state is not None:
            files.append(File(str(path / f"data_{self._ranks.data}.json"), [json.dumps(data_state).encode()]))
        return files

    def _write(self, files: list[File], background: bool) -> Outcome | None:
        if not background or not files:
            return attempt(files)
        try:
            self._writer.submit(files)
        except OSError as error:
            return Outcome([], f"no process or memory to write with: {error.strerror}")
        return None

    def _prepare(self, path: Path, needed: int) -> bool:
        """Make the folder, if there is room for it. Returns whether the checkpoint is there and complete.

        Raises:
            InputError: it cannot be made.
        """
        found: list[Any] = [None]
        if self._ranks.rank == 0:
            try:
                found = [(runs.is_complete(path) or _make_room(path, needed), None)]
            except OSError as error:
                found = [(False, self._cannot(path, needed, os.strerror(error.errno or 0), error.errno))]
        dist.broadcast_object_list(found)
        there, problem = found[0]
        if problem is not None:
            raise InputError(problem)
        return bool(there)

    @property
    def is_pending(self) -> bool:
        """Whether a checkpoint is not complete yet; the same on all ranks."""
        return self._pending is not None

    def progress(self) -> tuple[int, int]:
        """Whether this rank still writes, and whether its writing failed, as 0 or 1; local and cheap."""
        pending = self._pending
        if pending is None:
            return 0, 0
        if pending.outcome is None:
            pending.outcome = self._writer.poll()
        return int(pending.outcome is None), int(pending.outcome is not None and pending.outcome.error is not None)

    def settle(self, writing: float, failed: float) -> SaveReport | None:
        """Complete what all ranks have written, and delete older ones; all ranks call it.

        Args:
            writing: sum over the ranks of what `progress` says first.
            failed: sum of what it says second.

        Returns:
            What has become complete since the last call; None while there is nothing, or ranks still write.

        Raises:
            InputError: a rank could not write because of its file system; the same on all ranks.
            RuntimeError: or for another reason.
        """
        if self._pending is not None and failed:
            self._give_up()
        if self._pending is not None and not writing:
            self._complete()
        return self._reports.popleft() if self._reports else None

    def close(self, wait: bool) -> SaveReport | None:
        """End the writing process.

        Args:
            wait: complete what is being written first, which all ranks must do; else it stays half-written.

        Returns:
            What has become complete; more of it by `settle(0, 0)`.
        """
        try:
            if wait:
                self._wait()
        finally:
            self._pending = None
            self._writer.close()
            self._join()
        return self._reports.popleft() if self._reports else None

    def _wait(self) -> None:
        """Complete a pending save; all ranks call it."""
        if self._pending is None:
            return
        began = time.perf_counter()
        if self._pending.outcome is None:
            self._pending.outcome = self._writer.poll(wait=True)
        self._pending.held += time.perf_counter() - began
        _, failed = sum_over_ranks(self.progress(), self._ranks)
        if failed:
            self._give_up()
        self._complete()

    def _complete(self) -> None:
        """With the files of all ranks on disk: the index, the marker, and away with what is not kept."""
        pending = self._pending
        assert pending is not None and pending.outcome is not None
        began = time.perf_counter()
        index = self._format.index(pending.outcome.extents)
        everyone: list[Any] | None = [None] * self._ranks.world if self._ranks.rank == 0 else None
        dist.gather_object(index, everyone)
        problem: list[str | None] = [None]
        if everyone is not None:
            try:
                self._format.complete(pending.path, everyone)
                for folder in (pending.path, pending.path.parent, pending.path.parent.parent):
                    runs.sync_folder(folder)
                runs.write_marker(pending.path, pending.meta)
            except OSError as error:
                why = os.strerror(error.errno or 0)
                problem = [self._cannot(pending.path, pending.needed, why, error.errno)]
                _clear(pending.path)
        dist.broadcast_object_list(problem)
        self._pending = None
        if problem[0] is not None:
            raise InputError(problem[0])
        if self._ranks.rank == 0:
            self._join()
            self._deleting = Thread(target=self._prune, name="prune")
            self._deleting.start()
        now = time.perf_counter()
        held = pending.held + now - began
        self._reports.append(SaveReport(pending.path, pending.meta["step"], now - pending.began, held))

    def _join(self) -> None:
        if self._deleting is not None:
            self._deleting.join()
            self._deleting = None

    def _prune(self) -> None:
        """Delete what is not kept, beside training: gigabytes take seconds on some file systems."""
        train = self._config.train
        with suppress(OSError):  # what is left over goes with the next one
            runs.prune(Path(self._config.run_dir), train.keep_checkpoints, train.keep_every)

    def _give_up(self) -> None:
        """A rank could not write: stop the others, remove what they wrote, and say why on all ranks."""
        pending = self._pending
        assert pending is not None
        self._writer.kill()
        self._pending = None
        outcomes: list[Any] = [None] * self._ranks.world
        dist.all_gather_object(outcomes, pending.outcome and (pending.outcome.error, pending.outcome.code))
        rank, (error, code) = next((r, o) for r, o in enumerate(outcomes) if o is not None and o[0] is not None)
        problem: list[str | None] = [None]
        if self._ranks.rank == 0:
            problem = [self._cannot(pending.path, pending.needed, f"{error} (rank {rank})", code)]
            _clear(pending.path)
        dist.broadcast_object_list(problem)
        raise (RuntimeError if code is None else InputError)(problem[0])

    def _cannot(self, path: Path, needed: int, why: str, code: int | None) -> str:
        """One line on what stands in the way of a checkpoint."""
        found = runs.checkpoints(Path(self._config.run_dir))
        last = f"the last good checkpoint is {found[-1].path}" if found else "there is no good checkpoint yet"
        if code is None:
            return f"{path}: cannot be saved: {why}; {last}"
        advice = "make room there or lower train.keep_checkpoints" if code in _FULL else "see to that disk"
        return (
            f"{path}: cannot be saved: {why}; it needs {needed} bytes and {_free(path)} are free there; {last}; "
            f"{advice}, and start the same run again"
        )


def _make_room(path: Path, needed: int) -> bool:
    """An empty folder with enough space for what is to be written; always False.

    Raises:
        OSError: there is not.
    """
    shutil.rmtree(path, ignore_errors=True)  # what a killed run left half-written
    path.mkdir(parents=True)
    if _free(path) < needed:
        path.rmdir()
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    return False


def _free(path: Path) -> int:
    """Bytes that may be written where a path is, or would be; 0 where that cannot be asked."""
    for place in (path, *path.parents):
        with suppress(OSError):
            found = os.statvfs(place)
            return found.f_bavail * found.f_frsize
    return 0


def _clear(path: Path) -> None:
    """Remove a folder that is not to count, its marker first."""
    with suppress(OSError):
        (path / runs.MARKER).unlink(missing_ok=True)
    shutil.rmtree(path, ignore_errors=True)
