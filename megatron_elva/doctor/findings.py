"""What the doctor says about one thing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "missing", "warning", "bad"]
"""``missing`` is optional here and not there; ``warning`` runs, but not as it could; ``bad`` does not run."""

_LONGEST = 240


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at.

    Attributes:
        topic: what it is, such as ``GPU``.
        state: how it stands.
        there: what is there, one line.
        remedy: what to do about it, one line; empty where there is nothing to do.
    """

    topic: str
    state: State
    there: str
    remedy: str = ""


def one_line(text: str, longest: int = _LONGEST) -> str:
    """A text without line breaks, cut in its middle: what matters in an error is where it begins and ends."""
    flat = " ".join(text.split())
    if len(flat) <= longest:
        return flat
    half = (longest - 5) // 2
    return f"{flat[:half]} ... {flat[-half:]}"
