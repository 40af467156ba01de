"""Memory of one process that decodes many clips: ``python -m benchmarks.decode --memory 20000``."""

from __future__ import annotations

import io
import os
import random
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any, cast

import av
import numpy as np
from av.video.stream import VideoStream
from PIL import Image

from benchmarks.decode_clips import render
from benchmarks.report import table
from megatron_elva.config.errors import InputError

KINDS = (
    ("libx264", "mp4", "yuv420p"),
    ("libx264", "matroska", "yuv444p"),
    ("libx265", "mp4", "yuv420p10le"),
    ("libvpx", "webm", "yuv420p"),
    ("libvpx-vp9", "webm", "yuv420p"),
    ("libsvtav1", "mp4", "yuv420p"),
    ("mjpeg", "avi", "yuvj420p"),
    ("mpeg4", "mov", "yuv420p"),
)
"""Codec, container and pixel format of the clips."""
SIZES = ((64, 96), (120, 160), (144, 256), (240, 320), (320, 240), (360, 640))
FRAMES = (4, 8, 16)
FLAT = 1.05
"""Most that the second half may need more than the highest of the second quarter."""


def clips() -> list[bytes]:
    """Files of all codecs and sizes, of one to two seconds; images and cut files among them."""
    made: list[bytes] = []
    for number, (height, width) in enumerate(SIZES):
        pictures = list(render(height, width, 10 + 2 * number, 10, number))
        for codec, container, pixels in KINDS:
            made.append(_encode(pictures, codec, container, pixels))
        for kind in ("png", "jpeg", "webp"):
            buffer = io.BytesIO()
            Image.fromarray(pictures[0]).save(buffer, kind)
            made.append(buffer.getvalue())
        made.append(made[-5][: len(made[-5]) // 2])  # errors must not leave anything behind either
    return made


def _encode(pictures: list[np.ndarray], codec: str, container: str, pixels: str) -> bytes:
    quiet = {"libx265": {"x265-params": "log-level=none"}, "libvpx-vp9": {"deadline": "realtime", "cpu-used": "8"}}
    options = quiet.get(codec, {})
    with tempfile.NamedTemporaryFile() as file:
        with av.open(file.name, "w", format=container) as out:
            stream = cast(VideoStream, out.add_stream(codec, rate=10, options=options))
            stream.height, stream.width = pictures[0].shape[:2]
            stream.pix_fmt = pixels
            for picture in pictures:
                out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
            out.mux(stream.encode())
        return Path(file.name).read_bytes()


def resident() -> int:
    """Bytes of memory that this process holds."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def _route() -> Callable[[bytes, int, int], Any]:
    from dali_pipelines.decode import watch
    from dali_pipelines.options import Hybrid, Limits, Sampling, VisionOptions

    limits = Limits(pixels=1 << 22, frames=10_000, bytes=1 << 28, seconds=3600.0)
    ways = [
        VisionOptions(Sampling("uniform", k), 14, 2, fit, bound, hybrid, limits)
        for k in FRAMES
        for fit, bound, hybrid in (("pad", None, None), ("crop", 100 * 100, None), ("pad", None, Hybrid(168, 84, 3)))
    ]
    return lambda data, way, seed: watch(data, ways[way % len(ways)], seed=(seed,))


def measure(number: int, every: int) -> dict[str, Any]:
    """Decode so many clips in a mixed order and note the memory as it goes."""
    # encoders leave much free memory behind, in which a small leak would not show: they run in a process of their own
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as elsewhere:
        files = elsewhere.submit(clips).result()
    run, order = _route(), random.Random(0)
    noted: list[tuple[int, int]] = []
    refused = 0
    start = time.perf_counter()
    for i in range(1, number + 1):
        try:
            run(files[order.randrange(len(files))], order.randrange(1 << 16), i)
        except InputError:
            refused += 1
        if i % every == 0 or i == number:
            noted.append((i, resident()))
            sys.stderr.write(f"{i} clips, {noted[-1][1] / 1e6:.1f} MB\n")
    return {
        "clips": number,
        "files": len(files),
        "refused": refused,
        "seconds": time.perf_counter() - start,
        "resident": noted,
        **verdict([held for _, held in noted]),
    }


def verdict(held: list[int]) -> dict[str, Any]:
    """Whether memory stays: the highest of the second half against that of the second quarter."""
    n = len(held)
    if n < 8:
        return {"growth": None, "flat": None}
    growth = max(held[n // 2 :]) / max(held[n // 4 : n // 2])
    return {"growth": growth, "flat": growth <= FLAT}


def text(result: Mapping[str, Any]) -> str:
    """The report, with a bar for each figure."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    top = max(held for _, held in result["resident"])
    rows = [(f"{i:,}", f"{held / 1e6:.1f}", "#" * round(40 * held / top)) for i, held in result["resident"]]
    if result["flat"] is None:
        said = "Too few figures to say whether it grows."
    else:
        state = "flat" if result["flat"] else "NOT FLAT"
        growth = f"{result['growth']:.3f} (at most {FLAT})"
        said = f"Highest of the second half to that of the second quarter: {growth}: {state}."
    return f"""# Memory of one process over {result["clips"]:,} clips

`{result["command"]}`, {result["date"]}.
{result["device"]}, {result["cores"]}; {versions}.

{result["files"]} files: {len(KINDS)} kinds of videos and three of images in {len(SIZES)} sizes, some of them cut, in a
random order, with {min(FRAMES)} to {max(FRAMES)} frames, with and without a bound and hybrid resolution. Cut files are
refused: {result["refused"]:,} of them. {result["seconds"]:.0f} s in all.

{said}

{table(("clips", "MB", ""), rows)}"""
