"""Operations of a prefill, with and without merging: ``python -m benchmarks.flops``. Arithmetic alone, nothing runs.

Counted as `megatron_elva.training.flops` says, in both conventions for attention, with the head at the last position.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks import report
from megatron_elva.config.compose import compose, group_options
from megatron_elva.config.merge_schedule import resolve
from megatron_elva.config.schema import MergingConfig, ModelConfig
from megatron_elva.layout import PackSpec, SampleSpec, VideoSpec
from megatron_elva.training.flops import ends_flops, layer_groups_flops, merged_groups

PUBLISHED = (
    ("ELVA, no merging (published)", 75.0),
    ("ELVA, merging (published)", 25.0),
)
"""TFLOP of the paper's efficiency table (arXiv 2503.18422): 7B, 32 frames; how they were counted is not said."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Attributes:
        name: the merging.
        tokens_in: tokens in front of the first layer.
        tokens_out: tokens behind the last merge point.
        token_layers: tokens summed over layers, as a share of the same without merging.
        tflop_full: all scores of attention counted.
        tflop_causal: half of them.
    """

    name: str
    tokens_in: int
    tokens_out: int
    token_layers: float
    tflop_full: float
    tflop_causal: float


def row(name: str, model: ModelConfig, merging: MergingConfig, spec: PackSpec, kept: float | None = None) -> Row:
    """Count one way of merging.

    Args:
        name: for the table.
        model: sizes, `vocab_size` included.
        merging: what merges where.
        spec: the pack before pooling.
        kept: as `merged_groups` takes it.
    """
    groups = merged_groups(model, merging, spec, kept)
    window = merging.pooling.window if merging.kind == "pooling" else 1
    ends = ends_flops(model, model.vocab_size or 0, spec.pooled(window), loss_positions=1)
    tokens = [sum(lengths) for _, lengths in groups]
    whole = model.layers * spec.tokens
    return Row(
        name,
        tokens[0],
        tokens[-1],
        sum(layers * n for (layers, _), n in zip(groups, tokens, strict=True)) / whole,
        (layer_groups_flops(model, groups, "full") + ends) / 1e12,
        (layer_groups_flops(model, groups, "causal") + ends) / 1e12,
    )


def rows(model: ModelConfig, spec: PackSpec, kept: Sequence[float]) -> list[Row]:
    """The table's own lines."""
    ways = {name: compose([f"merging={name}"]).merging for name in ("none", "pooling", "paper", "fast")}
    return [
        row("none", model, ways["none"], spec),
        row(f"pooling, window {ways['pooling'].pooling.window}", model, ways["pooling"], spec),
        *(row(f"paper, threshold keeps {k:.0%}", model, ways["paper"], spec, k) for k in kept),
        row("fast", model, ways["fast"], spec),
    ]


def text(result: dict[str, Any], model: ModelConfig) -> str:
    """The table with its heading and what is counted."""
    own = [Row(**line) for line in result["rows"]]
    lines = [
        (
            r.name, f"{r.tokens_in:,}", f"{r.tokens_out:,}", f"{r.token_layers:.3f}", f"{r.tflop_full:.1f}",
            f"{r.tflop_causal:.1f}", "",
        )
        for r in own
    ]  # fmt: skip
    lines += [(name, "", "", "", "", "", f"{value:.0f}") for name, value in PUBLISHED]
    head = ("merging", "tokens in", "after last point", "token-layers", "TFLOP, full", "TFLOP, causal", "published")
    video = f"{result['frames']} frames of {result['size']} x {result['size']} pixels"
    places = {name: compose([f"merging={name}"]).merging for name in ("paper", "fast")}
    return f"""# Operations of a prefill: {result["model"]}, {video}, {result["text"]} text tokens

`{result["command"]}`, {result["date"]}. Counted, not measured.

{report.table(head, lines)}

Counted: the matrix products of all {model.layers} decoder layers with the tokens that each layer has, attention's
scores and weighted sums (full: n x n for a sample of n tokens; causal: half of them), patch embedding and projector,
and the head at the last position. A multiply-add is two operations. Not counted: norms, rotation, softmax, activation
functions, word embedding, and merging itself, none of which has a matrix product. Token-layers: tokens summed over the
layers, as a share of the same sum without merging. TFLOP: 10^12 operations.

Published: ELVA (arXiv 2503.18422), 7B, 32 frames. How it was counted, the size of the frames, the text and the layers
of the merge points are not published. The schedules are ours:
paper = {_points(places["paper"], model)};
fast = {_points(places["fast"], model)}.
What a threshold leaves depends on the video, so the kept share of the cell tokens is assumed; a budget's count behind
it follows, and is exact where no threshold comes before."""


def _points(merging: MergingConfig, model: ModelConfig) -> str:
    rules = (
        (point.layer, f"similarity above {point.tau:g} merges" if point.keep is None else f"keep {point.keep:.0%}")
        for point in resolve(merging, model.layers)
    )
    return ", ".join(f"after layer {layer} {rule}" for layer, rule in rules)


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.flops", description=__doc__)
    models = [name for name in group_options()["model"] if compose([f"model={name}"]).model.vocab_size is not None]
    parser.add_argument("--model", default="elva_7b", choices=models)
    parser.add_argument("--frames", type=int, default=32)
    parser.add_argument("--size", type=int, default=336, help="side of the square frames in pixels")
    parser.add_argument("--text", type=int, default=64, help="text tokens")
    parser.add_argument(
        "--threshold-kept", type=float, nargs="+", default=[0.8, 0.5, 0.25], metavar="SHARE",
        help="shares of the cell tokens that the threshold is assumed to keep",
    )  # fmt: skip
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--md", help="file for the text")
    arguments = parser.parse_args(argv)
    if arguments.frames < 1 or arguments.text < 1:
        parser.error("--frames and --text must be at least 1")
    if not all(0 < share <= 1 for share in arguments.threshold_kept):
        parser.error("--threshold-kept: shares must be above 0 and at most 1")
    return arguments


def main(argv: Sequence[str]) -> int:
    """Print the table; 2 where the arguments do not fit each other."""
    arguments = _arguments(argv)
    model = compose([f"model={arguments.model}"]).model
    grid = arguments.size // model.cell_pixels
    if not grid or arguments.size % model.cell_pixels:
        sys.stderr.write(f"--size={arguments.size}: must be a multiple of a cell's {model.cell_pixels} pixels\n")
        return 2
    spec = PackSpec((SampleSpec((VideoSpec.uniform(arguments.frames, grid, grid), arguments.text)),))
    result = {
        **report.origin("benchmarks.flops", argv),
        **{name: getattr(arguments, name) for name in ("model", "frames", "size", "text", "threshold_kept")},
        "tokens_a_frame": 1 + grid * (grid + 1),
        "rows": [vars(line) for line in rows(model, spec, arguments.threshold_kept)],
        "published_tflop": dict(PUBLISHED),
    }
    report.write(text(result, model), result, arguments.json, arguments.md)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
