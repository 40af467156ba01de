"""Loss curves of FP8 beside bf16: ``python -m benchmarks.gpu.fp8_curves``.

Every run trains the same small model on the same packs in the same order: made-up videos of a few classes, each class
with a text of its own, so that there is something to learn. All FP8 runs start from the weights of the first bf16 run;
the second bf16 run has another seed and shows how far apart two runs are without FP8.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import fmean
from typing import Any

import torch

from benchmarks.gpu import common
from benchmarks.packs import video_pack
from benchmarks.report import table
from megatron_elva.config.schema import Config
from megatron_elva.layout import Pack
from megatron_elva.model.inputs import prepare
from megatron_elva.parallel.engine import Engine, build_chunks
from megatron_elva.parallel.ranks import start, stop

NAME = "fp8_curves"
QWEN2_0_5B = ("model.hidden=896", "model.ffn_hidden=4864", "model.heads=14", "model.kv_heads=2", "model.layers=4")
"""Width of Qwen2-0.5B, a sixth of its depth."""
CLASSES = 8
PIXEL_NOISE = 24
"""Levels that each pixel of a video may differ from those of its class."""
WARMUP = 10
"""Steps in which the learning rate rises."""
RUNS = {"bf16": 0, "bf16, other seed": 1, "fp8_delayed": 0, "fp8_current": 0, "fp8_blockwise": 0}
"""What each run adds to the seed; the precision is the first word."""


def corpus(a: argparse.Namespace, config: Config) -> list[Pack]:
    """Packs of one sample each: class by class in turn, the text fixed by the class, the pixels its own."""
    classes = [video_pack(config.model, 1, a.frames, a.grid, a.text, a.vocab, 1000 + k) for k in range(CLASSES)]
    generator = torch.Generator().manual_seed(5)
    made = []
    for number in range(a.videos):
        pack = classes[number % CLASSES]
        noise = torch.randint(-PIXEL_NOISE, PIXEL_NOISE + 1, pack.patches.shape, generator=generator)
        made.append(replace(pack, patches=(pack.patches + noise).clamp(0, 255).to(torch.uint8)))
    return made


def batches(a: argparse.Namespace) -> list[list[int]]:
    """Numbers of the videos of each step, the same for every run: epochs, each in an order of its own."""
    generator = torch.Generator().manual_seed(6)
    order: list[int] = []
    while len(order) < a.steps * a.samples:
        order += torch.randperm(a.videos, generator=generator).tolist()
    return [order[i * a.samples : (i + 1) * a.samples] for i in range(a.steps)]


def train(a: argparse.Namespace, config: Config) -> dict[str, Any]:
    """Losses, gradient norms and seconds by step of one run."""
    ranks = start(config.parallel, config.device, config.seed)
    engine = Engine(config, build_chunks(config, a.vocab, ranks), ranks)
    videos = corpus(a, config)
    out: dict[str, list[float]] = {"losses": [], "grad_norms": [], "seconds": []}
    tokens = 0
    for step, chosen in enumerate(batches(a)):
        pack = common.joined([videos[i] for i in chosen], config.pad_multiple)
        tokens = pack.spec.tokens
        engine.set_learning_rate(min(1.0, (step + 1) / WARMUP), False)
        inputs = prepare(pack, config, ranks.device)
        began = time.perf_counter()
        result = engine.train_step([inputs])  # its loss is read on the host, so the device has done it
        out["seconds"].append(time.perf_counter() - began)
        out["losses"].append(result.loss_sum / result.loss_tokens)
        out["grad_norms"].append(result.grad_norm)
        if step % 20 == 0 or step + 1 == a.steps:
            print(f"{config.precision.name} step {step + 1}: loss {out['losses'][-1]:.4f}", flush=True)
    stop()
    parameters = sum(p.numel() for p in engine.names)
    return {**out, "seed": config.seed, "tokens": tokens, "parameters": parameters}


def compared(runs: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """First and last losses of each run that ended, and how far it is from the first bf16 run."""
    done = {name: run["losses"] for name, run in runs.items() if "failed" not in run}
    base = done.get("bf16")
    rows = {}
    for name, losses in done.items():
        last = max(1, len(losses) // 10)
        row: dict[str, Any] = {
            "first": losses[0],
            "last": fmean(losses[-last:]),
            "last_over": last,
            "fell": all(map(math.isfinite, losses)) and fmean(losses[-last:]) < losses[0],
            "gap": None,
            "mean_distance": None,
        }
        if base is not None and name != "bf16":
            row["gap"] = row["last"] - fmean(base[-last:])
            row["mean_distance"] = fmean(abs(x - y) for x, y in zip(losses, base, strict=True))
        rows[name] = row
    return rows


def plot(runs: Mapping[str, Mapping[str, Any]], file: Path) -> str | None:
    """Draw the curves; why not, where matplotlib is missing."""
    try:
        import matplotlib
    except ModuleNotFoundError:
        return "no picture: matplotlib is not installed (pip install matplotlib)"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.5), layout="constrained")
    for name, run in runs.items():
        if "failed" not in run:
            axes.plot(range(1, len(run["losses"]) + 1), run["losses"], label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="loss", yscale="log", title="Training loss, same packs in the same order")
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(file, dpi=110)
    pyplot.close(figure)
    return None


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""

    def shown(value: float | None) -> str:
        return "" if value is None else f"{value:+.4f}"

    runs, rows = result["runs"], result["compared"]
    lines = [
        (
            name, f"{row['first']:.4f}", f"{row['last']:.4f}", shown(row["gap"]),
            "" if row["mean_distance"] is None else f"{row['mean_distance']:.4f}",
            f"{common.summary(runs[name]['seconds'])['median'] * 1000:.1f}", "fell" if row["fell"] else "DID NOT FALL",
        )
        for name, row in rows.items()
    ]  # fmt: skip
    head = ("run", "first loss", "last tenth", "to bf16", "mean distance", "ms a step", "")
    picture = result["picture_missing"] or f"![loss curves](gpu_{NAME}.png)"
    some: Mapping[str, Any] = next((run for run in runs.values() if "failed" not in run), {})
    body = table(head, lines) if lines else "No run ended."
    return f"""{common.heading("Loss curves of FP8 beside bf16", result)}

{result["model"]} ({" ".join(result["set"])}), {some.get("parameters", 0) / 1e6:.1f}M parameters,
{result["steps"]} steps of {result["samples"]} of {result["videos"]} made-up videos ({some.get("tokens", 0):,} tokens
a step, padding included).

{picture}

{body}{common.failures(runs)}

To bf16: mean loss of the last tenth of the steps, less that of the first bf16 run. Mean distance: of the losses step
by step. The second bf16 run starts from other weights; all others start from the same. What differs from bf16 by no
more than it does is not told apart from bf16 here. The time of a step is that of a small model and says little about
large ones."""


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.options(
        NAME, __doc__, model="elva_1_5b", set=QWEN2_0_5B, samples=8, frames=8, grid=8, text=32, vocab=8192
    )
    parser.add_argument("--runs", nargs="+", choices=list(RUNS), help="default: all; on cpu those without FP8")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--videos", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-4)
    parser.add_argument("--seed", type=int, default=7)
    a = parser.parse_args(argv)
    if min(a.steps, a.samples) < 1 or a.videos < a.samples:
        parser.error("--steps and --samples: at least 1; --videos: at least --samples")
    a.runs = a.runs or [name for name in RUNS if a.device == "cuda" or not name.startswith("fp8")]
    return a


def main(argv: Sequence[str]) -> int:
    """Train all runs and report; 1 where one failed or did not learn."""
    a = _arguments(argv)
    if a.part:
        rates = (f"train.lr={a.lr}", f"train.lr_patch_embedding={a.lr}")
        config = common.configured(a, a.part.partition(",")[0], "none", *rates, f"seed={a.seed + RUNS[a.part]}")
        return common.write_part(a, train(a, config))
    runs = dict(common.parts(NAME, argv, a.runs, a.part_limit))
    rows = compared(runs)
    good = len(rows) == len(runs) and all(row["fell"] for row in rows.values())
    folder = Path(a.out or common.RESULTS[a.device])
    folder.mkdir(parents=True, exist_ok=True)
    result = {
        **common.head(NAME, argv, a.device),
        "device_kind": a.device,
        "status": "ok" if good else "failed",
        **{name: getattr(a, name) for name in ("model", "set", "steps", "samples", "videos", "lr", "vocab")},
        "runs": runs,
        "compared": rows,
        "picture_missing": plot(runs, folder / f"gpu_{NAME}.png"),
    }
    return common.finish(NAME, a, result, text(result))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
