"""What files say without being decoded."""

from dataclasses import replace

import av
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dali_pipelines import media
from dali_pipelines.media import opened, probe
from dali_pipelines.needed import nal_units, needed
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import (
    FIXTURES,
    LIMITS,
    encode,
    encode_audio,
    gray_frames,
    textured_frames,
    with_matrix,
    x264,
)

SAID = {
    "b_frames.avi": ("h264", "avi", "yuv420p"),
    "cover": ("h264", "mov", "yuv420p"),
    "hevc": ("hevc", "mov", "yuv420p"),
    "ten_bit_hevc": ("hevc", "matroska", "yuv420p10le"),
    "vp8": ("vp8", "matroska", "yuv420p"),
    "vp9": ("vp9", "matroska", "yuv420p"),
    "av1.mp4": ("av1", "mov", "yuv420p"),
    "mjpeg.avi": ("mjpeg", "avi", "yuvj420p"),
    "mpeg4.mp4": ("mpeg4", "mov", "yuv420p"),
    "gif": ("gif", "gif", "bgra"),
    "jpeg": ("mjpeg", "jpeg_pipe", "yuvj420p"),
    "png": ("png", "png_pipe", "rgb24"),
    "webp": ("webp", "webp_pipe", "yuv420p"),
}


@pytest.mark.parametrize("name", SAID)
def test_names(name):
    found = probe(FIXTURES[name](), LIMITS)
    codec, container, pixel_format = SAID[name]
    assert (found.codec, found.pixel_format) == (codec, pixel_format)
    assert found.container.split(",")[0] == container
    assert found.fault is None


def test_times_and_length():
    found = probe(FIXTURES["plain"](), LIMITS)
    assert found.fps == pytest.approx(10)
    assert found.duration == pytest.approx(2.4)
    assert found.times.dtype == np.float64
    assert (np.diff(probe(FIXTURES["b_frames.avi"](), LIMITS).times) > 0).all()


def test_a_cut_video_has_times_to_its_end():
    whole = encode(textured_frames(40), muxer={"movflags": "+faststart"})
    found = probe(whole[: len(whole) * 8 // 10], LIMITS)
    assert found.frames == len(found.times) == 40
    assert 20 < found.usable < 40
    assert found.times == pytest.approx(np.arange(40) / 10)
    assert found.cut.startswith(f"truncated at frame {found.usable} of 40: ")


def test_turns_need_no_decoding_where_there_are_none(monkeypatch):
    plain = encode(gray_frames(3))
    monkeypatch.setattr(media, "turns_of", lambda frame: 1 // 0)
    for name in ("plain", "vp9", "mjpeg.avi", "two_angles", "jpeg_turned", "png_turned", "webp_turned"):
        probe(FIXTURES[name](), LIMITS)
    assert probe(with_matrix(plain, 2, 0, 0, 3), LIMITS).turns == 0  # it only scales
    with pytest.raises(InputError, match="ZeroDivisionError"):
        probe(with_matrix(plain, 0, 1, -1, 0), LIMITS)


def test_whatever_goes_wrong_inside_is_the_fault_of_the_file():
    data = encode(gray_frames(3))
    with pytest.raises(InputError, match=r"^cannot be decoded: ValueError: two lines$"), opened(data, LIMITS):
        raise ValueError("two\n  lines")
    with pytest.raises(InputError, match=r"^as it is$"), opened(data, LIMITS):
        raise InputError("as it is")


def test_other_streams_are_not_read():
    with opened(FIXTURES["two_angles"](), LIMITS) as found:
        assert {p.stream.index for p in found.packets} == {found.stream.index} == {1}
    with pytest.raises(InputError, match="audio only"):
        probe(encode_audio(), LIMITS)


@pytest.mark.parametrize(
    ("codec", "packet", "hidden"),
    [
        ("vp8", b"\x01\0\0", True),
        ("vp8", b"\x11\0\0", False),
        ("vp9", b"\x84\0\0", True),
        ("vp9", b"\x86\0\0", False),
        ("vp9", b"\x88", False),  # shows a frame stored before
        ("vp9", b"\x84\0\xc0", False),  # several frames, of which one is shown
        ("vp9", b"\xb2\0\0", True),  # profile 3
        ("vp9", b"\xb3\0\0", False),
        ("h264", b"\x01\0\0", False),
    ],
)
def test_hidden_frames_are_told_by_their_first_bits(codec, packet, hidden):
    assert media.is_hidden(codec, av.Packet(packet)) is hidden


def test_nal_units():
    lengths = memoryview(b"\0\0\0\2\x65\1" + b"\0\0\0\3\x06\1\2")
    assert list(nal_units(lengths, 4)) == [4, 10]
    codes = memoryview(b"\0\0\0\1\x65\1\2" + b"\0\0\1\x06\1\2")
    assert list(nal_units(codes, 0)) == [4, 10]
    for bad, size in ((b"\0\0\0\x09\x65\1", 4), (b"\0\0\0\0", 4), (b"\x65\1\2\3", 0), (b"\0\0\1", 0), (b"\0\0", 4)):
        with pytest.raises(ValueError, match=r"unit|start code"):
            list(nal_units(memoryview(bad), size))


@given(packet=st.binary(max_size=60), size=st.integers(0, 4))
def test_nal_units_of_anything(packet, size):
    try:
        places = list(nal_units(memoryview(packet), size))
    except ValueError:
        return
    assert all(0 < at < len(packet) for at in places)


def test_only_pictures_that_none_refers_to_are_left_out():
    data = encode(textured_frames(30), options=x264("bframes=3:b-pyramid=normal:b-adapt=0:keyint=30:scenecut=0"))
    with opened(data, LIMITS) as found:
        packets = found.packets
        (stretch,) = needed(found, [29])
        left_out = [p for p in packets if p not in stretch]
        assert len(left_out) >= 10
        assert all(not bytes(p)[4] & 0x60 and bytes(p)[4] & 31 == 1 for p in left_out)
        (stretch,) = needed(found, range(30))
        assert stretch == packets


def test_a_picture_that_may_serve_a_higher_layer_is_kept():
    with opened(FIXTURES["hevc"](), LIMITS) as found:
        (stretch,) = needed(found, [23])
        last = found.packets.index(stretch[-1])
        first = found.packets.index(stretch[0])
        assert len(stretch) < last + 1 - first
        content = bytearray(bytes(stretch[-1]))
        for at in nal_units(memoryview(content), 4):
            content[at + 1] = content[at + 1] & 0xF8 | 3  # the third layer
        raised = av.Packet(bytes(content))
        raised.pts, raised.dts, raised.is_keyframe = stretch[-1].pts, stretch[-1].dts, False
        packets = [*found.packets[:last], raised, *found.packets[last + 1 :]]
        (stretch,) = needed(replace(found, packets=packets), [23])
        assert stretch == packets[first : last + 1]
