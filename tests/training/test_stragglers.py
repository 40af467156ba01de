"""The rank that the others wait for, found among ranks whose steps all take equally long."""

from __future__ import annotations

import json
import socket
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_elva.config.schema import Config, FaultConfig, ParallelConfig
from megatron_elva.model.inputs import prepare
from megatron_elva.training.stragglers import RankTimes, compare, slowest
from tests.builders import random_pack, small_config
from tests.distributed import run_distributed

STEPS, SLOW_S, RATIO = 12, 0.4, 1.25


def be_slow(how: str) -> None:
    end = time.perf_counter() + SLOW_S
    while time.perf_counter() < end:
        if how == "sleeps":
            time.sleep(SLOW_S)
        elif how == "computes":
            torch.mm(torch.ones(200, 200), torch.ones(200, 200))
        else:
            sum(range(1000))


def train(config: Config, slow: int | None, how: str) -> tuple[str | None, float]:
    """Some steps as the loop does them. Returns what `compare` said, and the seconds of a step."""
    from megatron_elva.parallel.collectives import sum_over_ranks
    from megatron_elva.training.watchdog import Watchdog
    from tests.parallel.test_engine import engine_of

    engine, ranks = engine_of(config)
    pack = random_pack(config.model, 1, (1, 2))
    dog = Watchdog(Path(config.run_dir), ranks.rank, ranks.world, FaultConfig(step_timeout_s=None), "x")

    def step(number: int, is_slow: bool) -> None:
        dog.phase("data", number)
        if is_slow and how == "waits for data":
            time.sleep(SLOW_S)
        engine.set_learning_rate(1.0, False)
        dog.phase("step", number)
        if is_slow and how != "waits for data":
            be_slow(how)
        engine.train_step([prepare(pack, config, "cpu", ranks.is_first, ranks.is_last)] * 2)
        dog.phase("sums", number)
        sum_over_ranks([1.0], ranks)

    step(1, False)
    dog.own_seconds()
    began = time.perf_counter()
    for number in range(2, STEPS + 2):
        step(number, ranks.rank == slow)
    wall = (time.perf_counter() - began) / STEPS
    said = compare(dog.own_seconds() / STEPS, wall, ranks, Path(config.run_dir), STEPS, RATIO, STEPS)
    dog.close()
    return said, wall


@pytest.mark.alone
@pytest.mark.parametrize(
    ("slow", "how"),
    [
        (3, "sleeps"),
        pytest.param(1, "computes", marks=pytest.mark.slow),
        pytest.param(2, "runs Python", marks=pytest.mark.slow),
        pytest.param(0, "waits for data", marks=pytest.mark.slow),
    ],
)
def test_a_slow_rank_is_named_though_all_steps_take_equally_long(slow, how, tmp_path):
    config = small_config(parallel=ParallelConfig(tensor=2, pipeline=2, sequence=True), run_dir=str(tmp_path))
    results = run_distributed(train, 4, config, slow, how)
    walls = [wall for _, wall in results]
    assert max(walls) < 1.1 * min(walls)
    assert [said is None for said, _ in results] == [False, True, True, True]
    assert results[0][0].startswith(f"slow rank: {slow} on {socket.gethostname()} (tensor ")
    (line,) = [json.loads(text) for text in (tmp_path / "logs" / "ranks.jsonl").read_text().splitlines()]
    assert line["step"] == STEPS and [r["rank"] for r in line["ranks"]] == [0, 1, 2, 3]
    own = [r["own_s"] for r in line["ranks"]]
    assert own.index(max(own)) == slow and own[slow] > 0.8 * SLOW_S


def test_nobody_is_named_in_a_balanced_run(tmp_path):
    config = small_config(parallel=ParallelConfig(tensor=2, pipeline=2, sequence=True), run_dir=str(tmp_path))
    results = run_distributed(train, 4, config, None, "")
    assert [said for said, _ in results] == [None] * 4


def times(own: list[float], pipeline: int = 1, **changes: float) -> list[RankTimes]:
    """Ranks of one tensor rank and so many pipeline ranks."""
    return [
        replace(RankTimes(r, f"node{r // 2}", 0, r % pipeline, r // pipeline, seconds, 1.0), **changes)
        for r, seconds in enumerate(own)
    ]


@pytest.mark.parametrize(
    ("ranks", "named"),
    [
        (times([0.3, 0.3, 0.3, 0.5]), 3),
        (times([0.3, 0.3, 0.3, 0.36]), None),  # below the ratio
        (times([0.01, 0.01, 0.01, 0.03]), None),  # nothing that the others would notice
        (times([0.6, 0.6, 0.6, 0.2]), None),
        (times([0.2, 0.6, 0.2, 0.6], pipeline=2), None),  # pipeline ranks have other layers
        (times([0.2, 0.6, 0.4, 0.6], pipeline=2), 2),
        (times([0.2, 0.6], pipeline=2), 1),  # nobody with the same layers
        (times([0.5, 0.3, 0.3, 0.7]), 3),
        (times([0.0, 0.0, 0.0, 0.4]), 3),
        (times([0.3]), None),
    ],
)
def test_who_is_named(ranks, named):
    line = slowest(ranks, RATIO)
    assert line is None if named is None else line.startswith(f"slow rank: {named} on node{named // 2} ")


def test_few_samples_say_little():
    ranks = times([0.3, 0.3, 0.3, 0.5])
    assert slowest(ranks, RATIO, samples=50) is None
    assert slowest(ranks, RATIO, samples=1000) is not None


def test_a_slow_gpu_is_named_by_its_own_clock():
    ranks = [replace(t, device_s=0.001 if t.rank != 2 else 0.002) for t in times([0.3] * 4)]
    line = slowest(ranks, RATIO)
    assert line.startswith("slow rank: 2 on node1 ") and "matrix product on its GPU" in line
