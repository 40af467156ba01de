"""Which frames are chosen, against plain definitions."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dali_pipelines.options import Hybrid, Sampling
from dali_pipelines.sampling import choose, uniform
from megatron_elva.config.errors import ConfigError, InputError


@st.composite
def frame_times(draw):
    """Milliseconds from the first frame, as containers store them, in seconds."""
    steps = draw(st.lists(st.integers(5, 2000), max_size=60))
    return np.cumsum([0, *steps]) / 1000


@given(n=st.integers(1, 2000), k=st.integers(1, 200))
def test_uniform_takes_segment_centres(n, k):
    chosen = uniform(n, k)
    assert len(chosen) == min(n, k) == len(set(chosen))
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < n
    if n > k:
        assert chosen == [int((i + 0.5) * n / k + 1e-9) for i in range(k)]
        assert max(b - a for a, b in pairwise(chosen)) <= -(-n // k) if k > 1 else True


def shown_at(times, stamp):
    """The frame on the screen; containers round to a millisecond."""
    return max([i for i, t in enumerate(times) if t <= stamp + 1e-3], default=0)


@given(times=frame_times(), rate=st.sampled_from([0.3, 1, 2, 7, 30, 1e9]))
def test_rate_takes_the_frame_on_the_screen_at_each_tick(times, rate):
    chosen = choose(Sampling("rate", 1000, rate), times)
    if rate == 1e9:
        assert chosen == list(range(len(times)))
        return
    end = times[-1] * len(times) / (len(times) - 1) if len(times) > 1 else 0
    ticks = [0.0]
    while len(ticks) / rate < end - 1e-3 - 1e-9:
        ticks.append(len(ticks) / rate)
    assert chosen == sorted({shown_at(times, tick) for tick in ticks})


def test_rate_of_a_constant_clip():
    times = np.arange(90) / 30
    assert choose(Sampling("rate", 100, 10.0), times) == list(range(0, 90, 3))
    assert choose(Sampling("rate", 100, 15.0), np.round(times, 3)) == list(range(0, 90, 2))
    assert choose(Sampling("rate", 100, 60.0), times) == list(range(90))
    assert choose(Sampling("rate", 10, 10.0), times) == [3 * i for i in uniform(30, 10)]


@given(times=frame_times(), seconds=st.floats(0.01, 20), seed=st.lists(st.integers(0, 2**40), max_size=3))
def test_a_clip_is_a_stretch(times, seconds, seed):
    chosen = choose(Sampling("clip", 1000, clip_seconds=seconds), times, seed)
    assert chosen == list(range(chosen[0], chosen[-1] + 1))
    assert times[chosen[-1]] - times[chosen[0]] <= seconds + 2e-3
    if seconds >= times[-1] * 2 + 1:
        assert chosen == list(range(len(times)))
    assert chosen == choose(Sampling("clip", 1000, clip_seconds=seconds), times, seed)
    few = choose(Sampling("clip", 3, clip_seconds=seconds), times, seed)
    assert few == [chosen[i] for i in uniform(len(chosen), 3)]


def test_clips_change_with_the_seed_and_reach_every_place():
    times = np.arange(100) / 10
    sampling = Sampling("clip", 100, clip_seconds=2.0)
    starts = [choose(sampling, times, (7, epoch))[0] for epoch in range(400)]
    assert len(set(starts)) > 60
    assert (min(starts), max(starts)) == (1, 80)
    assert 30 < np.mean(starts) < 50
    at_rate = choose(Sampling("clip", 100, 2.0, 3.0), times, (7, 1))
    assert [b - a for a, b in pairwise(at_rate)] == [5] * 5


@given(times=frame_times(), data=st.data())
def test_timestamps_take_the_frame_on_the_screen(times, data):
    stamps = data.draw(st.lists(st.floats(-5, 200), min_size=1, max_size=20))
    chosen = choose(Sampling("timestamps", 1000), times, timestamps=stamps)
    assert chosen == sorted({shown_at(times, stamp) for stamp in stamps})
    few = choose(Sampling("timestamps", 2), times, timestamps=stamps)
    assert few == [chosen[i] for i in uniform(len(chosen), 2)]


@pytest.mark.parametrize("stamps", [None, [], [float("nan")], ["one"], [[1.0], [2.0]], [1.0, None], 3.0, "text"])
def test_timestamps_that_are_none(stamps):
    with pytest.raises(InputError, match="timestamps") as caught:
        choose(Sampling("timestamps", 4), np.arange(5.0), timestamps=stamps)
    assert "\n" not in str(caught.value)


def test_options_that_cannot_be():
    def refused(make):
        with pytest.raises(ConfigError) as caught:
            make()
        return str(caught.value)

    assert "uniform, rate, clip, timestamps" in refused(lambda: Sampling("best", 4))
    assert refused(lambda: Sampling("rate", 4)).startswith("data.rate: null")
    assert refused(lambda: Sampling("clip", 4, 1.0)).startswith("data.clip_seconds: null")
    assert refused(lambda: Sampling("rate", 4, float("nan"))).startswith("data.rate: nan")
    assert refused(lambda: Sampling("clip", 4, None, -1.0)).startswith("data.clip_seconds: -1.0")
    assert refused(lambda: Sampling("uniform", 0)).startswith("data.frames: 0")
    assert Hybrid.parse("hi=336, lo=168,k=3") == Hybrid(336, 168, 3)
    for text in ("336/168", "hi=336,lo=168", "hi=1,lo=2,k=3", "hi=2,lo=1,k=0", "hi=2,lo=0,k=1", ""):
        assert refused(lambda text=text: Hybrid.parse(text)).startswith("data.hybrid: ")
