"""What cannot run, said before it is submitted."""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path

from launchers import record, slurm_queue
from launchers.progress import duration
from launchers.tokenizer import tokenizer_size
from megatron_elva.config.errors import InputError, did_you_mean
from megatron_elva.config.schema import Config
from megatron_elva.training import estimate

_IMAGE_FILES = (".sqsh", ".squashfs", ".sif")


def problems(configs: Sequence[Config]) -> list[list[str]]:
    """What keeps each stage of a submission from running, one line each; what files are missing is told elsewhere."""
    where = _partition_problems(configs[0]) if configs[0].cluster.kind == "slurm" else []
    return [
        [*_memory(config), *_run_dir(config), *_container(config), *_other_job(config), *(where if i == 0 else [])]
        for i, config in enumerate(configs)
    ]


def refuse(configs: Sequence[Config]) -> None:
    """Refuse a submission that cannot run.

    Raises:
        InputError: one line for the first problem, with the number of others.
    """
    found = [
        f"stage {config.stage.id}: {line}" if len(configs) > 1 else line
        for config, lines in zip(configs, problems(configs), strict=True)
        for line in lines
    ]
    if found:
        others = f" (and {len(found) - 1} more; dry_run=true lists them)" if len(found) > 1 else ""
        raise InputError(found[0] + others)


def refuse_other_jobs(configs: Sequence[Config]) -> None:
    """Refuse run directories of jobs that wait or run.

    Raises:
        InputError: one line for the first.
    """
    for line in [line for config in configs for line in _other_job(config)]:
        raise InputError(line)


def _memory(config: Config) -> list[str]:
    """The estimate is rough: a configuration near the limit may run out of memory, one above it may still run."""
    if config.device != "cuda":
        return []
    vocab = estimate.vocabulary(config.model, tokenizer_size(config.data.tokenizer or config.init_from))
    need, have = estimate.memory_estimate(config, vocab or 0).total / 1e9, config.cluster.gpu_memory_gb
    if need <= have:
        return []
    smaller = [] if config.train.recompute else ["train.recompute=true"]
    smaller.append("more train.accumulate (smaller packs)" if config.data.pack_tokens is None else "data.pack_tokens")
    smaller.append("parallel.tensor or parallel.pipeline")
    return [
        f"cluster.gpu_memory_gb={have:g}: a GPU would need about {need:.0f} GB (1e9 bytes; a rough estimate); set "
        f"{', '.join(smaller)}, or overrule this with cluster.gpu_memory_gb={need + 1:.0f}"
    ]


def _run_dir(config: Config) -> list[str]:
    path = Path(config.run_dir).absolute()
    if config.cluster.kind == "slurm" and "%" in str(path):
        return [f"run_dir={config.run_dir}: Slurm reads % as the beginning of a code there; name another folder"]
    there = next(folder for folder in (path, *path.parents) if folder.exists())
    if not there.is_dir():
        return [f"run_dir={config.run_dir}: {there} is a file; name a folder"]
    if not os.access(there, os.W_OK | os.X_OK):
        return [f"run_dir={config.run_dir}: you may not write to {there}; name another folder"]
    return []


def _container(config: Config) -> list[str]:
    image = config.cluster.container_image
    if image is None or config.cluster.kind != "slurm":
        return []
    if "://" in image:
        return [
            f"cluster.container_image={image}: pyxis takes REGISTRY#IMAGE:TAG or the path of a squashfs file, without "
            f"{image.partition('://')[0]}://"
        ]
    if image.endswith(_IMAGE_FILES) and not image.startswith(("/", "./")):
        return [f"cluster.container_image={image}: pyxis takes a path only with / or ./ in front: ./{image}"]
    return []


def _other_job(config: Config) -> list[str]:
    """Another job would train in the same run directory, or wait for its lock and fail."""
    before = record.read(Path(config.run_dir))
    state = record.queued(before) if before is not None else False
    if before is None or not isinstance(state, slurm_queue.Queued):
        return []
    since = duration(time.time() - before.submitted)
    return [
        f"run_dir={config.run_dir}: job {before.job} of {since} ago is still there ({state.text}); end it with "
        f"{before.stop}, or name another run_dir"
    ]


def _partition_problems(config: Config) -> list[str]:
    known = slurm_queue.partitions()
    if not known:
        return []
    wanted = config.cluster.partition
    if wanted is None:
        chosen = [partition for partition in known if partition.default]
    else:
        names = [partition.name for partition in known]
        for name in wanted.split(","):
            if name not in names:
                hint = did_you_mean(name, names) or f" (there are {', '.join(names)})"
                return [f"cluster.partition={wanted}: no such partition{hint}"]
        chosen = [partition for partition in known if partition.name in wanted.split(",")]
    if not chosen:
        return []
    out = []
    most = max(partition.nodes for partition in chosen)
    named = "/".join(partition.name for partition in chosen)
    if config.nodes > most:
        out.append(f"nodes={config.nodes}: partition {named} has {most}")
    limits = [partition.limit_min for partition in chosen if partition.limit_min is not None]
    if len(limits) == len(chosen) and config.cluster.time_min > max(limits):
        out.append(f"cluster.time_min={config.cluster.time_min}: partition {named} allows {max(limits)} minutes")
    return out
