"""A contact sheet of what the model sees of one video: the frames as they become patches, with the grid drawn in."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from megatron_elva.layout import VideoSpec

WIDTH = 1600
"""Of a sheet in pixels, about; one frame may make it narrower."""
_MARGIN, _GAP, _LABEL, _LINE = 24, 14, 40, 24
_PAPER, _INK, _SOFT, _ACCENT = (250, 250, 248), (30, 32, 36), (110, 114, 120), (196, 84, 32)
_PATCH_ALPHA, _CELL_ALPHA = 0.3, 0.6
_LEAST = 4  # pixels between two lines; closer ones would hide the picture
_CLEAR = 24  # pixels between two lines from which on they have all their strength
_LEAST_WIDTH = 116  # a label needs so much


@dataclass(frozen=True)
class Label:
    """What stands under a frame.

    Attributes:
        index: number of the frame in its video.
        seconds: its time from the first frame.
    """

    index: int
    seconds: float


def frames_of_patches(patches: np.ndarray, video: VideoSpec, patch: int, reduction: int) -> list[np.ndarray]:
    """Put patches together again.

    Args:
        patches: ``[n, P * P * 3]`` uint8 in the order of `megatron_elva.layout.Pack.patches`.
        video: their video.
        patch: P.
        reduction: patches per side of a cell (r).

    Returns:
        ``[h, w, 3]`` uint8 for each frame.
    """
    frames, first = [], 0
    for rows, columns in video.frame_grids:
        n = rows * columns * reduction**2
        split = patches[first : first + n].reshape(rows, columns, reduction, reduction, patch, patch, 3)
        # cell row, patch row, pixel row, then the same of columns
        ordered = split.transpose(0, 2, 4, 1, 3, 5, 6)
        side = reduction * patch
        frames.append(ordered.reshape(rows * side, columns * side, 3))
        first += n
    return frames


def draw(
    frames: Sequence[np.ndarray], labels: Sequence[Label], patch: int, reduction: int, title: str, lines: Sequence[str]
) -> Image.Image:
    """Draw the sheet.

    Args:
        frames: ``[h, w, 3]`` uint8 each; all are shown at one scale, so resolution classes at their relative size.
        labels: one for each.
        patch: side of a patch in pixels.
        reduction: patches per side of a cell.
        title: heading.
        lines: what stands below it.
    """
    widths = [f.shape[1] for f in frames]
    columns = _columns(len(frames), max(widths) / max(f.shape[0] for f in frames), _period(widths))
    scale = _scale(WIDTH - 2 * _MARGIN - (columns - 1) * _GAP, _widest_row(widths, columns))
    shown = [_with_grid(_scaled(f, scale), scale * patch, reduction) for f in frames]
    rows = [range(i, min(i + columns, len(shown))) for i in range(0, len(shown), columns)]
    heights = [max(shown[i].shape[0] for i in row) + _LABEL for row in rows]
    head = _MARGIN + 36 + _LINE * len(lines) + 12
    needed = [sum(max(shown[i].shape[1], _LEAST_WIDTH) + _GAP for i in row) - _GAP for row in rows]
    needed += [round(_font(15).getlength(line)) for line in lines] + [round(_font(22).getlength(title))]
    sheet = Image.new(
        "RGB", (max(needed) + 2 * _MARGIN, head + sum(heights) + _GAP * (len(rows) - 1) + _MARGIN), _PAPER
    )
    pen = ImageDraw.Draw(sheet)
    pen.text((_MARGIN, _MARGIN - 4), title, _INK, _font(22))
    for number, line in enumerate(lines):
        pen.text((_MARGIN, _MARGIN + 32 + _LINE * number), line, _SOFT, _font(15))
    top = head
    for row, height in zip(rows, heights, strict=True):
        left = _MARGIN
        for i in row:
            _place(sheet, pen, shown[i], labels[i], left, top)
            left += max(shown[i].shape[1], _LEAST_WIDTH) + _GAP
        top += height + _GAP
    return sheet


def _period(widths: Sequence[int]) -> int:
    """From one large frame to the next; 1 where all are alike."""
    large = [i for i, w in enumerate(widths) if w == max(widths)]
    return large[1] - large[0] if len(large) > 1 else len(widths) if len(set(widths)) > 1 else 1


def _columns(n: int, aspect: float, period: int) -> int:
    """Frames side by side: few and large, or many and small; whole periods of resolution classes."""
    if n <= 4:
        columns = 2 if aspect > 1.2 else 3
    else:
        columns = 3 if n <= 9 else 4 if n <= 24 else 6 if n <= 72 else 10
        columns *= 1 if aspect > 0.8 else 2
    return min(n, max(1, round(columns / period)) * period)


def _widest_row(widths: Sequence[int], columns: int) -> int:
    return max(sum(widths[i : i + columns]) for i in range(0, len(widths), columns))


def _scale(room: int, width: int) -> float:
    """Whole steps upwards, so that pixels stay square and alike; anything downwards."""
    return max(1, min(room // width, 8)) if width <= room else room / width


def _scaled(frame: np.ndarray, scale: float) -> np.ndarray:
    if scale == 1:
        return frame
    height, width = (max(1, round(n * scale)) for n in frame.shape[:2])
    how = Image.Resampling.NEAREST if scale > 1 else Image.Resampling.LANCZOS
    return np.asarray(Image.fromarray(frame).resize((width, height), how))


def _with_grid(shown: np.ndarray, patch: float, reduction: int) -> np.ndarray:
    """Draw the borders of patches faintly and those of cells clearly; the closer they are, the fainter."""
    ink = 255.0 if shown.mean() < 175 else 0.0
    out = shown.astype(np.float32)
    for step, most in ((patch, _PATCH_ALPHA), (patch * reduction, _CELL_ALPHA)):
        alpha = min(most, most * step / _CLEAR)
        if step < _LEAST:
            continue
        for axis in (0, 1):
            at = np.unique(np.round(np.arange(0, shown.shape[axis] + step / 2, step)).astype(int))
            at = np.minimum(at, shown.shape[axis] - 1)  # the far border lies on the last line
            index = (at, slice(None)) if axis == 0 else (slice(None), at)
            out[index] = shown[index] * (1 - alpha) + ink * alpha
    return out.round().astype(np.uint8)


def _place(sheet: Image.Image, pen: ImageDraw.ImageDraw, shown: np.ndarray, label: Label, left: int, top: int) -> None:
    sheet.paste(Image.fromarray(shown), (left, top))
    below = top + shown.shape[0] + 6
    number = f"#{label.index}"
    pen.text((left, below), number, _ACCENT, _font(16))
    pen.text((left + _font(16).getlength(number) + 10, below), f"{label.seconds:.3f} s", _INK, _font(16))


def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
