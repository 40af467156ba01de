"""Rules for single values: allowed words and ranges of numbers. Errors name key, value and what is allowed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NoReturn

from dali_pipelines.options import FITS, SAMPLINGS
from megatron_elva.config.errors import ConfigError, did_you_mean
from megatron_elva.config.schema import Config

_CHOICES: dict[str, Sequence[Any]] = {
    "device": ("cuda", "cpu"),
    "layers": ("auto", "local", "te"),
    "cluster.kind": ("slurm", "local", "debug"),
    "model.patch_embedding": ("cross_attention", "naive"),
    "model.attention_mask": ("causal", "frame_bidirectional"),
    "model.positions": ("1d", "thw"),
    "parallel.carrier": ("rows", "fixed"),
    "data.fit": FITS,
    "data.sampling": SAMPLINGS,
    "data.decoder": ("auto", "pyav", "dali"),
    "merging.kind": ("none", "pooling", "hierarchical"),
    "merging.survivor": ("first", "last"),
    "precision.dtype": ("fp32", "bf16"),
    "precision.fp8": (None, "delayed", "current", "blockwise"),
    "fault.nonfinite": ("skip", "stop"),
    "stage.id": (1, 2, 3),
}

_POSITIVE = (
    "nodes",
    "tasks_per_node",
    "model.layers",
    "model.hidden",
    "model.ffn_hidden",
    "model.heads",
    "model.kv_heads",
    "model.vocab_size",
    "model.max_position",
    "model.patch_size",
    "model.patch_width",
    "model.patch_heads",
    "model.cell_reduction",
    "model.rope_theta",
    "model.norm_eps",
    "model.init_std",
    "parallel.tensor",
    "parallel.pipeline",
    "parallel.virtual_pipeline",
    "parallel.carrier_tokens",
    "data.frames",
    "data.max_pixels",
    "data.pack_tokens",
    "data.max_text_tokens",
    "data.prefetch",
    "data.max_source_pixels",
    "data.max_source_frames",
    "data.max_source_mb",
    "data.max_source_seconds",
    "data.rate",
    "data.clip_seconds",
    "data.pack_text_tokens",
    "data.pack_buffer",
    "data.decode_timeout_s",
    "merging.pooling.window",
    "train.steps",
    "train.global_batch",
    "train.accumulate",
    "train.checkpoint_every",
    "train.log_every",
    "train.eps",
    "cluster.time_min",
    "cluster.cpus_per_task",
    "cluster.gpu_memory_gb",
    "fault.step_timeout_s",
    "fault.start_timeout_s",
    "fault.collective_timeout_s",
    "fault.max_nonfinite",
    "fault.straggler_ratio",
    "fault.same_step",
    "tracking.answers",
)
_NOT_NEGATIVE = (
    "seed",
    "data.workers",
    "data.cache_mb",
    "train.lr",
    "train.lr_patch_embedding",
    "train.warmup_steps",
    "train.weight_decay",
    "train.clip_grad",
    "train.keep_checkpoints",
    "train.keep_every",
    "cluster.signal_s",
    "fault.straggler_every",
    "tracking.system_every_s",
    "tracking.answers_every",
    "tracking.flush_s",
)
_SHARES = ("stage.frozen_share", "train.lr_min_share", "train.hold_share", "data.max_bad_share")


def get(config: Config, key: str) -> Any:
    """The value of a key with dots."""
    value: Any = config
    for name in key.split("."):
        value = getattr(value, name)
    return value


def shown(value: Any) -> str:
    """A value as it is written in a config."""
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else str(value)


def refuse(config: Config, key: str, why: str) -> NoReturn:
    """Raise the `ConfigError` that names a key, its value and what is allowed."""
    raise ConfigError(f"{key}={shown(get(config, key))}: {why}")


def divides(config: Config, key: str, by: str) -> None:
    """Refuse a key whose value is not a multiple of another's."""
    if get(config, key) % get(config, by):
        refuse(config, key, f"must be divisible by {by}={get(config, by)}")


def check_choices(config: Config) -> None:
    """Refuse words that are none of the allowed ones."""
    for key, allowed in _CHOICES.items():
        if get(config, key) not in allowed:
            names = ", ".join("null" if a is None else str(a) for a in allowed)
            refuse(config, key, f"allowed: {names}{did_you_mean(str(get(config, key)), map(str, allowed))}")


def check_ranges(config: Config) -> None:
    """Refuse numbers out of their range."""
    for key in _POSITIVE:
        value = get(config, key)
        if value is not None and value <= 0:
            refuse(config, key, "must be above 0")
    for key in _NOT_NEGATIVE:
        if get(config, key) < 0:
            refuse(config, key, "must be 0 or more")
    for key in _SHARES:
        if not 0 <= get(config, key) <= 1:
            refuse(config, key, "must be a share from 0 to 1")
    for key in ("train.beta1", "train.beta2"):
        if not 0 <= get(config, key) < 1:
            refuse(config, key, "must be at least 0 and below 1")
