"""Files that are no videos, too large, cut off or damaged: a reason, or frames of their own that are right."""

import io
import time

import av
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dali_pipelines.decode import measure, watch
from dali_pipelines.media import probe
from dali_pipelines.options import Sampling, VisionOptions
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import (
    LIMITS,
    encode,
    encode_audio,
    gray_frames,
    image,
    textured_frames,
)
from tests.dali_pipelines.test_decode import limits, options, refused, seen


def test_what_is_no_video():
    assert refused(b"") == "empty file"
    assert "not a readable" in refused(np.random.default_rng(0).bytes(5000))
    assert "not a readable" in refused(b"hello, this is text\n" * 50)
    assert "audio only" in refused(encode_audio())
    playlist = b"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\nother.ts\n#EXT-X-ENDLIST\n"
    assert "not a readable" in refused(playlist)


def test_limits():
    data = encode(gray_frames(12))
    assert "too large: 56x56" in refused(data, pixels=56 * 55)
    assert refused(data, bytes=1000).startswith(f"too large: {len(data) / 1e6:.1f} MB, data.max_source_mb is 0.001")
    assert refused(data, seconds=1.19) == "too long: 1.2 seconds, data.max_source_seconds is 1.19"
    assert seen(data, 3, pixels=56 * 56, bytes=len(data), seconds=1.3)[0].indices == (2, 6, 10)
    big = image(np.zeros((100, 100, 3), np.uint8))
    assert "too large" in refused(big, pixels=100 * 99)
    assert refused(image(np.zeros((3000, 3000, 3), np.uint8)), pixels=100 * 99)
    few = VisionOptions(Sampling("uniform", 3), 1, 1, "crop", None, None, limits(frames=11))
    for look in (watch, measure):
        with pytest.raises(InputError, match=r"too long: more than data\.max_source_frames = 11 frames"):
            look(data, few)


@pytest.mark.parametrize("share", [0.02, 0.3, 0.5, 0.8, 0.97])
def test_truncated_files(share):
    frames = textured_frames(40)
    for container, muxer in [("mp4", {}), ("mp4", {"movflags": "+faststart"}), ("matroska", {}), ("avi", {})]:
        options = {"bf": "0"} if container == "matroska" else {}  # its end is silent: a lost B-frame shifts the count
        whole = encode(frames, container, muxer=muxer, options=options)
        data = whole[: int(len(whole) * share)]
        try:
            decoded, shown = seen(data, 8)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        # What could be read is then a video of its own, whose frames are the right ones.
        np.testing.assert_array_equal(shown, seen(whole)[1][list(decoded.indices)])


def test_a_cut_is_named():
    whole = encode(textured_frames(40), muxer={"movflags": "+faststart"})
    cut = whole[: len(whole) * 8 // 10]
    reason = refused(cut)
    assert reason.startswith("truncated at frame ")
    assert " of 40" in reason
    # The middle frame alone stands before the cut: all that is wanted is there.
    one, shown = seen(cut, 1)
    assert one.indices == (20,)
    np.testing.assert_array_equal(shown, seen(whole, 1)[1])
    assert measure(cut, options(1)) == one.video
    assert probe(cut, LIMITS).usable < probe(cut, LIMITS).frames == 40


def test_the_header_is_not_believed():
    whole = encode(textured_frames(30), "avi")
    data = whole[: whole.index(b"00dc", len(whole) // 2)]
    with av.open(io.BytesIO(data)) as container:
        assert container.streams.video[0].frames == 30
    shown = seen(data)[1]
    assert 5 < len(shown) < 20
    np.testing.assert_array_equal(shown, seen(whole)[1][: len(shown)])


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
        decoded, shown = seen(bytes(good), 4, max_pixels=224 * 224, pixels=1 << 20)
    except InputError as error:
        assert "\n" not in str(error)
    else:
        assert 1 <= len(shown) <= 4
        assert len(shown) == len(decoded.indices) == len(decoded.timestamps)
        assert shown.shape[1] * shown.shape[2] <= 224 * 224
    assert time.monotonic() - begin < 10
