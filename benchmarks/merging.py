"""Times with and without merging, on the same packs in one process: ``python -m benchmarks.merging``.

Every variant has the same weights and sees the same pixels and text; only what merges differs. Repetitions go round
the variants, so that all of them share what else the machine does. `benchmarks.timing` says how parts are timed.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from benchmarks import merging_report, report
from benchmarks.packs import video_pack
from benchmarks.timing import Clock, prefill, training_step
from megatron_elva.config.compose import compose, group_options
from megatron_elva.config.merge_schedule import resolve
from megatron_elva.config.schema import Config, MergePoint, MergingConfig, ParallelConfig
from megatron_elva.layout import Pack
from megatron_elva.model.decoder import MergeSchedule
from megatron_elva.model.elva import ElvaModel
from megatron_elva.model.inputs import ModelInputs, pooling_window, prepare
from megatron_elva.parallel.engine import build_chunks
from megatron_elva.parallel.ranks import start, stop
from megatron_elva.training.flops import layer_groups_flops, merged_groups

HALF = MergingConfig(kind="hierarchical", points=[MergePoint(after=0.25, rule="budget", keep=0.5)])
"""What the target for time speaks of: after a quarter of the depth, half of the cells stay."""


@dataclass(frozen=True)
class Shape:
    """What is measured.

    Attributes:
        name: for the report.
        model: of ``configs/model``.
        layers: decoder layers of it; None: all.
        samples: samples in the pack.
        frames: frames of each video.
        grid: rows and columns of cells of a frame.
        text: text tokens of each sample.
        vocab: rows of the word embedding.
    """

    name: str
    model: str
    layers: int | None
    samples: int
    frames: int
    grid: int
    text: int
    vocab: int


DEMO = Shape("demo", "tiny", None, samples=16, frames=6, grid=4, text=48, vocab=512)
"""The packs of the demo recipes: 16 videos of 6 frames of 56 x 56 pixels."""


def variants() -> dict[str, MergingConfig]:
    """What is compared, by name; the first is what the others are compared with."""
    shipped = {name: compose([f"merging={name}"]).merging for name in ("none", "pooling", "paper", "fast")}
    return {
        "none": shipped["none"], "pooling": shipped["pooling"], "hierarchical": HALF, "paper": shipped["paper"],
        "fast": shipped["fast"],
    }  # fmt: skip


def configured(shape: Shape, device: str, dtype: str) -> Config:
    """The config of a shape: one process, no merging."""
    config = compose(
        [f"model={shape.model}", "merging=none", "cluster=local", f"device={device}", f"precision={dtype}"]
    )
    model = replace(config.model, layers=shape.layers or config.model.layers, vocab_size=shape.vocab)
    return replace(config, model=model, parallel=ParallelConfig(tensor=1, pipeline=1, sequence=False))


def video_pack_of(shape: Shape, config: Config, frames: int) -> Pack:
    """The pack of a shape, with as many frames."""
    return video_pack(config.model, shape.samples, frames, shape.grid, shape.text, shape.vocab, config.seed)


def expectation(config: Config, merging: MergingConfig, pack: Pack) -> dict[str, Any]:
    """What the operations of the decoder layers say beforehand: shares of what they are without merging.

    With a threshold two numbers, for it may remove nothing or all it may.
    """

    def share(kept: float) -> float:
        groups = merged_groups(config.model, merging, pack.spec, kept)
        return layer_groups_flops(config.model, groups) / _whole(config, pack)

    bounds = sorted({share(0.0), share(1.0)})
    return {"decoder_flops_share": bounds, "merge_share": merging_report.expected_merge_share(config, merging, pack)}


def _whole(config: Config, pack: Pack) -> float:
    return layer_groups_flops(config.model, merged_groups(config.model, MergingConfig(kind="none"), pack.spec))


@contextmanager
def merging_of(model: ElvaModel, config: Config) -> Iterator[None]:
    """The model with the merge points of a config."""
    before = model.decoder.schedule
    points = resolve(config.merging, config.model.layers)
    model.decoder.schedule = MergeSchedule(points, config.merging.survivor, config.pad_multiple)
    try:
        yield
    finally:
        model.decoder.schedule = before


@dataclass(frozen=True)
class Outcome:
    """What merging did to a pack.

    Attributes:
        groups: the decoder's layer groups.
        cells: cell tokens left behind each merge point.
    """

    groups: list[tuple[int, tuple[int, ...]]]
    cells: list[int]


def one_round(model: ElvaModel, config: Config, inputs: ModelInputs, clock: Clock) -> tuple[dict[str, float], Outcome]:
    """Seconds of a training step and a prefill, and what merging did."""
    trace = model.decoder.trace
    trace.clear()
    trace.keep_states = True
    with merging_of(model, config):
        seconds = training_step(model, inputs, clock)
        outcome = Outcome(list(trace.layers), [sum(state.counts) for state in trace.states])
        seconds |= prefill(model, inputs, clock)
    trace.clear()
    return seconds, outcome


def measure(shape: Shape, device: str, dtype: str, rounds: int, warmup: int, cpu_time: bool = False) -> dict[str, Any]:
    """Measure all variants of a shape.

    Args:
        shape: what to measure.
        device: ``cpu`` or ``cuda``.
        dtype: option of ``configs/precision``.
        rounds: how often each variant is timed.
        warmup: rounds before those, not kept.
        cpu_time: as `Clock` takes it.
    """
    config = configured(shape, device, dtype)
    ways = {name: replace(config, merging=merging) for name, merging in variants().items()}
    pack, small = (video_pack_of(shape, config, frames) for frames in (shape.frames, 2))
    expected = {name: expectation(config, way.merging, pack) for name, way in ways.items()}
    merging_report.announce(shape.name, expected)

    ranks = start(config.parallel, device, config.seed)
    clock = Clock(ranks.device, cpu_time)
    (model,) = build_chunks(config, shape.vocab, ranks)
    model.train()
    for way in ways.values():  # what a first call costs: compiled kernels, pools of threads
        one_round(model, way, prepare(small, way, ranks.device), clock)
    inputs = {name: prepare(pack, way, ranks.device) for name, way in ways.items()}
    taken: dict[str, list[dict[str, float]]] = {name: [] for name in ways}
    outcomes: dict[str, Outcome] = {}
    for number in range(warmup + rounds):
        names = list(ways)
        turn = number % len(names)  # no variant always follows the same one's warm caches
        for name in names[turn:] + names[:turn]:
            seconds, outcomes[name] = one_round(model, ways[name], inputs[name], clock)
            if number >= warmup:
                taken[name].append(seconds)
            shown = ", ".join(f"{part} {seconds[part]:.4g}" for part in ("step", "decoder", "merge", "prefill"))
            sys.stderr.write(f"{shape.name} round {number + 1} {name}: {shown} s\n")
    del model
    results = {name: _result(ways[name], pack, outcomes[name], taken[name], expected[name]) for name in ways}
    return {"shape": vars(shape), "layers": config.model.layers, "hidden": config.model.hidden, "variants": results}


def _result(
    config: Config, pack: Pack, outcome: Outcome, taken: list[dict[str, float]], expected: dict[str, Any]
) -> dict[str, Any]:
    """Figures of one variant."""
    cells = sum(v.cells for v in pack.spec.videos)
    first = sum(v.cells for v in pack.spec.pooled(pooling_window(config.merging)).videos)
    points = resolve(config.merging, config.model.layers)
    return {
        "tokens_in": sum(outcome.groups[0][1]),
        "tokens_out": sum(outcome.groups[-1][1]),
        "cells_kept": (outcome.cells[-1] if outcome.cells else first) / cells,
        "cells_kept_by_point": [
            {"layer": point.layer, "rule": point.rule, "kept": left / cells}
            for point, left in zip(points, outcome.cells, strict=True)
        ],
        "groups": outcome.groups,
        "decoder_flops_share": layer_groups_flops(config.model, outcome.groups) / _whole(config, pack),
        "expected": expected,
        "seconds": {name: [seconds[name] for seconds in taken] for name in taken[0]},
    }


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.merging", description=__doc__)
    parser.add_argument("--model", default="elva_1_5b", choices=group_options()["model"])
    parser.add_argument("--layers", type=int, default=4, help="decoder layers")
    parser.add_argument("--samples", type=int, default=1, help="samples in the pack")
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--grid", type=int, default=12, help="rows and columns of cells in a frame")
    parser.add_argument("--text", type=int, default=64, help="text tokens of a sample")
    parser.add_argument("--vocab", type=int, default=512, help="rows of the word embedding")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--clock", default="wall", choices=("wall", "cpu"), help="cpu: CPU time of this process")
    parser.add_argument("--dtype", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--steps", type=int, default=3, help="rounds that are timed")
    parser.add_argument(
        "--warmup", type=int, help="rounds before them; default: 0 on cpu, where rounds last, and 2 on cuda"
    )
    parser.add_argument("--demo", action="store_true", help="the demo's shape beside it, with ten times the rounds")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--md", help="file for the text")
    arguments = parser.parse_args(argv)
    if min(getattr(arguments, n) for n in ("samples", "frames", "grid", "text", "vocab", "steps")) < 1:
        parser.error("sizes and --steps must be at least 1")
    if arguments.clock == "cpu" and arguments.device != "cpu":
        parser.error("--clock=cpu goes with --device=cpu; on a GPU events are the clock")
    if arguments.layers < 2:
        parser.error("--layers must be at least 2, as merge points lie between layers")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Measure and report."""
    a = _arguments(argv)
    shape = Shape("video", a.model, a.layers, a.samples, a.frames, a.grid, a.text, a.vocab)
    warmup = (2 if a.device == "cuda" else 0) if a.warmup is None else a.warmup
    shapes = [(shape, a.steps), *([(DEMO, 10 * a.steps)] if a.demo else [])]
    measured = [measure(s, a.device, a.dtype, rounds, warmup, a.clock == "cpu") for s, rounds in shapes]
    result = {
        **report.origin("benchmarks.merging", argv),
        **report.machine(a.device),
        "dtype": a.dtype,
        "clock": a.clock,
        "shapes": [merging_report.summarised(m) for m in measured],
    }
    stop()
    report.write(merging_report.text(result), result, a.json, a.md)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
