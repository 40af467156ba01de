"""From the lines of `metrics.jsonl` and `mlflow/system_K.jsonl` to points of MLflow's curves."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

BATCH = 1000
"""Points in one request; MLflow takes no more."""
BY_SAMPLES = ("loss", "grad_norm", "lr", "tokens_per_s", "mfu")
"""Shown over samples as well as over steps."""

_AT_ONCE = 1 << 20
_NOT_CURVES = {"step", "time", "stage"}
_NO_KEY = re.compile(r"[^\w\-./ :]")


class Point(NamedTuple):
    """One value of a curve; `timestamp` in milliseconds since 1970."""

    key: str
    value: float
    timestamp: int
    step: int


def read_lines(path: Path, offset: int) -> Iterator[tuple[dict[str, Any], int]]:
    """The complete lines behind an offset, each with the offset behind it. Torn lines come as empty ones.

    A file that is shorter than the offset was written anew and is read from its start.
    """
    try:
        file = path.open("rb")
    except OSError:
        return
    with file:
        if offset > path.stat().st_size:
            offset = 0
        file.seek(offset)
        rest = b""
        while chunk := file.read(_AT_ONCE):
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                offset += len(line) + 1
                yield _parsed(line), offset


def _parsed(line: bytes) -> dict[str, Any]:
    try:
        found = json.loads(line)
    except ValueError:
        return {}
    return found if isinstance(found, dict) and isinstance(found.get("step"), int) else {}


def valid_key(key: str) -> str:
    """A key with the characters that MLflow takes."""
    return _NO_KEY.sub("_", key)[:250]


def training_points(line: dict[str, Any], started: int) -> list[Point]:
    """The points of one step.

    Args:
        line: of `metrics.jsonl`.
        started: when the run began, in milliseconds since 1970; counts for lines that do not say their time. The same
            line must give the same points whenever it is read, or sending it twice would show.
    """
    if not line:
        return []
    timed = _is_number(line.get("time"))
    step, timestamp = line["step"], int(1000 * line["time"]) if timed else started + line["step"]
    numbers = {key: value for key, value in line.items() if key not in _NOT_CURVES and _is_number(value)}
    points = [Point(valid_key(key), float(value), timestamp, step) for key, value in numbers.items()]
    samples = line.get("samples")
    if isinstance(samples, int):
        chosen = [key for key in BY_SAMPLES if key in numbers]
        points += [Point(f"by_samples/{key}", float(numbers[key]), timestamp, samples) for key in chosen]
    return points


def system_points(line: dict[str, Any], node: str) -> list[Point]:
    """The points of one sample of a node's machine."""
    if not line or not _is_number(line.get("time")):
        return []
    numbers = {key: value for key, value in line.items() if key not in _NOT_CURVES and _is_number(value)}
    timestamp = int(1000 * line["time"])
    return [Point(valid_key(f"system/node_{node}/{k}"), float(v), timestamp, line["step"]) for k, v in numbers.items()]


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
