"""Pooling over time at the input: what stands where in a pack once consecutive frames have become one.

Shape letters: S tokens, F frames and N cells of all videos of the pack; S', F' and N' of the pooled pack; w frames of a
window.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from megatron_elva.layout.pack import IGNORE
from megatron_elva.layout.spec import PackSpec, VideoSpec, order_in_class


def pool_columns(spec: PackSpec, pooled: PackSpec, tokens: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Carry token ids and labels of a pack over to the pooled pack.

    Args:
        spec: the pack before pooling.
        pooled: ``spec.pooled(window)``, with any padding.
        tokens: ``[S]`` int64, token ids; 0 at visual positions and padding.
        labels: ``[S]`` int64, `IGNORE` at visual positions (but the last of a span, which may predict text) and
            padding.

    Returns:
        Token ids and labels ``[S']`` of the pooled pack.
    """
    return _pool_column(spec, pooled, tokens, 0), _pool_column(spec, pooled, labels, IGNORE)


def _pool_column(spec: PackSpec, pooled: PackSpec, column: Tensor, constant: int) -> Tensor:
    parts, end = [column[:0]], 0
    for before, after in zip(spec.samples, pooled.samples, strict=True):
        for old, new in zip(before.segments, after.segments, strict=True):
            if isinstance(old, VideoSpec) and isinstance(new, VideoSpec):
                end += old.tokens
                # the last position of the span is kept: its label is the text token behind it
                parts += [column.new_full((new.tokens - 1,), constant), column[end - 1 : end]]
            elif isinstance(old, int) and old == new:
                parts.append(column[end : end + old])
                end += old
            else:
                raise ValueError(f"{new} is not {old} pooled")
    return torch.cat([*parts, column.new_full((pooled.padding,), constant)])


def pool_groups(spec: PackSpec, window: int) -> tuple[Tensor, Tensor]:
    """Find the cells that are averaged into each cell of the pooled pack.

    Args:
        spec: the pack before pooling.
        window: frames of a resolution class that become one.

    Returns:
        ``[N', w]`` int64, cells of the pack before pooling (0 where a window is shorter), in the order of the pooled
        pack's patches; and ``[N', w]`` bool, True at real cells. w is the longest window that the pack has.
    """
    frame_class = _class_in_pack(spec)
    order, rank = order_in_class(frame_class)
    counts = np.bincount(frame_class)
    sizes = spec.frame_sizes.prod(1)
    starts = np.cumsum(sizes) - sizes

    first = np.flatnonzero(rank % window == 0)  # [F'], the frame where each pooled frame stands
    step = np.arange(min(window, counts.max(initial=1)))
    real = rank[first, None] + step < counts[frame_class[first], None]  # [F', w]
    place = (np.cumsum(counts) - counts)[frame_class] + rank  # [F], where each frame stands in `order`
    member = order[np.where(real, place[first, None] + step, 0)]

    frame = np.repeat(np.arange(len(first)), sizes[first])  # [N'], the pooled frame of each pooled cell
    left = np.cumsum(sizes[first]) - sizes[first]
    cell = np.arange(len(frame)) - left[frame]
    mask = real[frame]
    index = np.where(mask, starts[member][frame] + cell[:, None], 0)
    return torch.from_numpy(index), torch.from_numpy(mask)


def _class_in_pack(spec: PackSpec) -> np.ndarray:
    """``[F]`` the resolution class of each frame, counted over the pack."""
    parts, classes = [np.empty(0, np.int64)], 0
    for video in spec.videos:
        parts.append(np.array(video.frame_class, np.int64) + classes)
        classes += len(video.grids)
    return np.concatenate(parts)
