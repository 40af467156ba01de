"""Tokens a second, MFU and peak memory of training steps: ``python -m benchmarks.gpu.training_speed``.

Whole steps of the real engine: forward and backward passes of ``--micro`` packs, the gradient norm and the optimizer.
Each precision has a process of its own, in which the mergings share one model. Weights are random.
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import common
from benchmarks.gpu.build import model_on_device
from benchmarks.merging import merging_of
from benchmarks.report import table
from benchmarks.timing import Clock
from megatron_elva.config.schema import Config
from megatron_elva.layout import Pack
from megatron_elva.model.inputs import ModelInputs, prepare
from megatron_elva.parallel.engine import Engine, StepResult
from megatron_elva.parallel.ranks import start, stop
from megatron_elva.training.flops import CONVENTION, ends_flops, layer_groups_flops, peak_tflops

NAME = "training_speed"
PRECISIONS = {"cuda": ("bf16", "fp8_current", "fp8_delayed", "fp8_blockwise"), "cpu": ("bf16",)}
RECOMPUTE = "train.recompute=true"


def timed_step(engine: Engine, clock: Clock, inputs: Sequence[ModelInputs]) -> tuple[dict[str, float], StepResult]:
    """Seconds of a whole step and of the optimizer within it, and what the step gave."""
    spans: list[tuple[Any, Any]] = []
    update = engine.optimizer.step

    def step() -> Any:
        began = clock.stamp()
        out = update()
        spans.append((began, clock.stamp()))
        return out

    results: list[StepResult] = []
    engine.optimizer.step = step
    try:
        seconds = common.whole(clock, lambda: results.append(engine.train_step(inputs)))
    finally:
        engine.optimizer.step = update
    return {"step": seconds, "optimizer": sum(clock.seconds(*span) for span in spans)}, results[0]


def measure(a: argparse.Namespace, engine: Engine, config: Config) -> dict[str, Any]:
    """One row: a merging of one precision."""
    clock = Clock(engine.ranks.device)
    packs = [common.made_up_pack(a, config, seed) for seed in range(a.micro)]
    results: list[StepResult] = []

    def run() -> dict[str, float]:
        seconds, result = timed_step(engine, clock, inputs)
        if not math.isfinite(result.grad_norm):
            raise ValueError(f"a gradient norm of {result.grad_norm}: the optimizer left the step out, which is faster")
        results[:] = [result]
        print(f"{config.precision.name}, {a.merging}: {seconds['step']:.4g} s, loss {result.loss_sum:.4g}", flush=True)
        return seconds

    (model,) = engine.chunks
    with merging_of(model, config), common.peak_memory(a.device) as peak:
        inputs = [prepare(pack, config, engine.ranks.device) for pack in packs]
        seconds = common.repeated(run, a.warmup, a.repeats)
    return figures(config, packs, results[0], seconds, engine.ranks.device.type) | peak


def figures(
    config: Config, packs: Sequence[Pack], result: StepResult, seconds: Mapping[str, Sequence[float]], device: str
) -> dict[str, Any]:
    """What a row says.

    Args:
        config: of the row.
        packs: of a step.
        result: of its last step.
        seconds: of each repeat, by part.
        device: ``cuda`` or ``cpu``; peaks are of the GPU in this process.
    """
    median = {name: common.summary(values)["median"] for name, values in seconds.items()}
    tokens = sum(pack.spec.tokens - pack.spec.padding for pack in packs)
    visual = sum(video.tokens for pack in packs for video in pack.spec.videos)
    row: dict[str, Any] = {
        "precision": config.precision.name,
        "fp8": config.precision.fp8 is not None,
        "recompute": config.train.recompute,
        "micro_steps": len(packs),
        "tokens": tokens,
        "padding": sum(pack.spec.padding for pack in packs),
        "tokens_out": tokens - visual + result.visual_tokens,
        "loss_tokens": result.loss_tokens,
        "seconds": {name: list(values) for name, values in seconds.items()},
        "tokens_per_s": tokens / median["step"],
        "optimizer_share": median["optimizer"] / median["step"],
    }
    ends = sum(ends_flops(config.model, config.model.vocab_size or 0, p.spec, _targets(p)) for p in packs)
    for convention in ("causal", "full"):
        flops = 3 * (layer_groups_flops(config.model, result.layers, convention) + ends)
        row[f"flops_{convention}"] = flops
        row[f"tflops_{convention}"] = flops / median["step"] / 1e12
    return row | utilisation(row, device)


def utilisation(row: Mapping[str, Any], device: str) -> dict[str, float | None]:
    """MFU in both conventions, of the peak of the row's own format and of the one in bf16; None where it is unknown."""
    name = common.report.machine(device)["device"] if device == "cuda" else "cpu"
    out: dict[str, float | None] = {}
    for suffix, fp8 in (("", row["fp8"]), ("_of_bf16_peak", False)):
        peak = peak_tflops(name, fp8)
        out[f"peak_tflops{suffix}"] = peak
        for convention in ("causal", "full"):
            out[f"mfu_{convention}{suffix}"] = None if peak is None else row[f"tflops_{convention}"] / peak
    return out


def _targets(pack: Pack) -> int:
    return int((pack.labels >= 0).sum())


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""
    lines = [_line(name, row) for name, row in result["rows"].items() if "failed" not in row]
    head = (
        "precision, merging", "s a step", "of it optimizer", "tokens/s", "tokens out", "TFLOP/s causal", "MFU causal",
        "MFU full", "MFU causal of bf16 peak", "peak GiB",
    )  # fmt: skip
    rows = result["rows"].values()
    packs = f"{result['micro']} packs of {result['samples']} x ({result['frames']} frames of {result['grid']} x "
    packs += f"{result['grid']} cells + {result['text']} text tokens)"
    again = "\n\nRows marked * recompute activations, as they did not fit otherwise." if any(
        row.get("recompute") for row in rows
    ) else ""  # fmt: skip
    return f"""{common.heading("Training speed", result)}

{result["model"]} ({" ".join(result["set"])}), a step is {packs}, gradient norm and optimizer included.
{result["repeats"]} steps after {result["warmup"]} that are not counted; medians, lowest and highest in brackets.

{table(head, lines) if lines else "No row was measured."}{again}{common.failures(result["rows"])}

Tokens a second are those at the input, padding not counted. Operations: {CONVENTION};
with merging those of the tokens that each layer has, so that MFU tells what the device does and not what merging
saves. Full counts every score of attention, causal half of them. MFU is of the dense peak of the row's own format (FP8:
twice that of bf16), and in the last column but one of the bf16 peak. Peak: what torch's allocator held at most. Data
and weights are made up; data are ready before the step."""


def _line(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    def share(value: float | None) -> str:
        return "-" if value is None else f"{value:.1%}"

    return (
        name + (" *" if row["recompute"] else ""),
        common.spread(common.summary(row["seconds"]["step"])),
        f"{row['optimizer_share']:.1%}",
        f"{row['tokens_per_s']:,.0f}",
        f"{row['tokens_out']:,} of {row['tokens']:,}",
        f"{row['tflops_causal']:.4g}",
        *(share(row[key]) for key in ("mfu_causal", "mfu_full", "mfu_causal_of_bf16_peak")),
        "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.options(NAME, __doc__, model="elva_1_5b", samples=3, frames=16, grid=12, text=218, vocab=151936)
    parser.add_argument("--precision", nargs="+", help="options of configs/precision; default: all, on cpu bf16")
    parser.add_argument("--merging", nargs="+", default=["none", "fast"], help="options of configs/merging")
    parser.add_argument("--micro", type=int, default=4, help="packs of a step")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=8)
    a = parser.parse_args(argv)
    if min(a.micro, a.repeats) < 1:
        parser.error("--micro and --repeats: at least 1")
    a.precision = a.precision or list(PRECISIONS[a.device])
    return a


def _part(a: argparse.Namespace) -> int:
    """All mergings of one precision, with one model."""
    rows = {}
    ways = {name: common.configured(a, a.part, name) for name in a.merging}
    first = next(iter(ways.values()))
    ranks = start(first.parallel, a.device, first.seed)
    engine = Engine(first, [model_on_device(first, ranks)], ranks)
    engine.set_learning_rate(0.01, False)
    for name, config in ways.items():
        one = argparse.Namespace(**{**vars(a), "merging": name})
        rows[name] = measure(one, engine, config)
    stop()
    return common.write_part(a, rows)


def main(argv: Sequence[str]) -> int:
    """Measure and report; 1 where a precision failed."""
    a = _arguments(argv)
    if a.part:
        return _part(a)
    rows: dict[str, Any] = {}
    for precision, found in common.parts(NAME, argv, a.precision, a.part_limit):
        if "OutOfMemoryError" in str(found.get("failed")) and RECOMPUTE not in a.set:
            found = common.one_part(NAME, [*argv, "--set", *a.set, RECOMPUTE], precision, a.part_limit)
        rows |= {precision: found} if "failed" in found else {f"{precision}, {m}": row for m, row in found.items()}
    result = {
        **common.head(NAME, argv, a.device),
        "device_kind": a.device,
        "status": "failed" if any("failed" in row for row in rows.values()) else "ok",
        **{name: getattr(a, name) for name in ("model", "set", "samples", "frames", "grid", "text", "vocab")},
        **{name: getattr(a, name) for name in ("micro", "warmup", "repeats")},
        "flops_convention": CONVENTION,
        "rows": rows,
    }
    return common.finish(NAME, a, result, text(result))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
