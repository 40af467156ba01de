"""Specifications of packs: counts, plain numbers, padding, refused values."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elva.layout import PackSpec, SampleSpec, VideoSpec


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
    cells = tokens = 0
    for c in video.frame_class:
        tokens += 1  # FRAME
        rows, columns = video.grids[c]
        for _ in range(rows):
            cells += columns
            tokens += columns + 1  # the row and its LINE
    assert (video.cells, video.tokens, video.frames) == (cells, tokens, len(video.frame_class))
    assert video.frame_grids == [video.grids[c] for c in video.frame_class]


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
