"""megatron-core's torch_dist format for whoever writes the files: what stands in them, and what completes a folder.

megatron-core's own saving plans and writes in one go. Here its planning is kept, and its writers are not: they fork
under threads, leave a failed write on one rank as a hang of the others, and sync neither small files nor folders.
"""

from __future__ import annotations

import io
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.core import CONFIG_FNAME, CheckpointingConfig
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies.common import COMMON_STATE_FNAME
from megatron.core.dist_checkpointing.strategies.torch import (
    MCoreSavePlanner,
    _replace_state_dict_keys_with_sharded_keys,
    mcore_to_pyt_state_dict,
)
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter, Metadata, SavePlan
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.storage import WriteResult

from megatron_elva.parallel.collectives import sum_over_ranks
from megatron_elva.parallel.ranks import Ranks
from megatron_elva.training.runs import write_atomic
from megatron_elva.training.writer import File

_HEADER = 1024
"""Bytes that stand around a tensor in a file, about."""


@dataclass(frozen=True)
class Share:
    """What this rank writes of a state.

    Attributes:
        plan: which part of which tensor each part is.
        parts: this rank's part of the state, in the order of the plan; tensors may be views of live ones.
        common: the file that the first rank writes besides; None on the others.
        total: bytes that all ranks together write, about.
    """

    plan: SavePlan
    parts: list[bytes | Tensor]
    common: bytes | None
    total: int

    def files(self, folder: Path) -> list[File]:
        """The files of this rank, the one that `index` is about first."""
        found = [File(str(folder / _file_name()), self.parts)] if self.parts else []
        if self.common is not None:
            found.append(File(str(folder / COMMON_STATE_FNAME), [self.common]))
        return found


class TorchDist:
    """Plans saves, and keeps the plan as long as every rank's share has the same shape.

    Args:
        ranks: this rank.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._ranks = ranks
        self._plan: SavePlan | None = None
        self._metadata: Metadata | None = None

    def share(self, state: dict[str, Any]) -> Share:
        """This rank's share of a state as megatron-core gives it; all ranks call it."""
        sharded, common = save_preprocess(state, validate_access_integrity=self._plan is None)
        flat, _, _ = _replace_state_dict_keys_with_sharded_keys(sharded, keep_only_main_replica=True)
        planner = MCoreSavePlanner(flatten_state_dict=False)
        planner.set_up_planner(mcore_to_pyt_state_dict(flat), is_coordinator=self._ranks.rank == 0)
        plan = planner.create_local_plan()
        found = [planner.resolve_data(item) for item in plan.items]
        parts = [p.getvalue() if isinstance(p, io.BytesIO) else p.detach() for p in found]
        shared = _bytes_of(common) if self._ranks.rank == 0 else None
        size = sum(p.numel() * p.element_size() if isinstance(p, Tensor) else len(p) for p in parts)
        size += _HEADER * len(parts) + len(shared or b"")
        changed, total = sum_over_ranks([plan != self._plan, size], self._ranks)
        if changed:
            self._gather(planner, plan)
        return Share(plan, parts, shared, int(total))

    def _gather(self, planner: MCoreSavePlanner, plan: SavePlan) -> None:
        plans: list[Any] | None = [None] * self._ranks.world if self._ranks.rank == 0 else None
        dist.gather_object(plan, plans)
        if plans is not None:
            _, self._metadata = planner.create_global_plan(plans)
        self._plan = plan

    def index(self, extents: Sequence[Sequence[tuple[int, int]]]) -> list[WriteResult]:
        """Where this rank's parts stand, from what writing its files gave."""
        assert self._plan is not None
        return [
            WriteResult(item.index, length, _StorageInfo(_file_name(), offset, length))
            for item, (offset, length) in zip(self._plan.items, extents[0] if self._plan.items else (), strict=True)
        ]

    def complete(self, folder: Path, indices: list[list[WriteResult]]) -> None:
        """Write what makes the ranks' files one checkpoint; the first rank alone calls it.

        Args:
            folder: of the checkpoint.
            indices: `index` of every rank.
        """
        assert self._metadata is not None
        FileSystemWriter(folder, sync_files=True).finish(self._metadata, indices)
        write_atomic(folder / CONFIG_FNAME, json.dumps(asdict(CheckpointingConfig("torch_dist", 1))))


def _file_name() -> str:
    return f"__{dist.get_rank()}_0.distcp"


def _bytes_of(common: dict[str, Any]) -> bytes:
    out = io.BytesIO()
    torch.save(common, out)
    return out.getvalue()
