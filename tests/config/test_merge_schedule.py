"""Merge points of a model and what they leave of a video."""

from __future__ import annotations

from fractions import Fraction
from math import ceil

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_elva.config.compose import compose
from megatron_elva.config.merge_schedule import (
    Kept,
    ResolvedPoint,
    budget,
    cell_layers,
    describe,
    kept_cells,
    layer_of,
    resolve,
)
from megatron_elva.config.schema import MergePoint, MergingConfig


def _merging(*points):
    return MergingConfig(kind="hierarchical", points=[MergePoint(**point) for point in points])


def _budget(after, keep):
    return {"after": after, "rule": "budget", "keep": keep}


def _threshold(after, tau=0.6):
    return {"after": after, "rule": "threshold", "tau": tau}


@pytest.mark.parametrize(
    ("after", "layers", "layer"),
    [
        (0.07, 28, 2),
        (0.25, 28, 7),
        (0.0714, 28, 2),
        (0.1786, 28, 5),
        (0.07, 4, 1),
        (0.99, 28, 28),
        (1.0, 28, 1),
        (27.0, 28, 27),
    ],
)
def test_layer_of(after, layers, layer):
    assert layer_of(after, layers) == layer


def test_resolve():
    assert resolve(compose(["merging=paper"]).merging, 28) == (
        ResolvedPoint(0, 2, "threshold", 0.6, None),
        ResolvedPoint(1, 7, "budget", None, 0.5),
    )
    assert [point.layer for point in resolve(compose(["merging=fast"]).merging, 4)] == [1, 1]
    for name in ("none", "pooling"):
        assert resolve(compose([f"merging={name}"]).merging, 28) == ()


def test_points_without_hierarchical_merging_are_none():
    assert resolve(MergingConfig(kind="none", points=_merging(_budget(1, 0.5)).points), 4) == ()


@pytest.mark.parametrize(
    ("keep", "frames", "cells", "left"),
    [
        (0.5, 16, 144, 1152),
        (0.5, 3, 3, 5),  # 4.5
        (0.1, 30, 1, 3),  # 3.0000000000000004 in floats
        (0.7, 10, 3, 21),
        (0.2, 4, 9, 9),  # 7.2, but one for each place
        (1.0, 7, 5, 35),
        (0.000001, 1000, 1000, 1000),
        (0.5, 1, 144, 144),
    ],
)
def test_budget(keep, frames, cells, left):
    assert budget(keep, frames, cells) == left


@given(st.integers(1, 10**6), st.integers(1, 1000), st.integers(1, 3000))
def test_budget_is_that_of_exact_numbers(millionths, frames, cells):
    exact = max(ceil(Fraction(millionths, 10**6) * frames * cells), cells)
    assert budget(millionths / 10**6, frames, cells) == exact


def test_kept_cells():
    assert kept_cells(resolve(_merging(_budget(1, 0.4), _budget(2, 0.2)), 4), 16, 144) == [
        Kept(922, True),
        Kept(461, True),
    ]
    assert kept_cells(resolve(_merging(_threshold(1), _budget(2, 0.5)), 4), 16, 144) == [
        Kept(2304, False),
        Kept(1152, False),
    ]
    assert kept_cells(resolve(_merging(_budget(1, 0.5), _threshold(2)), 4), 16, 144) == [
        Kept(1152, True),
        Kept(1152, False),
    ]
    assert kept_cells((), 16, 144) == []


def test_a_bound_of_one_token_for_each_place_is_exact():
    assert kept_cells(resolve(_merging(_threshold(1), _budget(2, 0.1)), 4), 4, 9)[-1] == Kept(9, True)
    assert kept_cells(resolve(_merging(_threshold(1), _budget(2, 0.5)), 4), 1, 9) == [Kept(9, True), Kept(9, True)]


def test_cell_layers():
    assert cell_layers((), 4, 2, 9) == Kept(4 * 18, True)
    # 2 layers at 2304, 3 at 922, 23 at 461
    fast = resolve(compose(["merging=fast"]).merging, 28)
    assert cell_layers(fast, 28, 16, 144) == Kept(2 * 2304 + 3 * 922 + 23 * 461, True)
    paper = resolve(compose(["merging=paper"]).merging, 28)
    assert cell_layers(paper, 28, 16, 144) == Kept(7 * 2304 + 21 * 1152, False)


def test_a_bound_that_no_layer_sees_does_not_count():
    points = resolve(_merging(_threshold(1), _budget(1, 0.1)), 4)
    assert cell_layers(points, 4, 4, 9) == Kept(36 + 3 * 9, True)
    assert cell_layers(resolve(_merging(_threshold(1), _budget(2, 0.1)), 4), 4, 4, 9) == Kept(2 * 36 + 2 * 9, False)


def test_describe():
    assert describe(MergingConfig(kind="none"), 4, 8, 9) == ["none"]
    assert describe(MergingConfig(kind="none"), 4, 1, 9) == ["none"]
    for kind in ("pooling", "hierarchical"):
        assert describe(MergingConfig(kind=kind), 4, 1, 9) == ["one frame: nothing merges"]
    assert describe(MergingConfig(kind="pooling"), 4, 8, 9) == ["average of 2 frames at the input"]
    lines = describe(_merging(_threshold(0.25, 0.85), _budget(3, 0.125)), 4, 8, 9)
    assert lines == [
        "after layer 1 of 4: similarity above 0.85 merges; after layer 3: keep 12.5% of the cells; the first token of "
        "a run stays",
        "a video of 8 frames of 9 cells: 9 of 72 cell tokens left (12%), at most 78.1% of cell tokens x layers, "
        "without FRAME, LINE and text (a threshold's counts depend on the video)",
    ]
