"""Frames a second from videos, ours and others', in one run on the same files: ``python -m benchmarks.decode``.

Every decoder gets the same bytes and the same frame numbers in the same worker processes, one after the other in every
round, each round beginning with another one; so what else the machine does hits all alike. Every frame that comes back
is checked by the number drawn into it. ``--memory N`` watches the memory of one process over N clips instead.
"""

from __future__ import annotations

import argparse
import multiprocessing as mp
import os
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks import decode_report, report
from benchmarks.decode_clips import Clip, make, read_number
from benchmarks.decode_routes import ROUTES, Decode, Route
from megatron_elva.config.errors import InputError

SIZES = {"360p": (360, 640), "720p": (720, 1280)}


@dataclass(frozen=True)
class Cell:
    """One line of the table.

    Attributes:
        name: for the report.
        clips: files, one for each worker; they differ in the picture alone.
        indices: frame numbers that are asked for, ascending.
    """

    name: str
    clips: tuple[Clip, ...]
    indices: tuple[int, ...]


def cells_of(a: argparse.Namespace) -> list[Cell]:
    """The grid: sizes, groups of pictures, frames; H.264, then the codecs that DALI decodes on a CPU."""

    def cell(codec: str, container: str, size: str, gop: int, count: int) -> Cell:
        n = a.seconds * a.rate
        height, width = SIZES[size]
        seeds = range(1, a.workers + 1)
        clips = tuple(Clip(codec, container, height, width, gop, n, a.rate, seed) for seed in seeds)
        k = min(count, n)
        # Written out here: a benchmark that asked the code under test for the indices could not catch it.
        chosen = tuple((2 * i + 1) * n // (2 * k) for i in range(k))
        return Cell(f"{decode_report.CODECS[codec]} {size}, GOP {gop}, {k} frames", clips, chosen)

    cells = [
        cell("libx264", "mp4", size, gop, count) for size in a.sizes for gop in a.gops for count in a.frames
    ]  # fmt: skip
    others = (("libvpx-vp9", "webm", 30), ("mjpeg", "matroska", 1))
    return cells + [cell(*codec[:2], a.sizes[0], codec[2], count) for codec in others[: a.others] for count in a.frames]


@cache
def _decoder(name: str) -> Decode:
    return ROUTES[name].made()


@cache
def _content(path: str) -> bytes:
    return Path(path).read_bytes()


def timed(name: str, path: str, indices: Sequence[int], repeats: int) -> dict[str, float]:
    """Decode one file again and again and check every frame.

    Returns:
        Wall and CPU seconds (all threads of the process) a clip.

    Raises:
        InputError: the decoder does not take the file, or gives other frames than those asked for.
    """
    run, data = _decoder(name), _content(path)
    wall = cpu = 0.0
    for _ in range(repeats):
        before, cpu_before = time.perf_counter(), time.process_time()
        frames = run(data, indices)
        wall += time.perf_counter() - before
        cpu += time.process_time() - cpu_before
        numbers = [read_number(frame) for frame in frames]
        if numbers != list(indices):
            raise InputError(f"gave the frames {numbers} where {list(indices)} were asked for")
    return {"wall": wall / repeats, "cpu": cpu / repeats}


def _serve(connection: Connection) -> None:
    """A worker process: measures what it is told to, until it is told nothing more."""
    while (task := connection.recv()) is not None:
        try:
            connection.send(timed(*task))
        except Exception as error:  # a decoder that fails is a line of the report
            connection.send(f"{type(error).__name__}: {' '.join(str(error).split())}"[:300])


@contextmanager
def workers(number: int) -> Iterator[list[Connection]]:
    """Processes that measure side by side."""
    context = mp.get_context("spawn")
    pairs = [context.Pipe() for _ in range(number)]
    processes = [context.Process(target=_serve, args=(theirs,), daemon=True) for _, theirs in pairs]
    for process in processes:
        process.start()
    try:
        yield [mine for mine, _ in pairs]
        for mine, _ in pairs:
            mine.send(None)
        for process in processes:
            process.join(30)
    finally:
        for process in processes:
            process.kill()


def together(
    connections: Sequence[Connection], route: str, files: Sequence[Path], indices: Sequence[int], repeats: int
) -> dict[str, float] | str:
    """One measurement with all workers at once: clips a second of all, CPU seconds a clip; or why there is none."""
    for connection, file in zip(connections, files, strict=True):
        connection.send((route, str(file), tuple(indices), repeats))
    results = [connection.recv() for connection in connections]
    faults = [r for r in results if isinstance(r, str)]
    if faults:
        return str(faults[0])
    return {
        "clips_s": sum(1 / r["wall"] for r in results),
        "cpu_s": sum(r["cpu"] for r in results) / len(results),
    }


def measure(a: argparse.Namespace, cells: Sequence[Cell], folder: Path) -> list[dict[str, Any]]:
    """All cells, round by round."""
    routes = [r for r in ROUTES.values() if r.installed is not None]
    files = {cell.name: make(cell.clips, folder) for cell in cells}
    taken: dict[str, dict[str, list[dict[str, float]]]] = {c.name: {r.name: [] for r in routes} for c in cells}
    faults: dict[str, dict[str, str]] = {c.name: {} for c in cells}
    with workers(a.workers) as connections:
        for number in range(a.rounds + 1):  # the first one warms up: imports, caches
            for cell in cells:
                _round(a, connections, number, cell, files[cell.name], routes, taken[cell.name], faults[cell.name])
    return [
        {
            "name": cell.name,
            "files": [f.name for f in files[cell.name]],
            "kbit_s": [f.stat().st_size * 8 / 1000 / a.seconds for f in files[cell.name]],
            "indices": list(cell.indices),
            "rounds": {name: rounds for name, rounds in taken[cell.name].items() if rounds},
            "faults": faults[cell.name],
        }
        for cell in cells
    ]


def _round(
    a: argparse.Namespace,
    connections: Sequence[Connection],
    number: int,
    cell: Cell,
    files: Sequence[Path],
    routes: Sequence[Route],
    taken: dict[str, list[dict[str, float]]],
    faults: dict[str, str],
) -> None:
    turn = number % len(routes)
    for route in [*routes[turn:], *routes[:turn]]:
        if route.name in faults:
            continue
        found = together(connections, route.name, files, cell.indices, a.repeats if number else 1)
        if isinstance(found, str):
            faults[route.name] = found
            sys.stderr.write(f"{cell.name}, {route.name}: {found}\n")
        elif number:
            taken[route.name].append(found)
            sys.stderr.write(
                f"round {number}, {cell.name}, {route.name}: {found['clips_s']:.3g} clips/s, {found['cpu_s']:.3g} s\n"
            )


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.decode", description=__doc__)
    parser.add_argument("--sizes", nargs="+", default=["360p", "720p"], choices=tuple(SIZES))
    parser.add_argument("--gops", nargs="+", type=int, default=[30, 250], metavar="N", help="frames between keyframes")
    parser.add_argument("--frames", nargs="+", type=int, default=[8, 32], metavar="N", help="frames taken from a clip")
    parser.add_argument("--seconds", type=int, default=30, help="length of a clip")
    parser.add_argument("--rate", type=int, default=30, help="frames a second")
    parser.add_argument("--others", type=int, default=2, help="codecs besides H.264: 1 VP9, 2 Motion JPEG too")
    parser.add_argument("--workers", type=int, default=2, help="processes, with one codec thread each")
    parser.add_argument("--rounds", type=int, default=7, help="how often each is measured")
    parser.add_argument("--repeats", type=int, default=2, help="clips that each process decodes in a measurement")
    parser.add_argument("--clips", help="folder where rendered clips are kept; default: rendered anew each time")
    parser.add_argument("--memory", type=int, metavar="N", help="instead: memory of one process over N clips")
    parser.add_argument("--every", type=int, default=500, metavar="N", help="clips between two figures of --memory")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--md", help="file for the text")
    a = parser.parse_args(argv)
    numbers = [a.seconds, a.rate, a.workers, a.rounds, a.repeats, a.every, *a.gops, *a.frames]
    if min(numbers) < 1 or a.others < 0 or (a.memory is not None and a.memory < 1):
        parser.error("numbers must be at least 1")
    if a.seconds * a.rate > 4096:
        parser.error("--seconds times --rate: at most 4096 frames, which is as far as the numbers in them go")
    return a


def main(argv: Sequence[str]) -> int:
    """Measure and report."""
    a = _arguments(argv)
    kept = list(argv)
    if a.clips is not None and "--clips" in kept:  # where files were kept is of no matter to who repeats it
        del kept[kept.index("--clips") : kept.index("--clips") + 2]
    head = {**report.origin("benchmarks.decode", kept), **report.machine("cpu"), "workers": a.workers}
    head["versions"] |= {r.package: r.installed for r in ROUTES.values() if r.installed is not None}
    if a.memory is not None:
        from benchmarks import decode_memory

        result = {**head, **decode_memory.measure(a.memory, a.every)}
        report.write(decode_memory.text(result), result, a.json, a.md)
        return 0
    with tempfile.TemporaryDirectory() as scratch:
        found = measure(a, cells_of(a), Path(a.clips or scratch))
    absent = [r.name for r in ROUTES.values() if r.installed is None]
    load = list(os.getloadavg())
    result = {
        **head,
        "load": load,
        "rounds": a.rounds,
        "repeats": a.repeats,
        "absent": absent,
        "cells": [decode_report.summarised(c) for c in found],
    }
    report.write(decode_report.text(result), result, a.json, a.md)
    return 0


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
