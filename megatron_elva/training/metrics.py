"""`metrics.jsonl` and the progress line."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType


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
        data_wait_s: seconds the step waited for data.
        step_s: seconds of the step, data included.
        skipped_samples: samples of this step that were bad: replaced, or left out.
        pack_fill: share of the token budget that the packs of the step used; None without a budget.
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
    pack_fill: float | None = None


class MetricsWriter:
    """Appends one line a step and flushes it. A number that is not finite is written as null: JSON has no other."""

    def __init__(self, path: Path) -> None:
        torn = path.is_file() and path.stat().st_size > 0 and not path.read_bytes().endswith(b"\n")
        self._file = path.open("a")
        if torn:
            self._file.write("\n")  # what a killed run left of its last line must not spoil the next one

    def write(self, metrics: StepMetrics) -> None:
        """Append a line."""
        fields = asdict(metrics)
        finite = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in fields.items()}
        self._file.write(json.dumps(finite) + "\n")
        self._file.flush()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()


def progress_line(metrics: StepMetrics, steps: int) -> str:
    """One line for people: where training is, how it goes, how long it takes."""
    left = int((steps - metrics.step) * metrics.step_s)
    kept = metrics.visual_tokens_out / metrics.visual_tokens_in if metrics.visual_tokens_in else 1.0
    merged = f"  visual tokens kept {kept:.0%}" if kept < 1 else ""
    skipped = f"  skipped {metrics.skipped_samples}" if metrics.skipped_samples else ""
    return (
        f"stage {metrics.stage}  step {metrics.step}/{steps}  loss {metrics.loss:.3f}  "
        f"grad {metrics.grad_norm:.2f}  lr {metrics.lr:.2e}  {metrics.tokens_per_s:,.0f} tokens/s  "
        f"{metrics.step_s:.2f} s/step  left {left // 60}:{left % 60:02d}{merged}{skipped}"
    )
