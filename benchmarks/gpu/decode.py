"""Frames a second of NVDEC through DALI and of PyAV, on the same files: ``python -m benchmarks.gpu.decode``.

Both go from a file in memory to patches, as a run's data does, and every frame is checked by the number drawn into
it. PyAV decodes in one process for each core, DALI in one process on the device. Without DALI or NVDEC their row says
so.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.decode import SIZES
from benchmarks.decode_clips import Clip, make, read_number
from benchmarks.decode_routes import PATCH, REDUCTION, ROUTES, _frames_from, _limits, _options
from benchmarks.gpu import common
from benchmarks.gpu.install import nvdec, tried
from benchmarks.report import table
from megatron_elva.config.errors import InputError

NAME = "decode"
CONTAINERS = {"libx264": "mp4", "libvpx-vp9": "webm"}
ROUTE = {"pyav": "PyAV, all cores", "pyav_one": "PyAV, one core", "dali": "DALI on the device"}


def clips_of(a: argparse.Namespace, size: str) -> list[Clip]:
    """The files of one size; they differ in the picture alone."""
    height, width = SIZES[size]
    number = a.seconds * a.rate
    return [
        Clip(a.codec, CONTAINERS[a.codec], height, width, a.gop, number, a.rate, seed) for seed in range(1, a.files + 1)
    ]


def indices_of(a: argparse.Namespace) -> list[int]:
    """Numbers of the frames that are asked for, spread over the file."""
    number = a.seconds * a.rate
    return [(2 * i + 1) * number // (2 * a.frames) for i in range(a.frames)]


def _make(clip: Clip, folder: str) -> None:
    make([clip], Path(folder))


def _by_pyav(path: str, indices: Sequence[int], repeats: int) -> None:
    """Decode a file again and again, in this process.

    Raises:
        InputError: a frame is not the one asked for.
    """
    run, data = ROUTES["ours to patches"].made(), Path(path).read_bytes()
    for _ in range(repeats):
        _check(run(data, indices), indices)


def _check(frames: Any, indices: Sequence[int]) -> None:
    numbers = [read_number(frame) for frame in frames]
    if numbers != list(indices):
        raise InputError(f"gave the frames {numbers} where {list(indices)} were asked for")


def pyav(a: argparse.Namespace, files: Sequence[Path], processes: int) -> dict[str, Any]:
    """Seconds of rounds in which each process decodes `repeats` files."""
    indices, seconds = indices_of(a), []
    repeats = a.repeats * max(1, len(files) // processes)
    with ProcessPoolExecutor(processes, mp_context=get_context("spawn")) as pool:
        paths = [str(files[i % len(files)]) for i in range(processes)]
        for _ in range(a.rounds + 1):  # the first one warms up: imports, caches
            began = time.perf_counter()
            list(pool.map(_by_pyav, paths, [indices] * processes, [repeats] * processes))
            seconds.append(time.perf_counter() - began)
    return {"processes": processes, "frames": processes * repeats * len(indices), "seconds": seconds[1:]}


def dali(a: argparse.Namespace, files: Sequence[Path]) -> dict[str, Any]:
    """Seconds of rounds in which the device decodes all files, and how much of them the host copied packets."""
    from dali_pipelines import codecs, media, remux
    from dali_pipelines.geometry import plan
    from dali_pipelines.graph import DeviceDecoder, GraphItem

    indices, limits = indices_of(a), _limits()
    native = codecs.native(a.device)
    batch = [files[i % len(files)].read_bytes() for i in range(a.batch)]
    takes, why = native.takes(media.probe(batch[0], limits))
    if not takes:
        return {"left_out": why}
    decoder = DeviceDecoder(a.device, a.batch, PATCH, REDUCTION, threads=os.cpu_count() or 2)
    seconds: list[float] = []
    host: list[float] = []
    for number in range(a.rounds + 1):
        began = since = time.perf_counter()
        copying = 0.0
        for _ in range(a.repeats):
            items = []
            for data in batch:
                probe = media.probe(data, limits)
                sparse, new = remux.sparse(data, indices, limits)
                geometry = plan(probe.native, probe.turns, len(indices), _options(len(indices)))
                items.append(GraphItem(sparse, new, None, geometry))
            copying += time.perf_counter() - since
            out = decoder.decode(items)
            if a.device == "cuda":
                torch.cuda.synchronize()
            since = time.perf_counter()
        seconds.append(since - began)
        host.append(copying)
        for patches, item in zip(out, items, strict=True):
            if isinstance(patches, str):
                raise InputError(patches)
            if not number:
                _check(_frames_from(patches.cpu().numpy(), item.geometry.video), indices)
    frames = a.repeats * a.batch * len(indices)
    return {"batch": a.batch, "frames": frames, "seconds": seconds[1:], "host_s": fmean(host[1:])}


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""
    rows = [
        (name, f"{row['frames']:,}", common.spread(row["frames_per_s"]), note)
        for name, row in result["rows"].items()
        if "seconds" in row
        for note in [f"{row['host_s'] / fmean(row['seconds']):.0%} on the host" if "host_s" in row else ""]
    ]
    left = [f"- {name}: {row['left_out']}" for name, row in result["rows"].items() if "left_out" in row]
    left_out = "\n\nLeft out:\n\n" + "\n".join(left) if left else ""
    body = table(("file, decoder", "frames a round", "frames/s", "note"), rows) if rows else "Nothing was measured."
    return f"""{common.heading("Frames a second from videos", result)}

{result["files"]} files of {result["seconds"]} s at {result["rate"]} frames a second, {result["codec"]},
GOP {result["gop"]}, {result["frames"]} frames of each, spread over it; {result["rounds"]} rounds.
NVDEC: {result["nvdec"]}.

{body}{left_out}{common.failures(result["rows"])}

From files in memory to patches at native size: PyAV's end on the host, DALI's on the device. Frames are those asked
for; to get them a decoder decodes all from the keyframe before. PyAV has one codec thread in each process. DALI's
files are first cut down to the packets that are needed, on one core of the host, which is part of its time."""


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.options(NAME, __doc__, frames=32)
    parser.add_argument("--sizes", nargs="+", default=["360p", "720p"], choices=tuple(SIZES))
    parser.add_argument("--codec", default="libx264", choices=tuple(CONTAINERS))
    parser.add_argument("--gop", type=int, default=30, help="frames between keyframes")
    parser.add_argument("--seconds", type=int, default=10, help="length of a file")
    parser.add_argument("--rate", type=int, default=30, help="frames a second")
    parser.add_argument("--files", type=int, default=4, help="files of each size")
    parser.add_argument("--batch", type=int, default=16, help="files that the device decodes at once")
    parser.add_argument("--processes", type=int, default=len(os.sched_getaffinity(0)), help="of PyAV")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--repeats", type=int, default=2, help="times that a round decodes its files")
    parser.add_argument("--clips", help="folder where rendered clips are kept; default: rendered anew each time")
    a = parser.parse_args(argv)
    if a.frames > a.seconds * a.rate:
        parser.error("--frames: at most --seconds times --rate")
    return a


def main(argv: Sequence[str]) -> int:
    """Measure and report; 1 where a decoder failed, 0 where one is not there."""
    a = _arguments(argv)
    if a.part:
        size, _, route = a.part.partition(" ")
        files = make(clips_of(a, size), Path(a.clips))
        found = dali(a, files) if route == "dali" else pyav(a, files, a.processes if route == "pyav" else 1)
        return common.write_part(a, found)
    rows: dict[str, dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        folder = a.clips or scratch
        clips = [clip for size in a.sizes for clip in clips_of(a, size)]
        with ProcessPoolExecutor(a.processes, mp_context=get_context("spawn")) as pool:
            list(pool.map(_make, clips, [folder] * len(clips)))
        names = [f"{size} {route}" for size in a.sizes for route in ROUTE]
        for name, row in common.parts(NAME, [*argv, "--clips", folder], names, a.part_limit):
            size, _, route = name.partition(" ")
            if "seconds" in row:
                row["frames_per_s"] = common.summary([row["frames"] / s for s in row["seconds"]])
            rows[f"{size}, {ROUTE[route]}"] = row
    result = {
        **common.head(NAME, argv, a.device),
        "device_kind": a.device,
        "status": "failed" if any("failed" in row for row in rows.values()) else "ok",
        "nvdec": tried(nvdec)[1],
        **{name: getattr(a, name) for name in ("codec", "gop", "seconds", "rate", "files", "frames", "rounds")},
        "rows": rows,
    }
    return common.finish(NAME, a, result, text(result))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
