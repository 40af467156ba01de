"""The token layout: what every position of a pack is.

Shape letters: S tokens of the pack, F frames, R rows and N cells of all its videos.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace
from enum import IntEnum
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

from megatron_elva.layout.compact import moved
from megatron_elva.layout.spec import PackSpec, VideoSpec
from megatron_elva.layout.tubes import Tubes, build_tubes


class Kind(IntEnum):
    """What a token stands for."""

    TEXT = 0
    FRAME = 1
    LINE = 2
    CELL = 3
    PADDING = 4


@dataclass(frozen=True)
class TokenLayout:
    """One entry for each position of a pack; -1 where a column does not apply.

    Attributes:
        lengths: tokens of each sample, the padding sample last (host numbers: no sync to read them).
        padding: tokens of the padding sample, 0 if there is none.
        kind: ``[S]`` int64, a `Kind`.
        sample: ``[S]`` int64, the sample; padding is a sample of its own.
        video: ``[S]`` int64, the video, counted over the pack.
        frame: ``[S]`` int64, the frame within its video.
        cell: ``[S]`` int64, ``row * Wp + column`` of a cell.
        position: ``[S]`` int64, the position id: counted from 0 within the sample, kept when others merge.
        origin: ``[S]`` int64, the position in the pack before any merge; -1 for padding.
        slot: ``[S]`` int64, the number of a cell in `Tubes`.
    """

    lengths: tuple[int, ...]
    padding: int
    kind: Tensor
    sample: Tensor
    video: Tensor
    frame: Tensor
    cell: Tensor
    position: Tensor
    origin: Tensor
    slot: Tensor

    @property
    def tokens(self) -> int:
        """Length of the pack."""
        return self.kind.numel()

    def where(self, kind: Kind) -> Tensor:
        """Positions of one kind, ascending, int64. Syncs with the host on a GPU: call it on a host layout."""
        return (self.kind == kind).nonzero().flatten()

    def to(self, device: torch.device | str) -> TokenLayout:
        """The same layout on another device."""
        names = [f.name for f in fields(self) if f.name not in ("lengths", "padding")]
        columns: dict[str, Any] = {name: moved(getattr(self, name), device) for name in names}
        return replace(self, **columns)


@lru_cache(maxsize=256)
def _frame_template(rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Kind and cell of the ``1 + rows * (columns + 1)`` tokens of a frame: FRAME, then each row and its LINE."""
    kind = torch.full((rows, columns + 1), int(Kind.CELL))
    kind[:, -1] = int(Kind.LINE)
    cell = torch.full((rows, columns + 1), -1)
    cell[:, :-1] = torch.arange(rows * columns).view(rows, columns)
    return (
        torch.cat([torch.tensor([int(Kind.FRAME)]), kind.flatten()]),
        torch.cat([torch.tensor([-1]), cell.flatten()]),
    )


def _video_columns(video: VideoSpec) -> tuple[Tensor, Tensor, Tensor]:
    """Kind, frame and cell of the tokens of one video."""
    kinds, cells = zip(*(_frame_template(*grid) for grid in video.grids), strict=True)
    lengths = torch.tensor([kind.numel() for kind in kinds])
    frame_class = torch.tensor(video.frame_class)
    sizes = lengths[frame_class]
    # from a token's place in the span to its place in the joined templates
    shift = (lengths.cumsum(0) - lengths)[frame_class] - (sizes.cumsum(0) - sizes)
    frame = torch.repeat_interleave(torch.arange(video.frames), sizes)
    picked = torch.arange(frame.numel()) + shift[frame]
    return torch.cat(kinds)[picked], frame, torch.cat(cells)[picked]


def build_layout(spec: PackSpec, tubes: Tubes | None = None) -> TokenLayout:
    """Lay out a pack on the host, before any merge.

    Args:
        spec: what the pack is made of.
        tubes: order of its cells, where the caller has it already.

    Returns:
        The token layout, on the CPU.
    """
    columns: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    n_videos = 0
    for sample in spec.samples:
        for segment in sample.segments:
            if isinstance(segment, VideoSpec):
                kind, frame, cell = _video_columns(segment)
                columns.append((kind, torch.full_like(kind, n_videos), frame, cell))
                n_videos += 1
            else:
                none = torch.full((segment,), -1)
                columns.append((torch.full((segment,), int(Kind.TEXT)), none, none, none))
    if spec.padding:
        none = torch.full((spec.padding,), -1)
        columns.append((torch.full((spec.padding,), int(Kind.PADDING)), none, none, none))
    kind, video, frame, cell = (torch.cat(parts) for parts in zip(*columns, strict=True))
    lengths = torch.tensor(spec.lengths)
    starts = torch.cumsum(lengths, 0) - lengths
    sample_of = torch.repeat_interleave(torch.arange(len(lengths)), lengths)
    origin = torch.arange(kind.numel())
    tubes = tubes or build_tubes(spec)
    slot = torch.full_like(kind, -1).index_copy_(0, tubes.token, torch.arange(tubes.cells))
    return TokenLayout(
        lengths=tuple(spec.lengths),
        padding=spec.padding,
        kind=kind,
        sample=sample_of,
        video=video,
        frame=frame,
        cell=cell,
        position=origin - starts[sample_of],
        origin=torch.where(kind == Kind.PADDING, -1, origin),
        slot=slot,
    )
