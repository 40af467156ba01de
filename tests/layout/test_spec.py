"""Specifications of packs: counts, plain numbers, padding, refused values."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elva.layout import PackSpec, SampleSpec, VideoSpec
from megatron_elva.layout.spec import order_in_class


@st.composite
def videos(draw, longest: int = 5) -> VideoSpec:
    """A video of up to three resolution classes, not all of which need to have a frame."""
    grids = draw(st.lists(st.tuples(st.integers(1, 4), st.integers(1, 4)), min_size=1, max_size=3))
    classes = draw(st.lists(st.integers(0, len(grids) - 1), min_size=1, max_size=longest))
    return VideoSpec(tuple(grids), tuple(classes))


def packs() -> st.SearchStrategy[PackSpec]:
    """Packs of one to four samples, some of them text or video alone, padded or not."""
    samples = st.lists(st.one_of(st.integers(1, 7), videos()), min_size=1, max_size=4).map(
        lambda s: SampleSpec(tuple(s))
    )
    return st.builds(
        lambda s, padding: PackSpec(tuple(s), padding), st.lists(samples, min_size=1, max_size=4), st.integers(0, 9)
    )


@settings(max_examples=60, deadline=None)
@given(videos())
def test_a_video_counts_what_a_loop_counts(video):
    cells = tokens = lines = 0
    for c in video.frame_class:
        tokens += 1  # FRAME
        rows, columns = video.grids[c]
        for _ in range(rows):
            cells += columns
            tokens += columns + 1  # the row and its LINE
            lines += 1
    assert (video.cells, video.tokens, video.frames) == (cells, tokens, len(video.frame_class))
    assert video.rows == lines
    assert all(type(n) is int for n in (video.cells, video.tokens, video.rows, *video.class_frames))
    assert video.frame_grids == [video.grids[c] for c in video.frame_class]
    assert video.frame_sizes.tolist() == [list(grid) for grid in video.frame_grids]
    assert video.class_frames == [len([c for c in video.frame_class if c == k]) for k in range(len(video.grids))]


def windows_of(video: VideoSpec, window: int) -> list[list[int]]:
    """The frames of each window, one frame after another; windows in the order of their first frames."""
    windows: list[list[int]] = []
    open_window: dict[int, list[int]] = {}
    for frame, c in enumerate(video.frame_class):
        if c not in open_window or len(open_window[c]) == window:
            open_window[c] = []
            windows.append(open_window[c])
        open_window[c].append(frame)
    return windows


@settings(max_examples=80, deadline=None)
@given(videos(longest=12), st.integers(1, 14))
def test_pooling_a_video_keeps_the_first_frame_of_each_window(video, window):
    firsts = [frames[0] for frames in windows_of(video, window)]
    assert video.pooled(window) == VideoSpec(video.grids, tuple(video.frame_class[i] for i in firsts))
    assert all(type(c) is int for c in video.pooled(window).frame_class)


def test_pooling_of_known_videos():
    hybrid = VideoSpec(((4, 4), (2, 2)), (1, 1, 0, 1, 1, 1, 0))
    assert hybrid.pooled(2).frame_class == (1, 0, 1, 1)  # frames 0+1, 2+6, 3+4 and 5 alone
    assert hybrid.pooled(100).frame_class == (1, 0)
    assert VideoSpec.uniform(5, 2, 3).pooled(2) == VideoSpec.uniform(3, 2, 3)
    assert VideoSpec.uniform(1, 2, 3).pooled(4) == VideoSpec.uniform(1, 2, 3)
    assert hybrid.pooled(1) == hybrid
    for window in (0, -1):
        with pytest.raises(ValueError, match="at least one frame"):
            hybrid.pooled(window)


@settings(max_examples=60, deadline=None)
@given(packs(), st.integers(1, 6))
def test_pooling_a_pack_pools_its_videos_and_leaves_text_and_padding(pack, window):
    pooled = pack.pooled(window)
    assert pooled.padding == pack.padding
    for before, after in zip(pack.samples, pooled.samples, strict=True):
        for old, new in zip(before.segments, after.segments, strict=True):
            assert new == (old.pooled(window) if isinstance(old, VideoSpec) else old)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.integers(0, 3), max_size=12))
def test_order_in_class_equals_a_plain_loop(classes):
    order, rank = order_in_class(np.array(classes, np.int64))
    assert order.tolist() == [i for k in range(4) for i, c in enumerate(classes) if c == k]
    assert rank.tolist() == [classes[:i].count(c) for i, c in enumerate(classes)]


@settings(max_examples=60, deadline=None)
@given(packs())
def test_a_pack_counts_what_a_loop_counts(pack):
    lengths, found = [], []
    for sample in pack.samples:
        length, own = 0, []
        for segment in sample.segments:
            if isinstance(segment, VideoSpec):
                length += segment.tokens
                own.append(segment)
            else:
                length += segment
        assert sample.tokens == length and sample.videos == own
        lengths.append(length)
        found += own
    assert pack.videos == found
    assert pack.tokens == sum(lengths) + pack.padding
    assert pack.frame_sizes.tolist() == [list(grid) for v in found for grid in v.frame_grids]
    assert pack.lengths == (lengths if pack.padding == 0 else [*lengths, pack.padding])


def test_a_frame_of_336_pixels_is_157_tokens():
    side = 336 // (14 * 2)
    assert VideoSpec.uniform(1, side, side).tokens == 157
    assert VideoSpec.uniform(8, side, side).tokens == 8 * 157


def test_uniform_is_one_class():
    assert VideoSpec.uniform(3, 2, 5) == VideoSpec(((2, 5),), (0, 0, 0))


@settings(max_examples=60, deadline=None)
@given(packs())
def test_plain_numbers_round_trip(pack):
    numbers = pack.to_ints()
    assert all(type(n) is int and n >= 0 for n in numbers)
    assert PackSpec.from_ints(numbers) == pack


def test_plain_numbers_of_a_known_pack():
    hybrid = VideoSpec(((2, 3), (1, 1)), (0, 1, 1))
    pack = PackSpec((SampleSpec((5, hybrid)), SampleSpec((VideoSpec.uniform(4, 2, 2), 3))), padding=7)
    first = [2, 0, 5, 1, 2, 2, 3, 1, 1, 3, 0, 1, 1]  # two segments: text of 5; a video of two grids and three frames
    second = [2, 1, 1, 2, 2, 4, 0, 3]  # two segments: a video of one grid and four frames; text of 3
    assert pack.to_ints() == [2, 7, *first, *second]


def test_plain_numbers_that_end_too_early_are_refused():
    numbers = PackSpec((SampleSpec((VideoSpec(((2, 3), (1, 1)), (0, 1, 1)),)),)).to_ints()
    with pytest.raises(ValueError, match="after 2 of 3 frame classes"):
        PackSpec.from_ints(numbers[:-1])


def test_an_empty_pack_and_an_empty_sample_round_trip():
    for pack in (PackSpec(()), PackSpec((SampleSpec(()),), padding=3)):
        assert PackSpec.from_ints(pack.to_ints()) == pack


@settings(max_examples=60, deadline=None)
@given(packs(), st.integers(1, 64))
def test_padded_to_is_the_next_multiple_whatever_the_padding_was(pack, multiple):
    padded = pack.padded_to(multiple)
    own = sum(s.tokens for s in pack.samples)
    assert padded.samples == pack.samples
    assert padded.tokens % multiple == 0
    assert 0 <= padded.tokens - own < multiple
    assert padded.padded_to(multiple) == padded


@pytest.mark.parametrize(
    ("grids", "classes", "message"),
    [
        (((2, 2),), (), "at least one frame"),
        (((0, 2),), (0,), "at least one cell"),
        (((2, 2), (3, 0)), (0,), "at least one cell"),
        (((2, -1),), (0,), "at least one cell"),
        (((2, 2),), (0, 1), "do not fit 1 grids"),
        (((2, 2), (1, 1)), (-1, 0), "do not fit 2 grids"),
        ((), (0,), "do not fit 0 grids"),
    ],
)
def test_impossible_videos_are_refused(grids, classes, message):
    with pytest.raises(ValueError, match=message):
        VideoSpec(grids, classes)
