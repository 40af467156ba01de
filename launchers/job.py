"""What each task of a job does: record the attempt, meet the other ranks, train, and say how it ended."""

from __future__ import annotations

import errno
import os
import re
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from submitit.core.utils import DelayedSubmission
from submitit.helpers import TorchDistributedEnvironment
from submitit.slurm.slurm import SlurmJobEnvironment

from launchers import network
from megatron_elva.config.build import load
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config
from megatron_elva.training import attempts, runs

LOST_PEER = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "remote process exited")
"""What gloo and NCCL say on a rank whose peer has failed: never the cause."""
_ADDRESS = re.compile(r"by peer \[?([0-9a-fA-F.:]+?)\]?:\d+")
_CAUSE_S = 2.0
"""How long such a rank waits before it reports: the one with the cause is to be first."""
_BEGIN_S = 10.0
_LOCK_S = 120
"""How long a job that was requeued waits for the lock besides: file servers keep that of a dead node for a while."""


@dataclass
class TrainJob:
    """One job: its stages one after another in the same processes.

    It holds paths and no state. Where training stands is found on disk at every start, so that a requeue by Slurm,
    which reloads this very object, resumes as well as one by the batch script.

    Attributes:
        config_paths: resolved configs, one for each stage.
        local_port: a free port on this machine where all ranks are on it; None: the first node of the allocation and
            a port from the job's number.
    """

    config_paths: list[str]
    local_port: int | None = None

    def __call__(self) -> None:
        """Run in each task.

        Raises:
            SystemExit: the exit code that the batch script and srun judge by; 2 for what was refused.
        """
        alone = "SUBMITIT_DEBUG_JOB_ID" in os.environ
        if not alone:
            _let_signals_end()
        configs = [load(path) for path in self.config_paths]
        folders = [Path(config.run_dir) for config in configs]
        rank = _rank()
        try:
            if rank == 0:
                _begin(configs)
            self.meet(configs[0].cluster.interface)
            if configs[0].device == "cpu":
                from megatron_elva.parallel.cpu import import_without_compiler  # late: the launcher needs no torch

                import_without_compiler()
            with _full_disk_refused(folders):
                self.work()
        except (ConfigError, InputError) as error:
            _wait_for_begin(folders, rank)
            _end(folders, "refused", str(error))
            if alone:
                raise  # the launcher itself prints it
            print(f"error: {error}", file=sys.stderr, flush=True)
            raise SystemExit(attempts.REFUSED_CODE) from error
        except Exception as error:
            _failed(folders, rank, error)
            raise
        except KeyboardInterrupt:
            _end(folders, "stopped", "interrupted")
            raise
        if rank == 0:
            _end(folders, "done", "")

    def work(self) -> None:
        """Train."""
        from megatron_elva.training.train import run_stages  # late: the launcher itself needs no torch

        run_stages(self.config_paths)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit for a signal that comes before this object is called: start again as it is."""
        return DelayedSubmission(self)

    def meet(self, interface: str | None = None) -> None:
        """Set MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE and the network's interface.

        Args:
            interface: ``cluster.interface``; None: the one with a route to the other nodes.

        Raises:
            InputError: the interface is not there, or the first node's name does not resolve.
        """
        # every task sees all GPUs of its node; LOCAL_RANK says which is its own
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if self.local_port is not None:
            os.environ["MASTER_ADDR"] = network.LOOPBACK  # a laptop's own name need not resolve
            os.environ["MASTER_PORT"] = str(self.local_port)
            if interface is not None:
                network.export([network.LOOPBACK], 0, interface)
            return
        slurm = SlurmJobEnvironment()
        os.environ["MASTER_ADDR"] = network.master_address(slurm.hostnames, os.environ)
        os.environ["MASTER_PORT"] = str(network.master_port(os.environ))
        network.export(slurm.hostnames, slurm.node, interface)


@contextmanager
def _full_disk_refused(folders: Sequence[Path]) -> Iterator[None]:
    """A disk without room is the same at the next start, whatever was being written.

    Raises:
        InputError: it is full.
    """
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise
        last = next((found[-1].path for folder in reversed(folders) if (found := runs.checkpoints(folder))), "none")
        raise InputError(
            f"{error.filename or folders[-1]}: cannot be written: {error.strerror}; the last good checkpoint is {last};"
            " make room and start the same run again"
        ) from error


def _let_signals_end() -> None:
    """Until the training loop listens, a signal ends the process, and the batch script sees by which.

    submitit's own handlers would requeue the job from within the task, where a container may have no scontrol, and
    pass by SIGTERM, which then costs the whole time that Slurm waits before it kills.
    """
    for number in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)


def _rank() -> int:
    for name in ("SLURM_PROCID", "SUBMITIT_LOCAL_GLOBALID"):
        if name in os.environ:
            return int(os.environ[name])
    return 0


def _begin(configs: Sequence[Config]) -> None:
    """Record the attempt for the stage that is next, and refuse one that has failed too often already.

    Raises:
        InputError: it has.
    """
    todo = [config for config in configs if _steps_done(config) < config.train.steps] or [configs[-1]]
    run = Path(todo[0].run_dir)
    fault = todo[0].fault  # a rank 0 that was cut off lives until its watchdog ends it
    _wait_for_lock(run, _LOCK_S + (fault.step_timeout_s or fault.collective_timeout_s))
    attempts.begin(run, _steps_done(todo[0]))
    if "SLURM_JOB_ID" in os.environ:  # a local job starts because somebody has started it
        why = attempts.verdict(run, todo[0].fault.same_step, starting=True)
        if why is not None:
            raise InputError(f"run_dir={run}: not started again: {why}")


def _wait_for_lock(run: Path, seconds: float) -> None:
    """Refuse to disturb another job, but give the lock of a node that was lost its time to run out.

    Args:
        run: the run directory.
        seconds: as long as a rank 0 that was cut off from the others may live on.

    Raises:
        InputError: another job trains in this run directory.
    """
    until = time.monotonic() + (seconds if os.environ.get("SLURM_RESTART_COUNT", "0") != "0" else 0)
    while True:
        try:
            return runs.check_unlocked(run)
        except InputError:
            if time.monotonic() >= until:
                raise
            time.sleep(1)


def _steps_done(config: Config) -> int:
    found = runs.checkpoints(Path(config.run_dir))
    return found[-1].step if found else 0


def _failed(folders: Sequence[Path], rank: int, error: Exception) -> None:
    text = f"rank {rank}: {type(error).__name__}: {' '.join(str(error).split())[:500]}"
    if any(echo in str(error) for echo in LOST_PEER):
        time.sleep(_CAUSE_S)
        where = _ADDRESS.search(str(error))
        place = f" on {where.group(1)}" if where else ""
        text = f"rank {rank} lost a rank{place} that did not say why: killed, or its node is gone"
    _wait_for_begin(folders, rank)
    _end(folders, "failed", text)


def _wait_for_begin(folders: Sequence[Path], rank: int) -> None:
    """A rank that fails sooner than rank 0 has begun would find no attempt to end."""
    until = time.monotonic() + _BEGIN_S
    while rank != 0 and time.monotonic() < until and not any(map(attempts.current, folders)):
        time.sleep(0.05)


def _end(folders: Sequence[Path], outcome: str, reason: str) -> None:
    """End what is open: of several stages the one that was being trained."""
    for folder in folders:
        attempts.end(folder, outcome, reason)
