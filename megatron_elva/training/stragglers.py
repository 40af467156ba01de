"""Names the rank that the others wait for.

All ranks of a step take equally long, as they wait for the slowest in its collectives. What differs is the time that a
rank spends on its own, which the watchdog samples. Ranks of one pipeline rank have the same layers and the same number
of packs to compute, so a rank is compared with those; only where it is alone there, with all.

On a GPU the main thread launches kernels and runs ahead of them; waiting for the device counts as waiting where the
thread stands at a copy to the host or a synchronisation. Where it cannot launch because too much is queued, and in a
backward pass, which another thread launches, it counts as the rank's own. Own time then is about that of the host: slow
Python, slow data, a busy or throttled CPU. It does not say that a GPU is slow, as all ranks wait for it alike. For that
a fixed matrix product is timed on each GPU.
"""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median_low
from typing import Any

import torch
import torch.distributed as dist

from megatron_elva.parallel.ranks import Ranks
from megatron_elva.training.watchdog import TICK_S

LOG = "ranks.jsonl"
LEAST = 0.05
"""Share of a step that a rank must be slower than its peers before it is named; more after few samples."""
PROBE_SIZE = 4096
PROBE_RUNS = 8


@dataclass(frozen=True)
class RankTimes:
    """What one rank took.

    Attributes:
        rank: global rank.
        host: where it runs.
        tensor: its tensor rank.
        pipeline: its pipeline rank.
        data: its replica.
        own_s: seconds of a step outside collectives.
        wall_s: seconds of a step.
        device_s: seconds of the fixed matrix product; None on a CPU.
    """

    rank: int
    host: str
    tensor: int
    pipeline: int
    data: int
    own_s: float
    wall_s: float
    device_s: float | None = None


def compare(
    own_seconds_per_step: float,
    wall_per_step: float,
    ranks: Ranks,
    run: Path,
    step: int,
    ratio: float,
    steps: int | None = None,
) -> str | None:
    """Compare the ranks' own time; call it on all ranks.

    Appends a line to ``logs/ranks.jsonl``.

    Args:
        own_seconds_per_step: this rank's, mean since the last comparison.
        wall_per_step: seconds of a step, likewise.
        ranks: this rank.
        run: the run directory.
        step: steps done.
        ratio: a rank is named above this many times the median of its peers.
        steps: since the last comparison; own time is sampled, so that few short ones say little. None: enough.

    Returns:
        On the first rank the line that names the slowest rank, if one is too slow; else None.
    """
    own = RankTimes(
        ranks.rank,
        socket.gethostname(),
        ranks.tensor,
        ranks.pipeline,
        ranks.data,
        own_seconds_per_step,
        wall_per_step,
        probe(ranks.device) if ranks.device.type == "cuda" else None,
    )
    everyone: list[Any] | None = [None] * ranks.world if ranks.rank == 0 else None
    dist.gather_object(own, everyone, dst=0)
    if everyone is None:
        return None
    _write(run / "logs" / LOG, step, everyone)
    samples = math.inf if steps is None else steps * wall_per_step / TICK_S
    return slowest(everyone, ratio, samples)


def slowest(times: Sequence[RankTimes], ratio: float, samples: float = math.inf) -> str | None:
    """The line that names the rank furthest above its peers, None where none is above `ratio` times their median.

    Args:
        times: of all ranks.
        ratio: see `compare`.
        samples: what each own time is made of; a difference within their noise is none.
    """
    least = max(LEAST, 3.0 / math.sqrt(max(samples, 1.0)))  # 4 standard deviations of the difference of two shares
    found: list[tuple[float, str]] = []
    for one in times:
        usual = median_low([t.own_s for t in _peers(one, times)])
        if one.own_s > ratio * usual and one.own_s - usual > least * one.wall_s:
            found.append((one.own_s - usual, _line(one, "of its own in each step", one.own_s, usual, one.wall_s)))
        if one.device_s is not None:
            usual = median_low([t.device_s for t in times if t.device_s is not None])
            if one.device_s > ratio * usual:
                lost = (1 - usual / one.device_s) * one.wall_s
                found.append((lost, _line(one, "for a matrix product on its GPU", one.device_s, usual, one.wall_s)))
    return max(found)[1] if found else None


def _peers(one: RankTimes, times: Sequence[RankTimes]) -> list[RankTimes]:
    """Those with the same layers, itself included; all where there is nobody else."""
    same = [t for t in times if t.pipeline == one.pipeline]
    return same if len(same) > 1 else list(times)


def _line(one: RankTimes, what: str, seconds: float, usual: float, wall: float) -> str:
    place = f"tensor {one.tensor}, pipeline {one.pipeline}, replica {one.data}"
    times = f", {seconds / usual:.1f} times as long as its peers" if usual > 0 else ""
    return (
        f"slow rank: {one.rank} on {one.host} ({place}) took {seconds:.3g} s {what}{times}; a step takes {wall:.3g} s"
    )


def _write(path: Path, step: int, times: Sequence[RankTimes]) -> None:
    record = {"step": step, "time": time.time(), "ranks": [asdict(t) for t in times]}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a") as f:
            f.write(json.dumps(record) + "\n")
    except OSError as error:  # not worth a run
        print(f"warning: {path}: {error}", flush=True)


def probe(device: torch.device) -> float:
    """Seconds of a fixed matrix product on a GPU: tells a slow GPU, which no host clock does.

    Waits for the device. It has not run in the tests of this project, which have no GPU.
    """
    a = torch.ones(PROBE_SIZE, PROBE_SIZE, dtype=torch.bfloat16, device=device)
    out = torch.empty_like(a)
    torch.mm(a, a, out=out)  # the first one is slower
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(PROBE_RUNS):
        torch.mm(a, a, out=out)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1000 / PROBE_RUNS
