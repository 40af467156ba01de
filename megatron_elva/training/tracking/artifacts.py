"""Which files of a run directory are uploaded, and where they stand on the run's page."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

from megatron_elva.training.tracking.about import diff_file
from megatron_elva.training.tracking.state import FOLDER

EXPORT = "hf"
"""Folder of the run directory for weights in Hugging Face's form; uploaded as a whole once its config is there."""

_ALONE = ("config.yaml", "metrics.meta.json", "evaluation.json", "answers.jsonl", f"{FOLDER}/loss.png")
_ANSWERS = "answers"
_QUIET_S = 30.0


def files(run: Path, at_work: bool) -> Iterator[tuple[Path, str | None]]:
    """The files to upload, each with its folder on the page (None: the top).

    Args:
        run: the run directory.
        at_work: others may be writing; an export that has changed lately is then left for later.
    """
    for name in _ALONE:
        if (run / name).is_file():
            yield run / name, None
    diff = diff_file(run)
    if diff is not None:
        yield diff, None
    for path in sorted((run / _ANSWERS).glob("step_*.*")):
        yield path, _ANSWERS
    export = [path for path in sorted((run / EXPORT).rglob("*")) if path.is_file()]
    if (run / EXPORT / "config.json").is_file() and not (at_work and _is_young(export)):
        for path in export:
            yield path, path.parent.relative_to(run).as_posix()


def stamp(path: Path) -> list[int]:
    """What tells whether a file is still the one that was uploaded."""
    found = path.stat()
    return [found.st_mtime_ns, found.st_size]


def _is_young(paths: list[Path]) -> bool:
    return max(path.stat().st_mtime for path in paths) > time.time() - _QUIET_S
