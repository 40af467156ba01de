"""Whether the files that a config names are there."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config


def file_problems(config: Config, coming: Collection[str] = ()) -> list[str]:
    """Files that the config names and that are not there, one line each.

    Args:
        config: a valid config.
        coming: run directories that earlier stages of the same submission will have made by then.
    """
    problems = []
    for name in config.stage.blend:
        for pattern in config.data.sources[name].shards:
            if not _matches(pattern):
                problems.append(f"data.sources.{name}.shards={pattern}: no such file")
    if config.data.tokenizer is not None and not Path(config.data.tokenizer).is_dir():
        problems.append(f"data.tokenizer={config.data.tokenizer}: no such folder")
    if config.data.tokenizer is None and config.init_from is None:
        problems.append("data.tokenizer=null: give a tokenizer's folder, or init_from a run or a Hugging Face folder")
    if config.init_from is not None and config.init_from not in coming and not Path(config.init_from).is_dir():
        problems.append(f"init_from={config.init_from}: no such folder; must be a run or a Hugging Face folder")
    return problems


def check_files(config: Config, coming: Collection[str] = ()) -> None:
    """Refuse a config whose files are missing.

    Args:
        config: a valid config.
        coming: run directories that earlier stages of the same submission will have made by then.

    Raises:
        InputError: one line for the first problem, with the number of others.
    """
    problems = file_problems(config, coming)
    if problems:
        others = f" (and {len(problems) - 1} more; dry_run=true lists them)" if len(problems) > 1 else ""
        raise InputError(problems[0] + others)


def _matches(pattern: str) -> bool:
    """Whether a path or glob, absolute or not, matches something."""
    path = Path(pattern).expanduser()
    base = Path(path.anchor)
    return any(base.glob(str(path.relative_to(base))))
