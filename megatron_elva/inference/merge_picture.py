"""A picture of what merging did to a video: the frames once as they were, and once for each merge point.

Shape letters: T frames of one resolution class of the video, N cells of a frame.
"""

from __future__ import annotations

import colorsys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from megatron_elva.layout import PackState, VideoSpec

Colour = tuple[int, int, int]
Box = tuple[int, int, int, int]
"""Left, top, right, bottom; the last two are one past the end."""

_PAPER, _INK, _FAINT = (255, 255, 255), (24, 27, 33), (104, 110, 120)
_MARGIN, _WIDTH, _GAP = 28, 1640, 14
_STRIP, _TITLE, _TITLE_SIZE, _TEXT_SIZE = 24, 42, 20, 15
_TINT = 0.72
"""Share of the tint in a shaded cell; the rest is what was there, without its colours."""
_LUMA = 104
"""Brightness of the colours: white numbers show on them, and they show on white paper."""


def frames_of(patches: Tensor, video: VideoSpec, patch: int, reduction: int) -> list[np.ndarray]:
    """The frames that patches were cut from, ``[H, W, 3]`` uint8 each.

    Args:
        patches: ``[cells * r * r, P * P * 3]`` uint8.
        video: its grids.
        patch: P.
        reduction: r.
    """
    out, begin = [], 0
    for rows, columns in video.frame_grids:
        end = begin + rows * columns * reduction**2
        split = patches[begin:end].numpy().reshape(rows, columns, reduction, reduction, patch, patch, 3)
        side = patch * reduction
        out.append(split.transpose(0, 2, 4, 1, 3, 5, 6).reshape(rows * side, columns * side, 3))
        begin = end
    return out


def destinations(state: PackState, survivor: str) -> list[np.ndarray]:
    """Where each cell of the one video of a sample is now.

    Args:
        state: the sample after a merge point.
        survivor: ``first`` or ``last``.

    Returns:
        For each frame ``[N]`` int64: the frame whose token now stands for the cell; a cell that still has its own
        token names its own frame.
    """
    (video,) = state.spec.videos
    frame_class = np.array(video.frame_class)
    out: list[np.ndarray] = [np.empty(0, np.int64)] * video.frames
    for klass, matrix in zip(state.tubes.classes, state.merge_index(), strict=True):
        frames = np.flatnonzero(frame_class == klass.number)
        alive, number = matrix.numpy().astype(bool), np.arange(klass.frames)[:, None]
        if survivor == "first":
            now = np.maximum.accumulate(np.where(alive, number, 0))
        else:
            now = np.minimum.accumulate(np.where(alive, number, klass.frames - 1)[::-1])[::-1]
        for frame, row in zip(frames.tolist(), frames[now], strict=True):
            out[frame] = row
    return out


def frame_colour(frame: int) -> Colour:
    """The colour of a frame: turned by the golden angle, so that neighbours in time differ most; all equally dark."""
    red, green, blue = colorsys.hls_to_rgb((0.58 + frame * 0.381966) % 1.0, 0.5, 0.8)
    scale = _LUMA / (0.299 * red + 0.587 * green + 0.114 * blue)
    return round(min(255, scale * red)), round(min(255, scale * green)), round(min(255, scale * blue))


@dataclass(frozen=True)
class Block:
    """One copy of the frames.

    Attributes:
        title: what stands above it.
        now: what `destinations` gave; None for the frames as they came in.
    """

    title: str
    now: list[np.ndarray] | None = None


class Sheet:
    """Where everything stands in the picture.

    Args:
        video: frames and grids.
        head: lines above the first block.
        blocks: number of blocks.
    """

    def __init__(self, video: VideoSpec, head: int, blocks: int) -> None:
        target = 190 if video.frames <= 32 else 124
        self.grids = video.frame_grids
        self.sides = [max(6, min(48, round(target / max(grid)))) for grid in self.grids]
        self.frame_width = max(s * columns for s, (_, columns) in zip(self.sides, self.grids, strict=True))
        self.frame_height = max(s * rows for s, (rows, _) in zip(self.sides, self.grids, strict=True))
        fit = (_WIDTH - 2 * _MARGIN + _GAP) // (self.frame_width + _GAP)
        lines = -(-video.frames // max(1, fit))
        self.per_row = -(-video.frames // lines)
        self.line_height = _STRIP + self.frame_height + _GAP
        self.block_height = _TITLE + lines * self.line_height + 10
        self.top = _MARGIN + 26 * head + 8
        frames_width = self.per_row * (self.frame_width + _GAP) - _GAP
        self.size = (2 * _MARGIN + max(frames_width, 880), self.top + blocks * self.block_height + _MARGIN - 10)

    def frame_corner(self, block: int, frame: int) -> tuple[int, int]:
        """Left and top of a frame's pixels; its strip stands above."""
        line, place = divmod(frame, self.per_row)
        left = _MARGIN + place * (self.frame_width + _GAP)
        return left, self.top + block * self.block_height + _TITLE + line * self.line_height + _STRIP

    def cell_box(self, block: int, frame: int, cell: int) -> Box:
        """The pixels of a cell."""
        left, top = self.frame_corner(block, frame)
        row, column = divmod(cell, self.grids[frame][1])
        side = self.sides[frame]
        return left + column * side, top + row * side, left + (column + 1) * side, top + (row + 1) * side


def draw_sheet(
    video: VideoSpec, frames: Sequence[np.ndarray], head: Sequence[str], blocks: Sequence[Block]
) -> Image.Image:
    """Draw the whole picture.

    Args:
        video: frames and grids.
        frames: pixels of each frame.
        head: lines at the top, the first of them the heading.
        blocks: the frames as they came in, then one for each merge point.
    """
    sheet = Sheet(video, len(head), len(blocks))
    image = Image.new("RGB", sheet.size, _PAPER)
    draw = ImageDraw.Draw(image)
    for number, line in enumerate(head):
        draw.text(
            (_MARGIN, _MARGIN - 8 + 26 * number), line, _FAINT if number else _INK, _font(_TEXT_SIZE + 7 * (not number))
        )
    for number, block in enumerate(blocks):
        left, top = _MARGIN, sheet.top + number * sheet.block_height
        draw.line((left, top - 4, sheet.size[0] - _MARGIN, top - 4), (222, 225, 230))
        draw.text((left, top + 6), block.title, _INK, _font(_TITLE_SIZE))
        for frame, pixels in enumerate(frames):
            _frame(image, sheet, number, frame, pixels)
        if block.now is not None:
            _merges(image, sheet, number, block.now)
    return image


def _frame(image: Image.Image, sheet: Sheet, block: int, frame: int, pixels: np.ndarray) -> None:
    """A frame and its strip: the colour that stands for it, and its number."""
    left, top = sheet.frame_corner(block, frame)
    rows, columns = sheet.grids[frame]
    size = columns * sheet.sides[frame], rows * sheet.sides[frame]
    enlarged = size[0] >= pixels.shape[1]
    image.paste(
        Image.fromarray(pixels).resize(size, Image.Resampling.BICUBIC if enlarged else Image.Resampling.LANCZOS),
        (left, top),
    )
    draw = ImageDraw.Draw(image)
    colour, text = frame_colour(frame), f"frame {frame + 1}"
    draw.rectangle((left, top - 5, left + size[0] - 1, top - 2), colour)
    draw.text((left, top - 8), text, colour, _font(_TEXT_SIZE - 2), anchor="ls")


def _merges(image: Image.Image, sheet: Sheet, block: int, now: Sequence[np.ndarray]) -> None:
    """Shade cells that went elsewhere, and outline those that they went to."""
    draw = ImageDraw.Draw(image)
    into: set[tuple[int, int]] = set()
    for frame, cell, to in _moved(now):
        _shade(image, draw, sheet.cell_box(block, frame, cell), to)
        into.add((to, cell))
    for frame, cell in sorted(into):
        left, top, right, bottom = sheet.cell_box(block, frame, cell)
        width = max(2, sheet.sides[frame] // 12)
        draw.rectangle((left, top, right - 1, bottom - 1), outline=frame_colour(frame), width=width)


def _moved(now: Sequence[np.ndarray]) -> Iterator[tuple[int, int, int]]:
    """Frame and cell of each that lost its token, and the frame that it went to."""
    for frame, row in enumerate(now):
        for cell in np.flatnonzero(row != frame).tolist():
            yield frame, cell, int(row[cell])


def _shade(image: Image.Image, draw: ImageDraw.ImageDraw, box: Box, to: int) -> None:
    """Cover a cell with the colour of frame `to`, with its number where there is room."""
    side = box[2] - box[0]
    grey = image.crop(box).convert("L").convert("RGB")
    image.paste(Image.blend(grey, Image.new("RGB", grey.size, frame_colour(to)), _TINT), box[:2])
    draw.rectangle((box[0], box[1], box[2] - 1, box[3] - 1), outline=_darker(frame_colour(to)), width=1)
    if side >= 16:
        centre = ((box[0] + box[2]) / 2, (box[1] + box[3]) / 2)
        draw.text(centre, str(to + 1), _PAPER, _font(max(10, round(side * 0.42))), anchor="mm")


def _darker(colour: Colour) -> Colour:
    red, green, blue = (round(0.8 * value) for value in colour)
    return red, green, blue


@cache
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)
