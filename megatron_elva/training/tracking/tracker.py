"""The trainer's side of tracking: starts the process that sends, and tells it the end. Standard library only."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import time
from pathlib import Path

from megatron_elva.config.schema import Config
from megatron_elva.training.stop import held_back

SENDER = "megatron_elva.training.tracking.sender"
_ROOT = Path(__file__).resolve().parents[3]


class Tracker:
    """Tracking of one stage, as every rank of the trainer sees it.

    The first local rank of each node has a process beside it; that of the node with rank 0 sends to MLflow, the others
    only sample their machine. Nothing here raises: training goes on without tracking where that cannot start.

    Args:
        config: the stage; its `config.yaml` is in the run directory.
        rank: of this process.
        local_rank: of this process on its node.
        node: number of the node within the job.
        world: ranks of the job.
    """

    def __init__(self, config: Config, rank: int, local_rank: int, node: int, world: int) -> None:
        self._config = config
        self._node = node
        self._world = world
        self._sends = rank == 0
        samples = config.tracking.system_every_s > 0
        self._wanted = config.tracking.mlflow and local_rank == 0 and (self._sends or samples)
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the process; returns at once."""
        if not self._wanted or self._process is not None:
            return
        run = Path(self._config.run_dir).absolute()
        command = [sys.executable, "-P", "-m", SENDER, str(run), "--node", str(self._node)]
        command += ["--parent", str(os.getpid()), "--world", str(self._world), *(["--send"] if self._sends else [])]
        try:
            (run / "logs").mkdir(parents=True, exist_ok=True)
            with (run / "logs" / f"tracking_{self._node}.log").open("ab") as log, held_back():
                self._process = subprocess.Popen(
                    command, stdin=subprocess.PIPE, stdout=log, stderr=log, env=_environment(), start_new_session=True
                )
        except OSError as error:
            print(f"tracking: did not start: {error}", file=sys.stderr, flush=True)

    def finish(self, reason: str, wait_s: float | None = None) -> None:
        """Tell the end, and wait until everything is sent.

        Args:
            reason: an outcome of `logs/attempts.jsonl` (``done``, ``requeue``, ``stopped``, ``failed`` ...).
            wait_s: seconds at most; None: `tracking.flush_s`.
        """
        process, self._process = self._process, None
        if process is None or process.stdin is None:
            return
        with contextlib.suppress(OSError):  # it may have ended long ago
            process.stdin.write(f"finish {reason}\n".encode())
            process.stdin.close()
        began = time.monotonic()
        try:
            process.wait(self._config.tracking.flush_s if wait_s is None else wait_s)
        except subprocess.TimeoutExpired:
            process.kill()  # what is not sent stands in the run directory, and how far sending came
            process.wait()
        if process.returncode and self._sends:
            print(
                f"tracking: not all is sent after {time.monotonic() - began:.0f} s, see "
                f"{self._config.run_dir}/logs/tracking_{self._node}.log; the rest goes when the run is next started, "
                f"or with: python -m {SENDER} {self._config.run_dir} --once",
                file=sys.stderr,
                flush=True,
            )


def _environment() -> dict[str, str]:
    """This process's, with one thread for each pool, and the code that runs here first on the path."""
    path = os.pathsep.join(filter(None, [str(_ROOT), os.environ.get("PYTHONPATH", "")]))
    return {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"}
