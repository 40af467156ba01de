"""Frames -> cells of patches, as a `Geometry` says.

Shape letters: T frames, H and W pixels, P side of a patch, r patches per side of a cell, N cells of all frames.
"""

from __future__ import annotations

import numpy as np

from dali_pipelines.geometry import Fit, Geometry
from dali_pipelines.resample import resize


class Cutter:
    """Cuts the frames of one video one by one, each to its place in the result.

    Attributes:
        patches: ``[N * r * r, P * P * 3]`` uint8, cells in order of the frames; right where frames have been `put`.
    """

    def __init__(self, geometry: Geometry, patch: int, reduction: int) -> None:
        """Make room for all frames.

        Args:
            geometry: sizes and classes.
            patch: side of a patch in pixels (P).
            reduction: patches per side of a cell (r).
        """
        if patch * reduction != geometry.side:
            raise ValueError(
                f"a cell of {reduction} x {patch} pixels a side does not fit a geometry of {geometry.side}"
            )
        self._geometry = geometry
        self._patch, self._reduction = patch, reduction
        per_class = [f.height * f.width // patch**2 for f in geometry.classes]
        ends = np.cumsum([per_class[c] for c in geometry.frame_class]).tolist()
        self._starts = [0, *ends]
        self.patches = np.empty((ends[-1], patch * patch * 3), np.uint8)

    def put(self, frame: np.ndarray, i: int) -> None:
        """Cut chosen frame number ``i``: ``[H, W, 3]`` uint8 as coded, of any strides."""
        geometry, p, r = self._geometry, self._patch, self._reduction
        fit = geometry.classes[geometry.frame_class[i]]
        upright = np.rot90(frame, geometry.turns)
        if upright.shape[:2] != fit.size:
            upright = resize(np.ascontiguousarray(upright)[None], *fit.size)[0]
        pixels = _whole_cells(upright, fit)
        rows, columns = fit.height // geometry.side, fit.width // geometry.side
        down, right, _ = pixels.strides
        blocks = np.lib.stride_tricks.as_strided(
            pixels,
            (rows, columns, r, r, p, p * 3),
            (down * p * r, right * p * r, down * p, right * p, down, 1),
        )
        # a line of a patch is one item of P * 3 bytes: moved as a whole, which is what makes this cheap
        line = np.dtype((np.void, p * 3))
        place = self.patches[self._starts[i] : self._starts[i + 1]].reshape(blocks.shape)
        place.view(line)[..., 0] = blocks.view(line)[..., 0]


def to_patches(frames: np.ndarray, geometry: Geometry, patch: int, reduction: int) -> np.ndarray:
    """Cut frames into the patches that the model takes.

    Args:
        frames: ``[T, H, W, 3]`` uint8 as coded: neither turned nor scaled.
        geometry: sizes and classes of these T frames.
        patch: side of a patch in pixels (P).
        reduction: patches per side of a cell (r).

    Returns:
        ``[N * r * r, P * P * 3]`` uint8 in the order of `megatron_elva.layout.Pack.patches`: the cells of frame 0
        first, row by row, and so on, whatever the classes.
    """
    if len(frames) != len(geometry.frame_class):
        raise ValueError(f"{len(frames)} frames for a geometry of {len(geometry.frame_class)}")
    cutter = Cutter(geometry, patch, reduction)
    for i, frame in enumerate(frames):
        cutter.put(frame, i)
    return cutter.patches


def _whole_cells(frame: np.ndarray, fit: Fit) -> np.ndarray:
    """The part that is used, ``[height, width, 3]`` with pixels of a line side by side; edge lines repeated."""
    kept = frame[fit.top : fit.top + fit.height, fit.left : fit.left + fit.width]
    missing = [(0, fit.height - kept.shape[0]), (0, fit.width - kept.shape[1]), (0, 0)]
    if any(after for _, after in missing):
        kept = np.pad(kept, missing, mode="edge")
    return kept if kept.strides[1:] == (3, 1) else np.ascontiguousarray(kept)
