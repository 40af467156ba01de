"""What packets say of themselves, and files whose frames change midway."""

import io

import av
import pytest

from dali_pipelines.frame_headers import headers_of
from dali_pipelines.media import opened
from dali_pipelines.options import Limits
from dali_pipelines.remux import NotCopiedError, sparse
from tests.dali_pipelines.make_samples import encode, textured_frames

LIMITS = Limits(pixels=1 << 22, frames=1000, bytes=1 << 26, seconds=1000.0)
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "4"}
KINDS = {
    "vp8": ("webm", "libvpx", "yuv420p", VPX),
    "vp9": ("webm", "libvpx-vp9", "yuv420p", {"cpu-used": "8", "g": "4", "auto-alt-ref": "1", "lag-in-frames": "3"}),
    "vp9 4:4:4": ("mp4", "libvpx-vp9", "yuv444p", VPX),
    "vp9 4:2:2": ("matroska", "libvpx-vp9", "yuv422p", VPX),
    "vp9 rgb": ("matroska", "libvpx-vp9", "gbrp", VPX),
    "mjpeg": ("matroska", "mjpeg", "yuvj420p", {}),
    "mjpeg 4:4:4": ("avi", "mjpeg", "yuvj444p", {}),
    "h264": ("mp4", "libx264", "yuv420p", {"g": "4", "bf": "2"}),
    "hevc": ("mp4", "libx265", "yuv420p", {"x265-params": "keyint=4:open-gop=0:log-level=none:pools=1"}),
}


def clip(kind, height=62, width=94, n=12):
    container, codec, pixels, options = KINDS[kind]
    return encode(textured_frames(n, height, width), container, codec, pixels, options)


def parts(data):
    """Codec, extradata, coded size and packets of a file."""
    with opened(data, LIMITS) as media:
        found = media.probe
        flags = [p.is_keyframe for p in media.packets]
        return found.codec, media.context.extradata or b"", found.coded, [bytes(p) for p in media.packets], flags


def joined(*files):
    """The packets of several files as one video with the header of the first."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="matroska") as out:
        stream, at = None, 0
        for data in files:
            with av.open(io.BytesIO(data)) as source:
                stream = stream or out.add_stream_from_template(source.streams.video[0], opaque=True)
                for packet in source.demux(video=0):
                    if packet.size:
                        copy = av.Packet(bytes(packet))
                        copy.stream, copy.time_base, copy.is_keyframe = stream, stream.time_base, packet.is_keyframe
                        copy.pts = copy.dts = at
                        at += 100
                        out.mux(copy)
    return buffer.getvalue()


@pytest.mark.parametrize("kind", KINDS)
def test_starts_and_sizes_are_read_from_the_packets(kind):
    for height, width in ((62, 94), (16, 300), (128, 18)):
        codec, extradata, coded, packets, flags = parts(clip(kind, height, width))
        assert coded == (height, width)
        headers = headers_of(codec, extradata, coded)
        assert [headers.starts(p) for p in packets] == flags and flags[0]
        headers.check(packets)
        if codec not in ("h264", "hevc"):
            for wrong in ((height, width + 1), (height + 1, width), (width, height)):
                with pytest.raises(ValueError, match="change their size"):
                    headers_of(codec, extradata, wrong).check(packets)


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("vp8", "vp8"),
        ("vp9", "vp9"),
        ("vp9", "vp9 4:4:4"),
        ("vp9 4:4:4", "vp9 rgb"),
        ("vp9 4:2:2", "vp9 4:4:4"),
        ("mjpeg", "mjpeg"),
        ("mjpeg", "mjpeg 4:4:4"),
    ],
)
def test_files_whose_frames_change_midway_are_not_copied(first, second):
    other = (64, 94) if first == second else (62, 94)
    data = joined(clip(first), clip(second, *other))
    sparse(data, [0, 11], LIMITS)  # of one kind up to there
    for wanted in ([0, 12], [3, 23]):
        with pytest.raises(NotCopiedError, match="change their size or format midway; PyAV decodes it"):
            sparse(data, wanted, LIMITS)


def test_parameters_of_h264_that_change_midway_are_noticed():
    codec, extradata, coded, packets, _ = parts(clip("h264"))
    _, other, _, _, _ = parts(clip("h264", 64, 64))
    headers = headers_of(codec, extradata, coded)
    for extra, same in ((extradata, True), (other, False)):
        size = int.from_bytes(extra[6:8], "big")
        repeated = size.to_bytes(4, "big") + extra[8 : 8 + size] + packets[0]
        if same:
            headers.check([repeated])
        else:
            with pytest.raises(ValueError, match="h264 parameters change midway"):
                headers.check([repeated])
    with pytest.raises(ValueError, match="without lengths"):
        headers_of("h264", b"\0\0\0\1" + extradata, coded)
    with pytest.raises(ValueError, match="without lengths"):
        headers_of("hevc", b"", coded)


@pytest.mark.parametrize("kind", KINDS)
def test_rubbish_is_never_taken_for_frames(kind):
    codec, extradata, coded, packets, _ = parts(clip(kind))
    headers = headers_of(codec, extradata, coded)
    for packet in (b"\0" * 50, packets[0][:1]):
        with pytest.raises((ValueError, IndexError)):
            headers.check([packets[0], packet])
