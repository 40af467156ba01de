"""How frames become cells, in whole numbers: rotation, size, crop or padding, resolution classes.

The one place that decides it, whichever decoder runs: what `plan` says holds for every route, bit for bit.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

from dali_pipelines.options import Hybrid, VisionOptions
from megatron_elva.layout import VideoSpec


@dataclass(frozen=True)
class Fit:
    """One resolution class.

    Attributes:
        size: ``(h, w)`` of the upright frame after scaling.
        top: first line kept.
        left: first column kept.
        height: lines used, whole cells; where it reaches past the frame the last line is repeated.
        width: columns used, whole cells; where it reaches past the frame the last column is repeated.
    """

    size: tuple[int, int]
    top: int
    left: int
    height: int
    width: int


@dataclass(frozen=True)
class Geometry:
    """How the chosen frames of one video become cells.

    Attributes:
        turns: ``np.rot90(frame, turns)`` makes a coded frame upright (0..3).
        native: ``(H, W)`` upright, before scaling.
        side: side of a cell in pixels.
        classes: the resolution classes in order of first appearance.
        frame_class: the class of each chosen frame.
    """

    turns: int
    native: tuple[int, int]
    side: int
    classes: tuple[Fit, ...]
    frame_class: tuple[int, ...]

    @property
    def video(self) -> VideoSpec:
        """The video in cells."""
        grids = tuple((f.height // self.side, f.width // self.side) for f in self.classes)
        return VideoSpec(grids, self.frame_class)


def plan(native: tuple[int, int], turns: int, frames: int, options: VisionOptions) -> Geometry:
    """Decide how ``frames`` chosen frames of a video become cells.

    Args:
        native: ``(H, W)`` upright, before scaling.
        turns: quarter turns that make a coded frame upright.
        frames: number of chosen frames, at least 1.
        options: the bounds and how sizes become whole cells.
    """
    return _plan(native, turns, frames, options.side, options.fit, options.max_pixels, options.hybrid)


@lru_cache(maxsize=4096)
def _plan(
    native: tuple[int, int],
    turns: int,
    frames: int,
    side: int,
    fit: str,
    max_pixels: int | None,
    hybrid: Hybrid | None,
) -> Geometry:
    if frames < 1:
        raise ValueError(f"a video needs at least one frame, got {frames}")
    if hybrid is None:
        sizes = [fit_area(*native, max_pixels)]
    else:
        sizes = [fit_area(*native, _lower(bound * bound, max_pixels)) for bound in (hybrid.hi, hybrid.lo)]
        if sizes[0] == sizes[1] or frames == 1:
            del sizes[1]
    period = hybrid.k + 1 if hybrid is not None and len(sizes) == 2 else 1
    frame_class = tuple(0 if i % period == 0 else 1 for i in range(frames))
    return Geometry(turns % 4, native, side, tuple(_whole_cells(size, side, fit) for size in sizes), frame_class)


def fit_area(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """The largest size of (nearly) the same aspect ratio whose area is at most ``max_pixels``."""
    if max_pixels is None or height * width <= max_pixels:
        return height, width
    h, w = max(isqrt(max_pixels * height // width), 1), max(isqrt(max_pixels * width // height), 1)
    return min(h, max(max_pixels // w, 1)), min(w, max(max_pixels // h, 1))  # a very thin frame has a side of 1


def _lower(bound: int, other: int | None) -> int:
    return bound if other is None else min(bound, other)


def _whole_cells(size: tuple[int, int], side: int, fit: str) -> Fit:
    (top, height), (left, width) = (_axis(n, side, fit) for n in size)
    return Fit(size, top, left, height, width)


def _axis(size: int, side: int, fit: str) -> tuple[int, int]:
    """First line kept and lines used: the centre with ``crop``; all and more with ``pad`` or below one cell."""
    if fit == "crop" and size >= side:
        used = size // side * side
        return (size - used) // 2, used
    return 0, -(-size // side) * side
