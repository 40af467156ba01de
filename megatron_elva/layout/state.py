"""The state of a pack between merge points: which cells still have their own token, and the layout that follows.

Shape letters: N cells of all videos before any merge (numbered as in tubes.py), S tokens of the pack now.
"""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from megatron_elva.layout.compact import compact, moved
from megatron_elva.layout.spec import PackSpec
from megatron_elva.layout.tokens import Kind, TokenLayout, build_layout
from megatron_elva.layout.tubes import Tubes, build_tubes


@dataclass(frozen=True)
class PackState:
    """What travels with the hidden states of a pack.

    The merge index of ELVA (M in arXiv 2503.18422, one 0/1 matrix for each resolution class of a video) is `alive`. It
    also fixes which cells each token stands for: those of its tube from its own up to the next alive one (``survivor:
    first``), or from behind the one before up to its own (``last``).

    Attributes:
        spec: the pack before any merge.
        tubes: order of its cells.
        alive: ``[N]`` bool, cells that still have their own token.
        counts: alive cells of each class of ``tubes.classes`` (host numbers: no sync to read them).
        done: merge points passed.
        layout: what every position is now.
    """

    spec: PackSpec
    tubes: Tubes
    alive: Tensor
    counts: tuple[int, ...]
    done: int
    layout: TokenLayout

    def to(self, device: torch.device | str) -> PackState:
        """The same state on another device."""
        return replace(
            self, tubes=self.tubes.to(device), alive=moved(self.alive, device), layout=self.layout.to(device)
        )

    @property
    def visual_tokens(self) -> int:
        """Cells that still have their token, FRAMEs and LINEs (host number)."""
        return sum(v.tokens for v in self.spec.videos) - sum(self.tubes.sizes) + sum(self.counts)

    def merge_index(self) -> list[Tensor]:
        """M of each class of ``tubes.classes``: ``[T, cells]`` uint8 on the host."""
        flat = self.alive[self.tubes.matrix].to("cpu", torch.uint8)
        parts = flat.split(list(self.tubes.sizes)) if self.tubes.classes else ()
        return [m.view(c.frames, c.cells) for m, c in zip(parts, self.tubes.classes, strict=True)]


def initial_state(spec: PackSpec) -> PackState:
    """The state of a pack before any merge, on the host."""
    tubes = build_tubes(spec)
    alive = torch.ones(tubes.cells, dtype=torch.bool)
    return PackState(spec, tubes, alive, tubes.sizes, 0, build_layout(spec, tubes))


def restored_state(spec: PackSpec, alive: Tensor, done: int, padding: int) -> PackState:
    """The state that another rank's merges left, rebuilt on the host.

    Args:
        spec: the pack before any merge.
        alive: ``[N]`` bool, on the host.
        done: merge points passed.
        padding: tokens of the padding sample now.
    """
    tubes = build_tubes(spec)
    klass = torch.zeros(len(tubes.classes), dtype=torch.long).index_add_(0, tubes.klass, alive.long())
    layout = build_layout(replace(spec, padding=0), tubes)
    counts = tuple(klass.tolist())
    rows = kept_rows(layout, tubes, alive, sum(tubes.sizes) - sum(counts))
    return PackState(spec, tubes, alive, counts, done, shrink(layout, tubes, counts, spec, rows, padding))


def kept_rows(layout: TokenLayout, tubes: Tubes, alive: Tensor, removed: int) -> Tensor:
    """Positions of a layout that keep their token, padding left out.

    Args:
        layout: the layout before the merge.
        tubes: order of the cells.
        alive: ``[N]`` bool after the merge.
        removed: cells with a token in `layout` that are no longer alive.

    Returns:
        ``[S - padding - removed]`` int64, ascending.
    """
    real = layout.tokens - layout.padding
    keep = torch.ones(real, dtype=torch.bool, device=alive.device)
    slot = layout.slot[:real]
    # every non-cell reads an extra entry that is always True
    alive = torch.cat([alive, alive.new_ones(1)])
    keep &= alive[torch.where(slot < 0, tubes.cells, slot)]
    return compact(keep, real - removed)


def shrink(
    layout: TokenLayout, tubes: Tubes, counts: tuple[int, ...], spec: PackSpec, rows: Tensor, padding: int
) -> TokenLayout:
    """The layout of the tokens that are left.

    Args:
        layout: the layout before the merge.
        tubes: order of the cells.
        counts: alive cells of each class after the merge.
        spec: the pack before any merge.
        rows: what `kept_rows` gave.
        padding: tokens of the padding sample after the merge.
    """
    lengths = [s.tokens for s in spec.samples]
    for klass, count, size in zip(tubes.classes, counts, tubes.sizes, strict=True):
        lengths[klass.sample] -= size - count
    columns = {f.name: getattr(layout, f.name)[rows] for f in fields(layout) if f.name not in ("lengths", "padding")}
    if padding:
        fill = {"kind": int(Kind.PADDING), "sample": len(lengths)}
        ids = torch.arange(padding, device=rows.device)
        pads = {n: ids if n == "position" else torch.full_like(ids, fill.get(n, -1)) for n in columns}
        columns = {n: torch.cat([column, pads[n]]) for n, column in columns.items()}
    return TokenLayout(lengths=(*lengths, padding) if padding else tuple(lengths), padding=padding, **columns)
