"""Cutting an optimizer's state: boxes cover a range exactly once."""

from __future__ import annotations

import random

import pytest
import torch

from megatron_elva.parallel.optimizer_state import _boxes


@pytest.mark.parametrize("shape", [(7,), (1,), (5, 3), (1, 4), (4, 1), (2, 3, 4), (3, 1, 5), (2, 2, 2, 3)])
def test_boxes_cover_a_range_of_an_array_exactly_once(shape):
    draw = random.Random(0)
    numbers = torch.arange(torch.Size(shape).numel()).view(shape)
    ranges = [(0, numbers.numel()), (0, 0), (0, 1)]
    ranges += [tuple(sorted(draw.choices(range(numbers.numel() + 1), k=2))) for _ in range(50)]
    for low, high in ranges:
        found = []
        for corner, sizes in _boxes(shape, low, high):
            assert len(corner) == len(sizes) == len(shape)
            box = numbers[tuple(slice(c, c + s) for c, s in zip(corner, sizes, strict=True))]
            assert box.shape == torch.Size(sizes) and box.is_contiguous()
            found += box.flatten().tolist()
        assert sorted(found) == list(range(low, high))
        assert len(list(_boxes(shape, low, high))) <= 2 * len(shape) - 1


def test_a_single_number_is_one_box():
    assert list(_boxes((), 0, 1)) == [((), ())]
