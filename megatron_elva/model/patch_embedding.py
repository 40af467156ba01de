"""Patch embedding: pixels of native resolution to one vector for each cell, FRAME and LINE.

Shape letters: N cells, F frames, R rows of all videos of a pack (with pooling: what is left of them); C width of the
patch embedding; P side of a patch; r patches per side of a cell. At P = 14, C = 1024 the parameters are exactly the
paper's "9M": 9,003,008.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional

from megatron_elva.layout import PackSpec
from megatron_elva.layout.compact import moved
from megatron_elva.layout.pooling import pool_groups


@dataclass(frozen=True)
class Groups:
    """Groups of cells, each looked at by one query or averaged into one cell.

    Attributes:
        index: ``[G, M]`` int64, the cells of each of the G groups, padded to the largest (M) with cell 0.
        mask: ``[G, M]`` bool, True at real cells.
    """

    index: Tensor
    mask: Tensor

    @classmethod
    def of_sizes(cls, sizes: Tensor) -> Groups:
        """Groups of consecutive cells that follow each other, given how many each has (``[G]`` int64, on the host)."""
        start = torch.cumsum(sizes, 0) - sizes
        offset = torch.arange(int(sizes.max()) if sizes.numel() else 0)
        mask = offset < sizes[:, None]
        return cls(torch.where(mask, start[:, None] + offset, torch.zeros_like(start[:, None])), mask)

    def to(self, device: torch.device | str) -> Groups:
        """The same groups on another device."""
        return Groups(moved(self.index, device), moved(self.mask, device))


@dataclass(frozen=True)
class VisualIndex:
    """Which cells each FRAME and each LINE of a pack looks at.

    Attributes:
        frames: the cells of each frame.
        rows: the cells of each row.
        pool: with pooling, the cells before it which each cell averages; `frames` and `rows` count cells after it.
    """

    frames: Groups
    rows: Groups
    pool: Groups | None = None

    @classmethod
    def of(cls, spec: PackSpec, window: int = 1) -> VisualIndex:
        """Derive the groups, on the host.

        Args:
            spec: what the pack is made of, before pooling.
            window: frames averaged into one; 1: no pooling.
        """
        rows, columns = torch.from_numpy(spec.pooled(window).frame_sizes).unbind(1)
        pool = Groups(*pool_groups(spec, window)) if window > 1 else None
        return cls(Groups.of_sizes(rows * columns), Groups.of_sizes(columns.repeat_interleave(rows)), pool)

    def to(self, device: torch.device | str) -> VisualIndex:
        """The same index on another device."""
        pool = None if self.pool is None else self.pool.to(device)
        return VisualIndex(self.frames.to(device), self.rows.to(device), pool)


def _average(values: Tensor, groups: Groups) -> Tensor:
    """Mean of each group: ``[N, V]`` -> ``[G, V]``, without a copy of the values by group."""
    real = groups.mask.to(values.dtype)
    sums = functional.embedding_bag(groups.index, values, mode="sum", per_sample_weights=real)
    return sums / real.sum(1, keepdim=True)


class CrossAttention(nn.Module):
    """One learned token looks at its group of cells; the result is added to the token.

    Pre-norm on queries and on cells, q and kv without bias, output with bias, softmax scale from the head's width.

    Args:
        width: C.
        heads: attention heads.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.token = nn.Parameter(torch.empty(width))
        self.norm_q = nn.LayerNorm(width)
        self.norm_kv = nn.LayerNorm(width)
        self.q = nn.Linear(width, width, bias=False)
        self.kv = nn.Linear(width, 2 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, cells_nc: Tensor, groups: Groups) -> Tensor:
        """``[N, C]`` cells in G groups -> ``[G, C]``.

        All queries are the one learned token, so its product with the key weights is taken first and the value weights
        act on sums over groups: no key or value of a single cell is ever computed.
        """
        count, longest = groups.index.shape
        width = cells_nc.shape[-1]
        head = width // self.heads
        key_w, value_w = self.kv.weight.view(2, self.heads, head, width)
        query = self.q(self.norm_q(self.token)).view(self.heads, head) / math.sqrt(head)
        cells = self.norm_kv(cells_nc)
        scores = cells @ torch.einsum("hd,hdc->ch", query, key_w)
        picked = groups.index.flatten()
        scores = scores.index_select(0, picked).view(count, longest, self.heads)
        share = scores.float().masked_fill(~groups.mask[..., None], -math.inf).softmax(1).to(cells.dtype)
        sums = share.transpose(1, 2) @ cells.index_select(0, picked).view(count, longest, width)
        seen = torch.einsum("ghc,hdc->ghd", sums, value_w)
        return self.token + self.out(seen.reshape(count, width))


class PatchEmbedding(nn.Module):
    """Patches to vectors of width C.

    Args:
        patch_values: numbers in a patch, ``P * P * 3``.
        width: C.
        heads: heads of the two cross-attention blocks.
        cell_patches: patches in a cell, ``r * r``.
        kind: ``cross_attention``, or ``naive``: FRAME and LINE are the learned tokens alone (the paper's ablation).
    """

    def __init__(
        self, patch_values: int, width: int, heads: int, cell_patches: int, kind: str = "cross_attention"
    ) -> None:
        super().__init__()
        self.cell_patches = cell_patches
        self.patch_values = patch_values
        self.proj = nn.Linear(patch_values, width, bias=False)
        self.frame: CrossAttention | None = None
        self.line: CrossAttention | None = None
        if kind == "cross_attention":
            self.frame = CrossAttention(width, heads)
            self.line = CrossAttention(width, heads)
        else:
            self.frame_token = nn.Parameter(torch.empty(width))
            self.line_token = nn.Parameter(torch.empty(width))

    def forward(self, patches: Tensor, index: VisualIndex) -> tuple[Tensor, Tensor, Tensor]:
        """Embed all videos of a pack.

        Args:
            patches: ``[N * r * r, P * P * 3]`` uint8, cell by cell, N before pooling.
            index: which cells each FRAME and LINE looks at, and which are averaged over time before.

        Returns:
            Cells ``[N, C]`` (N after pooling), FRAMEs ``[F, C]`` and LINEs ``[R, C]`` in the dtype of the parameters.
        """
        pixels = (patches.to(torch.float32) - 127.5) / 127.5
        # the projection is linear without bias, so a cell's mean may be taken before it (r * r times less work), and
        # so may the mean over time
        pixels = pixels.view(-1, self.cell_patches, self.patch_values).mean(1)
        if index.pool is not None:
            pixels = _average(pixels, index.pool)
        cells = self.proj(pixels.to(self.proj.weight.dtype))
        if self.frame is not None and self.line is not None:
            return cells, self.frame(cells, index.frames), self.line(cells, index.rows)
        frames = self.frame_token.expand(index.frames.index.shape[0], -1)
        return cells, frames, self.line_token.expand(index.rows.index.shape[0], -1)
