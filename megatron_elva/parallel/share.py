"""Hands the packs of a step from the rank that read them to the first and last pipeline ranks of its replica.

Ranks in the middle of the pipeline get nothing: the carrier brings them what they need.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from megatron_elva.layout import Pack, PackSpec
from megatron_elva.parallel.ranks import Ranks


def share_packs(packs: Sequence[Pack] | None, ranks: Ranks, count: int) -> list[Pack | None]:
    """Broadcast the packs of one step; call it on every rank of the replica, before the pipeline schedule starts.

    Text, labels and specifications go to the first and last pipeline ranks over gloo; pixels only to the tensor ranks
    of the first pipeline rank, on the device.

    Args:
        packs: the packs on the reading rank, None elsewhere.
        ranks: this rank.
        count: packs of a step.

    Returns:
        The packs, None in the middle of the pipeline; `keys` and `skipped` stay on the reading rank, and the last
        pipeline rank holds no pixels.
    """
    if not (ranks.is_first or ranks.is_last):
        return [None] * count
    numbers = _send_numbers(None if packs is None else _to_numbers(packs), ranks)
    out = list(packs) if packs is not None else _from_numbers(numbers, ranks)
    if ranks.is_first and ranks.tensor_size > 1:
        for pack in out:
            pack.patches = _share_patches(pack.patches, ranks)
    return list(out)


def _to_numbers(packs: Sequence[Pack]) -> Tensor:
    parts = [torch.tensor([len(packs)])]
    for pack in packs:
        spec = torch.tensor(pack.spec.to_ints())
        parts += [torch.tensor([spec.numel(), pack.tokens.numel(), pack.patches.shape[0], pack.patches.shape[1]])]
        parts += [spec, pack.tokens, pack.labels]
    return torch.cat(parts)


def _send_numbers(numbers: Tensor | None, ranks: Ranks) -> Tensor:
    size = torch.tensor([0 if numbers is None else numbers.numel()])
    dist.broadcast(size, ranks.reader, group=ranks.ends_group)
    if numbers is None:
        numbers = torch.empty(int(size), dtype=torch.long)
    dist.broadcast(numbers, ranks.reader, group=ranks.ends_group)
    return numbers


def _from_numbers(numbers: Tensor, ranks: Ranks) -> list[Pack]:
    count, rest = int(numbers[0]), numbers[1:]
    packs = []
    for _ in range(count):
        n_spec, n_tokens, n_patches, width = (int(n) for n in rest[:4])
        spec, tokens, labels, rest = rest[4:].split(
            [n_spec, n_tokens, n_tokens, rest.numel() - 4 - n_spec - 2 * n_tokens]
        )
        patches = torch.empty(n_patches if ranks.is_first else 0, width, dtype=torch.uint8)
        packs.append(Pack(PackSpec.from_ints(spec.tolist()), tokens, labels, patches))
    return packs


def _share_patches(patches: Tensor, ranks: Ranks) -> Tensor:
    patches = patches.to(ranks.device)
    if patches.numel():
        dist.broadcast(patches, ranks.reader, group=ranks.groups.tp)
    return patches
