"""Where the samples of a tar shard stand, found from its headers, and the file that keeps it."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any
from zlib import crc32

import numpy as np

from megatron_elva.config.errors import InputError

MEDIA = frozenset({"mp4", "mkv", "webm", "mov", "avi", "m4v", "gif", "png", "jpg", "jpeg", "webp"})
"""Last extension of the members that hold a video or an image."""

VERSION = 2
"""Of the index files; those of another version are made again."""
BLOCK = 512
LONGEST_JSON = 64 << 20
"""Bytes of a sample's JSON at most."""

_LONGEST_HEADER = 1 << 20  # bytes; a header that claims more is damaged
_LONGEST_TAIL = 4 << 20  # zeros behind the last member, with the largest blocking factor in use
_COLUMNS = ("first", "size", "json_at", "json_size", "media", "check")

# What tarfile raises on damaged headers. The last are not its own: it takes numbers and names as they come.
DAMAGE = (tarfile.TarError, EOFError, ValueError, OverflowError, RecursionError, LookupError, TypeError)


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key (with its folder) and extension (without the first dot)."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    folder = "" if str(path.parent) == "." else f"{path.parent}/"
    return (folder + stem if stem else ""), extension.lower()


@dataclass(frozen=True, eq=False)
class Table:
    """The index of a shard.

    Attributes:
        spans: ``[n, 2]`` int64, first byte and end of each sample.
        jsons: ``[n, 2]`` uint32, where the header of its ``.json`` begins within the sample, in blocks, and the bytes
            from there to the end of the JSON; 0 bytes where it has none.
        media: ``[n]`` uint16, number of its video and image files.
        checks: ``[n]`` uint32, checksum of the names and sizes of its members.
        fault: why the shard ends early, or None.
    """

    spans: np.ndarray
    jsons: np.ndarray
    media: np.ndarray
    checks: np.ndarray
    fault: str | None

    def dump(self, stamp: list[Any]) -> bytes:
        """As a file."""
        first, end = self.spans[:, 0], self.spans[:, 1]
        columns = (first, end - first, self.jsons[:, 0], self.jsons[:, 1], self.media, self.checks)
        stored = {name: column.tolist() for name, column in zip(_COLUMNS, columns, strict=True)}
        return json.dumps({"stamp": stamp, "fault": self.fault, **stored}, separators=(",", ":")).encode()

    @classmethod
    def load(cls, content: bytes | None, fits: Callable[[list[Any]], bool], size: int) -> Table | None:
        """From a file; None where that is of another version, of another shard or damaged."""
        try:
            stored = json.loads(content or b"")
            if stored["stamp"][0] != VERSION or not fits(stored["stamp"]):
                return None
            first, length, json_at, json_size, media, check = (np.array(stored[c], np.int64) for c in _COLUMNS)
            if len({column.shape for column in (first, length, json_at, json_size, media, check)}) > 1:
                return None
            ends = first + length
            rising = (first >= 0).all() and (length > 0).all() and (first[1:] >= ends[:-1]).all()
            inside = (ends <= size).all() and (json_at >= 0).all() and (json_at * BLOCK + json_size <= length).all()
            if not rising or not inside or not isinstance(stored["fault"], str | None):
                return None
            jsons = np.stack([json_at, json_size], 1).astype(np.uint32)
            spans = np.stack([first, ends], 1)
            return cls(spans, jsons, media.astype(np.uint16), check.astype(np.uint32), stored["fault"])
        except (ValueError, KeyError, TypeError, IndexError, OverflowError):
            return None


class Window(io.RawIOBase):
    """The file that tarfile reads headers from: a stretch of the shard in memory, moved where it is needed.

    The stretch grows while samples are small, so that one read covers many headers, and shrinks where the way to the
    next header is long, so that media are jumped over.
    """

    def __init__(
        self, fetch: Callable[[int, int], bytes], size: int, least: int = 1 << 13, longest: int = _LONGEST_HEADER
    ) -> None:
        """Look at a shard.

        Args:
            fetch: gives bytes ``first`` to ``end``.
            size: bytes of the shard.
            least: smallest stretch to fetch.
            longest: most that may be asked for at once.
        """
        self.size = size
        self._fetch, self._least, self._longest = fetch, least, longest
        self._most, self._jump = least << 7, least << 4
        self._step = least
        self._at = 0
        self._first, self._held = 0, b""

    def read(self, n: int = -1) -> bytes:
        """Read as a file does; what no header can hold is refused."""
        if not 0 <= n <= self._longest:
            raise tarfile.ReadError(f"a header of {n} bytes")
        end = min(self._at + n, self.size)
        if self._at < end and not (self._first <= self._at and end <= self._first + len(self._held)):
            self._move(end)
        start, self._at = self._at, max(end, self._at)
        return self._held[start - self._first : end - self._first] if start < end else b""

    def _move(self, end: int) -> None:
        gap = self._at - (self._first + len(self._held))
        if self._held and 0 <= gap <= self._jump:
            self._step = min(self._step * 2, self._most)
        else:
            self._step = max(self._step // 4, self._least)
        end = min(max(end, self._at + self._step), self.size)
        self._first, self._held = self._at, self._fetch(self._at, end)

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, from the start of the file."""
        if offset < 0 or whence != io.SEEK_SET:
            raise tarfile.ReadError("a header that points before the file")
        self._at = offset
        return offset

    def tell(self) -> int:
        """The position."""
        return self._at


def walk(window: Window) -> Iterator[tarfile.TarInfo]:
    """The members of a tar file in order, each further on than the one before. Raises one of `DAMAGE`."""
    last = -1
    window.seek(0)
    with tarfile.open(fileobj=window, mode="r:") as tar:
        for member in tar:
            if member.offset <= last or member.size < 0 or member.offset_data <= member.offset:
                raise tarfile.ReadError("a header that points back")
            last = member.offset
            if member.issparse():
                raise tarfile.ReadError(f"member {printable(member.name)} is sparse; allowed: plain files")
            yield member


def _end_of(member: tarfile.TarInfo) -> int:
    # the size of a link is that of its target
    return member.offset_data + (0 if member.islnk() or member.issym() or member.isdir() else member.size)


def belongs(member: tarfile.TarInfo) -> bool:
    """Whether this is a part of a sample. Links are, so that a sample of which a part stands elsewhere is refused."""
    return (member.isreg() or member.islnk() or member.issym()) and split_name(member.name)[0] != ""


def is_media(extension: str) -> bool:
    """Whether members with this extension hold a video or an image."""
    return extension.rpartition(".")[2] in MEDIA


def checksum(members: Iterable[tuple[str, int]]) -> int:
    """Checksum of names and sizes."""
    return crc32("\0".join(f"{name}\0{size}" for name, size in members).encode(errors="backslashreplace"))


def printable(name: str) -> str:
    """A name without line ends and what else cannot be shown."""
    return name if name.isprintable() else name.encode("unicode_escape", "backslashreplace").decode()


def scan(window: Window, where: str) -> Table:
    """Find the samples of a shard from its headers."""
    runs: list[list[tarfile.TarInfo]] = []
    last_key, end, fault = None, 0, None
    closed = False  # whether a member of another sample follows the last complete one
    try:
        for member in walk(window):
            key = split_name(member.name)[0]
            end = _end_of(member)
            if end > window.size:
                fault = f"member {printable(member.name)} is cut"
                closed = belongs(member) and key != last_key
                break
            if not belongs(member):
                continue
            if key != last_key:
                runs.append([])
                last_key = key
            runs[-1].append(member)
        fault = fault or _end_fault(window, end)
    except DAMAGE as error:
        if not runs:
            raise InputError(f"{where}: not a tar file: {error}") from error
        fault = f"damaged header: {error}"
    if fault is not None and runs and not closed:
        runs.pop()  # it may go on behind the cut, and a sample without a part of its media would be another sample
    rows = [_row(run) for run in runs]
    spans, jsons = np.array([r[:2] for r in rows], np.int64), np.array([r[2:4] for r in rows], np.uint32)
    media, checks = np.array([r[4] for r in rows], np.uint16), np.array([r[5] for r in rows], np.uint32)
    return Table(spans.reshape(-1, 2), jsons.reshape(-1, 2), media, checks, fault)


def _row(run: list[tarfile.TarInfo]) -> tuple[int, int, int, int, int, int]:
    """First byte, end, place and bytes of the JSON, number of media and checksum of a sample."""
    first = run[0].offset
    at = size = media = 0
    for member in run:
        extension = split_name(member.name)[1]
        media += is_media(extension)
        if extension == "json" and not size and member.isreg() and member.size <= LONGEST_JSON:
            at, size = (member.offset - first) // BLOCK, member.offset_data + member.size - member.offset
    return first, _end_of(run[-1]), at, size, min(media, 0xFFFF), checksum((m.name, m.size) for m in run)


def _end_fault(window: Window, end: int) -> str | None:
    """Why this is not where a tar file ends: tarfile takes a damaged header for the end as well."""
    at = -(-end // BLOCK) * BLOCK
    rest = window.size - at
    if rest < BLOCK:
        return "no end mark"
    window.seek(at)
    if window.read(BLOCK) != bytes(BLOCK):
        return "damaged header"
    while at < window.size:
        window.seek(at)
        piece = window.read(min(_LONGEST_HEADER, window.size - at))
        if rest > _LONGEST_TAIL or piece.strip(b"\0"):
            return f"end mark in the middle, {rest} bytes behind it"
        at += len(piece)
    return None
