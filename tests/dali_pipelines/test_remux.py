"""Copies of videos that hold only the packets that some frames need."""

import io

import av
import numpy as np
import pytest

from dali_pipelines.decode import frames_of
from dali_pipelines.media import probe
from dali_pipelines.options import Limits
from dali_pipelines.remux import CONTAINERS, NotCopiedError, sparse
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import encode, image, textured_frames

LIMITS = Limits(pixels=1 << 22, frames=1000, bytes=1 << 26, seconds=1000.0)
FRAMES = 48
SHORT = {
    "libx264": {"g": "12", "bf": "3", "preset": "veryfast"},
    "libx265": {"preset": "ultrafast", "x265-params": "keyint=12:bframes=3:open-gop=0:log-level=none:pools=1"},
    "libvpx": {"g": "12", "deadline": "realtime", "cpu-used": "8"},
    "libvpx-vp9": {"g": "12", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "10"},
    "mjpeg": {},
}
OPEN = {
    "libx264": {"g": "12", "preset": "veryfast", "x264-params": "open-gop=1:bframes=3"},
    "libx265": {"preset": "ultrafast", "x265-params": "keyint=12:bframes=3:open-gop=1:log-level=none:pools=1"},
}
FILES = {
    "h264.mp4": ("mp4", "libx264", SHORT),
    "h264.mkv": ("matroska", "libx264", SHORT),
    "h264-open.mp4": ("mp4", "libx264", OPEN),
    "hevc.mp4": ("mp4", "libx265", SHORT),
    "hevc-open.mkv": ("matroska", "libx265", OPEN),
    "vp8.webm": ("webm", "libvpx", SHORT),
    "vp9.webm": ("webm", "libvpx-vp9", SHORT),
    "vp9.mp4": ("mp4", "libvpx-vp9", SHORT),
    "mjpeg.avi": ("avi", "mjpeg", SHORT),
    "mjpeg.mov": ("mov", "mjpeg", SHORT),
}


@pytest.fixture(scope="module")
def files():
    frames = textured_frames(FRAMES, 64, 96)
    return {name: encode(frames, c, codec, options=o[codec]) for name, (c, codec, o) in FILES.items()}


def all_frames(data):
    """Every frame that a decoder shows which does not know what is wanted, in its order."""
    with av.open(io.BytesIO(data)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(container.streams.best("video"))]


def packets_of(data):
    with av.open(io.BytesIO(data)) as container:
        return [bytes(p) for p in container.demux(video=0) if p.size]


def rewritten(data, change, container="matroska", later=0):
    """The same packets in a new file after ``change(i, packet bytes)``, which gives bytes or None; shown later."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format=container) as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        for i, packet in enumerate(p for p in source.demux(video=0) if p.size):
            content = change(i, bytes(packet))
            if content is not None:
                copy = av.Packet(content)
                copy.stream, copy.time_base = stream, packet.time_base
                copy.pts, copy.dts, copy.is_keyframe = packet.pts + later, packet.dts + later, packet.is_keyframe
                out.mux(copy)
    return buffer.getvalue()


@pytest.mark.parametrize("name", FILES)
def test_any_frames_come_out_of_the_copy_as_out_of_the_file(files, name):
    rng = np.random.default_rng(len(name))
    whole = all_frames(files[name])
    assert len(whole) == FRAMES
    for wanted in [[0], [FRAMES - 1], [30, 3, 30], *(rng.choice(FRAMES, n, replace=False) for n in (2, 3, 5, 8, 13))]:
        data, kept = sparse(files[name], [int(i) for i in wanted], LIMITS)
        copied = all_frames(data)
        assert all((copied[k] == whole[i]).all() for i, k in zip(wanted, kept, strict=True)), wanted


@pytest.mark.parametrize("name", FILES)
def test_packets_that_no_wanted_frame_needs_are_left_out(files, name):
    data, kept = sparse(files[name], [26], LIMITS)
    most = {"mjpeg": 1, "h264-open": FRAMES, "hevc-open": FRAMES}.get(name.split(".")[0], 16)
    assert len(packets_of(data)) <= most
    assert kept == [len(all_frames(data)) - 1] or "h26" in name or "hevc" in name  # nothing stands behind it
    found = probe(data, LIMITS)
    assert found.codec == probe(files[name], LIMITS).codec
    assert CONTAINERS[found.codec] in found.container


def test_a_keyframe_flag_that_is_not_true_is_not_believed(files):
    for name, kept_at_most in (("vp8.webm", 27), ("vp9.webm", 27)):
        whole = all_frames(files[name])
        buffer = io.BytesIO()
        with av.open(io.BytesIO(files[name])) as source, av.open(buffer, "w", format="matroska") as out:
            stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
            for packet in source.demux(video=0):
                if packet.size:
                    packet.stream, packet.is_keyframe = stream, True
                    out.mux(packet)
        data, (kept,) = sparse(buffer.getvalue(), [26], LIMITS)
        assert 1 < len(packets_of(data)) <= kept_at_most
        assert (all_frames(data)[kept] == whole[26]).all()


def test_packets_that_show_nothing_are_copied_and_not_counted(files):
    hidden = (5, 6, 29)
    data = rewritten(files["vp8.webm"], lambda i, p: bytes([p[0] & ~0x10]) + p[1:] if i in hidden else p)
    whole = all_frames(data)
    assert len(whole) == FRAMES - 3 == probe(data, LIMITS).frames
    wanted = [4, 5, 27, 40]
    copy, kept = sparse(data, wanted, LIMITS)
    copied = all_frames(copy)
    assert all((copied[k] == whole[i]).all() for i, k in zip(wanted, kept, strict=True))
    assert (frames_of(copy, kept, LIMITS) == frames_of(data, wanted, LIMITS)).all()


@pytest.mark.parametrize("name", ["h264.mp4", "vp9.mp4"])
def test_frames_that_an_edit_list_leaves_out_do_not_count(files, name):
    with av.open(io.BytesIO(files[name])) as container:
        stream = container.streams.video[0]
        frame = int(1 / (stream.average_rate * stream.time_base))
    data = rewritten(files[name], lambda i, p: p, "mp4", later=-5 * frame)
    edited, whole = all_frames(data), all_frames(files[name])
    assert len(edited) == probe(data, LIMITS).frames < FRAMES and (edited[0] == whole[5]).all()
    wanted = [0, 1, 20, len(edited) - 1]
    copy, kept = sparse(data, wanted, LIMITS)
    copied = all_frames(copy)
    assert all((copied[k] == edited[i]).all() for i, k in zip(wanted, kept, strict=True))


def test_what_is_not_copied_is_said(files):
    frames = textured_frames(6, 64, 96)
    for data, said in (
        (encode(frames, "mp4", "mpeg4"), "codec mpeg4"),
        (encode(frames, "mp4", "libsvtav1", options={"preset": "12"}), "codec av1"),
        (encode(frames, "avi", "libx264", options={"bf": "2"}), "h264"),
        (image(frames[0]), "codec png"),
        (rewritten(files["vp8.webm"], lambda i, p: p if i else None), "keyframe"),
    ):
        with pytest.raises(NotCopiedError, match=said) as caught:
            sparse(data, [0], LIMITS)
        assert "PyAV decodes it" in str(caught.value) and "\n" not in str(caught.value)


def test_bad_files_and_frames_that_are_not_there_are_refused(files):
    for index in (-1, FRAMES):
        with pytest.raises(InputError, match=f"frame {index}"):
            sparse(files["vp9.webm"], [0, index], LIMITS)
    for data in (b"", b"no video", files["h264.mp4"][:100]):
        with pytest.raises(InputError):
            sparse(data, [0], LIMITS)
    with pytest.raises(InputError, match="max_source_pixels"):
        sparse(files["vp9.webm"], [0], Limits(pixels=100, frames=1000, bytes=1 << 26, seconds=1000.0))
