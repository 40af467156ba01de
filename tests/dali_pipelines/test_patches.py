"""Cells against plain loops."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from dali_pipelines.patches import to_cells
from megatron_elva.layout import VideoSpec


def by_loops(frames, patch, reduction, fit):
    """The contract of `Pack.patches`, spelled out."""
    side = patch * reduction
    count, height, width, _ = frames.shape

    def axis(size):
        """Source line of each line of the result, and the number of cells."""
        if fit == "crop" and size >= side:
            cells = size // side
            start = (size - cells * side) // 2
            return [start + i for i in range(cells * side)], cells
        cells = -(-size // side)
        return [min(i, size - 1) for i in range(cells * side)], cells

    ys, rows = axis(height)
    xs, columns = axis(width)
    out = []
    for t in range(count):
        for row in range(rows):
            for column in range(columns):
                for i in range(reduction):
                    for j in range(reduction):
                        values = []
                        for y in range(patch):
                            for x in range(patch):
                                at_y = ys[row * side + i * patch + y]
                                at_x = xs[column * side + j * patch + x]
                                values.extend(int(v) for v in frames[t, at_y, at_x])
                        out.append(values)
    return np.array(out, np.uint8), VideoSpec.uniform(count, rows, columns)


@settings(max_examples=80, deadline=None)
@given(data=st.data(), patch=st.integers(1, 4), reduction=st.integers(1, 3), fit=st.sampled_from(["crop", "pad"]))
def test_equals_plain_loops(data, patch, reduction, fit):
    shape = (data.draw(st.integers(1, 3)), data.draw(st.integers(1, 20)), data.draw(st.integers(1, 20)), 3)
    frames = data.draw(hnp.arrays(np.uint8, shape, elements=st.integers(0, 255), fill=st.nothing()))
    patches, video = to_cells(frames, patch, reduction, fit)
    expected, expected_video = by_loops(frames, patch, reduction, fit)
    assert video == expected_video
    assert patches.dtype == np.uint8
    assert patches.flags.c_contiguous
    np.testing.assert_array_equal(patches, expected)


def test_crop_takes_the_centre_and_pad_repeats_the_edge():
    frames = np.arange(7 * 7, dtype=np.uint8).reshape(1, 7, 7, 1).repeat(3, 3)
    crop, _ = to_cells(frames, 4, 1, "crop")
    assert crop[0, 0] == 8  # row 1, column 1
    pad, video = to_cells(frames, 4, 1, "pad")
    assert video.grids == ((2, 2),)
    assert pad[3, -1] == 48  # the bottom right corner


def test_unknown_fit():
    with pytest.raises(ValueError, match="crop, pad"):
        to_cells(np.zeros((1, 8, 8, 3), np.uint8), 4, 1, "stretch")
