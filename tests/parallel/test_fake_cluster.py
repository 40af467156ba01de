"""What the ranks of ``stage=2 nodes=16`` would say to each other, rank by rank on torch's fake process group.

`fake_cluster.py` says what of a rank is real and what is not. Values are compared on real process groups elsewhere.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace

import pytest

from megatron_elva.config.compose import compose_all
from megatron_elva.config.schema import Config, MergePoint, MergingConfig, ParallelConfig
from megatron_elva.layout import PackSpec, SampleSpec, VideoSpec
from megatron_elva.training import estimate
from tests.builders import small_config
from tests.parallel.fake_cluster import run_ranks
from tests.parallel.fake_records import Collective, Exchange, Message, Post, Record, Wait, problems, volumes

READS = {
    "megatron.core.distributed.finalize_model_grads:finalize_model_grads",
    "megatron.core.optimizer.clip_grads:get_grad_norm_fp32",
    "megatron.core.optimizer.optimizer:has_grad_norm_group",  # from 0.17 on
    "megatron.core.pipeline_parallel.p2p_communication:_communicate_shapes",
    "megatron.core.utils:local_multi_tensor_l2_norm",
    "megatron_elva.parallel.collectives:sum_over_ranks",
    "megatron_elva.parallel.engine:_mark_groups",
    "megatron_elva.parallel.engine:train_step",
}
"""Where the host may wait for the device: never in a layer, once in a while in a step."""


def sample(before: int, video: tuple[int, int, int] | None, behind: int) -> PackSpec:
    """A pack of one sample: text, a video, text."""
    return PackSpec((SampleSpec((before, *([] if video is None else [VideoSpec.uniform(*video)]), behind)),))


LARGEST = sample(24, (16, 12, 12), 1000)
KINDS = [LARGEST, sample(20, (1, 12, 12), 60), sample(10, (16, 9, 16), 200), sample(20, None, 300)]
"""The largest pack of the config, an image, a wide video, text alone."""


def steps(config: Config) -> list[list[PackSpec]]:
    """Packs of a step for four kinds of replicas, which have different ones in each micro-step."""
    return [[KINDS[(micro + replica) % 4] for micro in range(config.train.accumulate)] for replica in range(4)]


def cluster(*overrides: str) -> Config:
    return compose_all(["stage=2", "nodes=16", *overrides])[0]


# --- the whole cluster ----------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def whole() -> list[Record]:
    """One step of each of the 128 ranks, 16 micro-steps of packs up to the largest."""
    config = cluster()
    assert LARGEST.tokens == estimate.pack_estimate(config).tokens
    return run_ranks(config, steps(config), timeout=900)


@pytest.mark.slow
def test_all_128_ranks_run_a_step_and_none_waits_for_ever(whole):
    assert [record.rank for record in whole] == list(range(128))
    assert problems(whole) == []
    specs = steps(cluster())
    for record in whole:
        kinds = volumes(record)
        assert kinds["send"][0] == kinds["receive"][0] == 32, record.rank  # a shape and a message for each micro-step
        layers = [lengths for count, lengths in record.layers if count == 14]
        assert layers == [tuple(spec.lengths) for spec in specs[record.place[2] % 4]]
        assert set(record.reads) <= READS
    print_volumes(whole)


@pytest.mark.slow
def test_ranks_stand_where_the_launcher_says(whole):
    """Order tensor, data, pipeline: a tensor group lies on one node of 8, the two ends of a pipeline 8 nodes apart."""
    for record in whole:
        tensor, pipeline, data = record.place
        assert record.rank == pipeline * 64 + data * 4 + tensor
        first = record.rank - tensor
        assert members(record, "tp") == tuple(range(first, first + 4))
        assert first // 8 == (first + 3) // 8
        assert members(record, "pp") == (record.rank % 64, record.rank % 64 + 64)
        assert members(record, "dp") == tuple(range(pipeline * 64 + tensor, pipeline * 64 + 64, 4))
        assert members(record, "ends") == members(record, "mp")
        assert members(record, "mp") == tuple(end + data * 4 + i for end in (0, 64) for i in range(4))


@pytest.mark.slow
def test_parameters_and_gradients_are_those_of_the_dry_run(whole):
    sizes = estimate.rank_parameters(cluster(), 152064)
    for record in whole:
        size = sizes[record.place[1]]
        assert record.parameters == size
        kinds = volumes(record)
        # buffers are padded to whole shards of the 16 replicas
        assert 0 <= kinds["reduce_scatter dp_cp"][1] - 4 * size < 4 * 65536
        assert 0 <= kinds["all_gather dp_cp"][1] - 2 * size < 2 * 65536


def members(record: Record, name: str) -> tuple[int, ...]:
    return record.groups[record.names[name]]


def print_volumes(records: list[Record]) -> None:
    seconds = sum(sum(record.seconds) for record in records)
    print(f"\n{len(records)} ranks, {len(records[0].groups)} groups, {seconds:.0f} s of processor time")
    for record in (records[0], records[-1]):
        print(f"rank {record.rank}: {len(record.operations())} operations in the step")
        for name, (count, size) in volumes(record).items():
            print(f"  {name:<24}{count:>6}  {size / 2**20:>10,.1f} MiB")


# --- other ways through the pipeline --------------------------------------------------------------------------------

REPLICA = [*range(60, 64), *range(124, 128)]
"""The last one."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "overrides",
    [
        ["merging=fast"],
        ["merging=paper"],
        ["merging=fast", "parallel.carrier=fixed"],
        ["merging=fast", "parallel.virtual_pipeline=2"],
    ],
    ids=" ".join,
)
def test_a_replica_with(overrides):
    config = cluster("train.accumulate=4", "train.global_batch=64", *overrides)
    specs = steps(config)
    interleaved = config.parallel.virtual_pipeline is not None
    if interleaved:  # the harness tells the next message's shape only where all are alike
        specs = [[LARGEST] * 4]
    records = run_ranks(config, specs, REPLICA)
    assert problems(records) == []
    sync = {"megatron_elva.model.merging:choose"} if overrides == ["merging=paper"] else set()
    for record in records:
        assert sync <= set(record.reads) | (sync if record.place[1] else set())
        assert set(record.reads) <= READS | sync
        messages = 4 * (3 if interleaved else 1)
        shapes = 0 if config.parallel.carrier == "fixed" else messages
        assert volumes(record)["send"][0] == messages + shapes


# --- the checks can fail --------------------------------------------------------------------------------------------


def small() -> Config:
    """A layout of 2 x 2 x 2 ranks with a merge point on the first pipeline rank."""
    config = small_config(
        parallel=ParallelConfig(tensor=2, pipeline=2, sequence=True),
        merging=MergingConfig(kind="hierarchical", points=[MergePoint(after=1, rule="budget", keep=0.5)]),
    )
    return replace(config, device="cuda")


SMALL = [[sample(3, (4, 3, 3), 9), sample(5, (2, 4, 3), 7)], [sample(4, None, 8), sample(3, (3, 2, 2), 6)]]


@pytest.fixture(scope="module")
def healthy() -> list[Record]:
    return run_ranks(small(), SMALL, world=8, processes=1)


def test_a_small_cluster_agrees(healthy):
    assert problems(healthy) == []
    assert len({len(record.groups) for record in healthy}) == 1


def test_the_handed_state_is_the_one_that_was_sent(healthy):
    """Lengths behind the merge point are those that the second pipeline rank got, and shorter than before."""
    for record in healthy:
        first = next(r for r in healthy if r.place == (0, 0, record.place[2]))
        here = [lengths for _, lengths in first.layers]
        assert sum(map(sum, here[1::2])) < sum(map(sum, here[::2]))
        if record.place[1]:
            assert [lengths for _, lengths in record.layers] == here[1::2]


def step_of(records: list[Record], rank: int) -> tuple[Record, list[int]]:
    """A rank's record and where in it the operations of its step are."""
    record = records[rank]
    return record, [i for i in range(record.step, len(record.events)) if isinstance(record.events[i], Post)]


def change(record: Record, at: int, operation: Collective | Exchange) -> None:
    record.events[at] = Post(record.events[at].number, operation)


def skip_a_collective(records: list[Record]) -> None:
    record, places = step_of(records, 3)
    at = next(i for i in places if record.events[i].operation.kind == "all_gather")
    number = record.events[at].number
    record.events = [e for e in record.events if e.number != number]


def give_a_wrong_shape(records: list[Record]) -> None:
    record, places = step_of(records, 2)
    at = [i for i in places if getattr(record.events[i].operation, "kind", "") == "reduce_scatter"][5]
    operation = record.events[at].operation
    (shape, dtype), *rest = operation.values
    change(record, at, replace(operation, values=((((shape[0] + 1), *shape[1:]), dtype), *rest)))


def give_a_wrong_dtype(records: list[Record]) -> None:
    record, places = step_of(records, 5)
    at = [i for i in places if isinstance(record.events[i].operation, Exchange)][3]
    operation = record.events[at].operation
    message = operation.messages[0]
    change(record, at, replace(operation, messages=(replace(message, value=(message.value[0], "float64")),)))


def swap_two_sends(records: list[Record]) -> None:
    record, places = step_of(records, 1)
    sends = [
        i for i in places if isinstance(o := record.events[i].operation, Exchange) and any(m.sends for m in o.messages)
    ]
    assert len(sends) >= 2
    a, b = sends[0], sends[1]
    one, other = record.events[a].operation, record.events[b].operation
    change(record, a, other)
    change(record, b, one)


def send_before_receiving(records: list[Record]) -> None:
    """Two ranks that each wait for their own message to be taken before they take the other's."""
    for rank, peer in ((0, 4), (4, 0)):
        events = records[rank].events
        number = 10**6
        for i, sends in enumerate((True, False)):
            message = Message(sends, peer, ((1,), "float32"))
            events += [Post(number + i, Exchange(0, (message,))), Wait(number + i)]


def make_groups_in_another_order(records: list[Record]) -> None:
    groups = records[6].groups
    at = next(i for i, group in enumerate(groups) if groups[i + 1] != group)
    groups[at], groups[at + 1] = groups[at + 1], groups[at]


@pytest.mark.parametrize(
    ("mutate", "found"),
    [
        (skip_a_collective, "waits for ever"),
        (skip_a_collective, "rank 3"),
        (give_a_wrong_shape, "of ranks [2, 3], collective"),
        (give_a_wrong_dtype, "float64"),
        (swap_two_sends, "of rank 1 to rank 5: sent"),
        (send_before_receiving, "rank 0 waits for ever"),
        (make_groups_in_another_order, "make different groups"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_a_changed_record_is_found(healthy, mutate: Callable[[list[Record]], None], found: str):
    records = copy.deepcopy(healthy)
    mutate(records)
    lines = problems(records)
    assert any(found in line for line in lines), lines[:5]


def skips_agreeing(rank: int) -> None:
    """One tensor rank goes on with its own choice of links."""
    from megatron_elva.model.decoder import Decoder

    original = Decoder.__dict__.get("original") or Decoder._agree
    Decoder.original = original  # type: ignore[attr-defined]
    Decoder._agree = (lambda self, chosen: chosen) if rank == 2 else original  # type: ignore[method-assign]


def leaves_out_the_last_sum(rank: int) -> None:
    """One rank does not take part in the sums at the end of a step."""
    from megatron_elva.parallel import collectives

    original = collectives.__dict__.setdefault("original", collectives.sum_over_ranks)
    collectives.sum_over_ranks = (lambda values, ranks: list(values)) if rank == 7 else original


def two_faults(rank: int) -> None:
    skips_agreeing(rank)
    leaves_out_the_last_sum(rank)


def test_ranks_that_do_not_do_what_the_others_do_are_found():
    lines = problems(run_ranks(small(), SMALL, world=8, processes=1, fault=two_faults))
    for found in ("rank 2 waits for ever", "rank 3 waits for ever", "group of all ranks: rank 0 has"):
        assert any(found in line for line in lines), lines[:5]
    assert any("of ranks [2, 3], collective" in line and "broadcast" in line for line in lines)
