"""What a running job says in its metrics.jsonl, as one line."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any, TextIO

from megatron_elva.config.schema import Config
from megatron_elva.training import attempts

_LINE_EVERY_S = 10.0


def progress_line(configs: Sequence[Config], since: float) -> str | None:
    """The state of the stage that wrote last.

    Args:
        configs: the stages of the submission.
        since: metrics older than this time come from an earlier submission with the same run directory.

    Returns:
        A line such as ``stage 2  120/500  loss 2.314  35,120 tokens/s  2 min 35 s left``; None before the first step.
    """
    found = [(path.stat().st_mtime, config) for config in configs if (path := _metrics(config)).is_file()]
    mtime, config = max(found, key=lambda pair: pair[0], default=(0.0, configs[0]))
    steps = attempts.tail(_metrics(config)) if found and mtime >= since else []
    if not steps:
        return None
    line = describe(steps, config.train.steps)
    of_several = " in this stage" if len(configs) > 1 and line.endswith("left") else ""
    return f"stage {config.stage.id}  {line}{of_several}"


def describe(steps: Sequence[dict[str, Any]], total: int) -> str:
    """Where a run stands, as ``120/500  loss 2.314  35,120 tokens/s  2 min 35 s left``.

    Args:
        steps: the last lines of its metrics, at least one.
        total: steps of the stage.
    """
    last = steps[-1]
    parts = [f"{last.get('step', 0)}/{total}"]
    if isinstance(last.get("loss"), int | float):
        parts.append(f"loss {last['loss']:.4g}")
    if isinstance(last.get("tokens_per_s"), int | float):
        parts.append(f"{last['tokens_per_s']:,.0f} tokens/s")
    left = seconds_left(steps, total)
    if left:
        parts.append(f"{duration(left)} left")
    return "  ".join(parts)


def seconds_left(steps: Sequence[dict[str, Any]], total: int) -> float | None:
    """Time for the steps to come at the pace of the last ones; None where no pace is known."""
    durations = [s["step_s"] for s in steps[-20:] if isinstance(s.get("step_s"), int | float) and isfinite(s["step_s"])]
    if not durations:
        return None
    return max(0, total - int(steps[-1].get("step", 0))) * sum(durations) / len(durations)


def duration(seconds: float) -> str:
    """Two units at most: ``40 s``, ``2 min 35 s``, ``3 h 12 min``, ``4 d 3 h``."""
    left = max(0, round(seconds))
    units = [("d", 86_400), ("h", 3_600), ("min", 60), ("s", 1)]
    for i, (name, size) in enumerate(units):
        if left >= size or size == 1:
            text = f"{left // size} {name}"
            rest = left % size // units[i + 1][1] if size > 1 else 0
            return f"{text} {rest} {units[i + 1][0]}" if rest else text
    return ""


@dataclass
class Display:
    """Shows one changing line: in place on a terminal, elsewhere as a new line every ten seconds."""

    out: TextIO
    shown: str = ""
    shown_at: float = field(default=0.0)

    def show(self, line: str) -> None:
        """Show the state of now."""
        if line == self.shown:
            return
        if self.out.isatty():
            print(f"\r{line}\x1b[K", end="", file=self.out, flush=True)
        elif time.monotonic() - self.shown_at < _LINE_EVERY_S and self.shown:
            return
        else:
            print(line, file=self.out, flush=True)
        self.shown, self.shown_at = line, time.monotonic()

    def end(self, line: str) -> None:
        """Show the last line and leave it."""
        if self.out.isatty():
            print(f"\r{line}\x1b[K", file=self.out, flush=True)
        elif line != self.shown:
            print(line, file=self.out, flush=True)


def _metrics(config: Config) -> Path:
    return Path(config.run_dir) / "metrics.jsonl"
