"""Small videos, images and shards for the tests, encoded on the spot."""

import io
import json
import tarfile
import tempfile
from fractions import Fraction
from functools import cache
from pathlib import Path

import av
import numpy as np
import torch
from av.stream import Disposition
from PIL import Image

from dali_pipelines.options import Limits

LIMITS = Limits(pixels=4096 * 4096, frames=10_000, bytes=1 << 28, seconds=3600.0)

CODECS = {"mp4": "libx264", "mov": "libx264", "matroska": "libx264", "webm": "libvpx-vp9", "avi": "mjpeg"}

BAD = {"v007": "not a readable", "v013": "caption: empty", "t02": "text: empty"}
"""Samples of the corpus that cannot be used, and why."""


def gray_frames(n, height=56, width=56, step=7):
    """Frame i is plain gray of level ``20 + i * step``, so its number can be read back."""
    return np.stack([np.full((height, width, 3), 20 + i * step, np.uint8) for i in range(n)])


def textured_frames(n, height=56, width=56):
    rng = np.random.default_rng(n * height + width)
    base = rng.integers(0, 255, (height // 4 + 2, width // 4 + 2, 3), dtype=np.uint8).repeat(4, 0).repeat(4, 1)
    return np.stack([np.roll(base, 3 * i, 1)[:height, :width] for i in range(n)])


def numbered_frames(n, height=64, width=96, first=0):
    """Textured frames with a number drawn along the top: six blocks, white where its bit is set."""
    frames, side = textured_frames(n, height, width), width // 6
    bits = (np.arange(first, first + n)[:, None] >> np.arange(6) & 1).astype(np.uint8) * 255
    frames[:, :side, : 6 * side] = bits.repeat(side, 1)[:, None, :, None]
    return frames


def numbers(frames):
    """What `numbered_frames` drew, read back from decoded frames; None where a block is neither white nor black."""
    side = frames.shape[2] // 6
    blocks = frames[:, :side, : 6 * side].reshape(len(frames), side, 6, side, 3)[:, 2:-2, :, 2:-2].mean((1, 3, 4))
    sure = (np.abs(blocks - 127.5) > 60).all(1)
    return [int(value) if ok else None for value, ok in zip((blocks > 127) @ (1 << np.arange(6)), sure, strict=True)]


def encode(frames, container="mp4", codec=None, pixels=None, options=None, muxer=None, rate=10, times=None, turned=0):
    """``[T, H, W, 3]`` uint8 -> the bytes of a video file.

    ``times`` are milliseconds of each frame, in place of the rate; ``turned`` is the display matrix in degrees.
    """
    codec = codec or CODECS[container]
    odd = frames.shape[1] % 2 or frames.shape[2] % 2
    default = "yuvj420p" if codec == "mjpeg" else "yuv444p" if odd else "yuv420p"

    def streams(out):
        return [(add_video(out, frames, codec, pixels or default, options or {}, rate, turned), frames)]

    return written(container, muxer, streams, times)


def add_video(out, frames, codec, pixels, options=None, rate=10, turned=0):
    stream = out.add_stream(codec, rate=rate, options=options or {})
    stream.height, stream.width = frames.shape[1:3]
    stream.pix_fmt = pixels
    if turned:
        stream.set_display_rotation(turned)
    return stream


def written(container, muxer, streams, times=None):
    """The bytes of a container with the streams and frames that ``streams(out)`` gives."""
    with tempfile.NamedTemporaryFile() as file:  # by name: a header at the front is written in a second pass
        with av.open(file.name, "w", format=container, options=muxer or {}) as out:
            for stream, frames in streams(out):
                if times:
                    stream.codec_context.time_base = Fraction(1, 1000)
                for i, frame in enumerate(frames):
                    picture = av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")
                    if times:
                        picture.pts, picture.time_base = times[i], Fraction(1, 1000)
                    out.mux(stream.encode(picture))
                out.mux(stream.encode())
        return Path(file.name).read_bytes()


def encode_audio():
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="mp4") as out:
        stream = out.add_stream("aac", rate=16000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 1024), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return buffer.getvalue()


def image(array, kind="png", **options):
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, kind, **options)
    return buffer.getvalue()


def turned_by_header(mp4):
    """The same MP4 with a display matrix that turns it by 90 degrees clockwise."""
    return with_matrix(mp4, 0, 1, -1, 0)


def with_matrix(mp4, a, b, c, d):
    """The same MP4 with a display matrix of these four whole numbers."""
    at = mp4.index(b"tkhd") + 4 + 40
    numbers = (a << 16, b << 16, 0, c << 16, d << 16, 0, 0, 0, 1 << 30)
    return mp4[:at] + b"".join(n.to_bytes(4, "big", signed=True) for n in numbers) + mp4[at + 36 :]


def with_edit(mp4, first, frames, rate=10):
    """The same MP4 with an edit list that shows ``frames`` frames from frame ``first`` on."""
    at = mp4.index(b"elst") + 8
    assert int.from_bytes(mp4[at : at + 4], "big") == 1
    with av.open(io.BytesIO(mp4)) as container:
        base = container.streams.video[0].time_base
    begin = int.from_bytes(mp4[at + 8 : at + 12], "big") + int(first / rate / base)
    length = frames * 1000 // rate  # the whole movie counts in milliseconds
    return mp4[: at + 4] + length.to_bytes(4, "big") + begin.to_bytes(4, "big") + mp4[at + 12 :]


def two_angles():
    """An MP4 with two videos: a player shows the second, which is marked as the default."""

    def streams(out):
        frames = numbered_frames(6, 32, 48, first=40), numbered_frames(9, 64, 96)
        small, large = (add_video(out, f, "libx264", "yuv420p") for f in frames)
        large.disposition = Disposition.default
        return [(small, frames[0]), (large, frames[1])]

    return written("mp4", None, streams)


def with_cover():
    """An MP4 whose first video stream is a cover picture."""

    def streams(out):
        cover, film = numbered_frames(1, 128, 128, first=63), numbered_frames(9, 64, 96)
        picture = add_video(out, cover, "png", "rgb24")
        picture.disposition = Disposition.attached_pic
        return [(picture, cover), (add_video(out, film, "libx264", "yuv420p"), film)]

    return written("mp4", None, streams)


def with_exif(orientation, kind="jpeg", height=45, width=61):
    """A photo that says how the camera was held."""
    tag = Image.Exif()
    tag[0x0112] = orientation
    return image(numbered_frames(1, height, width)[0], kind, exif=tag.tobytes())


def x264(text):
    return {"x264-params": text}


OPEN_GOP = x264("open-gop=1:keyint=10:min-keyint=10:bframes=3:b-adapt=0:scenecut=0")
HEVC = {"preset": "ultrafast", "x265-params": "keyint=10:bframes=3:open-gop=1:b-adapt=0:log-level=none:pools=1"}
VPX = {"g": "10", "deadline": "realtime", "cpu-used": "8", "auto-alt-ref": "1", "lag-in-frames": "16"}
AV1 = {"g": "10", "preset": "12", "svtav1-params": "lp=1"}
UNEVEN = [0, 40, 80, 500, 510, 520, 1200, 1233, 1266, 1300, 3000, 3040]
"""Milliseconds of the frames of a clip with a variable rate."""


def _clip(container="mp4", codec=None, pixels=None, options=None, size=(64, 96), n=24, **more):
    return lambda: encode(numbered_frames(n, *size), container, codec, pixels, options, **more)


_FIXTURES = {
    "plain": _clip(),
    "variable_rate.mp4": _clip(n=len(UNEVEN), times=UNEVEN),
    "variable_rate.mkv": _clip("matroska", n=len(UNEVEN), times=UNEVEN),
    "b_frames.mp4": _clip(options=x264("bframes=3:keyint=12:b-adapt=0:scenecut=0")),
    "b_frames.mkv": _clip("matroska", options=x264("bframes=5:b-pyramid=normal:keyint=12:b-adapt=0:scenecut=0")),
    "b_frames.avi": _clip("avi", "libx264", options=x264("bframes=2:keyint=12:b-adapt=0")),
    "open_gop": _clip(options=OPEN_GOP),
    "intra_refresh": _clip(options=x264("intra-refresh=1:keyint=8:bframes=0")),
    "interlaced": _clip(options=x264("interlaced=1:keyint=12:bframes=3")),
    "edited": lambda: with_edit(FIXTURES["b_frames.mp4"](), 7, 11),
    "two_angles": two_angles,
    "cover": with_cover,
    "odd": _clip(size=(57, 43)),
    "odd_half_chroma": _clip("webm", pixels="yuv420p", options=VPX, size=(57, 43)),
    "portrait": _clip(size=(96, 54)),
    "turned_90": _clip(turned=90, n=6),
    "turned_180": _clip(turned=180, n=6),
    "turned_270": _clip(turned=270, n=6),
    "full_chroma": _clip(pixels="yuv444p"),
    "half_chroma": _clip(pixels="yuv422p"),
    "ten_bit": _clip(pixels="yuv420p10le"),
    "ten_bit_hevc": _clip("matroska", "libx265", "yuv420p10le", HEVC),
    "bt709": _clip(options=x264("colormatrix=bt709:colorprim=bt709:transfer=bt709")),
    "full_range": _clip(options=x264("colormatrix=bt709:fullrange=on")),
    "chroma_corner": _clip(options=x264("chromaloc=2")),
    "hevc": _clip("mp4", "libx265", options=HEVC),
    "vp8": _clip("webm", "libvpx", options=VPX),
    "vp9": _clip("webm", options=VPX),
    "av1.mp4": _clip("mp4", "libsvtav1", options=AV1),
    "av1.webm": _clip("webm", "libsvtav1", options=AV1),
    "mjpeg.avi": _clip("avi"),
    "mjpeg.mov": _clip("mov", "mjpeg", "yuvj422p"),
    "mpeg4.mp4": _clip("mp4", "mpeg4", options={"g": "12", "bf": "2"}),
    "mpeg4.avi": _clip("avi", "mpeg4", options={"g": "12", "bf": "2"}),
    "gif": _clip("gif", "gif", "rgb8", n=6),
    "jpeg": lambda: image(numbered_frames(1, 45, 61)[0], "jpeg"),
    "png": lambda: image(numbered_frames(1, 45, 61)[0]),
    "webp": lambda: image(numbered_frames(1, 45, 61)[0], "webp"),
    "jpeg_turned": lambda: with_exif(6),
    "png_turned": lambda: with_exif(8, "png"),
    "webp_turned": lambda: with_exif(3, "webp"),
}
FIXTURES = {name: cache(make) for name, make in _FIXTURES.items()}
"""What cameras, phones and sites make, each a function that gives the bytes of a small file; frames are numbered."""


def levels(frames):
    """The numbers that `gray_frames` painted, from decoded frames."""
    return [round((float(f.mean()) - 20) / 7) for f in frames]


def write_shard(path, samples):
    """Write ``(key, {extension: bytes, str or dict})`` as a tar file."""
    with tarfile.open(path, "w") as tar:
        for key, members in samples:
            for extension, content in members.items():
                if isinstance(content, dict):
                    content = json.dumps(content)
                data = content.encode() if isinstance(content, str) else content
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(data)
                tar.addfile(info, io.BytesIO(data))
    return Path(path)


def same(a, b):
    """Bit for bit the same pack."""
    tensors = all(torch.equal(getattr(a, name), getattr(b, name)) for name in ("tokens", "labels", "patches"))
    return tensors and (a.spec, a.keys, a.skipped, a.samples) == (b.spec, b.keys, b.skipped, b.samples)
