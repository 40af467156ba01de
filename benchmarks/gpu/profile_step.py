"""Where the time of one training step goes, and what waits for the device: ``python -m benchmarks.gpu.profile_step``.

A whole step of the real engine with one pack, three times after a warm-up: once timed, once under torch's profiler,
once with torch's warnings of host syncs. On a CPU the profile is of CPU time, which tests that it works.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.gpu import common, trace
from benchmarks.gpu.build import model_on_device
from benchmarks.merging import merging_of
from benchmarks.report import table
from benchmarks.timing import Clock
from megatron_elva.config.schema import Config
from megatron_elva.model.inputs import prepare
from megatron_elva.parallel.engine import Engine
from megatron_elva.parallel.ranks import start, stop

NAME = "profile_step"
LARGEST = 3
"""Costs that the report names first."""


@contextmanager
def ranges(engine: Engine) -> Iterator[None]:
    """The parts of a step that kernels' names do not tell, as ranges of the profile."""
    (model,) = engine.chunks
    owners: list[tuple[Any, str, str]] = [
        (model.decoder, "_merge", "elva.merge"),
        (model, "_embed", "elva.embed"),
        (engine, "_grad_norm", "elva.grad_norm"),
        (engine.optimizer, "step", "elva.optimizer"),
    ]

    def within(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*args: Any, **kwargs: Any) -> Any:
            with record_function(name):
                return function(*args, **kwargs)

        return run

    for owner, method, name in owners:
        owner.__dict__[method] = within(name, getattr(owner, method))
    try:
        yield
    finally:
        for owner, method, _ in owners:
            del owner.__dict__[method]


def measure(a: argparse.Namespace, engine: Engine, config: Config) -> dict[str, Any]:
    """The profile of one merging."""
    on_gpu = a.device == "cuda"
    device, clock = engine.ranks.device, Clock(engine.ranks.device)
    (model,) = engine.chunks
    pack = common.made_up_pack(a, config, 0)

    def step() -> None:
        engine.train_step([prepare(pack, config, device)])

    with merging_of(model, config):
        for _ in range(a.warmup):
            step()
        seconds = [common.whole(clock, step) for _ in range(a.repeats)]
        activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
        with ranges(engine), profile(activities=activities) as profiled:
            step()
            clock.wait()
        with trace.sync_warnings(a.device) as warned:
            step()
    events = profiled.events()
    assert events is not None
    names = [event.name for event in events]
    spent = trace.costs(events, on_gpu)
    return {
        "step_s": common.summary(seconds),
        "profiled_s": sum(spent.values()),
        "costs": spent,
        "largest": list(spent)[:LARGEST],
        "launches": sum(name.startswith(("cudaLaunchKernel", "cuLaunchKernel")) for name in names),
        "syncs": trace.count_syncs(names),
        "sync_places": dict(warned.most_common()),
        "tokens": pack.spec.tokens - pack.spec.padding,
    }


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""
    rows = {name: row for name, row in result["rows"].items() if "failed" not in row}
    kind = "device" if result["device_kind"] == "cuda" else "CPU"
    blocks = [_block(name, row, kind) for name, row in rows.items()]
    size = f"{result['samples']} x ({result['frames']} frames of {result['grid']} x {result['grid']} cells + "
    size += f"{result['text']} text tokens)"
    return f"""{common.heading("One training step in parts", result)}

{result["model"]} ({" ".join(result["set"])}), {result["precision"]}; one pack of {size},
optimizer and copy of the pack to the device included.

{(chr(10) * 2).join(blocks)}{common.failures(result["rows"])}

Merge points, optimizer, gradient norm and the forward pass of the patch embedding are known by where they are
launched; all else by the names of kernels. Kernels of different groups may overlap. The profiled step is slower than
the timed ones, and the syncs at its end, made by the benchmark, are among those counted. Host syncs are counted
twice: in the trace, with those of libraries and copies to the host; and by torch's own warnings, which know where."""


def _block(name: str, row: Mapping[str, Any], kind: str) -> str:
    total = row["profiled_s"] or 1.0
    lines = [(group, f"{s * 1000:.3f}", f"{s / total:.1%}") for group, s in row["costs"].items()]
    largest = ", ".join(f"{group} ({row['costs'][group] / total:.0%})" for group in row["largest"])
    syncs = ", ".join(f"{kind} {count}" for kind, count in row["syncs"].items())
    places = "\n".join(f"- {count} x {where}" for where, count in row["sync_places"].items()) or "- none"
    return f"""## {name}

A step takes {common.spread(row["step_s"], 1000)} ms; the {kind} is at work for {row["profiled_s"] * 1000:.1f} ms of
the profiled one, with {row["launches"]:,} kernels launched. Largest costs: {largest}.

{table(("group", f"{kind} ms", "share"), lines)}

Host syncs in the trace: {syncs}. By torch's warnings:

{places}"""


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.options(NAME, __doc__, model="elva_1_5b", samples=3, frames=16, grid=12, text=218, vocab=151936)
    parser.add_argument("--precision", default="bf16", help="option of configs/precision")
    parser.add_argument("--merging", nargs="+", default=["none", "fast"], help="options of configs/merging")
    parser.add_argument("--warmup", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=5, help="steps that are timed")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Profile and report; 1 where it failed."""
    a = _arguments(argv)
    if a.part:
        ways = {name: common.configured(a, a.precision, name) for name in a.merging}
        first = next(iter(ways.values()))
        ranks = start(first.parallel, a.device, first.seed)
        engine = Engine(first, [model_on_device(first, ranks)], ranks)
        engine.set_learning_rate(0.01, False)
        found = {name: measure(a, engine, config) for name, config in ways.items()}
        stop()
        return common.write_part(a, found)
    part = common.one_part(NAME, argv, "profile", a.part_limit)
    rows = {"profile": part} if "failed" in part else part
    result = {
        **common.head(NAME, argv, a.device),
        "device_kind": a.device,
        "status": "failed" if "failed" in part else "ok",
        **{name: getattr(a, name) for name in ("model", "set", "samples", "frames", "grid", "text", "vocab")},
        **{name: getattr(a, name) for name in ("precision", "warmup", "repeats")},
        "rows": rows,
    }
    return common.finish(NAME, a, result, text(result))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
