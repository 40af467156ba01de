"""What each task of a job does: meet the other ranks, then train."""

from __future__ import annotations

import os
from dataclasses import dataclass

from submitit.core.utils import DelayedSubmission
from submitit.helpers import TorchDistributedEnvironment

LOOPBACK = "127.0.0.1"


@dataclass
class TrainJob:
    """One job: its stages one after another in the same processes.

    It holds paths and no state. Where training stands is found on disk at every start, so that a requeue by Slurm,
    which reloads this very object, resumes as well as one by submitit.

    Attributes:
        config_paths: resolved configs, one for each stage.
        local_port: a free port on this machine where all ranks are on it; None: the first node of the allocation and
            a port from the job's number.
    """

    config_paths: list[str]
    local_port: int | None = None

    def __call__(self) -> None:
        """Run in each task."""
        self.meet()
        from megatron_elva.training.train import run_stages  # late: the launcher itself needs no torch

        run_stages(self.config_paths)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit on rank 0 before the time limit or preemption: start again as it is."""
        return DelayedSubmission(self)

    def meet(self) -> None:
        """Set MASTER_ADDR, MASTER_PORT, RANK, WORLD_SIZE, LOCAL_RANK and LOCAL_WORLD_SIZE."""
        if self.local_port is not None:
            os.environ["MASTER_PORT"] = str(self.local_port)
        # every task sees all GPUs of its node; LOCAL_RANK says which is its own
        TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
        if self.local_port is not None:
            os.environ["MASTER_ADDR"] = LOOPBACK  # a laptop's own name need not resolve
