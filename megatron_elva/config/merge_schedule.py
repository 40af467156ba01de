"""Where tokens merge, and how many are left: what a merging config means for a model and a video.

Pure arithmetic on the config; needs no torch. A resolution class is a video's frames on one grid: T frames of N cells.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from megatron_elva.config.schema import MergingConfig


@dataclass(frozen=True)
class ResolvedPoint:
    """A merge point of one model.

    Attributes:
        index: its place in `merging.points`, from 0.
        layer: decoder layers done before the merge, from 1 to the number of layers - 1.
        rule: ``threshold`` or ``budget``.
        tau: similarity above which a link merges; None for ``budget``.
        keep: share of the class's cells that stays; None for ``threshold``.
    """

    index: int
    layer: int
    rule: str
    tau: float | None
    keep: float | None


@dataclass(frozen=True)
class Kept:
    """A number of cell tokens, or of cell tokens summed over layers.

    Attributes:
        count: that many, or that many at most.
        exact: whether the number is known before the forward pass.
    """

    count: int
    exact: bool

    @property
    def bound(self) -> str:
        """``"at most "`` in front of a number that is no more than a bound."""
        return "" if self.exact else "at most "


def layer_of(after: float, layers: int) -> int:
    """Layers done at ``after``: a layer number, or below 1 a share of the depth.

    Never below 1 for a share, but no bound at the other end: whether the number fits the model, `validate` checks.
    """
    return max(1, round(after * layers)) if after < 1 else int(after)


def resolve(merging: MergingConfig, layers: int) -> tuple[ResolvedPoint, ...]:
    """The merge points of a model with ``layers`` decoder layers; none but with ``kind=hierarchical``."""
    if merging.kind != "hierarchical":
        return ()
    return tuple(
        ResolvedPoint(index, layer_of(point.after, layers), point.rule, point.tau, point.keep)
        for index, point in enumerate(merging.points)
    )


def budget(keep: float, frames: int, cells: int) -> int:
    """Cell tokens that a budget leaves of a resolution class at most: its share, but one for each place at least."""
    # 0.1 * 30 is 3.0000000000000004 in floats, and ceil would make 4 of it. The error of the product is below 1e-6 for
    # any number of cells below 1e9, and a share of up to six decimals gives no smaller fraction.
    return max(math.ceil(round(keep * frames * cells, 6)), cells)


def kept_cells(points: Sequence[ResolvedPoint], frames: int, cells: int) -> list[Kept]:
    """Cell tokens of a resolution class after each point."""
    out: list[Kept] = []
    now = Kept(frames * cells, exact=True)
    for point in points:
        if point.rule == "budget":
            assert point.keep is not None  # `validate` refuses a budget without
            now = Kept(min(now.count, budget(point.keep, frames, cells)), now.exact)
        # each place keeps one token at least, so that a bound that low is the number itself: with one frame always
        now = Kept(now.count, exact=now.count == cells or (now.exact and point.rule == "budget"))
        out.append(now)
    return out


def cell_layers(points: Sequence[ResolvedPoint], layers: int, frames: int, cells: int) -> Kept:
    """Cell tokens of a resolution class summed over the layers; without merging ``layers * frames * cells``."""
    after = kept_cells(points, frames, cells)
    counts = [frames * cells, *(kept.count for kept in after)]
    edges = [0, *(point.layer for point in points), layers]
    # a bound counts only where a layer sees it: of two points at one place the second alone does
    seen = [kept.exact for kept, start, end in zip(after, edges[1:-1], edges[2:], strict=True) if end > start]
    spans = zip(counts, edges[:-1], edges[1:], strict=True)
    return Kept(sum(count * (end - start) for count, start, end in spans), all(seen))


def describe(merging: MergingConfig, layers: int, frames: int, cells: int) -> list[str]:
    """What merging does to a video of ``frames`` frames of ``cells`` cells, in lines for people."""
    if merging.kind == "none":
        return ["none"]
    if frames == 1:
        return ["one frame: nothing merges"]
    if merging.kind == "pooling":
        return [f"average of {merging.pooling.window} frames at the input"]
    points = resolve(merging, layers)
    places = [f"after layer {point.layer}" for point in points]
    places[0] += f" of {layers}"
    stays = f"the {merging.survivor} token of a run stays"
    rules = "; ".join(f"{place}: {_rule(point)}" for place, point in zip(places, points, strict=True))
    return [f"{rules}; {stays}", _left(points, layers, frames, cells)]


def _rule(point: ResolvedPoint) -> str:
    return (
        f"similarity above {point.tau:g} merges" if point.rule == "threshold" else f"keep {_percent(point.keep or 0)}"
    )


def _percent(share: float) -> str:
    return f"{100 * share:.4g}% of the cells"


def _left(points: Sequence[ResolvedPoint], layers: int, frames: int, cells: int) -> str:
    """How many cell tokens of a video are left, at the end and summed over the layers."""
    whole, last = frames * cells, kept_cells(points, frames, cells)[-1]
    summed = cell_layers(points, layers, frames, cells)
    known = "counts known beforehand" if summed.exact else "a threshold's counts depend on the video"
    return (
        f"a video of {frames} frames of {cells:,} cells: {last.bound}{last.count:,} of {whole:,} cell tokens left "
        f"({last.count / whole:.0%}), {summed.bound}{summed.count / (layers * whole):.1%} of cell tokens x layers, "
        f"without FRAME, LINE and text ({known})"
    )
