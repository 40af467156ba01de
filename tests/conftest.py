"""Test files run side by side; what is marked ``alone`` has the machine for itself."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Generator
from pathlib import Path
from typing import IO

import pytest

_held: list[IO[str]] = []
"""The lock that this worker keeps from one test that is alone to the next."""


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item, nextitem: pytest.Item | None) -> Generator[None, object, object]:
    """Many tests at a time, or one that is alone: a lock that is shared, or not."""
    if "PYTEST_XDIST_WORKER" not in os.environ:
        return (yield)
    if not _held:
        _held.append(_lock(Path(item.config.option.basetemp).parent, _is_alone(item)))
    try:
        return (yield)
    finally:
        if not (_is_alone(item) and _is_alone(nextitem)):
            _held.pop().close()


def _is_alone(item: pytest.Item | None) -> bool:
    return item is not None and item.get_closest_marker("alone") is not None


def _lock(folder: Path, alone: bool) -> IO[str]:
    """Wait for the turn. Who waits to be alone holds the gate, so that no other test begins before it."""
    lock = (folder / "turn.lock").open("a")
    with (folder / "gate.lock").open("a") as gate:
        fcntl.flock(gate, fcntl.LOCK_EX)
        fcntl.flock(lock, fcntl.LOCK_EX if alone else fcntl.LOCK_SH)
    return lock
