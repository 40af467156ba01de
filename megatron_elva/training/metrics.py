"""`metrics.jsonl` and the progress line."""

from __future__ import annotations

import json
import math
import os
from collections import deque
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import fmean
from types import TracebackType

UNITS = {
    "step": "steps",
    "stage": "1, 2 or 3",
    "samples": "samples",
    "loss": "nats a token",
    "loss_gen": "nats a token",
    "loss_mse": "1",
    "loss_con": "nats",
    "grad_norm": "1",
    "lr": "1",
    "visual_tokens_in": "tokens",
    "visual_tokens_out": "tokens",
    "tokens_per_s": "tokens/s",
    "tflops_per_gpu": "1e12 operations/s of one rank",
    "mfu": "share, 0 to 1",
    "data_wait_s": "s",
    "step_s": "s",
    "skipped_samples": "samples",
    "pack_fill": "share, 0 to 1",
    "time": "s since 1970",
    "tokens": "tokens",
    "tokens_out": "tokens",
    "tokens_out_per_s": "tokens/s",
    "samples_per_s": "samples/s",
    "frames": "frames",
    "frames_per_s": "frames/s",
    "video_bytes": "bytes",
    "bytes_per_s": "bytes/s",
    "flops_per_gpu": "operations of one rank",
    "compute_s": "s",
    "checkpoint_s": "s",
    "other_s": "s",
}
"""What each number of a line is measured in."""

_PACE_STEPS = 50  # over which the time of a step is averaged, to tell how much is left


@dataclass(frozen=True)
class StepMetrics:
    """One line of `metrics.jsonl`; None where a field does not apply.

    Attributes:
        step: optimizer steps done in this stage.
        stage: 1, 2 or 3.
        samples: samples drawn since the start of the stage, the skipped ones included.
        loss: what was minimised.
        loss_gen: mean next-token loss over the step's target tokens.
        loss_mse: tube-wise guidance.
        loss_con: frame-wise guidance.
        grad_norm: norm of the whole gradient before clipping.
        lr: learning rate of the language model.
        visual_tokens_in: visual tokens at the input (cells, FRAME, LINE), all ranks.
        visual_tokens_out: visual tokens left after the last merge point (or after pooling).
        tokens_per_s: tokens of all packs (padding not counted) in a second.
        tflops_per_gpu: model TFLOP/s of one rank (convention: flops.py).
        mfu: share of the device's dense peak.
        data_wait_s: seconds the step waited for data, on the replica that waited longest.
        step_s: seconds since the line before, of the first rank.
        skipped_samples: samples of this step that were bad: replaced, or left out.
        pack_fill: share of the token budget that the packs of the step used; None without a budget.
        time: when the step ended, in seconds since 1970.
        tokens: tokens of all packs, padding not counted.
        tokens_out: those left after the last merge point (or after pooling), text included.
        tokens_out_per_s: the same in a second.
        samples_per_s: samples in the packs in a second.
        frames: video frames in the packs, before pooling; an image is one.
        frames_per_s: the same in a second.
        video_bytes: size of the encoded videos and images that the packs were made of.
        bytes_per_s: the same in a second.
        flops_per_gpu: operations of the step for each rank.
        compute_s: seconds of computing, waiting for slower ranks included.
        checkpoint_s: seconds the loop was held up by saves since the line before.
        other_s: what is left of step_s.
    """

    step: int
    stage: int
    samples: int
    loss: float
    loss_gen: float
    loss_mse: float | None
    loss_con: float | None
    grad_norm: float
    lr: float
    visual_tokens_in: int
    visual_tokens_out: int
    tokens_per_s: float
    tflops_per_gpu: float
    mfu: float | None
    data_wait_s: float
    step_s: float
    skipped_samples: int
    pack_fill: float | None
    time: float
    tokens: int
    tokens_out: int
    tokens_out_per_s: float
    samples_per_s: float
    frames: int
    frames_per_s: float
    video_bytes: int
    bytes_per_s: float
    flops_per_gpu: float
    compute_s: float
    checkpoint_s: float
    other_s: float


class MetricsWriter:
    """Appends one line a step. A number that is not finite is written as null: JSON has no other.

    What the disk does not take is kept, and written with a later line: a disk that a checkpoint has filled ends the run
    with the error of that checkpoint, or has room again.
    """

    def __init__(self, path: Path) -> None:
        torn = _is_torn(path)
        self._path, self._file = path, path.open("ab", buffering=0)
        self._unwritten, self._warned = b"", False
        self._steps = 0
        self._seconds: deque[float] = deque(maxlen=_PACE_STEPS)
        if torn:
            self._unwritten = b"\n"  # what a killed run left of its last line must not spoil the next one

    def write(self, metrics: StepMetrics) -> None:
        """Append a line."""
        fields = asdict(metrics)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        self._unwritten += json.dumps(finite).encode() + b"\n"
        self._put()
        if self._steps == 1:
            self._seconds.clear()  # the first step of a process takes longer than those to come
        self._steps += 1
        self._seconds.append(metrics.step_s)

    def _put(self) -> None:
        try:
            while self._unwritten:
                self._unwritten = self._unwritten[self._file.write(self._unwritten) :]
            self._warned = False
        except OSError as error:
            if not self._warned:
                print(f"warning: {self._path}: {os.strerror(error.errno or 0)}; its lines are kept", flush=True)
            self._warned = True

    @property
    def pace_s(self) -> float:
        """Seconds that a step took lately, saves included; 0 before the first line."""
        return fmean(self._seconds) if self._seconds else 0.0

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._put()
        self._file.close()


def _is_torn(path: Path) -> bool:
    """Whether the last line of a file has no end."""
    if not path.is_file() or not path.stat().st_size:
        return False
    with path.open("rb") as file:
        file.seek(-1, os.SEEK_END)
        return file.read() != b"\n"


def progress_line(metrics: StepMetrics, steps: int, pace_s: float) -> str:
    """One line for people: where training is, how it goes, how long it takes.

    Args:
        metrics: of the last step.
        steps: of the whole stage.
        pace_s: seconds that the steps to come are thought to take each.
    """
    minutes, seconds = divmod(int((steps - metrics.step) * pace_s), 60)
    left = f"{minutes // 60}:{minutes % 60:02d}:{seconds:02d}" if minutes >= 60 else f"{minutes}:{seconds:02d}"
    kept = metrics.visual_tokens_out / metrics.visual_tokens_in if metrics.visual_tokens_in else 1.0
    mfu = "" if metrics.mfu is None else f"  MFU {metrics.mfu:.1%}"
    merged = f"  visual tokens kept {kept:.0%}" if kept < 1 else ""
    skipped = f"  skipped {metrics.skipped_samples}" if metrics.skipped_samples else ""
    return (
        f"stage {metrics.stage}  step {metrics.step}/{steps}  loss {metrics.loss:.3f}  "
        f"grad {metrics.grad_norm:.2f}  lr {metrics.lr:.2e}  {metrics.tokens_per_s:,.0f} tokens/s  "
        f"{metrics.samples_per_s:,.1f} samples/s  {metrics.step_s:.2f} s/step  left {left}{mfu}{merged}{skipped}"
    )
