"""Frames -> cells of patches at native resolution.

Shape letters: T frames, H and W pixels, P side of a patch, r patches per side of a cell, N cells of all frames.
"""

from __future__ import annotations

import numpy as np

from megatron_elva.layout import VideoSpec

FITS = ("crop", "pad")
"""How height and width become whole cells."""


def _whole_cells(frames: np.ndarray, axis: int, side: int, fit: str) -> np.ndarray:
    """Bring one axis to a multiple of ``side``: cut both ends, or repeat the last line at the far end."""
    size = frames.shape[axis]
    if fit == "crop" and size >= side:
        kept = size // side * side
        start = (size - kept) // 2
        return frames.take(range(start, start + kept), axis) if kept < size else frames
    missing = -size % side
    if not missing:
        return frames
    widths = [(0, 0)] * frames.ndim
    widths[axis] = (0, missing)
    return np.pad(frames, widths, mode="edge")


def to_cells(frames: np.ndarray, patch: int, reduction: int, fit: str) -> tuple[np.ndarray, VideoSpec]:
    """Cut frames into the patches that the model takes.

    Args:
        frames: ``[T, H, W, 3]`` uint8.
        patch: side of a patch in pixels (P).
        reduction: patches per side of a cell (r).
        fit: ``crop`` cuts the centre down to whole cells, ``pad`` repeats the bottom and right edge up to whole cells.
            An axis shorter than one cell is padded in both.

    Returns:
        ``[N * r * r, P * P * 3]`` uint8 in the order of `megatron_elva.layout.Pack.patches`, and the video in cells.
    """
    if fit not in FITS:
        raise ValueError(f"fit: {fit!r}; allowed: {', '.join(FITS)}")
    side = patch * reduction
    frames = _whole_cells(_whole_cells(frames, 1, side, fit), 2, side, fit)
    n_frames, height, width, _ = frames.shape
    rows, columns = height // side, width // side
    split = frames.reshape(n_frames, rows, reduction, patch, columns, reduction, patch, 3)
    # frame, cell row, cell column, then patch row and column in the cell, then pixel row, pixel column, colour
    ordered = split.transpose(0, 1, 4, 2, 5, 3, 6, 7)
    flat = np.ascontiguousarray(ordered).reshape(-1, patch * patch * 3)
    return flat, VideoSpec.uniform(n_frames, rows, columns)
