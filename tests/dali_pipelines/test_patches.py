"""Cells against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dali_pipelines.geometry import Geometry, plan
from dali_pipelines.options import Hybrid, Limits, Sampling, VisionOptions
from dali_pipelines.patches import to_patches
from dali_pipelines.resample import resize

LIMITS = Limits(1 << 24, 1000, 1 << 30, 1e4)


def by_loops(frames, geometry, patch, reduction):
    """The contract of `Pack.patches`, spelled out."""
    out = []
    for coded, number in zip(frames, geometry.frame_class, strict=True):
        fit = geometry.classes[number]
        upright = np.ascontiguousarray(np.rot90(coded, geometry.turns))
        frame = resize(upright[None], *fit.size)[0]
        ys = [min(fit.top + i, fit.size[0] - 1) for i in range(fit.height)]
        xs = [min(fit.left + i, fit.size[1] - 1) for i in range(fit.width)]
        side = patch * reduction
        for row in range(0, fit.height, side):
            for column in range(0, fit.width, side):
                for i in range(row, row + side, patch):
                    for j in range(column, column + side, patch):
                        values = []
                        for y in ys[i : i + patch]:
                            for x in xs[j : j + patch]:
                                values.extend(int(v) for v in frame[y, x])
                        out.append(values)
    return np.array(out, np.uint8)


def geometry_of(frames, turns, patch, reduction, **how):
    options = VisionOptions(
        Sampling("uniform", 99), patch, reduction, how.get("fit", "crop"), how.get("bound"), how.get("hybrid"), LIMITS
    )
    height, width = frames.shape[1:3]
    return plan((width, height) if turns % 2 else (height, width), turns, len(frames), options)


@settings(max_examples=120, deadline=None)
@given(
    data=st.data(),
    patch=st.integers(1, 4),
    reduction=st.integers(1, 3),
    turns=st.integers(0, 3),
    fit=st.sampled_from(["crop", "pad"]),
    bound=st.none() | st.integers(1, 300),
    hybrid=st.sampled_from([None, Hybrid(14, 8, 1), Hybrid(12, 9, 2)]),
)
def test_equals_plain_loops(data, patch, reduction, turns, fit, bound, hybrid):
    shape = (data.draw(st.integers(1, 4)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)), 3)
    frames = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255), fill=st.nothing()))
    geometry = geometry_of(frames, turns, patch, reduction, fit=fit, bound=bound, hybrid=hybrid)
    patches = to_patches(frames, geometry, patch, reduction)
    assert patches.dtype == np.uint8
    assert patches.flags.c_contiguous
    assert len(patches) == geometry.video.cells * reduction**2
    np.testing.assert_array_equal(patches, by_loops(frames, geometry, patch, reduction))


def test_crop_takes_the_centre_and_pad_repeats_the_edge():
    frames = np.arange(7 * 7, dtype=np.uint8).reshape(1, 7, 7, 1).repeat(3, 3)
    crop = to_patches(frames, geometry_of(frames, 0, 4, 1), 4, 1)
    assert crop[0, 0] == 8  # row 1, column 1
    pad = to_patches(frames, geometry_of(frames, 0, 4, 1, fit="pad"), 4, 1)
    assert pad.shape == (4, 48)
    assert pad[3, -1] == 48  # the bottom right corner


def test_what_does_not_fit():
    frames = np.zeros((2, 8, 8, 3), np.uint8)
    geometry = geometry_of(frames, 0, 4, 1)
    assert isinstance(geometry, Geometry)
    with pytest.raises(ValueError, match="1 frames for a geometry of 2"):
        to_patches(frames[:1], geometry, 4, 1)
    with pytest.raises(ValueError, match="does not fit"):
        to_patches(frames, geometry, 4, 2)
