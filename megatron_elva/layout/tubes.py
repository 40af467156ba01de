"""Tubes: the cells of a pack ordered so that those that may merge stand side by side.

A tube is one cell place of one resolution class of a video over time. Shape letters: N cells of all videos of a pack
before any merge, numbered tube by tube and by time within a tube; S tokens of the pack.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor

from megatron_elva.layout.compact import moved
from megatron_elva.layout.spec import PackSpec, VideoSpec


@dataclass(frozen=True)
class VideoClass:
    """A resolution class of a video that has frames.

    Attributes:
        sample: the sample, counted over the pack.
        video: the video, counted over the pack.
        number: the class, counted over the video.
        frames: frames of this class (T).
        cells: cells of a frame, which are also the tubes of the class.
    """

    sample: int
    video: int
    number: int
    frames: int
    cells: int


@dataclass(frozen=True)
class Tubes:
    """Where the cells of a pack stand.

    Attributes:
        classes: the resolution classes of all videos, in the order of their cells (host numbers).
        klass: ``[N]`` int64, index into ``classes``.
        start: ``[N]`` int64, number of the first cell of the tube.
        end: ``[N]`` int64, one past the last cell of the tube.
        matrix: ``[N]`` int64, the cells in the order of the merge index: class by class, ``[T, cells]`` row-major.
        token: ``[N]`` int64, the position of the cell in the pack before any merge.
    """

    classes: tuple[VideoClass, ...]
    klass: Tensor
    start: Tensor
    end: Tensor
    matrix: Tensor
    token: Tensor

    @property
    def cells(self) -> int:
        """N."""
        return self.token.numel()

    @property
    def sizes(self) -> tuple[int, ...]:
        """Cells of each class."""
        return tuple(c.frames * c.cells for c in self.classes)

    def to(self, device: torch.device | str) -> Tubes:
        """The same tubes on another device."""
        names = [f.name for f in fields(self) if f.name != "classes"]
        columns: dict[str, Any] = {name: moved(getattr(self, name), device) for name in names}
        return replace(self, **columns)


def build_tubes(spec: PackSpec) -> Tubes:
    """Order the cells of a pack, on the host."""
    classes: list[VideoClass] = []
    columns: list[tuple[Tensor, ...]] = []
    position, first, n_videos = 0, 0, 0
    for number, sample in enumerate(spec.samples):
        for segment in sample.segments:
            if isinstance(segment, VideoSpec):
                for part, tokens in _class_tokens(segment):
                    columns.append(_class_columns(part.cells, part.frames, len(classes), first, tokens + position))
                    classes.append(replace(part, sample=number, video=n_videos))
                    first += part.frames * part.cells
                n_videos += 1
                position += segment.tokens
            else:
                position += segment
    none = torch.empty(0, dtype=torch.long)
    joined = [torch.cat(parts) for parts in zip(*columns, strict=True)] if columns else [none] * 5
    return Tubes(tuple(classes), *joined)


def _class_tokens(video: VideoSpec) -> list[tuple[VideoClass, Tensor]]:
    """Each class that has frames, with the positions ``[T, cells]`` of its cells within the visual span."""
    frame_class = torch.tensor(video.frame_class)
    sizes = torch.tensor([1 + rows * (columns + 1) for rows, columns in video.grids])[frame_class]
    starts = sizes.cumsum(0) - sizes
    out = []
    for number, (rows, columns) in enumerate(video.grids):
        frames = starts[frame_class == number]
        if frames.numel():
            cell = torch.arange(rows * columns)
            within = 1 + cell + cell // columns  # behind the FRAME, and one LINE after each earlier row
            out.append((VideoClass(0, 0, number, frames.numel(), rows * columns), frames[:, None] + within))
    return out


def _class_columns(cells: int, frames: int, klass: int, first: int, tokens: Tensor) -> tuple[Tensor, ...]:
    """The columns of `Tubes` for one class."""
    number = first + torch.arange(cells * frames).view(cells, frames)
    start = number[:, :1].expand(cells, frames)
    return (
        torch.full((cells * frames,), klass),
        start.flatten(),
        start.flatten() + frames,
        number.T.flatten(),
        tokens.T.flatten(),
    )
