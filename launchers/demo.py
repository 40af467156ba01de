"""The demo, end to end: render videos, train a tokenizer, train stages 1 to 3, ask about held-out videos.

`make demo` calls it. Everything lands in `runs/demo`; an interrupted demo goes on from its newest checkpoint, a
finished one starts anew. The rendered corpus is kept.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_elva.config.errors import InputError
from megatron_elva.evaluation.questions import Answered, evaluate, score, table
from megatron_elva.inference.model import Assistant
from megatron_elva.training.runs import RunLock, check_unlocked

ROOT = Path(__file__).resolve().parent.parent
RUN = Path("runs/demo")
CORPUS = RUN / "corpus"
_SAVE_S = 60.0
"""How long a job that is stopped may take to save."""
HELDOUT = str(CORPUS / "heldout" / "*.tar")


@dataclass(frozen=True)
class Size:
    """How much of everything.

    Attributes:
        images: training images.
        videos: training videos.
        heldout: held-out videos; each has one or two questions.
        vocab: size of the tokenizer.
        margin: the lower end of the accuracy's 95% interval has to be so far above chance, or the demo has failed.
        overrides: what differs from `configs/recipe/*_demo.yaml`.
    """

    images: int
    videos: int
    heldout: int
    vocab: int
    margin: float
    overrides: tuple[str, ...] = ()


SIZES = {
    "full": Size(images=4000, videos=9000, heldout=600, vocab=512, margin=0.35),
    "quick": Size(
        images=4000,
        videos=9000,
        heldout=600,
        vocab=512,
        margin=0.2,
        overrides=("stage_1.train.steps=200", "stage_2.train.steps=15", "stage_3.train.steps=180"),
    ),
}


def run(*command: str) -> None:
    """Run a step of the demo with this Python; ends the demo where it fails."""
    done = subprocess.run([sys.executable, *command], check=False, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    if done.returncode:
        sys.exit(done.returncode)


def prepare(size: Size) -> None:
    """Render the corpus and train the tokenizer, where that is not done yet."""
    counts = [f"--{name}={getattr(size, name)}" for name in ("images", "videos", "heldout")]
    run("-m", "dali_pipelines.demo_corpus", f"--out={CORPUS}", *counts, f"--workers={min(4, os.cpu_count() or 1)}")
    shards = [str(CORPUS / part / "train-*.tar") for part in ("images", "videos")]
    if not (CORPUS / "tokenizer" / "tokenizer.json").is_file():
        run(
            "-m",
            "dali_pipelines.tokenizer",
            "--shards",
            *shards,
            f"--vocab={size.vocab}",
            f"--out={CORPUS / 'tokenizer'}",
        )


def start_anew_if_finished(name: str) -> None:
    """Clear the runs of a finished demo, or of one of another size; keep those of an interrupted one."""
    mark = RUN / "size"
    if (RUN / "summary.json").is_file() or not mark.is_file() or mark.read_text() != name:
        for old in RUN.glob("stage_*"):
            try:
                check_unlocked(old)  # clearing under a job that trains would take its lock away too
            except InputError as error:
                sys.exit(f"error: {error}")
            shutil.rmtree(old)
        (RUN / "summary.json").unlink(missing_ok=True)
        shutil.rmtree(RUN / "mlflow", ignore_errors=True)  # new runs, in MLflow too
    mark.write_text(name)


def train(size: Size) -> None:
    """The three stages through the launcher with token merging, on 4 local processes at tensor 2 x pipeline 2."""
    command = ["stage=all", "cluster=local", "merging=paper", f"run_dir={RUN}", "follow=true", *size.overrides]
    print("$ python launchers/submit.py " + " ".join(command), flush=True)
    try:
        run(str(ROOT / "launchers" / "submit.py"), *command)
    except KeyboardInterrupt:
        stop_jobs()
        sys.exit("stopped; make demo goes on from the newest checkpoint")


def stop_jobs() -> None:
    """End what trains in the demo's run directories: a job outlives its launcher."""
    for lock in RUN.glob("stage_*/logs/lock"):
        try:
            RunLock(lock.parent.parent).release()
        except InputError:
            _end_group(int(lock.read_text()))


def _end_group(group: int) -> None:
    """Let the ranks save and end; a job that does not within a minute is killed."""
    for number, seconds in ((signal.SIGTERM, _SAVE_S), (signal.SIGKILL, 0.0)):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        until = time.monotonic() + seconds
        while time.monotonic() < until and _alive(group):
            time.sleep(0.2)


def _alive(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def track_answers(run: Path) -> None:
    """Add the answers to the run in MLflow; the demo does not depend on that."""
    sender = [sys.executable, "-m", "megatron_elva.training.tracking.sender", str(run), "--once"]
    subprocess.run(sender, check=False, timeout=120, stdout=subprocess.DEVNULL)


def summarise(assistant: Assistant, answered: list[Answered], began: float, margin: float) -> bool:
    """Print the scores and write `summary.json`. False where the model is not well above chance."""
    print(table(answered))
    total = score(answered)
    summary = {
        "accuracy": total.accuracy,
        "accuracy_low": total.low,
        "chance": total.chance,
        "questions": total.questions,
        "wall_s": time.time() - began,
        "checkpoint": str(assistant.checkpoint.path),
        "metrics": str(assistant.checkpoint.run / "metrics.jsonl"),
    }
    (RUN / "summary.json").write_text(json.dumps(summary, indent=1))
    learned = total.low >= total.chance + margin
    if not learned:
        print(f"too low: the 95% interval begins at {total.low:.3f}, expected {total.chance + margin:.3f} at least")
    print(f"held-out accuracy {total.accuracy:.3f} (chance {total.chance:.3f}, {total.questions} questions)")
    return learned


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(prog="demo", description="Train a small ELVA on rendered videos and ask it.")
    parser.add_argument("--size", choices=sorted(SIZES), default="full")
    size_name = parser.parse_args(argv).size
    began = time.time()
    os.chdir(ROOT)
    RUN.mkdir(parents=True, exist_ok=True)
    prepare(SIZES[size_name])
    start_anew_if_finished(size_name)
    train(SIZES[size_name])
    assistant, answered = evaluate(RUN, [HELDOUT])
    track_answers(assistant.checkpoint.run)
    if not summarise(assistant, answered, began, SIZES[size_name].margin):
        sys.exit(1)


if __name__ == "__main__":
    main()
