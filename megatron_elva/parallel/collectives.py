"""Small collectives of the training loop."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist

from megatron_elva.parallel.ranks import Ranks


def sum_over_ranks(values: Sequence[float], ranks: Ranks) -> list[float]:
    """Element-wise sum over all ranks in fp64; every rank gets it. Waits for the device."""
    total = torch.tensor(list(values), dtype=torch.float64, device=ranks.device)
    dist.all_reduce(total)
    return total.tolist()


def from_first(text: str) -> str:
    """The first rank's text, on every rank."""
    said = [text]
    dist.broadcast_object_list(said)
    return said[0]


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()
