"""Packs handed from the reading rank to its replica, and what a rank knows of its place."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_elva.config.errors import ConfigError
from megatron_elva.config.schema import Config, ParallelConfig
from megatron_elva.layout import Pack, PackSpec, SampleSpec, Skipped, VideoSpec
from tests.builders import fill, random_pack, small_config
from tests.distributed import run_distributed


def packs_of(config: Config) -> list[Pack]:
    """Different lengths, one pack without videos, one with two resolution classes."""
    hybrid = PackSpec((SampleSpec((3, VideoSpec(((2, 3), (1, 1)), (0, 1, 1)), 2)),)).padded_to(4)
    packs = [random_pack(config.model, 1), random_pack(config.model, 2, (0, 0)), fill(hybrid, config.model, 3)]
    packs[0].skipped = [Skipped("shard/key", "torn")]
    return packs


def shared(config: Config, replicas: list[list[Pack]]) -> dict:
    """What this rank holds after the sharing."""
    from megatron_elva.parallel.ranks import start
    from megatron_elva.parallel.share import share_packs

    ranks = start(config.parallel, "cpu", config.seed)
    got = share_packs(replicas[ranks.data] if ranks.is_reader else None, ranks, 3)
    place = {name: getattr(ranks, name) for name in ("rank", "tensor", "pipeline", "data", "reader", "is_reader")}
    return {"packs": got, "ends": ranks.ends_group is not None, **place}


def check(result: dict, expected: list[Pack]) -> None:
    """Text on every rank, pixels on the first pipeline ranks and nowhere else."""
    assert len(result["packs"]) == len(expected)
    for got, pack in zip(result["packs"], expected, strict=True):
        assert got.spec == pack.spec
        for a, b in ((got.tokens, pack.tokens), (got.labels, pack.labels)):
            assert a.dtype == b.dtype and torch.equal(a, b)
        assert got.patches.dtype == torch.uint8 and got.patches.shape[1] == pack.patches.shape[1]
        if result["pipeline"] == 0:
            assert torch.equal(got.patches, pack.patches), f"rank {result['rank']}"
        else:
            assert got.patches.shape[0] == 0, f"rank {result['rank']} holds {got.patches.numel()} bytes of pixels"
        keys, skipped = (pack.keys, pack.skipped) if result["is_reader"] else ([], [])
        assert (got.keys, got.skipped) == (keys, skipped)


def test_packs_reach_every_rank_and_pixels_only_the_first_pipeline_ranks():
    config = small_config(parallel=ParallelConfig(tensor=2, pipeline=2, sequence=False))
    packs = packs_of(config)
    assert packs[1].patches.shape[0] == 0 and packs[0].patches.shape[0] > 0
    results = run_distributed(shared, 4, config, [packs])
    assert {(r["tensor"], r["pipeline"]) for r in results} == {(0, 0), (1, 0), (0, 1), (1, 1)}
    assert [r["is_reader"] for r in results].count(True) == 1
    for result in results:
        check(result, packs)


def test_ranks_in_the_middle_of_the_pipeline_read_nothing():
    """They are in no group that packs go through, so nothing can reach them; the carrier brings what they need."""
    config = small_config(parallel=ParallelConfig(tensor=1, pipeline=4, sequence=False))
    packs = packs_of(config)
    for result in run_distributed(shared, 4, config, [packs]):
        if result["pipeline"] in (0, 3):
            check(result, packs)
        else:
            assert result["packs"] == [None] * 3 and not result["ends"]


def test_replicas_keep_to_their_own_packs():
    config = small_config(parallel=ParallelConfig(tensor=1, pipeline=2, sequence=False))
    replicas = [packs_of(config), [random_pack(config.model, 9)]]
    results = run_distributed(shared, 4, config, replicas)
    assert [r["is_reader"] for r in results].count(True) == 2
    for result in results:
        check(result, replicas[result["data"]])


def test_one_process_keeps_its_packs():
    config = small_config()
    packs = packs_of(config)
    (result,) = run_distributed(shared, 1, config, [packs])
    check(result, packs)


def refusal(parallel: ParallelConfig) -> str:
    import torch.distributed as dist

    from megatron_elva.parallel.ranks import start

    with pytest.raises(ConfigError) as error:
        start(parallel, "cpu", 1)
    assert not dist.is_initialized()  # refused before anything waits for anything
    return str(error.value)


@pytest.mark.parametrize(("tensor", "pipeline"), [(2, 1), (1, 2), (2, 2)])
def test_a_world_that_does_not_divide_is_refused(tensor, pipeline):
    for message in run_distributed(refusal, 3, ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=False)):
        assert "\n" not in message
        assert message.startswith("3 processes") and message.endswith(f"start a multiple of {tensor * pipeline}")
        assert f"parallel.tensor={tensor}" in message and f"parallel.pipeline={pipeline}" in message


def started_twice(config: Config) -> bool:
    from megatron_elva.parallel.ranks import start

    first, second = (start(config.parallel, "cpu", config.seed) for _ in range(2))
    same = {name: getattr(first, name) == getattr(second, name) for name in ("rank", "tensor", "pipeline", "reader")}
    return all(same.values()) and replace(first, groups=second.groups, ends_group=second.ends_group) == second


def test_a_second_start_gives_the_same_ranks():
    assert run_distributed(started_twice, 2, small_config(parallel=ParallelConfig(tensor=2, pipeline=1, sequence=True)))
