"""The learning rate's shape and the time that frozen parts stay frozen."""

from __future__ import annotations

import math
from dataclasses import replace
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elva.config.schema import StageConfig, TrainConfig
from megatron_elva.training.schedule import is_frozen, learning_rate_share
from tests.builders import small_config

TRAIN = small_config().train
STAGE = small_config().stage


def train(steps: int, warmup: int = 0, hold: float = 0.0, least: float = 0.0) -> TrainConfig:
    return replace(TRAIN, steps=steps, warmup_steps=warmup, hold_share=hold, lr_min_share=least)


def shares(config: TrainConfig) -> list[float]:
    return [learning_rate_share(step, config) for step in range(config.steps + 1)]


def test_warm_up_is_a_line_that_starts_above_zero_and_ends_at_one():
    got = shares(train(20, warmup=4))
    assert got[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])


def test_hold_is_full_and_then_a_cosine_falls_to_the_least_share():
    got = shares(train(110, warmup=10, hold=0.5, least=0.1))
    assert got[10:61] == [1.0] * 51
    # half way through the fall the cosine is half way down, a quarter through it has lost (1 - cos 45) / 2
    assert got[85] == pytest.approx(0.55)
    assert got[60 + 50 // 4] == pytest.approx(0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * 12 / 50)))
    assert got[110] == pytest.approx(0.1)


def test_without_warm_up_and_hold_it_is_a_cosine_from_the_first_step():
    got = shares(train(10))
    assert got == pytest.approx([0.5 * (1 + math.cos(math.pi * i / 10)) for i in range(11)])


def test_hold_of_everything_never_falls():
    assert shares(train(10, warmup=2, hold=1.0))[2:] == [1.0] * 9


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 200), st.integers(0, 250), st.floats(0, 1), st.floats(0, 1))
def test_it_rises_then_falls_and_stays_between_the_least_share_and_one(steps, warmup, hold, least):
    config = train(steps, warmup, hold, least)
    got = shares(config)
    top = min(warmup, steps)
    assert all(0 < a <= 1 for a in got[:steps]) or least == 0
    assert all(a < b for a, b in pairwise(got[: top + 1]))
    assert all(a >= b - 1e-12 for a, b in pairwise(got[top:]))
    assert all(least - 1e-12 <= a <= 1 for a in got[top:]) or top == steps
    # no jump: neither between warm-up and hold nor where the fall begins
    longest = max(1 / (warmup + 1), math.pi / 2 / max(1.0, (1 - hold) * (steps - warmup)))
    assert all(abs(a - b) <= longest + 1e-9 for a, b in pairwise(got))


def stage(frozen: list[str], share: float) -> StageConfig:
    return replace(STAGE, frozen=frozen, frozen_share=share)


@pytest.mark.parametrize(("share", "frozen_steps"), [(0.0, 0), (0.25, 2), (0.3, 3), (0.5, 4), (1.0, 8)])
def test_frozen_parts_are_frozen_for_the_first_steps(share, frozen_steps):
    got = [is_frozen(step, stage(["decoder.*"], share), train(8)) for step in range(8)]
    assert got == [True] * frozen_steps + [False] * (8 - frozen_steps)


def test_nothing_is_frozen_without_patterns():
    assert not is_frozen(0, stage([], 1.0), train(8))
