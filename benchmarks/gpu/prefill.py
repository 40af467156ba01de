"""Time of a prefill with and without merging: ``python -m benchmarks.gpu.prefill``.

One video and a question, from pixels on the device to the logits of the next token. Weights are random, so only budgets
may merge: what a threshold finds depends on trained weights, what a budget leaves does not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.gpu import common
from benchmarks.gpu.build import model_on_device
from benchmarks.gpu.training_speed import utilisation
from benchmarks.merging import merging_of
from benchmarks.report import table
from benchmarks.timing import Clock, prefill
from megatron_elva.config.merge_schedule import describe, resolve
from megatron_elva.config.schema import Config
from megatron_elva.model.elva import ElvaModel
from megatron_elva.model.inputs import prepare
from megatron_elva.parallel.ranks import start, stop
from megatron_elva.training.flops import ends_flops, layer_groups_flops

NAME = "prefill"


def measure(a: argparse.Namespace, model: ElvaModel, config: Config) -> dict[str, Any]:
    """One row: a merging of one precision."""
    device = next(model.parameters()).device
    clock, trace = Clock(device), model.decoder.trace
    pack = common.made_up_pack(a, config, 0)
    with merging_of(model, config), common.peak_memory(a.device) as peak:
        inputs = prepare(pack, config, device)

        def run() -> dict[str, float]:
            trace.clear()
            return prefill(model, inputs, clock)

        seconds = common.repeated(run, a.warmup, a.repeats)
    groups, visual = list(trace.layers), trace.visual_tokens
    median = common.summary(seconds["prefill"])["median"]
    cells = sum(video.cells for video in pack.spec.videos)
    total = sum(video.tokens for video in pack.spec.videos)
    tokens = pack.spec.tokens - pack.spec.padding
    row: dict[str, Any] = {
        "precision": config.precision.name,
        "fp8": config.precision.fp8 is not None,
        "schedule": describe(config.merging, config.model.layers, a.frames, a.grid**2)[0],
        "tokens": tokens,
        "tokens_out": tokens - total + visual,
        "cells_kept": 1 - (total - visual) / cells,
        "seconds": seconds,
        "tokens_per_s": tokens / median,
    }
    ends = ends_flops(config.model, config.model.vocab_size or 0, pack.spec, loss_positions=len(pack.spec.samples))
    for convention in ("causal", "full"):
        flops = layer_groups_flops(config.model, groups, convention) + ends
        row[f"flops_{convention}"] = flops
        row[f"tflops_{convention}"] = flops / median / 1e12
    return row | utilisation(row, a.device) | peak


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""
    rows = {name: row for name, row in result["rows"].items() if "failed" not in row}
    head = (
        "precision, merging", "ms", "decoder ms", "merge points ms", "cells kept", "tokens out", "TFLOP causal",
        "TFLOP full", "MFU causal", "peak GiB",
    )  # fmt: skip
    size = f"{result['frames']} frames of {result['grid']} x {result['grid']} cells + {result['text']} text tokens"
    schedules = "\n".join(f"- {name}: {row['schedule']}" for name, row in rows.items())
    return f"""{common.heading("Time of a prefill", result)}

{result["model"]} ({" ".join(result["set"])}), random weights, {result["samples"]} x ({size}).
{result["repeats"]} runs after {result["warmup"]} that are not counted; medians, lowest and highest in brackets.

{table(head, [_line(name, row) for name, row in rows.items()]) if rows else "No row was measured."}

{schedules}{common.failures(result["rows"])}

From pixels on the device to the logits behind the last token; decoding of the video, text tokenizer and the copy to
the device are not in it. TFLOP: 10^12 operations, counted as `megatron_elva/training/flops.py` says, full with every
score of attention and causal with half of them. MFU is of the dense peak of the row's own format. Budgets alone merge
here; quality is not measured."""


def _line(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    parts = {part: common.summary(values) for part, values in row["seconds"].items()}
    return (
        name,
        *(common.spread(parts[part], 1000) for part in ("prefill", "prefill_decoder", "prefill_merge")),
        f"{row['cells_kept']:.1%}",
        f"{row['tokens_out']:,} of {row['tokens']:,}",
        *(f"{row[f'flops_{convention}'] / 1e12:.4g}" for convention in ("causal", "full")),
        "-" if row["mfu_causal"] is None else f"{row['mfu_causal']:.1%}",
        "-" if row["peak_gib"] is None else f"{row['peak_gib']:.1f}",
    )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.options(NAME, __doc__, model="elva_7b", samples=1, frames=32, grid=12, text=64, vocab=152064)
    parser.add_argument("--precision", nargs="+", default=["bf16"], help="options of configs/precision")
    parser.add_argument("--merging", nargs="+", default=["none", "fast"], help="options of configs/merging")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=15)
    a = parser.parse_args(argv)
    for name in a.merging:
        points = resolve(common.compose([f"merging={name}"]).merging, 28)
        if any(point.rule != "budget" for point in points):
            parser.error(f"--merging {name}: has a threshold, whose result on random weights says nothing")
    return a


def main(argv: Sequence[str]) -> int:
    """Measure and report; 1 where a precision failed."""
    a = _arguments(argv)
    if a.part:
        ways = {name: common.configured(a, a.part, name) for name in a.merging}
        first = next(iter(ways.values()))
        ranks = start(first.parallel, a.device, first.seed)
        model = model_on_device(first, ranks).eval()
        found = {name: measure(a, model, config) for name, config in ways.items()}
        stop()
        return common.write_part(a, found)
    rows: dict[str, Any] = {}
    for precision, part in common.parts(NAME, argv, a.precision, a.part_limit):
        rows |= {precision: part} if "failed" in part else {f"{precision}, {m}": row for m, row in part.items()}
    result = {
        **common.head(NAME, argv, a.device),
        "device_kind": a.device,
        "status": "failed" if any("failed" in row for row in rows.values()) else "ok",
        **{name: getattr(a, name) for name in ("model", "set", "samples", "frames", "grid", "text", "vocab")},
        **{name: getattr(a, name) for name in ("warmup", "repeats")},
        "rows": rows,
    }
    return common.finish(NAME, a, result, text(result))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
