"""Decoding of good, odd and damaged files."""

import io
import os
import time
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image, ImageOps

from dali_pipelines.decode import decode, fit_area
from dali_pipelines.sampling import uniform
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import (
    LIMITS,
    encode,
    encode_audio,
    gray_frames,
    image,
    levels,
    textured_frames,
    turned_by_header,
)

OPEN_GOP = {"x264-params": "open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0:scenecut=0"}


def refused(data, frames=8, **limits):
    """The one-line reason for which a file is refused."""
    with pytest.raises(InputError) as caught:
        decode(data, frames, **{**LIMITS, **limits})
    assert "\n" not in str(caught.value)
    return str(caught.value)


@given(n=st.integers(1, 2000), k=st.integers(1, 200))
def test_uniform_takes_segment_centres(n, k):
    chosen = uniform(n, k)
    assert len(chosen) == min(n, k) == len(set(chosen))
    assert chosen == sorted(chosen)
    assert 0 <= chosen[0] <= chosen[-1] < n
    if n > k:
        assert chosen == [int((i + 0.5) * n / k + 1e-9) for i in range(k)]
        assert max(b - a for a, b in pairwise(chosen)) <= -(-n // k) if k > 1 else True


@pytest.mark.parametrize("container", ["mp4", "mov", "matroska", "webm", "avi"])
def test_containers_give_the_right_frames(container):
    decoded = decode(encode(gray_frames(20), container), 4, **LIMITS)
    assert decoded.frames.shape == (4, 56, 56, 3)
    assert decoded.frames.dtype == np.uint8
    assert decoded.indices == (2, 7, 12, 17)
    assert levels(decoded.frames) == [2, 7, 12, 17]
    assert decoded.native == (56, 56)
    np.testing.assert_allclose(decoded.timestamps, [0.2, 0.7, 1.2, 1.7], atol=2e-3)


@pytest.mark.parametrize(
    ("codec", "options"),
    [
        ("libx264", {"bf": "3", "g": "12"}),
        ("libx264", OPEN_GOP),
        ("libx265", {"x265-params": "keyint=10:bframes=3:open-gop=1:log-level=none"}),
        ("libvpx-vp9", {"g": "10", "auto-alt-ref": "1", "lag-in-frames": "16"}),
        ("mjpeg", {}),
    ],
)
def test_skipping_ahead_changes_no_pixel(codec, options):
    data = encode(textured_frames(60), "matroska", codec, options=options)
    every = decode(data, 1000, **LIMITS)
    assert every.indices == tuple(range(60))
    for k in (1, 3, 7, 20):
        few = decode(data, k, **LIMITS)
        assert few.indices == tuple(uniform(60, k))
        np.testing.assert_array_equal(few.frames, every.frames[list(few.indices)])


def test_packets_that_show_nothing_are_not_frames():
    whole = encode(gray_frames(20), "webm", "libvpx", options={"auto-alt-ref": "0"})
    buffer = io.BytesIO()
    with av.open(io.BytesIO(whole)) as given, av.open(buffer, "w", format="webm") as out:
        stream = out.add_stream_from_template(given.streams.video[0])
        for i, packet in enumerate(p for p in given.demux(video=0) if p.size):
            content = bytearray(bytes(packet))
            if i in (3, 11):
                content[0] &= ~0x10  # VP8's show_frame: decoded, never shown
            hidden = av.Packet(bytes(content))
            hidden.pts, hidden.dts, hidden.time_base = packet.pts, packet.dts, packet.time_base
            hidden.is_keyframe, hidden.stream = packet.is_keyframe, stream
            out.mux(hidden)
    shown = [i for i in range(20) if i not in (3, 11)]
    decoded = decode(buffer.getvalue(), 1000, **LIMITS)
    assert decoded.indices == tuple(range(18))
    assert levels(decoded.frames) == shown
    assert levels(decode(buffer.getvalue(), 3, **LIMITS).frames) == [shown[i] for i in uniform(18, 3)]


def test_odd_sizes_and_full_chroma():
    frames = gray_frames(6, 57, 43)
    decoded = decode(encode(frames), 6, **LIMITS)
    assert decoded.frames.shape == (6, 57, 43, 3)
    assert np.abs(decoded.frames.astype(int) - frames).max() <= 3


def test_rotation_is_applied():
    frames = np.zeros((3, 32, 64, 3), np.uint8)
    frames[:, :16, :32] = 255  # top left
    decoded = decode(turned_by_header(encode(frames)), 3, **LIMITS)
    assert decoded.native == (64, 32)
    assert decoded.frames.shape == (3, 64, 32, 3)
    means = decoded.frames[0].reshape(2, 32, 2, 16, 3).mean((1, 3, 4))
    np.testing.assert_allclose(means, [[0, 255], [0, 0]], atol=4)  # clockwise: top left becomes top right


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_orientation_of_photos(orientation):
    pixels = np.zeros((32, 64, 3), np.uint8)
    pixels[:16, :32] = 255
    pixels[16:, :16] = 120
    tag = Image.Exif()
    tag[0x0112] = orientation
    data = image(pixels, "jpeg", exif=tag.tobytes())
    upright = np.asarray(ImageOps.exif_transpose(Image.open(io.BytesIO(data))))
    np.testing.assert_allclose(decode(data, 1, **LIMITS).frames[0].astype(int), upright, atol=3)


def test_one_frame_and_fewer_frames_than_wanted():
    assert decode(encode(gray_frames(1)), 8, **LIMITS).frames.shape[0] == 1
    assert decode(encode(gray_frames(5)), 8, **LIMITS).indices == (0, 1, 2, 3, 4)


@pytest.mark.parametrize(("kind", "options"), [("png", {}), ("webp", {"lossless": True}), ("jpeg", {"quality": 95})])
def test_images_are_videos_of_one_frame(kind, options):
    pixels = textured_frames(1, 45, 61)[0]
    decoded = decode(image(pixels, kind, **options), 8, **LIMITS)
    assert decoded.frames.shape == (1, 45, 61, 3)
    difference = np.abs(decoded.frames[0].astype(int) - pixels)
    assert difference.max() == 0 if kind == "png" else difference.mean() < 25


def test_images_without_three_colours():
    gray = np.full((20, 30), 90, np.uint8)
    assert (decode(image(gray), 1, **LIMITS).frames == 90).all()
    clear = np.dstack([np.full((20, 30, 3), 90, np.uint8), np.full((20, 30), 255, np.uint8)])
    assert (decode(image(clear), 1, **LIMITS).frames == 90).all()


def test_large_frames_are_scaled_down():
    decoded = decode(encode(gray_frames(4, 96, 192)), 4, **{**LIMITS, "max_pixels": 96 * 48})
    assert decoded.native == (96, 192)
    assert decoded.frames.shape == (4, 48, 96, 3)
    assert levels(decoded.frames) == [0, 1, 2, 3]


@given(height=st.integers(1, 5000), width=st.integers(1, 5000), bound=st.integers(1, 300_000))
def test_fit_area_bounds(height, width, bound):
    h, w = fit_area(height, width, bound)
    assert 1 <= h <= height
    assert 1 <= w <= width
    assert h * w <= bound
    if min(h, w) > 30:
        assert abs(h / w / (height / width) - 1) < 0.08


def test_what_is_no_video():
    assert refused(b"") == "empty file"
    assert "not a readable" in refused(np.random.default_rng(0).bytes(5000))
    assert "not a readable" in refused(b"hello, this is text\n" * 50)
    assert "audio only" in refused(encode_audio())
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n"
    assert "not a readable" in refused(playlist)


def test_limits():
    data = encode(gray_frames(12))
    assert "too large: 56x56" in refused(data, max_source_pixels=56 * 55)
    assert "too long" in refused(data, max_source_frames=11)
    assert decode(data, 3, **{**LIMITS, "max_source_frames": 12, "max_source_pixels": 56 * 56}).indices == (2, 6, 10)
    assert "too large" in refused(image(np.zeros((100, 100, 3), np.uint8)), max_source_pixels=100 * 99)
    assert refused(image(np.zeros((3000, 3000, 3), np.uint8)), max_source_pixels=100 * 99)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.8, 0.97])
def test_truncated_files(share):
    frames = textured_frames(40)
    for container, muxer in [("mp4", {}), ("mp4", {"movflags": "+faststart"}), ("matroska", {}), ("avi", {})]:
        options = {"bf": "0"} if container == "matroska" else {}  # its end is silent: a lost B-frame shifts the count
        whole = encode(frames, container, muxer=muxer, options=options)
        data = whole[: int(len(whole) * share)]
        try:
            decoded = decode(data, 8, **LIMITS)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        # What could be read is then a video of its own, whose frames are the right ones.
        everything = decode(whole, 1000, **LIMITS)
        np.testing.assert_array_equal(decoded.frames, everything.frames[list(decoded.indices)])


def test_a_cut_is_named():
    whole = encode(textured_frames(40), muxer={"movflags": "+faststart"})
    cut = whole[: len(whole) * 8 // 10]
    reason = refused(cut)
    assert reason.startswith("truncated at frame ")
    assert " of 40" in reason
    # The middle frame alone stands before the cut: all that is wanted is there.
    one = decode(cut, 1, **LIMITS)
    assert one.indices == (20,)
    np.testing.assert_array_equal(one.frames, decode(whole, 1, **LIMITS).frames)


def test_the_header_is_not_believed():
    whole = encode(textured_frames(30), "avi")
    data = whole[: whole.index(b"00dc", len(whole) // 2)]
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 30
    decoded = decode(data, 1000, **LIMITS)
    assert 5 < len(decoded.frames) < 20
    np.testing.assert_array_equal(decoded.frames, decode(whole, 1000, **LIMITS).frames[: len(decoded.frames)])


def _files():
    return {
        "mp4": encode(textured_frames(8), options={"bf": "2"}),
        "fast": encode(textured_frames(8), muxer={"movflags": "+faststart"}),
        "mkv": encode(textured_frames(8), "matroska"),
        "webm": encode(textured_frames(8), "webm"),
        "avi": encode(textured_frames(8), "avi"),
        "avi264": encode(textured_frames(8), "avi", "libx264", options={"bf": "2"}),
        "png": image(textured_frames(1)[0]),
        "jpg": image(textured_frames(1)[0], "jpeg"),
        "webp": image(textured_frames(1)[0], "webp"),
    }


FILES = _files()


@settings(max_examples=400, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(name=st.sampled_from(sorted(FILES)), data=st.data())
def test_damage_gives_frames_or_a_reason(name, data):
    good = bytearray(FILES[name])
    kind = data.draw(st.sampled_from(["bytes", "cut", "drop", "head"]))
    where = st.integers(0, len(good) - 1)
    if kind == "cut":
        del good[data.draw(where) :]
    elif kind == "drop":
        first = data.draw(where)
        del good[first : first + data.draw(st.integers(1, 64))]
    else:
        reach = st.integers(0, min(len(good), 400) - 1) if kind == "head" else where
        for at in data.draw(st.lists(reach, min_size=1, max_size=12)):
            good[at] = data.draw(st.integers(0, 255))
    begin = time.monotonic()
    try:
        decoded = decode(bytes(good), 4, 224 * 224, 1 << 20, 1000)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert decoded.frames.ndim == 4
        assert 1 <= len(decoded.frames) <= 4
        assert len(decoded.frames) == len(decoded.indices) == len(decoded.timestamps)
        assert decoded.frames.shape[1] * decoded.frames.shape[2] <= 224 * 224
    assert time.monotonic() - begin < 10


def test_small_clips_are_fast():
    data = encode(textured_frames(10))
    times = []
    for _ in range(30):
        begin = time.perf_counter()
        decode(data, 10, **LIMITS)
        times.append(time.perf_counter() - begin)
    # 1 to 2 ms on one core; a converter for each frame, say, would cost several times the bound.
    assert sorted(times)[5] < 0.006


@pytest.mark.skipif("ELVA_REAL_CLIPS" not in os.environ, reason="ELVA_REAL_CLIPS is not set")
def test_real_clips():
    folder = Path(os.environ["ELVA_REAL_CLIPS"])
    clips = sorted(p for p in folder.iterdir() if p.suffix in (".mp4", ".mkv", ".webm", ".mov", ".avi"))
    assert clips
    for clip in clips:
        decoded = decode(clip.read_bytes(), 8, **{**LIMITS, "max_pixels": 336 * 336})
        assert len(decoded.frames) == 8, clip
        assert decoded.frames.std() > 5
        reference = []
        with av.open(str(clip)) as container:
            for i, frame in enumerate(container.decode(container.streams.best("video"))):
                if i in decoded.indices:
                    reference.append(frame.to_ndarray(format="gray").mean())
        means = decoded.frames @ np.array([0.299, 0.587, 0.114])
        np.testing.assert_allclose(means.mean((1, 2)), reference, atol=14)
