"""How long a run stood still: from the last step of the attempt before to the first new one."""

from __future__ import annotations

import json
import time
from dataclasses import dataclass
from pathlib import Path

from megatron_elva.training import attempts, runs

RECOVERIES = "recoveries.jsonl"
"""In `logs/`: one line for each break."""


@dataclass(frozen=True)
class Break:
    """A break between two attempts.

    Attributes:
        step: the last step that an earlier attempt did, the lost ones included.
        at: unix time of its end.
        resumed: step of the checkpoint from which the run goes on.
    """

    step: int
    at: float
    resumed: int

    @classmethod
    def of(cls, run: Path) -> Break | None:
        """The break that a run directory shows before this attempt writes to it; None at a first start."""
        last = attempts.newest(run / runs.METRICS)
        if not isinstance(last.get("time"), int | float) or "step" not in last:
            return None
        found = runs.checkpoints(run)
        return cls(last["step"], float(last["time"]), found[-1].step if found else 0)

    def ended(self, run: Path, step: int) -> str:
        """Record that the run goes on. Returns a line for people.

        Args:
            run: the run directory.
            step: the first new step, which is done.
        """
        seconds, again = time.time() - self.at, max(0, self.step - self.resumed)
        record = {"step": step, "last_step": self.step, "done_again": again, "seconds": round(seconds, 3)}
        path = run / "logs" / RECOVERIES
        try:
            with path.open("a") as file:
                file.write(json.dumps({"time": time.time(), **record}) + "\n")
        except OSError as error:  # not worth a run
            print(f"warning: {path}: {error}", flush=True)
        return (
            f"recovered in {seconds:.1f} s, from the end of step {self.step} in the attempt before to that of step "
            f"{step} in this one; steps done again: {again}"
        )
