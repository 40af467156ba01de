"""Small videos, images and shards for the tests, encoded on the spot."""

import io
import json
import tarfile
import tempfile
from pathlib import Path

import av
import numpy as np
import torch
from PIL import Image

LIMITS = {"max_pixels": None, "max_source_pixels": 4096 * 4096, "max_source_frames": 10_000}

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


def encode(frames, container="mp4", codec=None, pixels=None, options=None, muxer=None, rate=10):
    """``[T, H, W, 3]`` uint8 -> the bytes of a video file."""
    codec = codec or CODECS[container]
    odd = frames.shape[1] % 2 or frames.shape[2] % 2
    default = "yuvj420p" if codec == "mjpeg" else "yuv444p" if odd else "yuv420p"
    with tempfile.NamedTemporaryFile() as file:  # by name: a header at the front is written in a second pass
        _write(file.name, frames, container, codec, pixels or default, options or {}, muxer or {}, rate)
        return Path(file.name).read_bytes()


def _write(path, frames, container, codec, pixels, options, muxer, rate):
    with av.open(path, "w", format=container, options=muxer) as out:
        stream = out.add_stream(codec, rate=rate, options=options)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt = pixels
        for frame in frames:
            out.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(frame), format="rgb24")))
        out.mux(stream.encode())


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
    at = mp4.index(b"tkhd") + 4 + 40
    one = 1 << 16
    matrix = b"".join(n.to_bytes(4, "big", signed=True) for n in (0, one, 0, -one, 0, 0, 0, 0, 1 << 30))
    return mp4[:at] + matrix + mp4[at + 36 :]


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
