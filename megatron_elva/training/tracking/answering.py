"""Starts `answers.py` for fresh checkpoints, one at a time."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_elva.config.schema import Config
from megatron_elva.training.runs import checkpoints

ANSWERS = "megatron_elva.training.tracking.answers"


class Answering:
    """Has the newest checkpoint asked whenever `tracking.answers_every` steps are done.

    Where asking takes longer than that, checkpoints are left out. Where one cannot be asked, the log says why, and
    the next one is.

    Args:
        run: the run directory.
        config: its config.
    """

    def __init__(self, run: Path, config: Config) -> None:
        self._run = run
        self._every = config.tracking.answers_every
        self._tried = 0
        self._process: subprocess.Popen[bytes] | None = None

    def go_on(self) -> None:
        """Start asking where there is a checkpoint to ask and nothing is being asked."""
        if not self._every or (self._process is not None and self._process.poll() is None):
            return
        due = [c.step for c in checkpoints(self._run) if c.step % self._every == 0 and c.step > self._tried]
        if not due or (self._run / "answers" / f"step_{due[-1]}.jsonl").is_file():
            return
        self._tried = due[-1]
        command = [sys.executable, "-P", "-m", ANSWERS, str(self._run), "--step", str(self._tried)]
        environment = {**os.environ, "CUDA_VISIBLE_DEVICES": ""}
        environment.pop("OMP_NUM_THREADS", None)  # answers.py takes some of the cores that it may use
        self._process = subprocess.Popen([*command, "--parent", str(os.getpid())], env=environment)

    def last(self, until: float) -> bool:
        """Have the newest checkpoint asked, up to a time of the monotonic clock. Returns whether answers have come."""
        came = self._wait(until)
        self.go_on()
        return self._wait(until) or came

    def _wait(self, until: float) -> bool:
        if self._process is None:
            return False
        try:
            return self._process.wait(max(0.0, until - time.monotonic())) == 0
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            return False
