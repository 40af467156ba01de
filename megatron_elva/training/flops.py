"""Floating-point operations of a pack, from the real lengths of its samples.

Convention: a multiply-add is two operations; attention is causal, so a sample of n tokens costs n^2 / 2 scores for each
attention head; the output layer is counted where a loss is taken, as it is computed nowhere else; the backward pass
costs twice the forward pass; padding and recomputation are not counted. Each layer counts with the lengths that merging
has left there; merging itself has no matrix product and is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise

from megatron_elva.config.merge_schedule import ResolvedPoint, budget, resolve
from megatron_elva.config.schema import MergingConfig, ModelConfig
from megatron_elva.layout import PackSpec, SampleSpec

CONVENTION = "causal attention, backward = 2 x forward, head at loss positions, no recomputation"
PEAK_TFLOPS = {
    "H100 PCIe": 756.0,
    "H100 NVL": 835.0,
    "H100": 989.0,
    "H200 NVL": 835.0,
    "H200": 989.0,
    "H800 PCIe": 756.0,
    "H800": 989.0,
    "A100": 312.0,
}
"""Dense bf16 peak by device name, longer names first (NVIDIA data sheets, without sparsity; SXM unless named).

FP8 on Hopper: twice that.
"""


def layer_matmul_parameters(model: ModelConfig) -> int:
    """Weights of one decoder layer that take part in a matrix product for every token."""
    d, h = model.head_dim, model.hidden
    return h * d * (model.heads + 2 * model.kv_heads) + d * model.heads * h + 3 * h * model.ffn_hidden


SCORES = {"causal": 0.5, "full": 1.0, "none": 0.0}
"""Share of the ``n * n`` scores of a sample that each attention convention counts."""


def decoder_flops(model: ModelConfig, lengths: list[int], attention: str = "causal") -> float:
    """Forward operations of one decoder layer on samples of the given lengths."""
    scores = sum(SCORES[attention] * n * n for n in lengths)
    return 2.0 * layer_matmul_parameters(model) * sum(lengths) + 4 * scores * model.heads * model.head_dim


def patch_embedding_flops(model: ModelConfig, spec: PackSpec) -> float:
    """Forward operations of patch embedding and projector."""
    c = model.patch_width
    cells = sum(v.cells for v in spec.videos)
    frames = sum(v.frames for v in spec.videos)
    rows = sum(v.rows for v in spec.videos)
    total = 2.0 * cells * model.patch_values * c + 2.0 * (cells + frames + rows) * c * model.hidden
    if model.patch_embedding == "cross_attention":
        by_head = 2.0 * cells * model.patch_heads * c
        # both FRAME and LINE: scores of all cells and sums over them by head, the query and its product with the keys
        total += 2 * (2 * by_head + 2 * 2.0 * c * c)
        # values and output of each group
        total += 2 * 2.0 * (frames + rows) * c * c
    return total


def ends_flops(model: ModelConfig, vocab: int, spec: PackSpec, loss_positions: int) -> float:
    """Forward operations of a pack outside the decoder layers: patch embedding, projector and head.

    Args:
        model: sizes.
        vocab: rows of the word embedding.
        spec: the pack as the language model gets it (after pooling, before any merge).
        loss_positions: positions that go through the head.
    """
    return patch_embedding_flops(model, spec) + 2.0 * model.hidden * vocab * loss_positions


def layer_groups_flops(
    model: ModelConfig, groups: Iterable[tuple[int, Sequence[int]]], attention: str = "causal"
) -> float:
    """Forward operations of layer groups.

    Args:
        model: sizes.
        groups: ``(layers, lengths of the samples in them)``.
        attention: ``causal``, ``full`` (every score, as profilers count that know no mask) or ``none``.
    """
    return sum(layers * decoder_flops(model, list(lengths), attention) for layers, lengths in groups)


def merged_groups(
    model: ModelConfig, merging: MergingConfig, spec: PackSpec, threshold_kept: float | None = None
) -> list[tuple[int, tuple[int, ...]]]:
    """Layer groups of a pack before it runs, in the form that the decoder's trace has afterwards.

    Exact but for thresholds, whose result depends on the video.

    Args:
        model: sizes.
        merging: what merges where.
        spec: the pack as the data gives it (before pooling); its padding is not counted.
        threshold_kept: share of the cell tokens in front of a threshold point that are there behind it, in each
            resolution class; never below one token for each place.

    Returns:
        ``(layers, lengths of the samples)`` of each layer group.

    Raises:
        ValueError: a threshold point and no `threshold_kept`.
    """
    window = merging.pooling.window if merging.kind == "pooling" else 1
    spec = spec.pooled(window)
    points = resolve(merging, model.layers)
    steps = [_lengths_by_point(sample, points, threshold_kept) for sample in spec.samples]
    edges = [0, *(point.layer for point in points), model.layers]
    return [
        (end - start, tuple(lengths[i] for lengths in steps))
        for i, (start, end) in enumerate(pairwise(edges))
        if end > start
    ]


def _lengths_by_point(sample: SampleSpec, points: Sequence[ResolvedPoint], threshold_kept: float | None) -> list[int]:
    """Length of a sample in front of the first point and behind each."""
    classes = [
        (frames, rows * columns)
        for video in sample.videos
        for frames, (rows, columns) in zip(video.class_frames, video.grids, strict=True)
    ]
    left = [frames * cells for frames, cells in classes]
    lengths = [sample.tokens]
    for point in points:
        after = [_left(point, n, *klass, threshold_kept) for n, klass in zip(left, classes, strict=True)]
        lengths.append(lengths[-1] - sum(left) + sum(after))
        left = after
    return lengths


def _left(point: ResolvedPoint, now: int, frames: int, cells: int, threshold_kept: float | None) -> int:
    """Cell tokens of a resolution class behind a point, of `now` in front of it."""
    if point.rule == "budget":
        assert point.keep is not None  # `validate` refuses a budget without
        return min(now, budget(point.keep, frames, cells))
    if threshold_kept is None:
        raise ValueError("a threshold's result depends on the video: give threshold_kept")
    # rounded first, as 0.1 * 30 is a little more than 3 in floats; no class is left below one token a place
    return min(now, max(math.ceil(round(threshold_kept * now, 6)), cells))


def forward_flops(model: ModelConfig, vocab: int, spec: PackSpec, loss_positions: int) -> float:
    """Forward operations of a whole pack without merging."""
    lengths = [s.tokens for s in spec.samples]
    return layer_groups_flops(model, [(model.layers, lengths)]) + ends_flops(model, vocab, spec, loss_positions)


def training_flops(model: ModelConfig, vocab: int, spec: PackSpec, loss_positions: int) -> float:
    """Forward and backward operations of a whole pack without merging."""
    return 3 * forward_flops(model, vocab, spec, loss_positions)


def peak_tflops(device_name: str, fp8: bool) -> float | None:
    """Dense peak of a device in TFLOP/s; None where it is not known."""
    for name, peak in PEAK_TFLOPS.items():
        if name in device_name:
            return peak * (2 if fp8 and name.startswith("H") else 1)
    return None
