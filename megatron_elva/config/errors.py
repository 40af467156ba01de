"""The two ways a user's input can be wrong; both end a program with exit code 2 and one line."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches


class ConfigError(Exception):
    """A configuration value that cannot run. The message names the key, the value and what is allowed."""


class InputError(Exception):
    """A file or argument that cannot be used. The message names it and says why."""


def did_you_mean(word: str, known: Iterable[str]) -> str:
    """Return ``" (did you mean 'x'?)"`` for the nearest known word, or an empty string."""
    near = get_close_matches(word, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{near[0]}'?)" if near else ""
