"""What `benchmarks.merging` expects, how it sums its times up, and the text that it prints."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.report import table
from megatron_elva.config.merge_schedule import resolve
from megatron_elva.config.schema import Config, MergingConfig
from megatron_elva.layout import Pack
from megatron_elva.training.flops import layer_groups_flops, merged_groups

MERGE_LIMIT = 0.03
"""Target: merge points' share of a training step at most."""
HALF_LIMIT = 0.7
"""Target: decoder layers with half of the cells from a quarter of the depth on, as a share of their time without."""
PASSES = 20
"""Times that a merge point and its backward pass read or write the cells' hidden states in fp32; a rough count."""
BALANCE = 10.0
"""Operations that a machine does in matrix products while it moves one byte; a rough figure for CPUs and GPUs."""


def expected_merge_share(config: Config, merging: MergingConfig, pack: Pack) -> float:
    """Share of a training step's decoder time that merge points should take, from the bytes that they move."""
    points = len(resolve(merging, config.model.layers))
    cells = sum(v.cells for v in pack.spec.videos)
    moved = points * PASSES * cells * config.model.hidden * 4 * BALANCE
    groups = merged_groups(config.model, merging, pack.spec, 1.0)
    return moved / (moved + 3 * layer_groups_flops(config.model, groups))


def announce(shape: str, expected: Mapping[str, Mapping[str, Any]]) -> None:
    """Say what is expected before anything is measured."""
    for name, values in expected.items():
        sys.stderr.write(
            f"{shape}, expected of {name}: decoder {_range(values['decoder_flops_share'])} of none, merge points "
            f"{values['merge_share']:.2%} of the step\n"
        )


def _range(values: Sequence[float]) -> str:
    return " to ".join(f"{value:.3f}" for value in values)


def summarised(measured: dict[str, Any]) -> dict[str, Any]:
    """Medians, spreads, ratios to the first variant round by round, and the targets."""
    base = next(iter(measured["variants"].values()))["seconds"]
    for variant in measured["variants"].values():
        seconds = variant["seconds"]
        variant["summary"] = {name: _summary(values) for name, values in seconds.items()}
        variant["ratio"] = {
            name: _summary([own / other for own, other in zip(seconds[name], base[name], strict=True)])
            for name in ("step", "decoder", "prefill", "prefill_decoder")
        }
        shares = [merge / step for merge, step in zip(seconds["merge"], seconds["step"], strict=True)]
        variant["merge_share_of_step"] = _summary(shares)
    return {**measured, "targets": _targets(measured["variants"])}


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _targets(variants: Mapping[str, Any]) -> list[dict[str, Any]]:
    half = variants["hierarchical"]
    name = "decoder, half of the cells from a quarter of the depth on, to none"
    rows = [(name, HALF_LIMIT, half["expected"]["decoder_flops_share"][-1], half["ratio"]["decoder"]["median"])]
    rows += [
        (f"merge points of {name}, share of a step", MERGE_LIMIT, v["expected"]["merge_share"], share["median"])
        for name, v in variants.items()
        if (share := v["merge_share_of_step"])["max"] > 0
    ]
    names = ("target", "limit", "expected", "found")
    return [{**dict(zip(names, row, strict=True)), "met": row[-1] <= row[1]} for row in rows]


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    shapes = "\n\n".join(_shape(shape) for shape in result["shapes"])
    clock = "seconds are CPU time of the process" if result["clock"] == "cpu" else "seconds are wall time"
    return f"""# Time with and without merging

`{result["command"]}`, {result["date"]}. {result["device"]}, {result["cores"]}, {result["dtype"]};
{versions}; {clock}.

{shapes}

## How it is measured

One process and one model: all variants have the same weights, pixels and text. Rounds go over the variants, each time
from another one; figures are medians over the rounds, with the lowest and the highest in brackets; ratios are taken
within a round. A step is the forward and backward pass of one pack without the optimizer; a prefill is a forward pass
without gradients and with the head at each sample's last position. Decoder: the layers with their merge points and the
last norm, forward and backward. The vocabulary is small, so that the head weighs nothing.

Merge points are timed where they run (`benchmarks/timing.py`): forward from the call to its end, backward between the
gradient of what they return and that of what they got, and what attention derives from the new layout. It is part of
step and decoder. On a GPU all times are those of events on the stream, so waiting for the host counts.

The pixels are waves that drift, from not at all in the top row to half a cell a frame in the bottom row, with noise;
weights are random. What a threshold finds in real videos with trained weights is another matter: here it shows what the
rule costs. Expected shares come from the operations of the decoder layers (causal), computed before anything ran; that
of the merge points assumes {PASSES} passes over the cells' hidden states at {BALANCE:.0f} operations to the byte."""


def _shape(measured: Mapping[str, Any]) -> str:
    s, variants = measured["shape"], measured["variants"]
    title = (
        f"## {s['name']}: {s['model']} with {measured['layers']} layers of width {measured['hidden']}; "
        f"{s['samples']} x ({s['frames']} frames of {s['grid']} x {s['grid']} cells + {s['text']} text tokens)"
    )
    rounds = len(next(iter(variants.values()))["seconds"]["step"])
    targets = [
        (
            t["target"],
            f"{t['limit']:.2f}",
            f"{t['expected']:.3f}",
            f"{t['found']:.3f}",
            "met" if t["met"] else "NOT MET",
        )
        for t in measured["targets"]
    ]
    blocks = [
        title,
        "Expected before measuring, against the operations with the lengths that came out:",
        table(("variant", "tokens in", "out", "cells kept", "decoder expected", "by lengths", "merge expected"),
              [_expected(name, v) for name, v in variants.items()]),
        f"Measured, {rounds} rounds, seconds:",
        table(("variant", "step", "decoder", "merge points", "of them backward", "prefill"),
              [_seconds(name, v["summary"]) for name, v in variants.items()]),
        "Ratios to none, and the merge points' share of the step:",
        table(("variant", "step", "decoder", "prefill", "merge points"),
              [_ratios(name, v) for name, v in variants.items()]),
        table(("target", "at most", "expected", "found", ""), targets),
    ]  # fmt: skip
    return "\n\n".join(blocks)


def _expected(name: str, v: Mapping[str, Any]) -> tuple[str, ...]:
    expected = v["expected"]
    return (
        name,
        f"{v['tokens_in']:,}",
        f"{v['tokens_out']:,}",
        _kept(v),
        _range(expected["decoder_flops_share"]),
        f"{v['decoder_flops_share']:.3f}",
        f"{expected['merge_share']:.2%}",
    )


def _kept(v: Mapping[str, Any]) -> str:
    """Share of the cells behind each merge point, or what pooling leaves."""
    points = v["cells_kept_by_point"]
    if not points:
        return f"{v['cells_kept']:.3f}"
    return ", ".join(f"{p['rule']} after {p['layer']}: {p['kept']:.3f}" for p in points)


def _seconds(name: str, summary: Mapping[str, Any]) -> tuple[str, ...]:
    parts = ("step", "decoder", "merge", "merge_backward", "prefill")
    return (name, *(_with_range(summary[part], lambda x: f"{x:.3g}") for part in parts))


def _ratios(name: str, v: Mapping[str, Any]) -> tuple[str, ...]:
    ratios = (_with_range(v["ratio"][part], lambda x: f"{x:.3f}") for part in ("step", "decoder", "prefill"))
    return (name, *ratios, _with_range(v["merge_share_of_step"], lambda x: f"{x:.2%}"))


def _with_range(summary: Mapping[str, float], shown: Callable[[float], str]) -> str:
    return f"{shown(summary['median'])} ({shown(summary['min'])}..{shown(summary['max'])})"
