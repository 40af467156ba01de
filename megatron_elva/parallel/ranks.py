"""Set-up of the process group and of megatron-core's global state, and what a rank knows of itself afterwards."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from megatron.core.process_groups_config import ProcessGroupCollection

from megatron_elva.config.errors import ConfigError
from megatron_elva.config.schema import ParallelConfig
from megatron_elva.parallel import cpu

TIMEOUT = timedelta(minutes=10)


@dataclass(frozen=True)
class Ranks:
    """Where this process stands in the layout.

    Attributes:
        rank: global rank.
        world: number of ranks.
        tensor: rank among the tensor ranks.
        tensor_size: their number.
        pipeline: rank in the pipeline.
        pipeline_size: their number.
        data: rank among the model replicas.
        data_size: their number.
        device: where tensors live, ``cpu`` or ``cuda:N``.
        groups: megatron-core's process groups.
        ends_group: gloo group of the first and last pipeline ranks of this replica, for tensors on the host; None on
            the ranks between them.
        reader: global rank that reads data for this replica: its first pipeline rank's first tensor rank.
    """

    rank: int
    world: int
    tensor: int
    tensor_size: int
    pipeline: int
    pipeline_size: int
    data: int
    data_size: int
    device: torch.device
    groups: ProcessGroupCollection
    ends_group: dist.ProcessGroup | None
    reader: int

    @property
    def is_reader(self) -> bool:
        """Whether this rank reads data for its replica."""
        return self.rank == self.reader

    @property
    def is_first(self) -> bool:
        """Whether this is a first pipeline rank."""
        return self.pipeline == 0

    @property
    def is_last(self) -> bool:
        """Whether this is a last pipeline rank."""
        return self.pipeline == self.pipeline_size - 1


def start(parallel: ParallelConfig, device: str, seed: int, timeout: timedelta = TIMEOUT) -> Ranks:
    """Join the process group and split it into tensor, pipeline and data ranks.

    Reads ``RANK``, ``WORLD_SIZE``, ``LOCAL_RANK``, ``MASTER_ADDR`` and ``MASTER_PORT`` as torchrun and the launcher set
    them; without them the process is a world of its own. A second call with the same layout gives the same ranks.

    Args:
        parallel: the layout.
        device: ``cpu`` (installs CPU mode) or ``cuda``.
        seed: for megatron-core's random states.
        timeout: of every collective.

    Raises:
        ConfigError: the number of processes does not fit the layout.
    """
    if device == "cuda" and parallel.tensor > 1:
        # communication overlaps with products as they are launched, which one queue keeps; read by CUDA as it starts
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    local = _choose_device(device)
    world = int(os.environ.get("WORLD_SIZE", "1"))
    if world % (parallel.tensor * parallel.pipeline):
        raise ConfigError(
            f"{world} processes do not divide into parallel.tensor={parallel.tensor} x "
            f"parallel.pipeline={parallel.pipeline}: start a multiple of {parallel.tensor * parallel.pipeline}"
        )
    if not dist.is_initialized():
        _join(world, local, timeout)
    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=parallel.tensor,
            pipeline_model_parallel_size=parallel.pipeline,
            virtual_pipeline_model_parallel_size=_virtual(parallel),
            create_gloo_process_groups=False,
            distributed_timeout_minutes=timeout.total_seconds() / 60,
        )
        tensor_parallel.model_parallel_cuda_manual_seed(seed)
    return _describe(local, timeout)


def stop() -> None:
    """Leave the process group."""
    if parallel_state.is_initialized():
        parallel_state.destroy_model_parallel()
    if dist.is_initialized():
        dist.destroy_process_group()


def _virtual(parallel: ParallelConfig) -> int | None:
    return parallel.virtual_pipeline if (parallel.virtual_pipeline or 1) > 1 else None


def _choose_device(device: str) -> torch.device:
    if device == "cpu":
        cpu.install()
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ConfigError("device=cuda: no GPU is visible here; use device=cpu to run without one")
    local = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0")))
    torch.cuda.set_device(local)
    return local


def _join(world: int, device: torch.device, timeout: timedelta) -> None:
    backend = "gloo" if device.type == "cpu" else "nccl"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=world, timeout=timeout)


def _describe(device: torch.device, timeout: timedelta) -> Ranks:
    groups = ProcessGroupCollection.use_mpu_process_groups()
    members = dist.get_process_group_ranks(groups.mp)
    pipeline, pipeline_size = groups.pp.rank(), groups.pp.size()
    return Ranks(
        rank=dist.get_rank(),
        world=dist.get_world_size(),
        tensor=groups.tp.rank(),
        tensor_size=groups.tp.size(),
        pipeline=pipeline,
        pipeline_size=pipeline_size,
        data=groups.dp.rank(),
        data_size=groups.dp.size(),
        device=device,
        groups=groups,
        ends_group=_ends_group(members, pipeline in (0, pipeline_size - 1), timeout),
        reader=min(members),
    )


def _ends_group(members: list[int], is_end: bool, timeout: timedelta) -> dist.ProcessGroup | None:
    """A gloo group of the replica's ranks at an end of the pipeline; every rank makes all of them in one order."""
    everyone: list[tuple[int, bool] | None] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, (min(members), is_end))
    own = None
    ends = [(place[0], rank) for rank, place in enumerate(everyone) if place is not None and place[1]]
    for replica in sorted({first for first, _ in ends}):
        ranks = [rank for first, rank in ends if first == replica]
        group = dist.new_group(ranks, timeout=timeout, backend="gloo")  # else 30 minutes
        if dist.get_rank() in ranks:
            own = group
    return own
