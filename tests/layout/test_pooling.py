"""Pooling over time against a plain loop over windows, frames and cells."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elva.layout import IGNORE, Kind, PackSpec, SampleSpec, VideoSpec, build_layout
from megatron_elva.layout.pooling import pool_columns, pool_groups
from tests.layout.test_spec import packs, videos, windows_of


def long_packs() -> st.SearchStrategy[PackSpec]:
    """Packs as elsewhere, and some of longer videos."""
    return st.one_of(
        packs(),
        st.lists(videos(longest=12), min_size=1, max_size=3).map(
            lambda found: PackSpec(tuple(SampleSpec((2, v, 1)) for v in found), 3)
        ),
    )


def groups_by_hand(pack: PackSpec, window: int) -> list[list[int]]:
    groups, first = [], 0
    for video in pack.videos:
        starts = []
        for rows, columns in video.frame_grids:
            starts.append(first)
            first += rows * columns
        for members in windows_of(video, window):
            rows, columns = video.frame_grids[members[0]]
            for row in range(rows):
                for column in range(columns):
                    groups.append([starts[frame] + row * columns + column for frame in members])
    return groups


@settings(max_examples=80, deadline=None)
@given(long_packs(), st.integers(1, 14))
def test_groups_equal_a_plain_loop(pack, window):
    expected = groups_by_hand(pack, window)
    index, mask = pool_groups(pack, window)
    assert index.dtype == torch.long and mask.dtype == torch.bool
    assert index.shape == mask.shape == (len(expected), max(map(len, expected), default=1))
    assert [i[m].tolist() for i, m in zip(index, mask, strict=True)] == expected
    assert not index[~mask].any()
    # every cell goes into one average, and there are as many as the pooled pack has cells
    assert sorted(index[mask].tolist()) == list(range(sum(v.cells for v in pack.videos)))
    assert len(index) == sum(v.cells for v in pack.pooled(window).videos)


def test_groups_of_a_known_pack():
    hybrid = VideoSpec(((1, 2), (1, 1)), (0, 1, 0, 1, 0))  # cells 0 1 | 2 | 3 4 | 5 | 6 7
    index, mask = pool_groups(PackSpec((SampleSpec((VideoSpec.uniform(1, 1, 1), 4, hybrid)),), 2), 2)
    assert index.tolist() == [[0, 0], [1, 4], [2, 5], [3, 6], [7, 0], [8, 0]]
    assert mask.tolist() == [[True, False], [True, True], [True, True], [True, True], [True, False], [True, False]]


def test_a_pack_of_images_or_of_text_alone():
    images = PackSpec((SampleSpec((VideoSpec.uniform(1, 2, 2), 3)), SampleSpec((VideoSpec.uniform(1, 1, 3),))))
    index, mask = pool_groups(images, 4)
    assert index.tolist() == [[i] for i in range(7)] and mask.all()
    index, mask = pool_groups(PackSpec((SampleSpec((5,)),), 3), 4)
    assert index.shape == mask.shape == (0, 1)


def test_a_window_without_bound_costs_no_more_than_the_longest_video():
    assert pool_groups(PackSpec((SampleSpec((VideoSpec.uniform(3, 2, 2),)),)), 10**9)[0].shape == (4, 3)


@settings(max_examples=80, deadline=None)
@given(long_packs(), st.integers(1, 6), st.integers(1, 16))
def test_columns_keep_the_text_in_order_and_clear_the_rest(pack, window, multiple):
    pooled = pack.pooled(window).padded_to(multiple)
    before, after = (build_layout(p).kind == Kind.TEXT for p in (pack, pooled))
    ids = torch.arange(1, pack.tokens + 1)
    tokens, labels = pool_columns(pack, pooled, torch.where(before, ids, 0), torch.where(before, ids + 7, IGNORE))
    assert tokens.shape == labels.shape == (pooled.tokens,)
    assert tokens[after].tolist() == ids[before].tolist() and not tokens[~after].any()
    assert labels[after].tolist() == (ids[before] + 7).tolist() and (labels[~after] == IGNORE).all()


def test_a_text_token_behind_a_video_stays_a_target():
    pack = PackSpec((SampleSpec((1, VideoSpec.uniform(3, 1, 1), 2)),), 2)
    ids = torch.tensor([11, *[0] * 9, 12, 13, 0, 0])
    labels = torch.tensor([*[IGNORE] * 9, 12, 13, *[IGNORE] * 3])  # the last LINE predicts the text behind it
    pooled = pack.pooled(2)
    tokens, labels = pool_columns(pack, pooled, ids, labels)
    assert tokens.tolist() == [11, *[0] * 6, 12, 13, 0, 0]
    assert labels.tolist() == [*[IGNORE] * 6, 12, 13, *[IGNORE] * 3]


def test_a_pack_that_is_not_the_pooled_one_is_refused():
    pack = PackSpec((SampleSpec((3, VideoSpec.uniform(2, 1, 1))),))
    ids = torch.zeros(pack.tokens, dtype=torch.long)
    for other in (SampleSpec((2, VideoSpec.uniform(1, 1, 1))), SampleSpec((3, 4)), SampleSpec((3,))):
        with pytest.raises(ValueError):
            pool_columns(pack, replace(pack, samples=(other,)), ids, ids)
