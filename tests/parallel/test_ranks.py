"""Joining the ranks."""

from __future__ import annotations

import time
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from megatron_elva.config.schema import ParallelConfig
from tests.distributed import run_distributed

TIMEOUT_S = 3.0
LATE_S = 9.0


def wait_in_vain() -> list[float]:
    """Rank 0 waits in collectives for the other rank, which never comes. Returns the seconds of each wait."""
    from megatron_elva.parallel.ranks import start

    ranks = start(ParallelConfig(tensor=1, pipeline=2, sequence=False), "cpu", 1, timedelta(seconds=TIMEOUT_S))
    if ranks.rank == 1:
        time.sleep(LATE_S)
        return []
    waits = []
    for group in (ranks.groups.pp, ranks.ends_group):
        began = time.monotonic()
        with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout"):
            dist.all_reduce(torch.ones(1), group=group)
        waits.append(time.monotonic() - began)
    return waits


@pytest.mark.slow
def test_every_group_has_the_given_timeout():
    waits, _ = run_distributed(wait_in_vain, 2)
    assert len(waits) == 2 and all(0.8 * TIMEOUT_S < waited < 1.4 * TIMEOUT_S for waited in waits)
