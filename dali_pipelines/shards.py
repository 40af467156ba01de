"""WebDataset tar shards with random access.

A sample is a run of members with one key (the name up to the first dot of its last part). Such a run is one stretch of
the file, so the index holds two numbers a sample whatever the shard's size, and one read fetches the whole sample.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from glob import glob
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np

from megatron_elva.config.errors import InputError

MEDIA = frozenset({"mp4", "mkv", "webm", "mov", "avi", "m4v", "gif", "png", "jpg", "jpeg", "webp"})
"""Last extension of the members that hold a video or an image."""

_VERSION = 1
_BLOCK = 512


@dataclass(frozen=True)
class RawSample:
    """A sample as it stands in its shard.

    Attributes:
        key: ``shard.tar/key``.
        meta: content of its ``.json`` member.
        media: its video and image files, in the order of their names.
    """

    key: str
    meta: dict[str, Any]
    media: list[bytes]


def find_shards(patterns: Iterable[str], what: str) -> list[Path]:
    """Resolve paths and globs, sorted by name.

    Args:
        patterns: paths or globs of tar files.
        what: the key or option they come from, for the message.

    Raises:
        InputError: a pattern matches no file.
    """
    found: set[str] = set()
    for pattern in patterns:
        matches = glob(pattern, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        if not matches:
            raise InputError(f"{what}: no file matches {pattern}")
        found.update(matches)
    if not found:
        raise InputError(f"{what}: names no shards")
    return [Path(path) for path in sorted(found)]


def split_name(name: str) -> tuple[str, str]:
    """Split a member's name into key (with its folder) and extension (without the first dot)."""
    path = PurePosixPath(name)
    stem, _, extension = path.name.partition(".")
    folder = "" if str(path.parent) == "." else f"{path.parent}/"
    return (folder + stem if stem else ""), extension.lower()


class ShardIndex:
    """One shard: where each of its samples stands, and how to read it.

    Nothing is held open, so an index can be sent to other processes and thousands of shards stay below the limit on
    open files.

    Attributes:
        path: the tar file.
        spans: ``[n, 2]`` int64, first byte and end of each sample.
        warning: what is wrong with the shard though its complete samples can be used, or None.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            stat = self.path.stat()
        except OSError as error:
            raise InputError(f"{self.path}: {error.strerror}") from error
        stamp = [_VERSION, stat.st_size, stat.st_mtime_ns]
        cached = _load_cache(self._cache, stamp)
        if cached is None:
            cached = _scan(self.path, stat.st_size)
            _save_cache(self._cache, stamp, *cached)
        self.spans, self.warning = cached

    @property
    def _cache(self) -> Path:
        return self.path.with_name(self.path.name + ".index.json")

    def __len__(self) -> int:
        return len(self.spans)

    def name_of(self, i: int) -> str:
        """How to call a sample whose key could not be read."""
        return f"{self.path.name}#{i}"

    def read(self, i: int) -> RawSample:
        """Read one sample.

        Raises:
            InputError: it cannot be read, or has no usable ``.json``.
        """
        first, end = (int(n) for n in self.spans[i])
        try:
            with self.path.open("rb") as file:
                file.seek(first)
                content = file.read(end - first)
            if len(content) < end - first:
                raise InputError(f"{self.name_of(i)}: cannot be read: the shard has become shorter")
            content += bytes(-len(content) % _BLOCK)
            with tarfile.open(fileobj=io.BytesIO(content), mode="r:") as tar:
                members = [(m.name, _content(tar, m)) for m in tar if m.isreg()]
        except (OSError, tarfile.TarError) as error:
            raise InputError(f"{self.name_of(i)}: cannot be read: {error}") from error
        named = [(*split_name(name), content) for name, content in members]
        key = f"{self.path.name}/{named[0][0]}"
        meta = [content for _, extension, content in named if extension == "json"]
        if not meta:
            raise InputError(f"{key}: no .json member")
        media = sorted((extension, content) for _, extension, content in named if extension.split(".")[-1] in MEDIA)
        return RawSample(key, parse_meta(key, meta[0]), [content for _, content in media])


def iterate_meta(path: Path) -> Iterator[dict[str, Any]]:
    """The ``.json`` members of a shard in order, without reading the media. A cut shard ends where it is cut."""
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                if member.isreg() and split_name(member.name)[1] == "json":
                    yield parse_meta(f"{path.name}/{member.name}", _content(tar, member))
    except (OSError, tarfile.TarError) as error:
        if isinstance(error, OSError) or "empty" in str(error):
            raise InputError(f"{path}: {error}") from error


def parse_meta(key: str, content: bytes) -> dict[str, Any]:
    """Read a sample's JSON object."""
    try:
        meta = json.loads(content)
    except ValueError as error:
        raise InputError(f"{key}: its .json cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise InputError(f"{key}: its .json holds no object")
    return meta


def _content(tar: tarfile.TarFile, member: tarfile.TarInfo) -> bytes:
    file = tar.extractfile(member)
    return file.read() if file is not None else b""


def _scan(path: Path, size: int) -> tuple[np.ndarray, str | None]:
    """Find the samples of a shard from its headers."""
    spans: list[list[int]] = []
    kinds: list[set[str]] = []
    last_key, end, fault = None, 0, None
    closed = False  # whether a member of another sample follows the last complete one
    try:
        with tarfile.open(path, mode="r:") as tar:
            for member in tar:
                end = member.offset_data + member.size
                key, extension = split_name(member.name)
                if end > size:
                    fault, end = f"member {member.name} is cut", member.offset
                    closed = key != last_key
                    break
                if not member.isreg() or not key:
                    continue
                if key != last_key:
                    spans.append([member.offset, end])
                    kinds.append(set())
                    last_key = key
                spans[-1][1] = end
                kinds[-1].add(extension)
    except (tarfile.TarError, EOFError) as error:
        if not spans:
            raise InputError(f"{path}: not a tar file: {error}") from error
        fault = str(error)
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    if fault is None and not _ends_properly(path, end):
        fault = "no end mark"
    if fault is not None and spans and not closed and (len(kinds) < 2 or kinds[-1] != kinds[-2]):
        # The last sample may go on behind the cut; it counts if it has the members that the one before it has.
        spans.pop()
    warning = None if fault is None else f"{path}: cut at byte {end} ({fault}): {len(spans)} complete samples are used"
    return np.array(spans, np.int64).reshape(-1, 2), warning


def _ends_properly(path: Path, end: int) -> bool:
    """Whether the tar ends with zeros, as it should: tarfile takes a damaged header for the end as well."""
    with path.open("rb") as file:
        file.seek(-(-end // _BLOCK) * _BLOCK)
        return file.read(_BLOCK) == bytes(_BLOCK)


def _load_cache(cache: Path, stamp: list[int]) -> tuple[np.ndarray, str | None] | None:
    """Read a stored index if it belongs to the shard as it is now."""
    try:
        stored = json.loads(cache.read_bytes())
        if stored["stamp"] != stamp:
            return None
        spans = np.array(stored["spans"], np.int64).reshape(-1, 2)
        return spans, stored["warning"]
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _save_cache(cache: Path, stamp: list[int], spans: np.ndarray, warning: str | None) -> None:
    """Store an index beside its shard; where that is not allowed, the next process scans again."""
    draft = cache.with_name(f"{cache.name}.{os.getpid()}.tmp")
    try:
        draft.write_text(json.dumps({"stamp": stamp, "warning": warning, "spans": spans.tolist()}))
        draft.replace(cache)
    except OSError:
        draft.unlink(missing_ok=True)
