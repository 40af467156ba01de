"""Run directories: where things lie in them, and which checkpoint of a run counts.

A run directory holds `config.yaml`, `metrics.jsonl`, `tokenizer/`, `logs/` and `checkpoints/step_N/`. A checkpoint is
complete once its marker, written last, is there; without it nothing here ever returns it.
"""

from __future__ import annotations

import json
import os
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron_elva.config.errors import InputError

MARKER = "complete.json"
METRICS = "metrics.jsonl"


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


def write_marker(path: Path, meta: dict[str, Any]) -> None:
    """Declare a checkpoint complete; atomic."""
    _write_atomic(path / MARKER, json.dumps(meta, indent=1))


def prune(run: Path, keep: int) -> None:
    """Delete all but the newest `keep` complete checkpoints (0 keeps all), marker first."""
    for old in checkpoints(run)[:-keep] if keep else []:
        (old.path / MARKER).unlink()
        shutil.rmtree(old.path, ignore_errors=True)


def _write_atomic(path: Path, text: str) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w") as f:
        f.write(text)
        f.flush()
        os.fsync(f.fileno())
    part.replace(path)
