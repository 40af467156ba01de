"""One way to show how far a stage is: a bar on a terminal, a line now and then in the log of a job."""

from __future__ import annotations

import sys
from typing import Any

from tqdm import tqdm

_LOG_EVERY_S = 30.0


def progress(total: int, what: str, unit: str) -> tqdm[Any]:
    """A bar.

    Args:
        total: units in all.
        what: the stage.
        unit: what is counted.
    """
    if sys.stderr.isatty():
        return tqdm(total=total, desc=what, unit=unit)
    return tqdm(
        total=total, desc=what, unit=unit, delay=_LOG_EVERY_S, mininterval=_LOG_EVERY_S, maxinterval=2 * _LOG_EVERY_S
    )
