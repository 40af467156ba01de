"""What a step did and how long it took: this rank's share of each number, and the line that their sums make.

Every second of the first rank's loop belongs to one line of the metrics: a line's time begins where the time of the
line before ended. It has four parts, and they sum to it: waiting for data, computing, being held up by saves, the rest.

All counts travel in the step's one sum over ranks. The wait for data does too, in one place for each replica, which
only its reading rank fills: so the sum tells the longest wait, which is the one that the step waited.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from megatron_elva.config.schema import Config
from megatron_elva.parallel.engine import StepResult
from megatron_elva.parallel.ranks import Ranks
from megatron_elva.training.data import StepCounts
from megatron_elva.training.flops import CONVENTION, layer_groups_flops, peak_tflops
from megatron_elva.training.metrics import UNITS, StepMetrics
from megatron_elva.training.runs import write_atomic

Part = Literal["data", "compute", "checkpoint"]

META = "metrics.meta.json"
"""What the numbers in a run's metrics mean, in its directory."""

MFU_CONVENTION = (
    "mfu = tflops_per_gpu / peak_tflops, the device's dense peak in bf16, with FP8 layers in FP8; "
    "tflops_per_gpu = flops_per_gpu / step_s, so that waiting for data and for saves lowers it"
)

_WAIT = "wait_"  # and the number of a replica


@dataclass(frozen=True)
class StepTimes:
    """Seconds of one rank between two lines of the metrics.

    Attributes:
        data: getting the step's packs to where they are needed.
        compute: forward, backward, optimizer and the sum over ranks, in which a rank waits for slower ones.
        checkpoint: held up by saves.
        whole: all of it.
        ended: when, in seconds since 1970.
    """

    data: float
    compute: float
    checkpoint: float
    whole: float
    ended: float


class StepClock:
    """Measures the parts of a step, one after another.

    Args:
        clock: seconds from any origin that never go back.
        wall: seconds since 1970.
    """

    def __init__(self, clock: Callable[[], float] = time.perf_counter, wall: Callable[[], float] = time.time) -> None:
        self._clock, self._wall = clock, wall
        self._open = False
        self.begin()

    def begin(self) -> None:
        """Forget what was measured: the first step begins now."""
        self._since = self._clock()
        self._spent: dict[Part, float] = {"data": 0.0, "compute": 0.0, "checkpoint": 0.0}

    @contextmanager
    def part(self, name: Part) -> Iterator[None]:
        """What runs inside belongs to a part of the step, also where it fails. A part may come several times.

        Raises:
            RuntimeError: within another part, as seconds would count twice.
        """
        if self._open:
            raise RuntimeError(f"part {name} of a step begins within another one")
        self._open, since = True, self._clock()
        try:
            yield
        finally:
            self._spent[name] += self._clock() - since
            self._open = False

    def spent(self, name: Part) -> float:
        """Seconds of a part in this step so far."""
        return self._spent[name]

    def end(self) -> StepTimes:
        """The times of this step; the next one begins at the same instant, so that no time is lost between them."""
        now, spent, since = self._clock(), self._spent, self._since
        self._since, self._spent = now, dict.fromkeys(spent, 0.0)
        return StepTimes(spent["data"], spent["compute"], spent["checkpoint"], now - since, self._wall())


def collect(result: StepResult, counts: StepCounts, waited: float, config: Config, ranks: Ranks) -> dict[str, float]:
    """This rank's addends of a step by name: the same names in the same order on every rank.

    Args:
        result: of the step on this rank.
        counts: of this rank's packs, which are zero where it reads none.
        waited: seconds until this rank had its packs.
        config: the stage's config.
        ranks: this rank.
    """
    layers = 3 * layer_groups_flops(config.model, result.layers) if ranks.tensor == 0 else 0.0
    values: dict[str, float] = {
        "loss_sum": result.loss_sum,
        "loss_tokens": result.loss_tokens,
        "samples": counts.samples,
        "packed": counts.packed,
        "skipped": counts.skipped,
        "listed": counts.listed,
        "tokens": counts.tokens,
        "visual": counts.visual_tokens,
        "visual_left": result.visual_tokens,
        "frames": counts.frames,
        "video_bytes": counts.video_bytes,
        "flops": counts.flops + layers,
        "packs": counts.packs,
    }
    for replica in range(ranks.data_size):
        values[f"{_WAIT}{replica}"] = waited if ranks.is_reader and replica == ranks.data else 0.0
    return values


def step_metrics(
    config: Config,
    world: int,
    device_name: str,
    totals: Mapping[str, float],
    times: StepTimes,
    step: int,
    samples: int,
    share: float,
    grad_norm: float,
) -> StepMetrics:
    """The line of a step.

    A step waits for the replica whose packs come last. What the first rank waited less than that, it waited in its
    collectives, so those seconds are moved from computing to data.

    Args:
        config: the stage's config.
        world: number of ranks.
        device_name: as torch names it, or ``cpu``.
        totals: sums over all ranks of what `collect` gave.
        times: of the first rank.
        step: steps done, this one included.
        samples: samples drawn since the start of the stage, this step's included.
        share: of the full learning rate.
        grad_norm: of the whole gradient.
    """
    seconds = times.whole
    data = min(max(totals[k] for k in totals if k.startswith(_WAIT)), times.data + times.compute)
    compute = times.data + times.compute - data
    loss = totals["loss_sum"] / totals["loss_tokens"] if totals["loss_tokens"] else math.nan
    tokens_out = totals["tokens"] - totals["visual"] + totals["visual_left"]
    flops = totals["flops"] / world
    tflops = flops / seconds / 1e12
    peak = peak_tflops(device_name, config.precision.fp8 is not None)
    return StepMetrics(
        step=step,
        stage=config.stage.id,
        samples=samples,
        loss=loss,
        loss_gen=loss,
        loss_mse=None,
        loss_con=None,
        grad_norm=grad_norm,
        lr=share * config.train.lr,
        visual_tokens_in=int(totals["visual"]),
        visual_tokens_out=int(totals["visual_left"]),
        tokens_per_s=totals["tokens"] / seconds,
        tflops_per_gpu=tflops,
        mfu=None if peak is None else tflops / peak,
        data_wait_s=data,
        step_s=seconds,
        skipped_samples=int(totals["skipped"]),
        pack_fill=totals["tokens"] / (budget * totals["packs"]) if (budget := config.data.pack_tokens) else None,
        time=times.ended,
        tokens=int(totals["tokens"]),
        tokens_out=int(tokens_out),
        tokens_out_per_s=tokens_out / seconds,
        samples_per_s=totals["packed"] / seconds,
        frames=int(totals["frames"]),
        frames_per_s=totals["frames"] / seconds,
        video_bytes=int(totals["video_bytes"]),
        bytes_per_s=totals["video_bytes"] / seconds,
        flops_per_gpu=flops,
        compute_s=compute,
        checkpoint_s=times.checkpoint,
        other_s=seconds - data - compute - times.checkpoint,
    )


def write_meta(run: Path, config: Config, world: int, device_name: str, step: int) -> None:
    """Write beside the metrics what they are measured in and against: units, conventions, devices and their peak.

    A run may go on with other devices or on another layout: each entry of ``starts`` holds for the lines behind its
    step, up to the next one.

    Args:
        run: its directory.
        config: the stage's config.
        world: number of ranks.
        device_name: as torch names it, or ``cpu``.
        step: steps done.
    """
    parallel, precision = config.parallel, config.precision
    now = {
        "ranks": world,
        "tensor": parallel.tensor,
        "pipeline": parallel.pipeline,
        "data": world // (parallel.tensor * parallel.pipeline),
        "device": device_name,
        "precision": precision.name,
        "peak_tflops": peak_tflops(device_name, precision.fp8 is not None),
        "merging": asdict(config.merging),
    }
    starts = _starts(run / META)
    if not starts or {k: v for k, v in starts[-1].items() if k != "behind_step"} != now:
        starts.append({"behind_step": step, **now})
    about = {"units": UNITS, "flops": CONVENTION, "mfu": MFU_CONVENTION, "starts": starts}
    write_atomic(run / META, json.dumps(about, indent=1) + "\n")


def _starts(path: Path) -> list[dict[str, Any]]:
    """What an earlier start has written; nothing where it cannot be read."""
    try:
        found = json.loads(path.read_text())["starts"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return [entry for entry in found if isinstance(entry, dict)] if isinstance(found, list) else []
