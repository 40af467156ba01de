"""What DALI decodes on a device, found out by trying.

It depends on DALI's version, on the chip and on the driver, and the documentation is no guide (DALI 2.4 decodes no
H.264 on a CPU). So at the start a tiny clip of each kind is encoded, decoded by DALI and compared
with what PyAV makes of it.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from importlib import import_module
from typing import cast

import av
import numpy as np
import torch
from av.video.stream import VideoStream

from dali_pipelines.decode import frames_of
from dali_pipelines.geometry import Fit, Geometry
from dali_pipelines.graph import DeviceDecoder, GraphItem
from dali_pipelines.media import Probe
from dali_pipelines.options import Limits
from dali_pipelines.remux import CONTAINERS, sparse
from megatron_elva.config.errors import InputError

_ENCODERS = {
    "h264": ("libx264", {"preset": "ultrafast"}),
    "hevc": ("libx265", {"preset": "ultrafast", "x265-params": "log-level=none:pools=1:frame-threads=1"}),
    "vp8": ("libvpx", {"deadline": "realtime", "cpu-used": "8"}),
    "vp9": ("libvpx-vp9", {"deadline": "realtime", "cpu-used": "8"}),
    "mjpeg": ("mjpeg", {}),
}
_FORMATS = {
    "h264": ("yuv420p", "yuvj420p", "yuv422p", "yuv444p", "yuv420p10le"),
    "hevc": ("yuv420p", "yuvj420p", "yuv444p", "yuv420p10le"),
    "vp8": ("yuv420p",),
    "vp9": ("yuv420p", "yuv422p", "yuv444p", "yuv420p10le"),
    "mjpeg": ("yuvj420p", "yuvj422p", "yuvj444p"),
}
_HEIGHT, _WIDTH, _FRAMES = 160, 192, 4  # NVDEC refuses less than 144 lines for some codecs
_LIMITS = Limits(pixels=1 << 20, frames=100, bytes=1 << 24, seconds=100.0)
_CLOSE = 8.0  # mean difference of levels that a GPU may have; from frame to frame the clip changes by more
_SMALLEST, _LARGEST = 144, 4096  # sides that every NVDEC takes, whatever the codec
_CONTAINERS = ("mov", "matroska", "avi")


@dataclass(frozen=True)
class NativeCodecs:
    """What DALI decodes on one device.

    Attributes:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
        formats: pairs of a codec's plain name and a pixel format, such as ``("vp9", "yuv420p")``.
        missing: why there are none, or None.
    """

    device: str
    formats: frozenset[tuple[str, str]]
    missing: str | None = None

    def takes(self, probe: Probe) -> tuple[bool, str]:
        """Whether a file is DALI's, and why or why not. Files that end early are left to PyAV, which can tell."""
        codec, height, width = probe.codec, *probe.coded
        refused: str | None = None
        if self.missing is not None:
            refused = self.missing
        elif probe.fault is not None:
            refused = f"the file ends early: {probe.fault}"
        elif (codec, probe.pixel_format) not in self.formats:
            refused = f"DALI does not decode {codec} {probe.pixel_format or 'of unknown format'} on {self.device}"
        elif probe.container.split(",")[0] not in _CONTAINERS:
            refused = f"{probe.container} is not copied for DALI"
        elif probe.container == "avi" and CONTAINERS[codec] == "mp4":
            refused = f"avi does not tell the order of {codec} frames"
        elif self.device != "cpu" and (height % 2 or width % 2):
            refused = f"an odd size, {width}x{height}, is not tried on a GPU"
        elif self.device != "cpu" and not _SMALLEST <= min(height, width) <= max(height, width) <= _LARGEST:
            refused = f"{width}x{height} may be outside of what the GPU decodes"
        return refused is None, refused or f"DALI decodes {codec} {probe.pixel_format} on {self.device}"

    def describe(self) -> str:
        """One line: the codecs and their pixel formats."""
        if not self.formats:
            return f"no codec ({self.missing})" if self.missing else "no codec"
        codecs = [codec for codec in _FORMATS if any(codec == found for found, _ in self.formats)]
        return ", ".join(f"{codec} ({' '.join(f for c, f in sorted(self.formats) if c == codec)})" for codec in codecs)


def dali_missing() -> str | None:
    """Why DALI cannot be used at all, in words, or None."""
    try:
        import_module("nvidia.dali")
    except ModuleNotFoundError:
        return "DALI is not installed (pip install nvidia-dali-cuda130==2.4.0)"
    except Exception as error:  # a damaged installation
        return f"DALI cannot be imported: {' '.join(str(error).split())}"
    return None


@lru_cache(maxsize=8)
def native(device: str) -> NativeCodecs:
    """Try what DALI decodes on a device; about a second, once in each process.

    Args:
        device: ``cpu``, ``cuda`` or ``cuda:N``.
    """
    missing = dali_missing()
    if missing is None and device != "cpu" and not torch.cuda.is_available():
        missing = f"there is no {device}"
    if missing is not None:
        return NativeCodecs(device, frozenset(), missing)
    pairs = [(codec, pixels) for codec, formats in _FORMATS.items() for pixels in formats]
    with _quiet():
        decoder = DeviceDecoder(device, 1, 1, 1, threads=1)
        return NativeCodecs(device, frozenset(pair for pair in pairs if _decodes(decoder, *pair)))


def _decodes(decoder: DeviceDecoder, codec: str, pixel_format: str) -> bool:
    """Whether DALI gives the frames of a clip that PyAV gives: on a CPU bit for bit, on a GPU about the same."""
    indices = [1, 3]
    try:
        clip = _clip(codec, pixel_format)
        expected = frames_of(clip, indices, _LIMITS)
        data, kept = sparse(clip, indices, _LIMITS)
    except (av.error.FFmpegError, InputError, ValueError):
        return False  # PyAV cannot encode it here
    whole = Fit((_HEIGHT, _WIDTH), 0, 0, _HEIGHT, _WIDTH)
    geometry = Geometry(0, whole.size, 1, (whole,), (0, 0))
    (out,) = decoder.decode([GraphItem(data, kept, None, geometry)])
    if isinstance(out, str):
        return False
    difference = np.abs(out.cpu().numpy().reshape(expected.shape).astype(np.int16) - expected).mean((1, 2, 3))
    return bool((difference <= (0 if decoder.device.type == "cpu" else _CLOSE)).all())


def _clip(codec: str, pixel_format: str) -> bytes:
    """A clip of four frames that differ much from each other."""
    name, options = _ENCODERS[codec]
    ramp = np.add.outer(np.arange(_HEIGHT), np.arange(_WIDTH)) % 64
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=CONTAINERS[codec]) as out:
        stream = cast(VideoStream, out.add_stream(name, rate=10, options=options))
        stream.height, stream.width, stream.pix_fmt = _HEIGHT, _WIDTH, pixel_format
        stream.codec_context.thread_count = 1
        for i in range(_FRAMES):
            rgb = np.stack([ramp + 40 * i, ramp[::-1] + 40 * i, np.full_like(ramp, 180 - 40 * i)], -1).astype(np.uint8)
            out.mux(stream.encode(av.VideoFrame.from_ndarray(rgb, format="rgb24")))
        out.mux(stream.encode())
    return buffer.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep from the terminal what DALI and the encoders write there themselves about what they do not support."""
    sys.stderr.flush()
    terminal = os.dup(2)
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(terminal, 2)
        os.close(terminal)
        os.close(nowhere)
