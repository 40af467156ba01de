"""What the model would see of a file: ``python -m dali_pipelines.inspect clip.mp4 --frames 8 --out seen``.

Prints the chosen frames, the decoder and why, sizes, tokens and times. Writes a contact sheet with the patch grid
(``sheet.png``), the patches (``patches.npz``) and the same figures (``report.json``): for one file into the folder
itself, for several into a folder of each file's name. ``shard.tar/key`` stands for the media of a sample in a shard.
Exit code 2 where a file cannot be used: one line says why, and the others are still written.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipelines.decode import frames_of, select, watch
from dali_pipelines.geometry import Geometry
from dali_pipelines.inspect_sheet import Label, draw, frames_of_patches
from dali_pipelines.media import Probe, probe
from dali_pipelines.options import FITS, SAMPLINGS, Hybrid, Limits, Sampling, VisionOptions
from dali_pipelines.patches import to_patches
from dali_pipelines.shards import MEDIA, split_name
from megatron_elva.config.errors import ConfigError, InputError


@dataclass(frozen=True)
class Seen:
    """What the model would see of one file.

    Attributes:
        probe: what the file says without being decoded.
        indices: the chosen frames.
        timestamps: their seconds from the first frame.
        geometry: how they became patches.
        patches: ``[n, P * P * 3]`` uint8.
        route: what decoded it, and why.
        seconds: time by part.
    """

    probe: Probe
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    geometry: Geometry
    patches: np.ndarray
    route: str
    seconds: dict[str, float]


@dataclass
class _Stopwatch:
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[part] = time.perf_counter() - start


Look = Callable[[bytes], Seen]


def see(data: bytes, options: VisionOptions, seed: Sequence[int] = (), stamps: Sequence[float] | None = None) -> Seen:
    """Look at a file through PyAV.

    Args:
        data: the file.
        options: which frames, and how they become cells.
        seed: of a random clip.
        stamps: seconds, for ``sampling=timestamps``.

    Raises:
        InputError: it cannot be used; one line says why.
    """
    timed = _Stopwatch()
    with timed("probe"):
        found = probe(data, options.limits)
    watched = watch(data, options, seed, stamps)
    with timed("decode"):  # once more, for the times of the parts: `watch` is what training runs, in one piece
        frames = frames_of(data, watched.indices, options.limits)
    timed.seconds["decode"] = max(timed.seconds["decode"] - timed.seconds["probe"], 0.0)  # which is a part of it
    with timed("patches"):
        to_patches(frames, watched.geometry, options.patch, options.reduction)
    return Seen(
        found, watched.indices, watched.timestamps, watched.geometry, watched.patches, watched.route, timed.seconds
    )


def see_with_dali(
    options: VisionOptions, device: str, decoder: str, seed: Sequence[int] = (), stamps: Sequence[float] | None = None
) -> Look:
    """Set DALI up to look at files, PyAV taking those that it does not decode.

    Args:
        options: as `see` takes them.
        device: ``cpu`` or ``cuda:0``.
        decoder: ``auto`` or ``dali``.
        seed: as `see` takes it.
        stamps: as `see` takes them.

    Raises:
        InputError: ``dali`` is wanted and not installed.
    """
    from dali_pipelines.graph import DeviceDecoder, GraphItem
    from dali_pipelines.remux import sparse
    from dali_pipelines.routes import choose_route

    chosen = choose_route(decoder, device)
    native = chosen.native
    graph = None if native is None else DeviceDecoder(device, 1, options.patch, options.reduction)

    def look(data: bytes) -> Seen:
        timed = _Stopwatch()
        with timed("probe"):
            found = probe(data, options.limits)
        takes, why = (False, chosen.about) if native is None else native.takes(found)
        if graph is None or not takes:
            return _because(see(data, options, seed, stamps), why)
        indices, geometry = select(found, options, seed, stamps)
        try:
            with timed("copy of the packets"):
                copied, kept = sparse(data, indices, options.limits)
            with timed("decode and patches"):
                (patches,) = graph.decode([GraphItem(copied, kept, None, geometry)])
                if isinstance(patches, str):
                    raise InputError(patches)
                on_host = patches.cpu().numpy()
        except InputError as error:
            return _because(see(data, options, seed, stamps), f"DALI: {error}")
        seconds = tuple(float(found.times[i]) for i in indices)
        return Seen(found, tuple(indices), seconds, geometry, on_host, f"dali on {device}: {why}", timed.seconds)

    return look


def _because(seen: Seen, why: str) -> Seen:
    return Seen(**{**vars(seen), "route": f"{seen.route}: {why}"})


def report_of(name: str, seen: Seen) -> dict[str, Any]:
    """The figures, for ``report.json``."""
    found, video, geometry = seen.probe, seen.geometry.video, seen.geometry
    return {
        "file": name,
        "codec": found.codec,
        "pixel_format": found.pixel_format,
        "container": found.container,
        "frames": found.frames,
        "fps": found.fps,
        "seconds": found.duration,
        "turns": geometry.turns,
        "native": list(geometry.native),
        "classes": [
            {
                "scaled": list(fit.size),
                "used": [fit.height, fit.width],
                "cells": list(grid),
                "frames": count,
            }
            for fit, grid, count in zip(geometry.classes, video.grids, video.class_frames, strict=True)
        ],
        "indices": list(seen.indices),
        "timestamps": list(seen.timestamps),
        "route": seen.route,
        "tokens": {"FRAME": video.frames, "cells": video.cells, "LINE": video.rows, "visual_span": video.tokens},
        "patches": len(seen.patches),
        "times_s": seen.seconds,
    }


def lines_of(report: dict[str, Any]) -> list[str]:
    """The figures in words."""
    turned = f", turned by {90 * report['turns']} degrees" if report["turns"] else ""
    height, width = report["native"]
    sizes = []
    for c in report["classes"]:
        scaled = "" if c["scaled"] == report["native"] else f"scaled to {_size(c['scaled'])}, "
        sizes.append(f"{scaled}{_size(c['used'])} used = {c['cells'][1]} x {c['cells'][0]} cells")
        if len(report["classes"]) > 1:
            sizes[-1] = f"{c['frames']} frames {sizes[-1]}"
    tokens = report["tokens"]
    times = ", ".join(f"{part} {1000 * seconds:.1f} ms" for part, seconds in report["times_s"].items())
    return [
        f"{report['codec']} {report['pixel_format']} in {report['container']}: {report['frames']:,} frames, "
        f"{report['seconds']:.2f} s, {report['fps']:.2f} fps",
        f"decoded by {report['route']}",
        f"{width} x {height} native{turned}; {'; '.join(sizes)}",
        f"{tokens['visual_span']:,} tokens: {tokens['FRAME']} FRAME, {tokens['cells']:,} cells, "
        f"{tokens['LINE']:,} LINE; {report['patches']:,} patches",
        times,
        "chosen: " + ", ".join(f"#{i} {t:.3f} s" for i, t in zip(report["indices"], report["timestamps"], strict=True)),
    ]


def _size(height_width: Sequence[int]) -> str:
    return f"{height_width[1]} x {height_width[0]}"


def write(name: str, seen: Seen, options: VisionOptions, folder: Path) -> list[str]:
    """Write a file's sheet, patches and report; the lines that say it in words."""
    report = report_of(name, seen)
    lines = lines_of(report)
    video = seen.geometry.video
    frames = frames_of_patches(seen.patches, video, options.patch, options.reduction)
    labels = [Label(i, t) for i, t in zip(seen.indices, seen.timestamps, strict=True)]
    sheet = draw(frames, labels, options.patch, options.reduction, name, [*lines[:1], *lines[2:4], lines[1]])
    folder.mkdir(parents=True, exist_ok=True)
    sheet.save(folder / "sheet.png")
    grid = np.array(video.frame_grids, np.int64)
    np.savez(
        folder / "patches.npz",
        patches=seen.patches,
        grid=grid,
        indices=np.array(seen.indices, np.int64),
        timestamps=np.array(seen.timestamps, np.float64),
    )
    (folder / "report.json").write_text(json.dumps(report, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return lines


def read(name: str) -> list[tuple[str, bytes]]:
    """The media of a file, or of a sample in a shard (``shard.tar/key``), with their names.

    Raises:
        InputError: there is no such file or sample.
    """
    path = Path(name)
    shard = next((p for p in path.parents if p.suffix == ".tar" and p.is_file()), None)
    try:
        if shard is None:
            return [(path.name, path.read_bytes())]
        key = path.relative_to(shard).as_posix()
        with tarfile.open(shard) as tar:
            named = [(m.name, tar.extractfile(m)) for m in tar if m.isreg() and split_name(m.name)[0] == key]
            found = [(n, file.read()) for n, file in named if file and split_name(n)[1].split(".")[-1] in MEDIA]
    except OSError as error:
        raise InputError(error.strerror or str(error)) from error
    except tarfile.TarError as error:
        raise InputError(f"the shard cannot be read: {error}") from error
    if not found:
        raise InputError("the shard has no such sample" if not named else "the sample has no video or image")
    return found


def folders_of(names: Sequence[str], out: Path) -> list[Path]:
    """Where each file's results go: the folder itself for one, folders by their stems for several."""
    if len(names) == 1:
        return [out]
    taken: dict[str, int] = {}
    folders = []
    for name in names:
        stem = Path(name).stem
        taken[stem] = taken.get(stem, 0) + 1
        folders.append(out / (stem if taken[stem] == 1 else f"{stem}-{taken[stem]}"))
    return folders


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m dali_pipelines.inspect",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("files", nargs="+", metavar="FILE", help="video or image, or shard.tar/key")
    parser.add_argument("--frames", type=int, default=8, metavar="N", help="frames at most")
    parser.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder to write")
    parser.add_argument("--sampling", choices=SAMPLINGS, help="default: uniform, or what the options below call for")
    parser.add_argument("--rate", type=float, metavar="R", help="frames a second")
    parser.add_argument("--clip-seconds", type=float, metavar="S", help="length of a random clip")
    parser.add_argument("--timestamps", nargs="+", type=float, metavar="T", help="seconds of the frames")
    parser.add_argument("--seed", type=int, default=0, help="of a random clip")
    parser.add_argument("--hybrid", metavar="SPEC", help="two resolution classes, such as hi=336,lo=168,k=3")
    parser.add_argument("--max-pixels", type=int, metavar="N", help="area of a frame at most")
    parser.add_argument("--fit", choices=FITS, default="crop", help="how sides become whole cells")
    parser.add_argument("--patch", type=int, default=14, metavar="P", help="side of a patch in pixels")
    parser.add_argument("--cell-reduction", type=int, default=2, metavar="R", help="patches per side of a cell")
    parser.add_argument("--decoder", choices=("auto", "pyav", "dali"), default="auto")
    parser.add_argument("--device", default=None, help="cpu or cuda:0; default: a GPU where there is one")
    return parser.parse_args(argv)


def _options(a: argparse.Namespace) -> VisionOptions:
    """The options that the arguments describe; limits as in the shipped configs."""
    wanted = "timestamps" if a.timestamps else "clip" if a.clip_seconds else "rate" if a.rate else "uniform"
    hybrid = None if a.hybrid is None else Hybrid.parse(a.hybrid)
    limits = Limits(pixels=8_294_400, frames=36_000, bytes=2048 * 10**6, seconds=14_400.0)
    sampling = Sampling(a.sampling or wanted, a.frames, a.rate, a.clip_seconds)
    return VisionOptions(sampling, a.patch, a.cell_reduction, a.fit, a.max_pixels, hybrid, limits)


def _look(a: argparse.Namespace, options: VisionOptions) -> Look:
    if a.sampling == "timestamps" and not a.timestamps:
        raise ConfigError("--sampling=timestamps: needs --timestamps")
    seed = (a.seed,)
    if a.decoder == "pyav":
        return lambda data: _because(see(data, options, seed, a.timestamps), "--decoder=pyav")
    device = a.device
    if device is not None and not re.fullmatch(r"cpu|cuda(:\d+)?", device):
        raise ConfigError(f"--device {device}: allowed: cpu, cuda:0 and so on")
    if device is None:
        import torch

        device = "cuda:0" if torch.cuda.is_available() else "cpu"
    return see_with_dali(options, device, a.decoder, seed, a.timestamps)


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    a = _arguments(argv)
    try:
        options = _options(a)
        look = _look(a, options)
    except (ConfigError, InputError) as error:
        print(error, file=sys.stderr)
        return 2
    bad = 0
    for name, folder in zip(a.files, folders_of(a.files, a.out), strict=True):
        try:
            media = read(name)
            for part, (title, data) in enumerate(media):
                into = folder if len(media) == 1 else folder / str(part)
                lines = write(title, look(data), options, into)
                print("\n  ".join([f"{name}: {into}", *lines]))
        except InputError as error:
            bad += 1
            print(f"{name}: {error}", file=sys.stderr)
        except OSError as error:
            print(f"--out {a.out}: cannot be written: {error}", file=sys.stderr)
            return 2
    return 2 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
