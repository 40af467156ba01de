"""What the modules here share: options, configs, packs, head and form of a result, times, parts in own processes.

A part has a process to itself so that one that fails or fills the device takes no other along, and so that its peak of
memory is its own.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from statistics import median
from threading import Timer
from typing import Any

import torch
from torch.nn.functional import pad

from benchmarks import report
from benchmarks.gpu.state import code_version, commit
from benchmarks.packs import video_pack
from benchmarks.timing import Clock
from megatron_elva.config.compose import compose, group_options
from megatron_elva.config.errors import ConfigError
from megatron_elva.config.schema import Config, ParallelConfig
from megatron_elva.layout import IGNORE, Pack, PackSpec

ROOT = Path(__file__).resolve().parents[2]
RESULTS = {"cuda": ROOT / "benchmarks" / "results", "cpu": ROOT / "runs" / "gpu_rehearsal"}
"""Where results go: figures of a CPU are none, so they stay out of the repository."""
LAYERS = {"cuda": "te", "cpu": "auto"}
"""What is asked for where ``--layers`` is not given: on a GPU nothing else may be measured in place of it."""
TAIL = 30
"""Lines of a failed part that its result keeps."""


def options(module: str, doc: str | None, **defaults: Any) -> argparse.ArgumentParser:
    """The options of all modules.

    Args:
        module: its name below ``benchmarks.gpu``.
        doc: its docstring.
        defaults: of the sizes that the module has: ``model``, ``samples``, ``frames``, ``grid``, ``text``, ``vocab``
            and ``set``, a list of overrides; and ``part_limit``.
    """
    parser = argparse.ArgumentParser(prog=f"python -m benchmarks.gpu.{module}", description=doc)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--layers", choices=("te", "local"), help="layer spec; default: te on cuda, on cpu local")
    parser.add_argument("--out", help="folder for gpu_*.json and .md; default: benchmarks/results, on cpu runs/")
    helps = {
        "samples": "samples in a pack", "frames": "frames of a video", "grid": "rows and columns of cells in a frame",
        "text": "text tokens of a sample", "vocab": "rows of the word embedding",
    }  # fmt: skip
    if "model" in defaults:
        parser.add_argument("--model", default=defaults["model"], choices=group_options()["model"])
        parser.add_argument(
            "--set", nargs="*", default=list(defaults.get("set", ())), metavar="KEY=VALUE", help="overrides of configs/"
        )
    for name in helps.keys() & defaults.keys():
        parser.add_argument(f"--{name}", type=int, default=defaults[name], help=helps[name])
    limit = defaults.get("part_limit", 240)
    parser.add_argument("--part-limit", type=int, default=limit, help="seconds that one process may take")
    parser.add_argument("--part", help=argparse.SUPPRESS)
    parser.add_argument("--part-file", help=argparse.SUPPRESS)
    return parser


def configured(a: argparse.Namespace, precision: str, merging: str = "none", *overrides: str) -> Config:
    """The config of a run in one process, from `options`.

    Raises:
        ConfigError: as `compose`; or FP8 with local layers, which would compute without it.
    """
    lines = [f"model={a.model}", f"merging={merging}", "cluster=local", f"device={a.device}", f"precision={precision}"]
    lines += [f"layers={a.layers or LAYERS[a.device]}", *overrides, *a.set]
    config = compose(lines)
    if config.precision.fp8 is not None and config.layers == "local":
        raise ConfigError(f"precision={precision}: local layers do not compute in FP8; give --layers te")
    model = replace(config.model, vocab_size=a.vocab)
    return replace(config, model=model, parallel=ParallelConfig(tensor=1, pipeline=1, sequence=False))


def joined(packs: Sequence[Pack], multiple: int) -> Pack:
    """The samples of several packs as one, padded to a multiple as the data does it."""
    spec = PackSpec(tuple(s for pack in packs for s in pack.spec.samples)).padded_to(multiple)
    sides = (0, spec.padding)
    tokens = pad(torch.cat([p.tokens[: p.spec.tokens - p.spec.padding] for p in packs]), sides)
    labels = pad(torch.cat([p.labels[: p.spec.tokens - p.spec.padding] for p in packs]), sides, value=IGNORE)
    patches = torch.cat([p.patches for p in packs])
    keys = [key for pack in packs for key in pack.keys]
    return Pack(spec, tokens, labels, patches, keys=keys, samples=len(spec.samples))


def made_up_pack(a: argparse.Namespace, config: Config, seed: int) -> Pack:
    """A pack of the sizes in `options`, padded."""
    pack = video_pack(config.model, a.samples, a.frames, a.grid, a.text, a.vocab, seed)
    return joined([pack], config.pad_multiple)


def head(module: str, argv: Sequence[str], device: str) -> dict[str, Any]:
    """Command, date, commit, code, device and versions: what every result begins with."""
    origin = report.origin(f"benchmarks.gpu.{module}", _without(argv, "--out"))
    where = report.machine(device)
    versions = where["versions"] | {name: found for name in ("transformer-engine",) if (found := _version(name))}
    if device == "cuda":
        versions |= {"cuda": str(torch.version.cuda), "cudnn": str(torch.backends.cudnn.version())}
        where["memory_gib"] = torch.cuda.get_device_properties(0).total_memory / 2**30
    return {**origin, "commit": commit(), "code": code_version(), **where, "versions": versions}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _without(argv: Sequence[str], option: str) -> list[str]:
    """The arguments without an option and its value: where results went is of no matter to who repeats them."""
    words = list(argv)
    if option in words:
        del words[words.index(option) : words.index(option) + 2]
    return words


def heading(title: str, result: Mapping[str, Any]) -> str:
    """Title and origin of a report in Markdown."""
    versions = ", ".join(f"{name} {number}" for name, number in result["versions"].items())
    rehearsal = "" if result["device_kind"] == "cuda" else "\n\nA rehearsal on a CPU: no figure here is one of a GPU."
    return (
        f"# {title}\n\n`{result['command']}`, {result['date']}, commit {result['commit']}.\n"
        f"{result['device']}, {result['cores']}; {versions}.{rehearsal}"
    )


def finish(name: str, a: argparse.Namespace, result: dict[str, Any], text: str) -> int:
    """Write ``gpu_NAME.json`` and ``.md``; the exit status: 0 where the result's status is ``ok``, else 1."""
    folder = Path(a.out or RESULTS[a.device])
    report.write(text, result, str(folder / f"gpu_{name}.json"), str(folder / f"gpu_{name}.md"))
    return 0 if result["status"] == "ok" else 1


def parts(module: str, argv: Sequence[str], names: Sequence[str], limit: int) -> Iterator[tuple[str, dict[str, Any]]]:
    """Each part of a module by its name, with what `one_part` gives of it."""
    for name in names:
        yield name, one_part(module, argv, name, limit)


def one_part(module: str, argv: Sequence[str], name: str, limit: int, hide_gpu: bool = False) -> dict[str, Any]:
    """Run a part in a process of its own.

    Args:
        module: below ``benchmarks.gpu``.
        argv: its arguments.
        name: of the part.
        limit: seconds after which it is killed.
        hide_gpu: it is to see no GPU.

    Returns:
        What it gave, or ``{"failed": why, "log": its last lines}``.
    """
    env = {**os.environ, **({"CUDA_VISIBLE_DEVICES": ""} if hide_gpu else {})}
    with tempfile.TemporaryDirectory() as scratch:
        file = Path(scratch, "part.json")
        command = [sys.executable, "-m", f"benchmarks.gpu.{module}", *argv, "--part", name, "--part-file", str(file)]
        sys.stderr.write(f"part {name}\n")
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT, env=env
        )
        assert process.stdout is not None
        last: deque[str] = deque(maxlen=TAIL)
        timer = Timer(limit, process.kill)
        timer.start()
        for line in process.stdout:  # shown as it comes: a part that hangs is seen where it hangs
            sys.stderr.write(line)
            last.append(line.rstrip())
        status = process.wait()
        timed_out = not timer.is_alive()
        timer.cancel()
        if status == 0:
            found: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
            return found
    why = f"took more than {limit} s" if timed_out else reason(last) or f"exit status {status}"
    return {"failed": why, "log": list(last)}


def reason(log: Sequence[str]) -> str | None:
    """The line of a failed process's output that says why: its last error, else its last line; None without any."""
    lines = [text for line in log if (text := re.sub(r"^\[rank\d+\]:", "", line).strip())]
    said = [line for line in lines if re.match(r"[\w.]*(Error|Exception)\b.*:", line)]
    return (said or lines)[-1][:500] if lines else None


def write_part(a: argparse.Namespace, result: Mapping[str, Any]) -> int:
    """What a part's process ends with."""
    Path(a.part_file).write_text(json.dumps(result), encoding="utf-8")
    return 0


def failures(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """Paragraphs on the parts that failed, for a report; empty without any."""
    lines = [f"- {name}: {row['failed']}" for name, row in rows.items() if "failed" in row]
    return "\n\nFailed:\n\n" + "\n".join(lines) if lines else ""


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lowest and highest."""
    return {"median": median(values), "min": min(values), "max": max(values)}


def spread(figure: Mapping[str, float], scale: float = 1.0) -> str:
    """A summary as text: median (lowest..highest)."""
    return f"{figure['median'] * scale:.4g} ({figure['min'] * scale:.4g}..{figure['max'] * scale:.4g})"


def repeated(run: Callable[[], dict[str, float]], warmup: int, repeats: int) -> dict[str, list[float]]:
    """Seconds by part of repeated runs, those of the warm-up left out."""
    taken = [run() for _ in range(warmup + repeats)][warmup:]
    return {name: [seconds[name] for seconds in taken] for name in taken[0]}


def whole(clock: Clock, run: Callable[[], object]) -> float:
    """Seconds of a call, from a device at rest to a device at rest."""
    clock.wait()
    start = clock.stamp()
    run()
    end = clock.stamp()
    clock.wait()
    return clock.seconds(start, end)


@contextmanager
def peak_memory(device: str) -> Iterator[dict[str, float | None]]:
    """GiB that torch's allocator held at most within the block, filled in at its end; None on a CPU."""
    found: dict[str, float | None] = {"peak_gib": None}
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device == "cuda":
        torch.cuda.synchronize()
        found["peak_gib"] = torch.cuda.max_memory_allocated() / 2**30
