"""Run directories: where things lie in them, and which checkpoint of a run counts.

A run directory holds `config.yaml`, `metrics.jsonl`, `tokenizer/`, `logs/` and `checkpoints/step_N/`. A checkpoint is
complete once its marker, written last, is there; without it nothing here ever returns it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config, ModelConfig

MARKER = "complete.json"
METRICS = "metrics.jsonl"
_SHAPE_FIELDS = ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "tied_head", "patch_size", "patch_width",
                 "patch_heads", "cell_reduction", "patch_embedding")  # fmt: skip


@dataclass(frozen=True)
class Checkpoint:
    """A complete checkpoint.

    Attributes:
        path: its folder.
        step: optimizer steps done.
        meta: what the marker says: ``step``, ``samples``, ``stage``, ``vocab``, ``model``.
    """

    path: Path
    step: int
    meta: dict[str, Any]

    @property
    def run(self) -> Path:
        """The run directory."""
        return self.path.parent.parent


def checkpoints(run: Path) -> list[Checkpoint]:
    """The complete checkpoints of a run directory, oldest first."""
    found = [_read(marker.parent) for marker in run.glob(f"checkpoints/step_*/{MARKER}")]
    return sorted((c for c in found if c is not None), key=lambda c: c.step)


def _read(path: Path) -> Checkpoint | None:
    """The checkpoint in a folder; None where the marker is missing or torn."""
    try:
        meta = json.loads((path / MARKER).read_text())
        return Checkpoint(path, int(meta["step"]), meta)
    except (OSError, ValueError, KeyError, TypeError):
        return None


def stage_runs(folder: Path) -> list[Path]:
    """The stage directories of a ``stage=all`` run in order, or the folder itself."""
    stages = sorted(folder.glob("stage_[0-9]"))
    return stages or [folder]


def latest(folder: str | Path) -> Checkpoint:
    """The newest complete checkpoint of a run, of the last stage of a ``stage=all`` run, or of a checkpoint folder.

    Raises:
        InputError: there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder}: no such run directory")
    if (folder / MARKER).is_file():
        checkpoint = _read(folder)
        if checkpoint is None:
            raise InputError(f"{folder}: its {MARKER} is torn, so the checkpoint is not complete")
        return checkpoint
    for run in reversed(stage_runs(folder)):
        found = checkpoints(run)
        if found:
            return found[-1]
    raise InputError(f"{folder}: holds no complete checkpoint (looked for checkpoints/step_*/{MARKER})")


def tokenizer_folder(folder: str | Path) -> Path | None:
    """The folder with the tokenizer's files: the given one, or that of a run, of its stages or of its checkpoint."""
    folder = Path(folder)
    runs = [folder, *reversed(stage_runs(folder)), folder.parent.parent]
    for place in [folder, *(run / "tokenizer" for run in runs)]:
        if any((place / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json")):
            return place
    return None


def check_resumable(config: Config) -> None:
    """Refuse a config that cannot go on from what its run directory holds, before anything there is touched.

    Raises:
        ConfigError: another model, or steps of another size: samples would be skipped or read twice.
        InputError: the run directory is a file.
    """
    run = Path(config.run_dir)
    if run.exists() and not run.is_dir():
        raise InputError(f"run_dir={run}: is a file; name a folder")
    found = checkpoints(run)
    if not found:
        return
    meta = found[-1].meta
    check_shapes(meta["model"], config.model, f"run_dir={run}")
    own, saved = config.train.global_batch, meta.get("global_batch")
    if saved is not None and saved != own:
        raise ConfigError(
            f"train.global_batch={own}: run_dir={run} was trained with {saved}, so samples would be skipped or read "
            f"twice; set train.global_batch={saved}, or another run_dir with init_from={run}"
        )
    budget = config.data.pack_tokens
    if (budget is None) != (meta.get("pack_tokens") is None):
        raise ConfigError(
            f"data.pack_tokens={'null' if budget is None else budget}: run_dir={run} was trained with "
            f"{meta.get('pack_tokens') or 'null'}, which puts the samples in another order; set that, or another "
            f"run_dir with init_from={run}"
        )


def check_shapes(
    saved: dict[str, Any], model: ModelConfig, source: str, fields: tuple[str, ...] = _SHAPE_FIELDS
) -> None:
    """Refuse weights of another model in one line.

    Raises:
        ConfigError: names the first field that differs.
    """
    for field in fields:
        if saved.get(field) != getattr(model, field):
            raise ConfigError(
                f"model.{field}={getattr(model, field)}: {source} holds a model with {field}={saved.get(field)}; "
                f"set model.{field}={saved.get(field)} or name another checkpoint"
            )


class RunLock:
    """Held by the first rank of a job while it trains in a run directory; the file names its process group.

    Where the file system has no locks, nothing is held and nothing refused.

    Raises:
        InputError: another job holds it.
    """

    def __init__(self, run: Path) -> None:
        path = run / "logs" / "lock"
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._file.seek(0)
            group = self._file.read().strip()
            self._file.close()
            raise InputError(
                f"run_dir={run}: a job is training there (stop it with: kill -TERM -- -{group})"
            ) from error
        except OSError:
            return
        self._file.truncate(0)
        self._file.write(str(os.getpgrp()))
        self._file.flush()

    def release(self) -> None:
        """Let go."""
        self._file.close()


def check_unlocked(run: Path) -> None:
    """Refuse a run directory in which a job trains.

    Raises:
        InputError: there is one.
    """
    if (run / "logs" / "lock").is_file():
        RunLock(run).release()


def is_complete(path: Path) -> bool:
    """Whether a folder holds a complete checkpoint."""
    return _read(path) is not None


def write_marker(path: Path, meta: dict[str, Any]) -> None:
    """Declare a checkpoint complete; atomic."""
    write_atomic(path / MARKER, json.dumps(meta, indent=1))


def prune(run: Path, keep: int, keep_every: int = 0) -> None:
    """Delete older checkpoints, marker first, and what was left half-written before the newest complete one.

    Args:
        run: the run directory.
        keep: complete checkpoints that stay, the newest; 0 keeps all.
        keep_every: those at multiples of this many steps stay besides; 0: none do.
    """
    found = checkpoints(run)
    if not found:
        return
    for old in found[:-keep] if keep else []:
        if not keep_every or old.step % keep_every:
            (old.path / MARKER).unlink()
            shutil.rmtree(old.path, ignore_errors=True)
    for path in run.glob("checkpoints/step_*"):
        step = path.name.removeprefix("step_")
        if step.isdecimal() and int(step) < found[-1].step and not is_complete(path):
            shutil.rmtree(path, ignore_errors=True)


def write_atomic(path: Path, text: str, writer: str = "") -> None:
    """Write a file that is either there as a whole or not at all, also after a power cut.

    Args:
        path: of the file.
        text: what is to stand in it.
        writer: names this process where several may write the file at a time; the last one's stays.
    """
    part = path.with_name(f".{path.name}{writer}.part")
    with part.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)
    sync_folder(path.parent)


def sync_folder(folder: str | Path) -> None:
    """Put the names in a folder on disk, where its file system can do that."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EBADF, errno.ENOTSUP):
            raise
    finally:
        os.close(handle)
