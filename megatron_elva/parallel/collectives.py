"""Small collectives of the training loop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.parallel.ranks import Ranks

_T = TypeVar("_T")


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


def first_finds(find: Callable[[], _T]) -> _T:
    """What the first rank finds on the shared disk, on every rank: each one's own look may see it at another moment.

    Args:
        find: called on the first rank; what it gives must be fit for pickle.

    Raises:
        ConfigError: `find` raised it, on all ranks alike; likewise InputError.
    """
    found: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            found[0] = find()
        except (ConfigError, InputError) as error:
            found[1] = error
    dist.broadcast_object_list(found)
    if found[1] is not None:
        raise found[1]
    return found[0]


def barrier() -> None:
    """Wait for all ranks."""
    dist.barrier()
