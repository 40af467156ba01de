"""Picking marked entries without asking the device how many there are."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def compact(mask: Tensor, count: int) -> Tensor:
    """Indices of the True entries, ascending, where their number is known on the host: no sync, unlike ``nonzero``.

    Args:
        mask: ``[n]`` bool with exactly `count` True entries.
        count: their number.

    Returns:
        ``[count]`` int64.
    """
    n = mask.numel()
    place = torch.where(mask, mask.cumsum(0) - 1, count)
    out = torch.empty(count + 1, dtype=torch.long, device=mask.device)
    return out.scatter_(0, place, torch.arange(n, device=mask.device))[:count]


def on_device(numbers: Sequence[int], device: torch.device) -> Tensor:
    """Host numbers as an int64 tensor on a device, without waiting for it: from pinned memory where it is a GPU."""
    return moved(torch.tensor(numbers, dtype=torch.long), device)


def moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    """A tensor on a device, without waiting for it: from pinned memory where it goes from the host to a GPU."""
    if torch.device(device).type == "cuda" and tensor.device.type == "cpu":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)
