"""Steps whose loss or gradient is not finite: which samples they held, and when they end the run.

The engine changes no weight in such a step and gives every rank a gradient norm that is not finite, so that all of them
come here in the same step and none needs to be asked before.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config
from megatron_elva.layout import Pack
from megatron_elva.parallel.engine import StepResult
from megatron_elva.parallel.ranks import Ranks

LOG = "nonfinite.jsonl"
SHOWN = 4
"""Keys in the printed line; the log has all of them."""


@dataclass(frozen=True)
class SuspectPack:
    """A pack of a step that was not finite. Replica and micro-step count from 0."""

    replica: int
    micro_step: int
    keys: list[str]


class Nonfinite:
    """Looks at every step of a stage; `check` is called on all ranks.

    Args:
        config: the stage's config.
        ranks: this rank.
    """

    def __init__(self, config: Config, ranks: Ranks) -> None:
        self.fault, self.ranks = config.fault, ranks
        self.log = Path(config.run_dir, "logs", LOG)
        self.in_a_row = 0

    def check(self, step: int, result: StepResult, packs: Sequence[Pack | None], grad_norm: float) -> None:
        """After a step: nothing if it was finite; else find the samples, log them, and stop where the config says so.

        Args:
            step: its number.
            result: what the engine gave on this rank.
            packs: the packs of this rank; the rank that read them knows their keys.
            grad_norm: the same on all ranks.

        Raises:
            InputError: on all ranks, with ``fault.nonfinite=stop`` or after ``fault.max_nonfinite`` in a row.
        """
        if math.isfinite(grad_norm):
            self.in_a_row = 0
            return
        self.in_a_row += 1
        what, suspects = _suspects(result, packs, self.ranks)
        line = f"step {step}: the {what} is not finite, no weight changed; {_describe(suspects, str(self.log))}"
        if self.ranks.rank == 0:
            self._write(step, what, suspects)
            print(line, flush=True)
        if self.fault.nonfinite == "stop":
            raise InputError(
                f"{line}; fault.nonfinite=stop: list the samples to blame in the file of data.quarantine, or set skip"
            )
        if self.in_a_row >= self.fault.max_nonfinite:
            raise InputError(
                f"{line}; it is the last of {self.in_a_row} in a row, and fault.max_nonfinite="
                f"{self.fault.max_nonfinite}: go on from an older checkpoint with a lower train.lr"
            )

    def _write(self, step: int, what: str, suspects: Sequence[SuspectPack]) -> None:
        record = {"step": step, "time": time.time(), "what": what, "packs": [asdict(s) for s in suspects]}
        try:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as f:
                f.write(json.dumps(record) + "\n")
        except OSError as error:  # the printed line says the most of it, and a full disk is the checkpoint's to refuse
            print(f"warning: {self.log}: {error}", flush=True)


def _suspects(result: StepResult, packs: Sequence[Pack | None], ranks: Ranks) -> tuple[str, list[SuspectPack]]:
    """``loss`` and the packs whose loss is not finite, or ``gradient`` and all packs of the step; on all ranks."""
    keys = [[] if pack is None else pack.keys for pack in packs] if ranks.is_reader else None
    everyone: list[Any] = [None] * ranks.world
    dist.all_gather_object(everyone, (ranks.data, result.nonfinite, keys))
    keys_of = {replica: read for replica, _, read in everyone if read is not None}
    bad_of = {replica: bad for replica, bad, _ in everyone if bad is not None}
    whole_step = not any(bad_of.values())
    suspects = [
        SuspectPack(replica, micro, keys)
        for replica, read in sorted(keys_of.items())
        for micro, keys in enumerate(read)
        if whole_step or micro in bad_of[replica]
    ]
    return "gradient" if whole_step else "loss", suspects


def _describe(suspects: Sequence[SuspectPack], log: str) -> str:
    keys = [key for suspect in suspects for key in suspect.keys]
    places = [f"micro-step {s.micro_step} of replica {s.replica}" for s in suspects[:SHOWN]]
    more = f" and {len(suspects) - SHOWN} more packs" if len(suspects) > SHOWN else ""
    rest = f" and {len(keys) - SHOWN} more in {log}" if len(keys) > SHOWN else ""
    return f"{', '.join(places)}{more}: samples {', '.join(keys[:SHOWN]) or '(none)'}{rest}"
