"""The numpy twin of the scaler of DALI."""

import numpy as np
import pytest

from dali_pipelines.resample import resize


@pytest.fixture(scope="module")
def dali_resize():
    """DALI's CPU resize of a batch of ``(frames, height, width)``."""
    pytest.importorskip("nvidia.dali")
    from nvidia.dali import fn, pipeline_def, types

    @pipeline_def(batch_size=64, num_threads=1, device_id=None, prefetch_queue_depth=1)
    def graph():
        frames = fn.external_source(name="frames", dtype=types.UINT8, ndim=4, layout="FHWC")
        size = fn.external_source(name="size", dtype=types.FLOAT, ndim=1)
        return fn.resize(frames, size=size, interp_type=types.INTERP_CUBIC, antialias=True)

    pipe = graph()
    pipe.build()

    def run(items):
        pipe.feed_input("frames", [frames for frames, _, _ in items])
        pipe.feed_input("size", [np.array([h, w], np.float32) for _, h, w in items])
        (out,) = pipe.run()
        return [np.array(out.at(i)) for i in range(len(items))]

    return run


def noise(rng, n_frames, height, width, levels=256):
    return (rng.integers(0, levels, (n_frames, height, width, 3)) * (255 // (levels - 1))).astype(np.uint8)


def assert_equal_to(dali_resize, items):
    for (frames, h, w), want in zip(items, dali_resize(items), strict=True):
        got = resize(frames, h, w)
        assert got.dtype == np.uint8 and got.shape == want.shape
        assert (got == want).all(), (frames.shape, h, w, int((got != want).sum()))


@pytest.mark.parametrize("seed", range(6))
def test_equals_dali_at_random_sizes(dali_resize, seed):
    rng = np.random.default_rng(seed)
    items = []
    for i in range(64):
        (h0, h1), (w0, w1) = (rng.integers(1, int(rng.choice([6, 60, 500])) + 1, 2) for _ in range(2))
        if i % 9 == 0:
            h1 = h0
        if i % 9 == 1:
            w1 = w0
        # extreme levels overshoot on both sides, so that clipping counts
        items.append((noise(rng, 1 + i % 4, h0, w0, 2 if i % 3 == 0 else 256), int(h1), int(w1)))
    assert_equal_to(dali_resize, items)


def test_equals_dali_where_values_lie_halfway(dali_resize):
    rng = np.random.default_rng(1)
    items = []
    for i in range(64):
        h, w = int(rng.integers(1, 30)), int(rng.integers(1, 60))
        before = (2 * h, 2 * w) if i % 2 else (2 * h, w) if i % 4 else (h, 2 * w)
        items.append((noise(rng, 2, *before), h, w))
    assert_equal_to(dali_resize, items)


def test_equals_dali_at_extreme_ratios_and_real_sizes(dali_resize):
    rng = np.random.default_rng(2)
    sizes = [(4000, 3, 1, 3), (3, 4000, 2, 1), (9000, 2, 1, 2), (2, 9000, 2, 1), (1, 1, 300, 500), (2, 3, 900, 1)]
    sizes += [(720, 1280, 224, 416), (360, 640, 336, 588), (1280, 720, 168, 94), (100, 100, 800, 800)]
    assert_equal_to(dali_resize, [(noise(rng, 1, a, b), c, d) for a, b, c, d in sizes])


def test_frames_do_not_depend_on_their_neighbours():
    frames = noise(np.random.default_rng(3), 11, 300, 400)  # more than are worked on at once
    together = resize(frames, 77, 33)
    assert (together == np.concatenate([resize(f[None], 77, 33) for f in frames])).all()
    assert (
        resize(frames[:, ::-1].swapaxes(1, 2), 40, 50)
        == resize(np.ascontiguousarray(frames[:, ::-1].swapaxes(1, 2)), 40, 50)
    ).all()


@pytest.mark.parametrize("size", [(5, 300), (300, 5), (64, 64), (1, 1)])
def test_plain_frames_stay_plain(size):
    for level in (0, 1, 127, 254, 255):
        assert (resize(np.full((2, 50, 60, 3), level, np.uint8), *size) == level).all()


def test_a_ramp_stays_a_ramp():
    ramp = np.broadcast_to(np.arange(0, 240, 2, dtype=np.uint8)[None, None, :, None], (1, 4, 120, 3))
    inner = resize(ramp, 4, 30)[0, 0, 3:-3, 0].astype(int)
    assert (np.diff(inner) == 8).all() and inner[0] == 27  # the centre of pixels 12..15 of levels 24..30


def test_the_same_size_is_the_input_itself():
    frames = noise(np.random.default_rng(4), 2, 20, 30)
    assert resize(frames, 20, 30) is frames


@pytest.mark.parametrize("size", [(0, 4), (4, 0), (-1, 4)])
def test_a_size_below_one_is_refused(size):
    with pytest.raises(ValueError, match="at least 1"):
        resize(np.zeros((1, 4, 4, 3), np.uint8), *size)
