"""Does merging cost answers? The demo's model, trained with each kind of merging from one start and asked the same.

python -m benchmarks.merging_accuracy --out runs/merging_accuracy --jobs 2

For each seed: stage 1 once (images: nothing merges), then stages 2 and 3 with each kind, at the same steps, data order
and learning rates, then all held-out questions. What is there already is not done again, so an interrupted run goes on.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import time
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from scipy.stats import t as student_t

from megatron_elva.evaluation.questions import Z95, normal

KINDS: dict[str, tuple[str, ...]] = {
    "none": ("merging=none",),
    "pooling": ("merging=pooling", "merging.pooling.window=2"),
    "hierarchical": ("merging=paper", "merging.points=[{after: 0.25, rule: budget, keep: 0.5}]"),
    "paper": ("merging=paper",),
}
"""Overrides of each kind. `pooling` and `hierarchical` leave half of the cells; `paper` at most half."""


@dataclass(frozen=True)
class Plan:
    """What is run.

    Attributes:
        out: where runs go.
        corpus: the demo's corpus with its tokenizer.
        seeds: of the weights and the order of samples.
        kinds: keys of `KINDS`; the first is what the others are compared with.
        steps: of stage 3; the other stages have the demo's.
    """

    out: Path
    corpus: Path
    seeds: tuple[int, ...]
    kinds: tuple[str, ...]
    steps: int

    def run(self, seed: int, kind: str) -> Path:
        """Run directory of stage 3."""
        return self.out / f"{kind}_{seed}" / "stage_3"


def call(log: Path, *command: str) -> None:
    """Run a Python module with one thread, its output into a log; stops everything where it fails."""
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a") as f:
        done = subprocess.run(
            [sys.executable, "-m", *command],
            check=False,
            stdout=f,
            stderr=subprocess.STDOUT,
            env={**os.environ, "OMP_NUM_THREADS": "1"},
        )
    if done.returncode:
        raise SystemExit(f"{' '.join(command)}: failed with {done.returncode}; see {log}")


def prepare(plan: Plan, heldout: int) -> None:
    """Render the corpus and train its tokenizer, where that is not done yet."""
    if (plan.corpus / "tokenizer" / "tokenizer.json").is_file():
        return
    log = plan.out / "corpus.log"
    sizes = ("--images=4000", "--videos=9000", f"--heldout={heldout}")
    call(log, "dali_pipelines.demo_corpus", f"--out={plan.corpus}", *sizes)
    shards = [str(plan.corpus / part / "train-*.tar") for part in ("images", "videos")]
    out = f"--out={plan.corpus / 'tokenizer'}"
    call(log, "dali_pipelines.tokenizer", "--shards", *shards, "--vocab=512", out)


def train(plan: Plan, stage: int, seed: int, folder: Path, *overrides: str) -> None:
    """One stage in one process."""
    fixed = ("cluster=debug", "data.workers=0", f"data.root={plan.corpus}", f"seed={seed}", f"run_dir={folder}")
    call(folder.with_suffix(".log"), "megatron_elva.training.train", f"stage={stage}", *fixed, *overrides)


def images(plan: Plan, seed: int) -> None:
    """Stage 1 of a seed."""
    train(plan, 1, seed, plan.out / f"images_{seed}")
    say(f"seed {seed}: stage 1 done")


def chain(plan: Plan, seed: int, kind: str) -> None:
    """Stages 2 and 3 of a seed with one kind of merging, and the questions."""
    run = plan.run(seed, kind)
    if (run / "evaluation.json").is_file():
        return
    before = run.with_name("stage_2")
    train(plan, 2, seed, before, f"init_from={plan.out / f'images_{seed}'}", *KINDS[kind])
    train(plan, 3, seed, run, f"init_from={before}", f"train.steps={plan.steps}", *KINDS[kind])
    shards = str(plan.corpus / "heldout" / "*.tar")
    call(run.with_suffix(".log"), "megatron_elva.evaluation.questions", f"--run={run}", "--shards", shards)
    accuracy = json.loads((run / "evaluation.json").read_text())["all"]["accuracy"]
    say(f"seed {seed}, {kind}: accuracy {accuracy:.3f}")


@dataclass(frozen=True)
class Asked:
    """One question and how a run did: the video it is about, its type, whether the answer was right."""

    video: str
    type: str
    right: bool


def answers(run: Path) -> list[Asked]:
    """What a run was asked, in order."""
    lines = (json.loads(line) for line in (run / "answers.jsonl").read_text().splitlines())
    return [Asked(a["key"], a["type"], normal(a["answer"]) == normal(a["expected"])) for a in lines]


def kept_share(run: Path) -> float:
    """Mean share of the visual tokens that were left in the last 50 steps of a run."""
    steps = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()][-50:]
    return sum(s["visual_tokens_out"] for s in steps) / sum(s["visual_tokens_in"] for s in steps)


def interval(by_seed: Sequence[Sequence[float]], videos: Sequence[str]) -> tuple[float, float]:
    """Mean of values by seed and question, and half of its 95% interval.

    Two sources of chance are added in squares: other seeds (t distribution over the means of seeds) and other videos
    (normal; questions about one video count as one cluster). One seed alone gives the second only.
    """
    seeds, n = len(by_seed), len(videos)
    means = [sum(values) / n for values in by_seed]
    mean = sum(means) / seeds
    between = sum((m - mean) ** 2 for m in means) / max(1, seeds - 1) / seeds
    clusters: dict[str, float] = defaultdict(float)
    for q, video in enumerate(videos):
        clusters[video] += sum(values[q] for values in by_seed) / seeds - mean
    count = len(clusters)
    within = sum(total**2 for total in clusters.values()) / n**2 * count / max(1, count - 1)
    quantile = float(student_t.ppf(0.975, seeds - 1)) if seeds > 1 else 0.0
    return mean, math.sqrt(quantile**2 * between + Z95**2 * within)


def compare(plan: Plan) -> dict[str, dict[str, object]]:
    """Accuracy of each kind by question type, and its difference from the first, paired by seed and question."""
    got = {kind: [answers(plan.run(seed, kind)) for seed in plan.seeds] for kind in plan.kinds}
    first = got[plan.kinds[0]]
    asked = [(a.video, a.type) for a in first[0]]
    for kind, runs in got.items():
        if any([(a.video, a.type) for a in run] != asked for run in runs):
            raise SystemExit(f"{kind}: was asked other questions than {plan.kinds[0]}")
    out: dict[str, dict[str, object]] = {}
    for kind, runs in got.items():
        rows = {}
        for name in [*sorted({t for _, t in asked}), "all"]:
            picked = [q for q, (_, t) in enumerate(asked) if name in (t, "all")]
            videos = [asked[q][0] for q in picked]
            right = [[float(run[q].right) for q in picked] for run in runs]
            change = [
                [float(run[q].right) - float(base[q].right) for q in picked]
                for run, base in zip(runs, first, strict=True)
            ]
            difference, half = interval(change, videos)
            rows[name] = {
                "questions": len(picked),
                "accuracy": interval(right, videos)[0],
                "seeds": [sum(values) / len(picked) for values in right],
                "difference": difference,
                "difference_half": half,
                "seed_differences": [sum(values) / len(picked) for values in change],
            }
        out[kind] = {"kept": [kept_share(plan.run(seed, kind)) for seed in plan.seeds], "types": rows}
    return out


def table(plan: Plan, result: dict[str, dict[str, object]]) -> str:
    """The comparison in Markdown: accuracy, and in brackets the difference, its interval, and that of each seed."""
    kinds = list(plan.kinds)
    head = ["type", "questions", *(f"{k}" if i == 0 else f"{k} (difference)" for i, k in enumerate(kinds))]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    first: dict[str, dict[str, float]] = result[kinds[0]]["types"]  # type: ignore[assignment]
    for name, row in first.items():
        cells = [name, f"{row['questions']:.0f}"]
        for kind in kinds:
            own = result[kind]["types"][name]  # type: ignore[index]
            text = f"{own['accuracy']:.1%}"
            if kind != kinds[0]:
                seeds = ", ".join(f"{100 * d:+.0f}" for d in own["seed_differences"])
                text += f" ({100 * own['difference']:+.1f} ± {100 * own['difference_half']:.1f}; {seeds})"
            cells.append(text)
        lines.append("| " + " | ".join(cells) + " |")
    for label, value in (("by seed", _by_seed), ("visual tokens left", _kept)):
        lines.append("| " + " | ".join([label, "", *(value(result[k]) for k in kinds)]) + " |")
    return "\n".join(lines)


def _by_seed(kind: dict[str, object]) -> str:
    seeds: list[float] = kind["types"]["all"]["seeds"]  # type: ignore[index]
    return ", ".join(f"{s:.1%}" for s in seeds)


def _kept(kind: dict[str, object]) -> str:
    kept: list[float] = kind["kept"]  # type: ignore[assignment]
    return f"{sum(kept) / len(kept):.0%}"


def say(line: str) -> None:
    """One line with the time."""
    print(f"{time.strftime('%H:%M:%S')}  {line}", flush=True)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="merging_accuracy", description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--out", type=Path, default=Path("runs/merging_accuracy"))
    parser.add_argument("--corpus", type=Path, help="a demo corpus with its tokenizer; made below --out without it")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--kinds", nargs="+", choices=sorted(KINDS), default=["none", "hierarchical", "pooling"])
    parser.add_argument("--steps", type=int, default=560, help="of stage 3")
    parser.add_argument("--heldout", type=int, default=900, help="held-out videos of a corpus that is made")
    parser.add_argument("--jobs", type=int, default=max(1, (os.cpu_count() or 2) // 2), help="processes at a time")
    given = parser.parse_args(argv)
    plan = Plan(
        given.out.resolve(),
        (given.corpus or given.out / "corpus").resolve(),
        tuple(given.seeds),
        tuple(given.kinds),
        given.steps,
    )
    plan.out.mkdir(parents=True, exist_ok=True)
    prepare(plan, given.heldout)
    with ThreadPoolExecutor(given.jobs) as pool:
        list(pool.map(lambda seed: images(plan, seed), plan.seeds))
        list(pool.map(lambda c: chain(plan, *c), [(seed, kind) for seed in plan.seeds for kind in plan.kinds]))
    result = compare(plan)
    (plan.out / "comparison.json").write_text(json.dumps(result, indent=1))
    print(table(plan, result))


if __name__ == "__main__":
    main()
