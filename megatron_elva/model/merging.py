"""Hierarchical token merging over time (ELVA, arXiv 2503.18422), for packs and without a word of parallelism.

Within a tube (one cell place of one resolution class of a video) the tokens still alive are ordered in time; a link
joins two neighbours. Merging a set of links collapses each run of linked tokens into its first or last one, as the mean
weighted by how many cells each stands for. The rules (threshold, budget) choose the links; see `MergePoint`.

Nothing here waits for the device, but for one number per resolution class after a threshold point.

Shape letters: S tokens of the pack before a merge, K after it, N cells of all videos before any merge, A alive cells,
L links, G cells left (and runs), H hidden width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_elva.config.merge_schedule import ResolvedPoint, budget
from megatron_elva.layout import Kind, PackState
from megatron_elva.layout.compact import compact, on_device
from megatron_elva.layout.state import kept_rows, shrink

EPS = 1e-12
"""Smallest norm in a similarity: that of a zero vector with anything is 0. EPS squared is the smallest product."""
BLOCK = 2**25
"""Numbers of a pack that are in fp32 at a time, which bounds the memory of a merge point: 128 MiB a tensor."""


@dataclass(frozen=True)
class Links:
    """Neighbours in time, in the order that settles ties: class, frame of the earlier, cell.

    Attributes:
        earlier: ``[L]`` int64, number of a cell.
        later: ``[L]`` int64, the next alive cell of its tube.
        counts: links of each class (host numbers).
    """

    earlier: Tensor
    later: Tensor
    counts: tuple[int, ...]


def find_links(state: PackState) -> Links:
    """All links of a pack. Every tube keeps at least one token, so their number is known on the host."""
    tubes = state.tubes
    counts = tuple(n - c.cells for n, c in zip(state.counts, tubes.classes, strict=True))
    following = next_alive(state.alive)
    linked = state.alive & (following < tubes.end)
    earlier = tubes.matrix[compact(linked[tubes.matrix], sum(counts))]
    return Links(earlier, following[earlier], counts)


def next_alive(alive: Tensor) -> Tensor:
    """``[N]``: the first alive cell behind each cell; N where there is none."""
    n = alive.numel()
    number = torch.where(alive, torch.arange(n, device=alive.device), n)
    return torch.cat([number.flip(0).cummin(0).values.flip(0)[1:], number.new_full((min(n, 1),), n)])


def similarity(hidden: Tensor, earlier: Tensor, later: Tensor) -> Tensor:
    """Cosine similarity in fp32; what is not a number counts as -1.

    Args:
        hidden: ``[S, H]``.
        earlier: ``[L]`` rows.
        later: ``[L]`` rows.

    Returns:
        ``[L]`` fp32 in -1..1.
    """
    rows = max(1, BLOCK // hidden.shape[1])
    parts = zip(earlier.split(rows), later.split(rows), strict=True)
    return torch.cat([_cosine(hidden.index_select(0, e).float(), hidden.index_select(0, x).float()) for e, x in parts])


def _cosine(a: Tensor, b: Tensor) -> Tensor:
    # the last steps in fp64, on L numbers: two equal vectors have similarity 1 to the bit, so that in a still video
    # frame and cell settle the ties and not rounding
    lengths = (a * a).sum(-1).double() * (b * b).sum(-1).double()
    return ((a * b).sum(-1).double() / lengths.sqrt().clamp_min(EPS**2)).nan_to_num(nan=-1.0).float().clamp(-1.0, 1.0)


def most_similar(scores: Tensor, counts: Sequence[int], take: Sequence[int]) -> Tensor:
    """Mark the links with the highest scores in each class; among equal ones those that come first.

    Args:
        scores: ``[L]`` fp32, class by class.
        counts: links of each class.
        take: how many of them to mark.

    Returns:
        ``[L]`` bool.
    """
    device = scores.device
    bits = (scores + 0.0).view(torch.int32).long()  # + 0.0: there is a -0.0
    rising = torch.where(bits < 0, bits ^ 0x7FFFFFFF, bits)
    sizes = on_device(counts, device)
    klass = torch.repeat_interleave(torch.arange(len(counts), device=device), sizes, output_size=scores.numel())
    # keys are whole numbers from 0 on, so that the sort is a radix sort: linear in links
    order = torch.sort((klass << 32) | (0x7FFFFFFF - rising), stable=True).indices
    rank = torch.arange(scores.numel(), device=device) - (sizes.cumsum(0) - sizes)[klass]
    wanted = rank < on_device(take, device)[klass]
    return torch.zeros_like(wanted).index_copy_(0, order, wanted)


@dataclass(frozen=True)
class MergePlan:
    """How the tokens of a pack become fewer: a matrix with one entry in each column, in sparse form.

    Attributes:
        rows: ``[K]`` int64, the token that each new one takes its place from; padding (at the end) is not in it.
        members: ``[A]`` int64, tokens of alive cells, run by run.
        share: ``[A]`` fp32, weight of each in its run; they sum to 1 over a run.
        sizes: ``[G]`` int64, members of each run.
        into: ``[G]`` int64, the new token of each run.
        column: ``[S]`` int64, the new token that each old one goes into.
        weight: ``[S]`` fp32, with which weight; 0 for padding.
        padding: tokens of the new padding sample.
    """

    rows: Tensor
    members: Tensor
    share: Tensor
    sizes: Tensor
    into: Tensor
    column: Tensor
    weight: Tensor
    padding: int


class _Merge(torch.autograd.Function):
    """Applies a `MergePlan`. Both directions are free of atomic adds, so they repeat bit for bit on a GPU."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, plan: MergePlan) -> Tensor:
        ctx.plan = plan
        out = hidden.new_zeros(plan.rows.numel() + plan.padding, hidden.shape[1])
        out[: plan.rows.numel()] = hidden.index_select(0, plan.rows)
        columns = max(1, BLOCK // max(1, plan.members.numel()))
        for source, target in zip(hidden.split(columns, 1), out.split(columns, 1), strict=True):
            parts = source.index_select(0, plan.members).float() * plan.share[:, None]
            means = torch.segment_reduce(parts, "sum", lengths=plan.sizes, axis=0, unsafe=True)
            target.index_copy_(0, plan.into, means.to(hidden.dtype))
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        plan: MergePlan = ctx.plan
        if grad.dtype == torch.float32:
            return grad.index_select(0, plan.column).mul_(plan.weight[:, None]), None
        rows = max(1, BLOCK // grad.shape[1])
        parts = zip(plan.column.split(rows), plan.weight.split(rows), strict=True)
        return torch.cat([(grad.index_select(0, c).float() * w[:, None]).to(grad.dtype) for c, w in parts]), None


def apply_plan(hidden: Tensor, plan: MergePlan) -> Tensor:
    """``[S, H] -> [K + padding, H]``, with gradient."""
    return _Merge.apply(hidden, plan)


Agree = Callable[[Tensor], Tensor]
"""Makes all ranks that hold the same pack go on with the choice of one of them, ``[L]`` bool."""


def merge(
    hidden: Tensor,
    state: PackState,
    point: ResolvedPoint,
    survivor: str = "first",
    multiple: int = 1,
    agree: Agree | None = None,
) -> tuple[Tensor, PackState]:
    """Pass one merge point.

    Args:
        hidden: ``[S, H]`` hidden states of the whole pack.
        state: what its tokens are; on the same device.
        point: the rule.
        survivor: ``first`` or ``last``: which token of a run stays.
        multiple: what the length is padded to a multiple of afterwards.
        agree: where several ranks hold the same pack.

    Returns:
        The hidden states and the state of the tokens that are left; both as they were where nothing can merge.
    """
    passed = replace(state, done=state.done + 1)
    with torch.no_grad():
        chosen = choose(hidden, state, point, agree)
        if chosen is None:
            return hidden, passed
        plan, merged = make_plan(state, *chosen, survivor, multiple)
    return apply_plan(hidden, plan), replace(merged, done=passed.done)


def choose(
    hidden: Tensor, state: PackState, point: ResolvedPoint, agree: Agree | None = None
) -> tuple[Links, Tensor, tuple[int, ...]] | None:
    """Choose links by a rule: the links, ``[L]`` bool and the cells left in each class; None where none can merge."""
    links = find_links(state)
    agree = agree or _alone
    if not sum(links.counts):
        return None
    if point.rule == "budget":
        keep = point.keep or 0.0
        left = [min(n, budget(keep, c.frames, c.cells)) for n, c in zip(state.counts, state.tubes.classes, strict=True)]
        take = [n - k for n, k in zip(state.counts, left, strict=True)]
        if not sum(take):
            return None
        return links, agree(most_similar(link_scores(hidden, state, links), links.counts, take)), tuple(left)
    if point.tau is None:
        raise ValueError(f"{point}: a threshold point needs tau")
    chosen = agree(link_scores(hidden, state, links) > point.tau)
    merged = torch.zeros(len(links.counts), dtype=torch.long, device=hidden.device)
    gone: list[int] = merged.index_add_(0, state.tubes.klass[links.earlier], chosen.long()).tolist()  # the one sync
    if not sum(gone):
        return None
    return links, chosen, tuple(n - g for n, g in zip(state.counts, gone, strict=True))


def _alone(chosen: Tensor) -> Tensor:
    return chosen


def link_scores(hidden: Tensor, state: PackState, links: Links) -> Tensor:
    """Similarity of the tokens that each link joins."""
    token = cell_tokens(state)
    return similarity(hidden, token[links.earlier], token[links.later])


def cell_tokens(state: PackState) -> Tensor:
    """``[N]``: the present position of each cell's token; without meaning for cells that have none."""
    slot = state.layout.slot
    n = state.tubes.cells
    token = torch.zeros(n + 1, dtype=torch.long, device=slot.device)
    return token.scatter_(0, torch.where(slot < 0, n, slot), torch.arange(slot.numel(), device=slot.device))[:n]


def cell_sizes(alive: Tensor, state: PackState, survivor: str) -> Tensor:
    """``[N]``: how many cells the token of each alive cell stands for."""
    number = torch.arange(alive.numel(), device=alive.device)
    if survivor == "first":
        return torch.minimum(next_alive(alive), state.tubes.end) - number
    before = torch.where(alive, number, -1).cummax(0).values
    before = torch.cat([before.new_full((1,), -1), before[:-1]])
    return number - torch.maximum(before, state.tubes.start - 1)


def make_plan(
    state: PackState, links: Links, chosen: Tensor, counts: tuple[int, ...], survivor: str, multiple: int
) -> tuple[MergePlan, PackState]:
    """The plan that merges the chosen links, and the state after it.

    Args:
        state: before the merge.
        links: all links.
        chosen: ``[L]`` bool.
        counts: cells left in each class.
        survivor: ``first`` or ``last``.
        multiple: what the new length is padded to a multiple of.
    """
    tubes, layout = state.tubes, state.layout
    cells, left = sum(state.counts), sum(counts)
    gone = links.later if survivor == "first" else links.earlier
    alive = state.alive & ~torch.zeros_like(state.alive).index_copy_(0, gone, chosen)
    joined = torch.zeros_like(state.alive).index_copy_(0, links.later, chosen)  # to the one before it

    members = compact(state.alive, cells)
    begins = ~joined[members]
    run = begins.cumsum(0) - 1
    first = compact(begins, left)
    survivors = compact(alive, left)
    before, after = (cell_sizes(a, state, survivor) for a in (state.alive, alive))
    share = before[members].float() / after[survivors][run].float()

    rows = kept_rows(layout, tubes, alive, cells - left)
    padding = -rows.numel() % multiple
    new = torch.zeros(layout.tokens, dtype=torch.long, device=rows.device)
    new.index_copy_(0, rows, torch.arange(rows.numel(), device=rows.device))
    token = cell_tokens(state)
    into = new[token[survivors]]
    member_tokens = token[members]
    column = new.index_copy(0, member_tokens, into[run])
    weight = (layout.kind != Kind.PADDING).float().index_copy_(0, member_tokens, share)
    sizes = torch.diff(first, append=first.new_full((1,), cells))
    plan = MergePlan(rows, member_tokens, share, sizes, into, column, weight, padding)
    merged = replace(state, alive=alive, counts=counts, layout=shrink(layout, tubes, counts, state.spec, rows, padding))
    return plan, merged
