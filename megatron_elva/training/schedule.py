"""The learning rate as a share of its full value: warm-up, hold, cosine."""

from __future__ import annotations

import math

from megatron_elva.config.schema import StageConfig, TrainConfig


def learning_rate_share(step: int, train: TrainConfig) -> float:
    """Share of the full learning rate in a step.

    Linear warm-up over `warmup_steps`, full for `hold_share` of the steps after it, then a cosine to `lr_min_share`.

    Args:
        step: steps done before this one, from 0.
        train: the schedule.
    """
    if step < train.warmup_steps:
        return (step + 1) / (train.warmup_steps + 1)
    hold_until = train.warmup_steps + train.hold_share * (train.steps - train.warmup_steps)
    if step <= hold_until:
        return 1.0
    progress = min(1.0, (step - hold_until) / max(1.0, train.steps - hold_until))
    return train.lr_min_share + (1 - train.lr_min_share) * 0.5 * (1 + math.cos(math.pi * progress))


def is_frozen(step: int, stage: StageConfig, train: TrainConfig) -> bool:
    """Whether `stage.frozen` holds in a step (counted from 0)."""
    return bool(stage.frozen) and step < stage.frozen_share * train.steps
