"""A picture of a run's curves, drawn without a screen."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from megatron_elva.training.tracking.lines import read_lines

_MOST = 4000
_PANELS = (
    ("loss", "loss", False),
    ("grad_norm", "gradient norm", True),
    ("lr", "learning rate", False),
    ("kept", "visual tokens kept", False),
    ("tokens_per_s", "tokens / s", False),
)
"""Field, title, whether its axis is logarithmic."""


class Curves:
    """The numbers of a growing `metrics.jsonl`, thinned so that a long run stays small.

    Args:
        path: the file.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._offset = 0
        self._every = 1
        self._rows: dict[int, tuple[float, ...]] = {}

    def update(self) -> bool:
        """Read what is new. Returns whether there was anything."""
        before = self._offset
        for line, offset in read_lines(self._path, self._offset):
            self._offset = offset
            if line and line["step"] % self._every == 0:
                self._rows[line["step"]] = _row(line)  # of a step that was done twice the last one counts
            if len(self._rows) > _MOST:
                self._every *= 2
                self._rows = {step: row for step, row in self._rows.items() if step % self._every == 0}
        return self._offset != before

    def draw(self, path: Path, title: str) -> None:
        """Write the picture as PNG; it is there as a whole or not at all."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure

        steps = sorted(self._rows)
        figure = Figure(figsize=(9, 11), layout="constrained")
        FigureCanvasAgg(figure)
        axes = figure.subplots(len(_PANELS), 1, sharex=True, height_ratios=[2, 1, 1, 1, 1])
        for i, (axis, (_, name, logarithmic)) in enumerate(zip(axes, _PANELS, strict=True)):
            values = [self._rows[step][i] for step in steps]
            axis.plot(steps, values, linewidth=1.2, color=f"C{i}", marker="." if len(steps) < 60 else None)
            axis.set_ylabel(name)
            axis.grid(alpha=0.3)
            if logarithmic and any(value > 0 for value in values):
                axis.set_yscale("log")
        axes[0].set_title(title)
        axes[-1].set_xlabel("step")
        part = path.with_name(f".{path.name}.part")
        figure.savefig(part, format="png", dpi=90)
        part.replace(path)


def _row(line: dict[str, Any]) -> tuple[float, ...]:
    kept = line["visual_tokens_out"] / line["visual_tokens_in"] if line.get("visual_tokens_in") else None
    fields = {**line, "kept": kept}
    return tuple(math.nan if fields.get(key) is None else float(fields[key]) for key, _, _ in _PANELS)
