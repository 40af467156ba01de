"""Version numbers and the ranges of requirements. Small: the doctor works where `packaging` is missing."""

from __future__ import annotations

import re
from dataclasses import dataclass

_REQUIREMENT = re.compile(r"\s*([A-Za-z0-9._-]+)\s*(?:\[[^\]]*\])?\s*\(?([^;()]*)\)?\s*(?:;(.*))?")
_EXTRA = re.compile(r"""extra\s*==\s*["']([^"']+)["']""")


@dataclass(frozen=True)
class Requirement:
    """A line of a distribution's requirements.

    Attributes:
        name: the distribution, as `plain` writes it.
        ranges: such as ``>=2.11,<2.14``; empty: any version.
        extra: the extra that asks for it; empty: always needed.
        marked: whether it has another condition, such as a platform.
    """

    name: str
    ranges: str
    extra: str = ""
    marked: bool = False

    @property
    def text(self) -> str:
        """As pip takes it."""
        return self.name + self.ranges


def plain(name: str) -> str:
    """The one spelling of a distribution's name, such as ``transformer-engine-torch``."""
    return re.sub(r"[-_.]+", "-", name).lower()


def parse(line: str) -> Requirement | None:
    """Read a line of requirements; None where it is not understood."""
    match = _REQUIREMENT.fullmatch(line)
    if match is None or "@" in line:
        return None
    extra = _EXTRA.search(match[3] or "")
    marked = bool(_EXTRA.sub("", match[3] or "").strip())
    return Requirement(plain(match[1]), match[2].replace(" ", ""), extra[1] if extra else "", marked)


def release(version: str) -> tuple[int, ...]:
    """The leading numbers of a version: ``2.11.0a0+cu130`` is ``(2, 11, 0)``; empty where there are none."""
    match = re.match(r"v?(?:\d+!)?(\d+(?:\.\d+)*)", version.strip())
    return tuple(int(part) for part in match[1].split(".")) if match else ()


def within(version: str, ranges: str) -> bool:
    """Whether a version is in all ranges. Only leading numbers count, so a vendor's ``2.11.0a0`` passes ``>=2.11``.

    Args:
        version: an installed version.
        ranges: such as ``>=2.11,<2.14``; an operator that is not known excludes nothing.
    """
    return all(_one(release(version), part.strip()) for part in ranges.split(",") if part.strip())


def _one(have: tuple[int, ...], condition: str) -> bool:
    match = re.match(r"(>=|<=|==|!=|~=|>|<)\s*(.+)", condition)
    if match is None or not have:
        return True
    operator, text = match[1], match[2]
    wanted = release(text)
    if not wanted:
        return True
    if text.endswith(".*"):
        same = _padded(have, len(wanted))[: len(wanted)] == wanted
        return same if operator == "==" else not same
    size = max(len(have), len(wanted))
    left, right = _padded(have, size), _padded(wanted, size)
    if operator == "~=":
        return left >= right and have[: len(wanted) - 1] == wanted[:-1]
    return {
        ">=": left >= right, "<=": left <= right, "==": left == right, "!=": left != right,
        ">": left > right, "<": left < right,
    }[operator]  # fmt: skip


def _padded(numbers: tuple[int, ...], size: int) -> tuple[int, ...]:
    return numbers + (0,) * (size - len(numbers))
