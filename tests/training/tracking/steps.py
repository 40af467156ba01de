"""Stands for a trainer: takes steps of a fixed length, writes their metrics and has a real `Tracker` beside it.

python -m tests.training.tracking.steps RUN_DIR FIRST LAST SECONDS END

END is the outcome to finish with, or ``kill``: then it kills itself behind the last step. A file ``enough`` in the run
directory makes it the last one. Prints the longest and the mean step, and what the end took, in seconds.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sys
import time
from pathlib import Path

from megatron_elva.config.build import load, save
from megatron_elva.config.schema import Config, TrackingConfig
from megatron_elva.training import attempts
from megatron_elva.training.tracking import Tracker
from tests.builders import small_config


def write_config(run: Path, **tracking) -> Config:
    config = small_config(run_dir=str(run), tracking=TrackingConfig(**tracking))
    save(config, run / "config.yaml")
    return config


def line(step: int) -> dict:
    """Metrics of a step; `time` makes those of another attempt differ."""
    loss = None if step == 7 else 2.0 + math.exp(-step / 10)  # as the trainer writes what is not finite
    return {
        "step": step, "stage": 2, "samples": 4 * step, "loss": loss, "grad_norm": 1.0 / step, "lr": 1e-3,
        "tokens_per_s": 1000.5 + step, "mfu": None, "visual_tokens_in": 100, "visual_tokens_out": 40,
        "time": time.time(),
    }  # fmt: skip


def lines_of(run: Path) -> list[dict]:
    return [json.loads(text) for text in (run / "metrics.jsonl").read_text().splitlines()]


def write_lines(run: Path, steps: range) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in steps:
            file.write(json.dumps(line(step)) + "\n")


def train(run: Path, first: int, last: int, seconds: float, end: str) -> None:
    config = load(run / "config.yaml")
    attempts.begin(run, first - 1)
    tracker = Tracker(config, 0, 0, 0, 1)
    tracker.start()
    longest, total, done = 0.0, 0.0, 0
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(first, last + 1):
            if (run / "enough").exists():
                last = step - 1
                break
            began = time.perf_counter()
            time.sleep(seconds)
            file.write(json.dumps(line(step)) + "\n")
            file.flush()
            took = time.perf_counter() - began
            longest, total, done = max(longest, took), total + took, done + 1
    print(longest, total / max(done, 1), flush=True)
    if end == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    attempts.end(run, end, "as told", last)
    began = time.perf_counter()
    tracker.finish(end)
    print(time.perf_counter() - began, flush=True)


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), float(sys.argv[4]), sys.argv[5])
