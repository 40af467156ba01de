"""What the tests have the ranks do: training with time to strike, faults from within, or no training at all.

The nodes cannot import this file: it goes to them by value, inside the job.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cloudpickle

from launchers.job import TrainJob

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@dataclass
class PacedJob(TrainJob):
    """Trains with a pause before every step.

    Attributes:
        pause_s: seconds of the pause.
        paced: in the first so many attempts alone.
        fault: what one rank does before a step, ``hang`` or ``raise``; or ``slow_marker``, which on every rank takes a
            minute between the last byte of that step's checkpoint and its marker. Empty: nothing.
        at: the step.
        rank: the rank.
        attempts: in the first so many attempts alone.
    """

    pause_s: float = 0.0
    paced: int = 99
    fault: str = ""
    at: int = 0
    rank: int = 0
    attempts: int = 1

    def work(self) -> None:
        """Train."""
        from megatron_elva.training import runs
        from megatron_elva.training.data import StepReader

        read, mark = StepReader.next_step, runs.write_marker
        restart = int(os.environ.get("SLURM_RESTART_COUNT", "0"))
        faulty, pause_s = restart < self.attempts, self.pause_s * (restart < self.paced)
        mine = faulty and int(os.environ["RANK"]) == self.rank

        def next_step(reader, step):
            time.sleep(pause_s)
            if mine and step == self.at and self.fault == "hang":
                wait_for_ever()
            if mine and step == self.at and self.fault == "raise":
                raise ValueError(f"step {step} has a banana in it")
            return read(reader, step)

        def write_marker(path, meta):
            if faulty and self.fault == "slow_marker" and Path(path).name == f"step_{self.at}":
                time.sleep(60)
            mark(path, meta)

        StepReader.next_step, runs.write_marker = next_step, write_marker
        super().work()


def wait_for_ever() -> None:
    """A rank that hangs; its stack shows this line."""
    while True:
        time.sleep(1)


@dataclass
class LookingJob(TrainJob):
    """Meets the other ranks over the network, and writes what each rank sees to ``seen/RANK_RESTART.json``.

    Attributes:
        fails: stages whose rank 0 fails.
        stays: stages that stay at the first start, to be requeued.
    """

    fails: tuple[int, ...] = ()
    stays: tuple[int, ...] = ()

    def work(self) -> None:
        """Look."""
        import torch
        import torch.distributed as dist

        import megatron_elva
        from megatron_elva.config.build import load

        dist.init_process_group("gloo")
        number = torch.tensor([float(dist.get_rank())])
        dist.all_reduce(number)
        rank, package = dist.get_rank(), Path(megatron_elva.__file__).parent
        config = load(self.config_paths[0])
        folder = Path(config.run_dir) / "seen"
        folder.mkdir(exist_ok=True)
        seen = {"env": dict(os.environ), "host": socket.gethostname(), "sum": number.item(), "package": str(package)}
        seen["word"] = getattr(megatron_elva, "WORD", "")
        (folder / f"{rank}_{os.environ.get('SLURM_RESTART_COUNT', '0')}.json").write_text(json.dumps(seen))
        if config.stage.id in self.stays and "SLURM_RESTART_COUNT" not in os.environ:
            wait_for_ever()
        dist.barrier()
        dist.destroy_process_group()
        if rank == 0 and config.stage.id in self.fails:
            raise ValueError("this stage fails")
