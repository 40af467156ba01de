"""Bad samples: the list of those to pass by, the report of those met, and when there are too many of them."""

from __future__ import annotations

import json
import logging
import os
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

from megatron_elva.config.errors import InputError
from megatron_elva.layout import Skipped

logger = logging.getLogger(__name__)

_BUILDING = "building: "  # before the reason of a sample that failed while its pack was built

WINDOW = 1000
"""Samples over which their share of bad ones is looked at."""


def short(key: str) -> str:
    """A key as it stands in the list: one of more than 400 bytes is cut and ends with a digest of the whole."""
    whole = key.encode(errors="replace")
    if len(whole) <= 400:
        return key
    return f"{whole[:380].decode(errors='ignore')}...{crc32(whole):08x}"


@dataclass(frozen=True)
class PassedBy:
    """Keys of samples to pass by, as `short` gives them.

    Attributes:
        keys: not to be touched.
        built: not to be decoded. Their lengths count, so that a sample that fails while its pack is built changes
            nothing of what is planned: a run that starts again with the list plans the same packs.
    """

    keys: frozenset[str] = frozenset()
    built: frozenset[str] = frozenset()

    def __or__(self, other: PassedBy) -> PassedBy:
        return PassedBy(self.keys | other.keys, self.built | other.built)

    def has(self, key: str, building: bool) -> bool:
        """Whether a sample is to be passed by."""
        key = short(key)
        return key in self.keys or (building and key in self.built)


NONE_PASSED_BY = PassedBy()


class Quarantine:
    """The list of samples that are passed by, one a line in a file: the key, and behind a tab why.

    A sample whose decoding hangs or kills its process is added, so that a restarted run does not meet it again.
    """

    def __init__(self, path: Path, others: Iterable[Path] = ()) -> None:
        """Read the run's own list, which need not be there, and others, which must.

        Raises:
            InputError: one cannot be read.
        """
        self.path = path
        self.listed = PassedBy()
        self.added = PassedBy()
        self.reasons: dict[str, str] = {}
        for place in [*([path] if path.exists() else []), *others]:
            self.listed |= _read_list(place)

    def has(self, key: str, building: bool) -> bool:
        """Whether a sample is to be passed by."""
        return self.listed.has(key, building) or self.added.has(key, building)

    def add(self, key: str, reason: str, building: bool) -> None:
        """Put a key on the list and in the file; where that cannot be written, the list alone has it.

        Args:
            key: of the sample.
            reason: why.
            building: it failed while its pack was built, its length is known.
        """
        key = short(key)
        if self.has(key, building):
            return
        one = frozenset({key})
        self.added |= PassedBy(built=one) if building else PassedBy(one)
        self.reasons[key] = " ".join(reason.split())
        line = f"{key}\t{_BUILDING if building else ''}{self.reasons[key]}\n"
        logger.warning("sample %s is passed by from now on: %s", key, self.reasons[key])
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("ab+") as file:
                if file.seek(0, os.SEEK_END):
                    file.seek(-1, os.SEEK_END)
                    line = line if file.read(1) == b"\n" else f"\n{line}"
                file.write(line.encode(errors="replace"))
        except OSError as error:
            logger.warning("%s cannot be written (%s): a run that starts again will meet it again", self.path, error)

    def explained(self, bad: Skipped) -> Skipped:
        """What is reported of a sample that this run put on the list itself: the true reason."""
        reason = self.reasons.get(short(bad.key))
        return bad if reason is None or bad.stage != "quarantine" else replace(bad, stage="worker", reason=reason)


def _read_list(path: Path) -> PassedBy:
    """Keys of a list; a line without a tab is a key alone, and one that begins with # says nothing."""
    try:
        lines = path.read_text(encoding="utf-8-sig").split("\n")  # a key may hold what splitlines takes for an end
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"data.quarantine={path}: cannot be read: {error}") from error
    keys: set[str] = set()
    built: set[str] = set()
    for line in lines:
        key, tab, reason = line.partition("\t")
        key = key if tab else key.strip()
        if key and not line.startswith("#"):
            (built if reason.startswith(_BUILDING) else keys).add(short(key))
    return PassedBy(frozenset(keys), frozenset(built))


class BadQuota:
    """Ends a run once too many of the last `WINDOW` samples of all ranks were bad."""

    def __init__(self, max_share: float) -> None:
        self.max_share = max_share
        self._steps: deque[tuple[int, int]] = deque()
        self._drawn = self._bad = 0

    def count(self, drawn: int, bad: int, reports: str) -> None:
        """Count a step.

        Args:
            drawn: samples drawn from the stream.
            bad: of these, bad ones that were on no list.
            reports: where their reasons stand, for the message.

        Raises:
            InputError: more than `max_share` of the window.
        """
        self._steps.append((drawn, bad))
        self._drawn += drawn
        self._bad += bad
        while self._drawn - self._steps[0][0] >= WINDOW:
            old_drawn, old_bad = self._steps.popleft()
            self._drawn -= old_drawn
            self._bad -= old_bad
        if self._bad > self.max_share * max(self._drawn, WINDOW):
            raise InputError(
                f"data.max_bad_share={self.max_share:g}: {self._bad} of the last {self._drawn} samples were bad; "
                f"{reports} says why; mend the data, or raise it to go on without them"
            )


def report_lines(skipped: Iterable[Skipped], **where: Any) -> str:
    """One JSON object a line for each bad sample: key, shard, stage of its processing, reason, and what took its place.

    Args:
        skipped: the bad samples.
        where: more fields for each line.
    """
    lines = []
    for bad in skipped:
        shard = bad.key.split("/", 1)[0].split("#", 1)[0]
        lines.append({**where, "key": bad.key, "shard": shard, "stage": bad.stage, "reason": bad.reason,
                      "replaced_by": bad.replaced_by})  # fmt: skip
    return "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
