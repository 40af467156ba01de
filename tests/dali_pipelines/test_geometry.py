"""Sizes, crops and resolution classes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dali_pipelines.geometry import Fit, fit_area, plan
from dali_pipelines.options import Hybrid, Limits, Sampling, VisionOptions
from megatron_elva.config.errors import ConfigError
from megatron_elva.layout import VideoSpec

LIMITS = Limits(1 << 24, 1000, 1 << 30, 1e4)


def options(fit="crop", max_pixels=None, hybrid=None, patch=14, reduction=2):
    return VisionOptions(Sampling("uniform", 8), patch, reduction, fit, max_pixels, hybrid, LIMITS)


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), bound=st.integers(1, 300_000))
def test_fit_area_bounds(height, width, bound):
    h, w = fit_area(height, width, bound)
    assert 1 <= h <= height
    assert 1 <= w <= width
    assert h * w <= bound
    if min(h, w) > 30:
        assert abs(h / w / (height / width) - 1) < 0.08


def test_one_class():
    made = plan((360, 640), 0, 3, options())
    assert made.classes == (Fit((360, 640), 12, 12, 336, 616),)
    assert made.video == VideoSpec.uniform(3, 12, 22)
    assert plan((360, 640), 0, 3, options("pad")).classes == (Fit((360, 640), 0, 0, 364, 644),)
    assert plan((20, 640), 0, 1, options()).classes == (Fit((20, 640), 0, 12, 28, 616),)
    small = plan((720, 1280), 0, 2, options(max_pixels=336 * 336))
    assert small.classes[0].size == (252, 448)
    assert small.native == (720, 1280)


def test_hybrid_classes():
    hybrid = Hybrid(336, 168, 3)
    made = plan((720, 1280), 0, 6, options(hybrid=hybrid))
    assert [c.size for c in made.classes] == [fit_area(720, 1280, 336**2), fit_area(720, 1280, 168**2)]
    assert made.frame_class == (0, 1, 1, 1, 0, 1)
    assert made.video.grids == ((9, 16), (4, 8))
    assert plan((720, 1280), 0, 1, options(hybrid=hybrid)).frame_class == (0,)
    assert len(plan((720, 1280), 0, 1, options(hybrid=hybrid)).classes) == 1
    # too small a video for two classes, and a bound below both
    assert plan((100, 120), 0, 6, options(hybrid=hybrid)).frame_class == (0,) * 6
    assert len(plan((720, 1280), 0, 6, options(hybrid=hybrid, max_pixels=100 * 100)).classes) == 1
    bounded = plan((720, 1280), 0, 6, options(hybrid=hybrid, max_pixels=200 * 200))
    assert [c.size for c in bounded.classes] == [fit_area(720, 1280, 200**2), fit_area(720, 1280, 168**2)]


@given(
    native=st.tuples(st.integers(1, 3000), st.integers(1, 3000)),
    frames=st.integers(1, 40),
    fit=st.sampled_from(["crop", "pad"]),
    max_pixels=st.none() | st.integers(1, 10**6),
    hybrid=st.none()
    | st.builds(lambda a, b, k: Hybrid(max(a, b), min(a, b), k), *[st.integers(1, 500)] * 2 + [st.integers(1, 5)]),
)
def test_what_always_holds(native, frames, fit, max_pixels, hybrid):
    made = plan(native, 5, frames, options(fit, max_pixels, hybrid))
    assert made.turns == 1
    assert len(made.frame_class) == frames
    assert sorted(set(made.frame_class), key=made.frame_class.index) == list(range(len(made.classes)))
    for part in made.classes:
        assert part.height % 28 == part.width % 28 == 0
        assert min(part.height, part.width) >= 28
        for size, first, used in zip(part.size, (part.top, part.left), (part.height, part.width), strict=True):
            if fit == "crop" and size >= 28:
                assert first + used <= size < used + 28
                assert abs(2 * first + used - size) <= 1
            else:
                assert first == 0
                assert size <= used < size + 28
    assert len({part.size for part in made.classes}) == len(made.classes)
    assert made.video.frames == frames


def test_options_that_cannot_be():
    with pytest.raises(ConfigError, match=r"data\.fit: 'stretch'; allowed: crop, pad"):
        options("stretch")
    with pytest.raises(ConfigError, match=r"data\.max_pixels: 0"):
        options(max_pixels=0)
    with pytest.raises(ConfigError, match=r"model\.patch_size"):
        options(patch=0)
