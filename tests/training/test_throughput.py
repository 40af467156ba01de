"""The figures of a step against numbers counted by hand, with a clock that the test moves."""

from __future__ import annotations

import json
import math
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from functools import cache
from typing import Any

import pytest

from megatron_elva.config.schema import Config, MergePoint, MergingConfig, ParallelConfig, PrecisionConfig
from megatron_elva.layout import IGNORE, Pack, PackSpec, SampleSpec, Skipped, VideoSpec
from megatron_elva.training.metrics import UNITS, StepMetrics
from megatron_elva.training.throughput import META, StepClock, StepTimes, step_metrics, write_meta
from tests.builders import fill, small_config, small_model
from tests.distributed import run_distributed

VOCAB = 96
H100 = "NVIDIA H100 80GB HBM3"
MODEL = small_model(patch_embedding="naive")
MERGING = {
    "none": MergingConfig(kind="none"),
    "pooling": MergingConfig(kind="pooling"),
    "budget": MergingConfig(kind="hierarchical", points=[MergePoint(after=2.0, rule="budget", keep=0.5)]),
}


class Time:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def passes(self, seconds: float) -> None:
        self.now += seconds


def clock_of(time: Time) -> StepClock:
    return StepClock(time, lambda: 1_800_000_000 + time.now)


def step_of(clock: StepClock, time: Time, waited: float) -> None:
    """A save of the step before, data, computing, and time that belongs to no part: 2.5 s but for the data."""
    with clock.part("checkpoint"):
        time.passes(0.5)
    with clock.part("data"):
        time.passes(waited)
    time.passes(0.125)
    with clock.part("compute"):
        time.passes(1.75)
    time.passes(0.125)


def test_the_parts_of_a_step_are_measured_and_no_time_is_lost_between_steps():
    time = Time()
    clock = clock_of(time)
    time.passes(60)
    clock.begin()  # what came before belongs to no step
    step_of(clock, time, 0.25)
    assert clock.spent("data") == 0.25
    assert clock.end() == StepTimes(data=0.25, compute=1.75, checkpoint=0.5, whole=2.75, ended=1_800_000_162.75)
    time.passes(1)
    for _ in range(2):
        with clock.part("checkpoint"):
            time.passes(0.5)
    assert clock.end() == StepTimes(data=0, compute=0, checkpoint=1, whole=2, ended=1_800_000_164.75)


def test_a_part_that_fails_counts_and_parts_do_not_overlap():
    time = Time()
    clock = clock_of(time)
    with suppress(KeyError), clock.part("data"):
        time.passes(3)
        raise KeyError
    assert clock.spent("data") == 3
    with clock.part("compute"):
        time.passes(1)
        with pytest.raises(RuntimeError, match="checkpoint"), clock.part("checkpoint"):
            pass
    assert clock.spent("compute") == 1


def pack(samples: tuple[SampleSpec, ...], loss: list[int], video_bytes: int, skipped: int = 0) -> Pack:
    """A pack with a loss at the given positions."""
    made = fill(PackSpec(samples).padded_to(8), MODEL, seed=len(samples))
    labels = made.labels.fill_(IGNORE)
    labels[loss] = 7
    bad = [Skipped(f"bad{i}", "empty", "quarantine" if i else "text") for i in range(skipped)]
    return replace(made, labels=labels, skipped=bad, samples=len(samples) + skipped, video_bytes=video_bytes)


def known_packs() -> list[Pack]:
    """Four packs of which every number below is counted by hand, in this order.

    ====  ===========================================  ======  =====================  ======  =====  ========
    pack  samples                                      tokens  visual (cells+F+LINE)  frames  bytes  padding
    ====  ===========================================  ======  =====================  ======  =====  ========
    0     5, four frames of 2x3, 4;  and 6             45 + 6  24 + 4 + 8             4       1000   5
    1     10; two samples are skipped                  10      0                      0       0      6
    2     2, image of 3x2, 3, two frames of 2x2, 3     32      6 + 1 + 3, 8 + 2 + 4   3       750    0
    3     4, two frames of 2x3 and two of 1x2, 2       32      12 + 4 + 6 and 4       4       77     0
    ====  ===========================================  ======  =====================  ======  =====  ========
    """
    hybrid = VideoSpec(((2, 3), (1, 2)), (0, 1, 1, 0))
    image, short = VideoSpec.uniform(1, 3, 2), VideoSpec.uniform(2, 2, 2)
    return [
        pack((SampleSpec((5, VideoSpec.uniform(4, 2, 3), 4)), SampleSpec((6,))), [0, 1, 2], 1000),
        pack((SampleSpec((10,)),), [0, 1, 2], 0, skipped=2),
        pack((SampleSpec((2, image, 3, short, 3)),), [0, 1, 12], 750),
        pack((SampleSpec((4, hybrid, 2)),), [0, 1, 2], 77),
    ]


TOKENS, VISUAL, FRAMES, BYTES = 51 + 10 + 32 + 32, 36 + 10 + 14 + 26, 11, 1827
LENGTHS = [45, 6, 10, 32, 32]
LEFT = {  # lengths of the samples after merging or pooling, visual tokens left
    "none": (LENGTHS, VISUAL),
    # frames become 2; 1 and 1; 1 and 1, each with its FRAME and LINEs
    "pooling": ([9 + 18, 6, 10, 8 + 10 + 7, 6 + 9 + 4], 18 + 10 + 7 + 13),
    # of 24 cells 12 are left; of 6 (one frame) all, of 8 there are 4; of 12 and 4 there are 6 and 2
    "budget": ([33, 6, 10, 28, 24], VISUAL - 12 - 4 - 8),
}


def by_hand(merging: str) -> float:
    """Operations of the step: three times those of the forward pass."""

    def layer(lengths: list[int]) -> int:
        weights = 32 * 32 + 2 * 32 * 16 + 32 * 32 + 3 * 32 * 48  # query, keys and values of 2 heads, output, SwiGLU
        return sum(2 * weights * n + 4 * 32 * n * n // 2 for n in lengths)

    lengths, left = LEFT[merging]
    layers = {
        "none": 4 * layer(LENGTHS),
        "pooling": 4 * layer(lengths),
        "budget": 2 * layer(LENGTHS) + 2 * layer(lengths),
    }
    cells, visual = (30, left) if merging == "pooling" else (24 + 14 + 16, VISUAL)
    patches = 2 * cells * (4 * 4 * 3) * 16 + 2 * visual * 16 * 32
    head = 2 * 12 * 32 * VOCAB
    return 3 * (layers[merging] + patches + head)


def steps(config: Config, packs: list[Pack], waits: list[float]) -> dict[str, StepMetrics]:
    """One step with each kind of merging through what the loop calls; a replica waits for its data as `waits` says."""
    from megatron_elva.model.inputs import prepare
    from megatron_elva.parallel.collectives import sum_over_ranks
    from megatron_elva.parallel.engine import Engine, build_chunks
    from megatron_elva.parallel.ranks import start
    from megatron_elva.parallel.share import share_packs
    from megatron_elva.training.data import StepCounts, count
    from megatron_elva.training.throughput import collect

    ranks = start(config.parallel, "cpu", config.seed)
    own = packs[ranks.data :: ranks.data_size]
    lines = {}
    for name, merging in MERGING.items():
        config = replace(config, merging=merging)
        engine = Engine(config, build_chunks(config, VOCAB, ranks), ranks)
        engine.set_learning_rate(1.0, False)
        shared = share_packs(own if ranks.is_reader else None, ranks, len(own))
        counts = count(own, config, VOCAB) if ranks.is_reader else StepCounts()
        inputs = [p and prepare(p, config, ranks.device, first=ranks.is_first, last=ranks.is_last) for p in shared]
        time = Time()
        clock = clock_of(time)
        step_of(clock, time, waits[ranks.data])
        result = engine.train_step(inputs)
        addends = collect(result, counts, clock.spent("data"), config, ranks)
        totals = dict(zip(addends, sum_over_ranks(list(addends.values()), ranks), strict=True))
        lines[name] = step_metrics(config, ranks.world, H100, totals, clock.end(), 5, 35, 0.5, result.grad_norm)
    return lines


@dataclass(frozen=True)
class Case:
    """A layout, and how long each of its replicas waits for data."""

    parallel: ParallelConfig
    world: int
    waits: list[float]


CASES = {
    "one": Case(ParallelConfig(tensor=1, pipeline=1, sequence=False), 1, [0.25]),
    "dp2pp2": Case(ParallelConfig(tensor=1, pipeline=2, sequence=False), 4, [0.25, 1.0]),
    "tp2pp2": Case(ParallelConfig(tensor=2, pipeline=2, sequence=True), 4, [0.25]),
}


@cache
def lines(name: str) -> dict[str, StepMetrics]:
    """A case's line for each kind of merging, as the first rank writes it."""
    case = CASES[name]
    config = small_config(MODEL, parallel=case.parallel, tasks_per_node=case.world)
    config = replace(config, data=replace(config.data, pack_tokens=64))
    return run_distributed(steps, case.world, config, known_packs(), case.waits)[0]


@pytest.mark.parametrize("merging", MERGING)
@pytest.mark.parametrize("name", ["one", *(pytest.param(n, marks=pytest.mark.slow) for n in ("dp2pp2", "tp2pp2"))])
def test_every_figure_of_a_line_is_what_a_hand_counts(name, merging):
    line, case = lines(name)[merging], CASES[name]
    lengths, left = LEFT[merging]
    seconds = 2.75  # of the first rank, whose own data came after 0.25 s
    slow = case.waits[-1]
    flops = by_hand(merging) / case.world
    reached = flops / seconds / 1e12
    expected: dict[str, Any] = {
        "step": 5, "stage": 2, "samples": 35, "loss_mse": None, "loss_con": None, "lr": 0.5 * 1e-2,
        "visual_tokens_in": VISUAL, "visual_tokens_out": left, "tokens_per_s": TOKENS / seconds,
        "tflops_per_gpu": pytest.approx(reached, rel=1e-12), "mfu": pytest.approx(reached / 989, rel=1e-12),
        "data_wait_s": slow, "step_s": seconds, "skipped_samples": 2, "pack_fill": TOKENS / (4 * 64),
        "time": 1_800_000_102.75, "tokens": TOKENS, "tokens_out": sum(lengths),
        "tokens_out_per_s": sum(lengths) / seconds, "samples_per_s": 5 / seconds, "frames": FRAMES,
        "frames_per_s": FRAMES / seconds, "video_bytes": BYTES, "bytes_per_s": BYTES / seconds,
        "flops_per_gpu": pytest.approx(flops, rel=1e-12), "compute_s": 1.75 + 0.25 - slow, "checkpoint_s": 0.5,
        "other_s": 0.25,
    }  # fmt: skip
    got = asdict(line)
    model = {key: got.pop(key) for key in ("loss", "loss_gen", "grad_norm")}
    assert got == expected
    assert model["loss"] == model["loss_gen"] == pytest.approx(lines("one")[merging].loss, rel=1e-4)
    assert line.data_wait_s + line.compute_s + line.checkpoint_s + line.other_s == pytest.approx(line.step_s, rel=1e-12)


TOTALS = {
    "loss_sum": 12.0, "loss_tokens": 4, "samples": 3, "packed": 2, "skipped": 1, "listed": 0, "tokens": 100,
    "visual": 60, "visual_left": 40, "frames": 8, "video_bytes": 900, "flops": 989e12, "packs": 1, "wait_0": 1.0,
}  # fmt: skip


def line_of(device: str = H100, fp8: str | None = None, **more: float) -> StepMetrics:
    config = small_config(precision=PrecisionConfig(name="p", dtype="bf16", fp8=fp8))
    times = StepTimes(data=1.0, compute=2.0, checkpoint=0.5, whole=4.0, ended=7.0)
    return step_metrics(config, 2, device, {**TOTALS, **more}, times, 1, 3, 1.0, 0.1)


def test_utilisation_is_measured_against_the_dense_peak_of_the_device_and_precision():
    assert line_of().mfu == pytest.approx(0.125)  # half of the operations on each rank, in four seconds
    assert line_of(fp8="delayed").mfu == pytest.approx(0.0625)
    assert line_of("NVIDIA A100-SXM4-80GB").mfu == pytest.approx(0.125 * 989 / 312)
    assert line_of("cpu").mfu is None and line_of("cpu").tflops_per_gpu == pytest.approx(123.625)


def test_a_replica_whose_data_comes_late_takes_the_time_from_computing_and_no_more_than_there_is():
    for late, data, compute in ((1.0, 1.0, 2.0), (2.5, 2.5, 0.5), (9.0, 3.0, 0.0)):
        line = line_of(wait_1=late)
        assert (line.data_wait_s, line.compute_s, line.checkpoint_s, line.other_s) == (data, compute, 0.5, 0.5)


def test_a_step_without_a_target_has_no_loss():
    assert math.isnan(line_of(loss_sum=0.0, loss_tokens=0).loss)


def test_units_and_conventions_lie_beside_the_metrics(tmp_path):
    config = small_config()
    write_meta(tmp_path, config, 1, "cpu", 0)
    write_meta(tmp_path, config, 1, "cpu", 10)  # goes on as it was
    write_meta(tmp_path, config, 4, H100, 20)
    about = json.loads((tmp_path / META).read_text())
    assert list(about["units"]) == list(UNITS) == list(StepMetrics.__dataclass_fields__)
    assert "causal" in about["flops"] and "dense peak" in about["mfu"]
    assert [(s["behind_step"], s["ranks"], s["data"], s["device"], s["peak_tflops"]) for s in about["starts"]] == [
        (0, 1, 1, "cpu", None), (20, 4, 4, H100, 989.0),
    ]  # fmt: skip


@pytest.mark.parametrize("content", ["", "{", "[]", '{"starts": 3}', '{"starts": [4]}'])
def test_damaged_conventions_are_written_anew(tmp_path, content):
    (tmp_path / META).write_text(content)
    write_meta(tmp_path, small_config(), 1, "cpu", 3)
    assert [s["behind_step"] for s in json.loads((tmp_path / META).read_text())["starts"]] == [3]
