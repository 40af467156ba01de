"""Whether the files that a config names are there."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from dali_pipelines import storage
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
            why = _shard_problem(pattern)
            if why:
                problems.append(f"data.sources.{name}.shards={pattern}: {why}")
    if config.data.tokenizer is not None and not Path(config.data.tokenizer).is_dir():
        problems.append(f"data.tokenizer={config.data.tokenizer}: no such folder")
    if config.data.tokenizer is None and config.init_from is None:
        problems.append("data.tokenizer=null: give a tokenizer's folder, or init_from a run or a Hugging Face folder")
    if config.init_from is not None and config.init_from not in coming and not Path(config.init_from).is_dir():
        problems.append(f"init_from={config.init_from}: no such folder; must be a run or a Hugging Face folder")
    if config.data.quarantine is not None and not Path(config.data.quarantine).is_file():
        problems.append(f"data.quarantine={config.data.quarantine}: no such file; null: the run's own list alone")
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


def _shard_problem(pattern: str) -> str:
    """What is wrong with a path, glob or URL of shards, or an empty text.

    Of URLs only the form is checked: the machine that submits a job may have no way to the bucket.
    """
    if storage.is_url(pattern):
        return storage.url_fault(pattern) or ""
    try:
        names = [pattern] if _matches(pattern) else storage.expand(pattern)
    except InputError as error:
        return str(error)
    missing = [name for name in names if not _matches(name)]
    if not missing:
        return ""
    return "no such file" if len(names) == 1 else f"no such file: {missing[0]}"


def _matches(pattern: str) -> bool:
    """Whether a path or glob, absolute or not, matches something."""
    path = Path(pattern).expanduser()
    base = Path(path.anchor)
    return any(base.glob(str(path.relative_to(base))))
