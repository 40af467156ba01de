"""How `benchmarks.decode` sums its figures up, and the text that it prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.decode_routes import ROUTES
from benchmarks.report import table

CODECS = {"libx264": "H.264", "libvpx-vp9": "VP9", "mjpeg": "Motion JPEG"}
NEAR = 0.9
"""Target: clips a second as a share of the best other decoder's, at least."""
AHEAD_GOP = 30
"""Target: at groups of pictures of at most so many frames, ahead of it."""


def summarised(cell: Mapping[str, Any]) -> dict[str, Any]:
    """A cell's rounds with medians, ranges, and ours against the best other."""
    rounds = cell["rounds"]
    summary = {
        name: {what: _summary([r[what] for r in taken]) for what in ("clips_s", "cpu_s")}
        for name, taken in rounds.items()
    }
    return {**cell, "summary": summary, "ratio": _ratio(cell["name"], rounds, summary)}


def _summary(values: Sequence[float]) -> dict[str, float]:
    return {"median": median(values), "min": min(values), "max": max(values)}


def _ratio(
    name: str, rounds: Mapping[str, Sequence[Mapping[str, float]]], summary: Mapping[str, Any]
) -> dict[str, Any] | None:
    """Ours against the best other by clips a second, and by CPU seconds; within each round, as noise is alike there."""
    others = [r for r in rounds if r in ROUTES and not ROUTES[r].ours]
    if "ours" not in rounds or not others:
        return None
    best = max(others, key=lambda r: summary[r]["clips_s"]["median"])
    frugal = min(others, key=lambda r: summary[r]["cpu_s"]["median"])
    speed = [a["clips_s"] / b["clips_s"] for a, b in zip(rounds["ours"], rounds[best], strict=True)]
    cpu = [a["cpu_s"] / b["cpu_s"] for a, b in zip(rounds["ours"], rounds[frugal], strict=True)]
    wanted = None if not name.startswith(CODECS["libx264"]) else 1.0 if _gop(name) <= AHEAD_GOP else NEAR
    found = _summary(speed)
    return {
        "best": best,
        "clips_s": found,
        "wanted": wanted,
        "met": None if wanted is None else found["median"] >= wanted,
        "frugal": frugal,
        "cpu_s": _summary(cpu),
    }


def _gop(name: str) -> int:
    return int(name.split("GOP ")[1].split(",")[0])


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    cells = result["cells"]
    absent = [f"Not installed: {', '.join(result['absent'])}."] if result["absent"] else []
    faults: dict[str, list[str]] = {}
    for cell in cells:
        for name, why in cell["faults"].items():
            faults.setdefault(f"{name}: {why}", []).append(cell["name"])
    left_out = ["Left out:", "\n".join(f"- {why} ({'; '.join(where)})" for why, where in faults.items())]
    rivals = [n for n, r in ROUTES.items() if not r.patches and any(n in c["summary"] for c in cells)]
    blocks = [
        "# Frames from videos: ours and other decoders",
        f"`{result['command']}`, {result['date']}.\n{result['device']}, {result['cores']}, "
        f"load {result['load'][0]:.1f} at the end (own included);\n{versions}.",
        f"Clips a second with {result['workers']} processes (medians of {result['rounds']} rounds, lowest and highest "
        "in brackets):",
        _figures(cells, rivals, "clips_s"),
        "CPU seconds a clip, all threads:",
        _figures(cells, rivals, "cpu_s"),
        "Ours against the best other, within each round (clips a second: above 1 ours is faster; CPU: below 1 ours "
        "takes less):",
        table(
            ("cell", "best other", "clips/s, ours / it", "at least", "", "least CPU", "CPU, ours / it"),
            [_verdict(c) for c in cells if c["ratio"]],
        ),
        *absent,
        *_to_patches(cells),
        *(left_out if faults else []),
        HOW,
    ]  # fmt: skip
    return "\n\n".join(blocks)


HOW = """## How it is measured

Clips are rendered by the benchmark: textured pictures that pan, sprites, grain, a cut every 8 seconds; x264 medium
crf 23 (VP9 realtime crf 34, Motion JPEG quality 3 to 5). Every frame carries its number, and every frame of every
decoder is checked by it. The target is one for H.264, which most videos are; the other codecs are those that DALI
decodes on a CPU, so that its own route can be seen beside ours. Files are in memory. A measurement is `--repeats`
clips in each of the processes at once, one codec thread each, from bytes and frame numbers to an array of RGB frames of
native size; all decoders go in turn in every round, which begins each time with another one. The first round is not
kept.

Ours counts the packets of the file itself and converts colours as DALI does (swscale's accurate mode, full chroma
interpolation). PyAV: seek to the keyframe before a frame, decode up to it, `to_ndarray` with swscale's defaults; it is
told the keyframes for nothing. torchcodec: one decoder a clip, NHWC, one thread, both seek modes. decord: one reader a
clip, one thread. Colours differ between the decoders by design, and frame numbers do not."""


def _to_patches(cells: Sequence[Mapping[str, Any]]) -> list[str]:
    names = [n for n, r in ROUTES.items() if r.patches and any(n in c["summary"] for c in cells)]
    title = "To patches at native size (frames are the start of it), CPU seconds a clip:"
    return [title, _figures(cells, names, "cpu_s")] if names else []


def _figures(cells: Sequence[Mapping[str, Any]], names: Sequence[str], what: str) -> str:
    def shown(cell: Mapping[str, Any], name: str) -> str:
        figure = cell["summary"].get(name)
        return "-" if figure is None else with_range(figure[what])

    rows = [(c["name"], *(shown(c, n) for n in names)) for c in cells if any(n in c["summary"] for n in names)]
    return table(("cell", *names), rows)


def _verdict(cell: Mapping[str, Any]) -> tuple[str, ...]:
    r = cell["ratio"]
    return (
        cell["name"],
        r["best"],
        with_range(r["clips_s"]),
        *(("", "no target") if r["met"] is None else (f"{r['wanted']:.2f}", "met" if r["met"] else "NOT MET")),
        r["frugal"],
        with_range(r["cpu_s"]),
    )


def with_range(figure: Mapping[str, float]) -> str:
    """A median with the lowest and the highest."""
    return f"{figure['median']:.3g} ({figure['min']:.3g}..{figure['max']:.3g})"
