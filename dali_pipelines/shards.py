"""WebDataset tar shards with random access, on the local disk or behind a URL.

A sample is a run of members with one key (the name up to the first dot of its last part). Such a run is one stretch of
the file, so the index holds a few numbers a sample whatever the shard's size, and one read fetches the whole sample.
"""

from __future__ import annotations

import io
import json
import tarfile
import uuid
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from glob import glob, has_magic
from pathlib import Path
from typing import Any

import numpy as np

from dali_pipelines import storage
from dali_pipelines.tar_index import (
    BLOCK,
    DAMAGE,
    LONGEST_JSON,
    MEDIA,
    VERSION,
    Table,
    Window,
    belongs,
    checksum,
    is_media,
    printable,
    scan,
    split_name,
    walk,
)
from megatron_elva.config.errors import InputError

__all__ = ["MEDIA", "RawSample", "SampleMeta", "ShardIndex", "find_shards", "iterate_meta", "parse_meta", "split_name"]


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


@dataclass(frozen=True)
class SampleMeta:
    """A sample without its media.

    Attributes:
        key: ``shard.tar/key``.
        meta: content of its ``.json`` member.
        media: number of its video and image files.
        size: bytes that `ShardIndex.read` would read.
    """

    key: str
    meta: dict[str, Any]
    media: int
    size: int


def find_shards(patterns: Iterable[str], what: str, cache_dir: str | Path | None = None) -> list[Path | str]:
    """Resolve paths, globs and URLs, sorted by name.

    Args:
        patterns: paths, globs or URLs of tar files; braces as in ``{000..012}`` or ``{a,b}`` are written out. Globs
            work on the local disk and on S3. A URL without one is not asked for here.
        what: the key or option they come from, for the message.
        cache_dir: folder for what comes from URLs; made here, so that a bad one is found before anything is fetched.

    Returns:
        Paths of local shards, and URLs.

    Raises:
        InputError: a pattern matches no file, or is none.
    """
    found: dict[str, Path | str] = {}
    for pattern in patterns:
        for name in _expanded(pattern):
            matches = _matches(name, what)
            if not matches:
                raise InputError(f"{what}: no file matches {storage.shown(name)}")
            found.update((str(match), match) for match in matches)
    if not found:
        raise InputError(f"{what}: names no shards")
    if cache_dir is not None and any(isinstance(shard, str) for shard in found.values()):
        storage.make_cache(cache_dir)
    return [found[name] for name in sorted(found)]


def _expanded(pattern: str) -> list[str]:
    """A pattern without its braces; a local file whose name holds braces stands for itself."""
    return [pattern] if not storage.is_url(pattern) and Path(pattern).exists() else storage.expand(pattern)


def _matches(name: str, what: str) -> list[Path | str]:
    """The shards that a path, glob or URL stands for."""
    if not storage.is_url(name):
        paths = glob(name, recursive=True)  # noqa: PTH207 (Path.glob takes no absolute pattern)
        return [Path(path) for path in paths if not (has_magic(name) and path.endswith(".index.json"))]
    fault = storage.url_fault(name)
    if fault is not None:
        raise InputError(f"{what}: {storage.shown(name)}: {fault}")
    return list(storage.find(name))


class ShardIndex:
    """One shard: where each of its samples stands, and how to read it.

    Nothing is held open, so an index can be sent to other processes and thousands of shards stay below the limit on
    open files. What was read once reads the same later, or is refused: a shard must not change under a run.

    Attributes:
        path: the tar file, or None where its samples are read by URL.
        url: where it comes from, or None.
        name: its file name, whatever folder or bucket it lies in.
        spans: ``[n, 2]`` int64, first byte and end of each sample.
        sizes: ``[n]`` int64, bytes of each sample.
        warning: what is wrong with the shard though its complete samples can be used, or None.
    """

    def __init__(self, path: str | Path, cache_dir: str | Path | None = None) -> None:
        """Index a shard.

        Args:
            path: a local path or a URL.
            cache_dir: folder where a shard from a URL is kept as a whole, which is downloaded here and now. None: its
                samples are read from the URL, and only its index is kept, in the user's cache directory.

        Raises:
            InputError: it cannot be read, or is no tar file.
        """
        self.url = str(path) if storage.is_url(path) else None
        self.path: Path | None = None if self.url else Path(path)
        self.name = storage.base_name(self.url) if self.url else Path(path).name
        self._where = storage.shown(str(path))
        self._stat = storage.stat(self.url) if self.url else storage.local_stat(Path(path))
        if self.url and cache_dir is not None:
            self.path = storage.fetch(self.url, self._stat, cache_dir)
        table = _open_local(self.path, self._where) if self.path else _open_url(str(path), self._stat)
        self.spans, self._jsons, self._media, self._checks = table.spans, table.jsons, table.media, table.checks
        end = int(self.spans[-1, 1]) if len(self.spans) else 0
        complete = f"{len(self.spans)} complete samples are used"
        self.warning = table.fault and f"{self._where}: cut at byte {end} ({table.fault}): {complete}"

    def __len__(self) -> int:
        return len(self.spans)

    @property
    def sizes(self) -> np.ndarray:
        """``[n]`` int64, bytes of each sample."""
        return self.spans[:, 1] - self.spans[:, 0]

    @property
    def place(self) -> str:
        """Its whole path or URL, which no other shard has."""
        return self._where

    def name_of(self, i: int) -> str:
        """How to call a sample whose key could not be read."""
        return f"{self.name}#{i}"

    def read(self, i: int) -> RawSample:
        """Read one sample, with one read or request.

        Raises:
            InputError: it cannot be read, or has no usable ``.json``.
        """
        first, end = (int(n) for n in self.spans[i])
        members = self._members(i, first, end)
        named = [(*split_name(name), content) for name, content in members]
        if checksum(((name, len(content)) for name, content in members)) != int(self._checks[i]):
            raise InputError(f"{self.name_of(i)}: is not what the index says; the shard has changed since it was made")
        key = f"{self.name}/{printable(named[0][0])}"
        meta = [content for _, extension, content in named if extension == "json"]
        if not meta:
            raise InputError(f"{key}: no .json member")
        media = sorted((extension, content) for _, extension, content in named if is_media(extension))
        return RawSample(key, parse_meta(key, meta[0]), [content for _, content in media])

    def read_meta(self, i: int) -> SampleMeta:
        """Read the ``.json`` of one sample and nothing else, with one read or request.

        Raises:
            InputError: it cannot be read, or has no usable ``.json``.
        """
        at, size = (int(n) for n in self._jsons[i])
        if not size:
            raise InputError(f"{self.name_of(i)}: no .json member")
        first = int(self.spans[i, 0]) + at * BLOCK
        members = self._members(i, first, first + size)
        stem, extension = split_name(members[0][0])
        if len(members) != 1 or extension != "json":
            raise InputError(f"{self.name_of(i)}: is not what the index says; the shard has changed since it was made")
        key = f"{self.name}/{printable(stem)}"
        return SampleMeta(key, parse_meta(key, members[0][1]), int(self._media[i]), int(self.sizes[i]))

    def _members(self, i: int, first: int, end: int) -> list[tuple[str, bytes]]:
        """Names and contents of the members in a stretch of the shard; at least one."""
        content = self._bytes(i, first, end)
        whole = -(-len(content) // BLOCK) * BLOCK  # the last member's padding is not read
        window = Window(lambda a, b: content[a:b].ljust(b - a, b"\0"), whole)
        found = []
        try:
            for member in walk(window):
                if not belongs(member):
                    continue
                if not member.isreg():
                    raise tarfile.ReadError(f"member {printable(member.name)} is a link; allowed: plain files")
                data = content[member.offset_data : member.offset_data + member.size]
                if len(data) != member.size:
                    raise tarfile.ReadError(f"member {printable(member.name)} is cut")
                found.append((member.name, data))
            if not found or member.offset_data + member.size != len(content):
                raise tarfile.ReadError("damaged header")
        except DAMAGE as error:
            raise InputError(f"{self.name_of(i)}: cannot be read: {error}") from error
        return found

    def _bytes(self, i: int, first: int, end: int) -> bytes:
        if self.path is None:
            return storage.read(str(self.url), first, end, self._stat)
        try:
            with self.path.open("rb") as file:
                size = file.seek(0, io.SEEK_END)
                if size != self._stat.size:
                    how = "shorter" if size < self._stat.size else "longer"
                    raise InputError(f"{self.name_of(i)}: cannot be read: the shard has become {how} during the run")
                return _read_at(file, first, end)
        except OSError as error:
            raise InputError(f"{self.name_of(i)}: cannot be read: {error.strerror or error}") from error


def _open_local(path: Path, where: str) -> Table:
    """The index beside a local shard, made where it is missing."""
    try:
        stat = path.stat()
        stamp = [VERSION, stat.st_size, stat.st_mtime_ns]
        cache = path.with_name(path.name + ".index.json")
        table = Table.load(_content_of(cache), lambda found: found == stamp, stat.st_size)
        if table is None:
            with path.open("rb") as file:
                table = scan(Window(lambda first, end: _read_at(file, first, end), stat.st_size), where)
            _save(cache, table.dump(stamp))
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}") from error
    return table


def _open_url(url: str, stat: storage.Stat) -> Table:
    """The index of a shard behind a URL: from the cache, from beside it, or from its headers."""
    stamp = [VERSION, stat.size, stat.tag, storage.shown(url)]
    cache = storage.cache_folder(None) / "index" / f"{storage.digest(url)}.json"
    table = Table.load(_content_of(cache), lambda found: found == stamp, stat.size)
    if table is None:
        # written beside a local shard and uploaded with it: the time in its stamp is of the first copy
        beside = storage.read_small(storage.index_url(url))
        table = Table.load(beside, lambda found: found[1] == stat.size, stat.size)
        if table is None:
            window = Window(lambda first, end: storage.read(url, first, end, stat), stat.size, least=1 << 16)
            table = scan(window, storage.shown(url))
        _save(cache, table.dump(stamp))
    return table


def iterate_meta(path: Path | str) -> Iterator[dict[str, Any]]:
    """The ``.json`` members of a shard in order, without reading the media. A cut shard ends where it is cut.

    Args:
        path: a local path or a URL.

    Raises:
        InputError: it cannot be read, or a ``.json`` is none.
    """
    where = storage.shown(str(path))
    if isinstance(path, str) and storage.is_url(path):
        url, stat = path, storage.stat(path)
        window = Window(lambda a, b: storage.read(url, a, b, stat), stat.size, least=1 << 16, longest=LONGEST_JSON)
        yield from _metas(window, storage.base_name(url), where)
        return
    try:
        with Path(path).open("rb") as file:
            size = file.seek(0, io.SEEK_END)
            window = Window(lambda a, b: _read_at(file, a, b), size, longest=LONGEST_JSON)
            yield from _metas(window, Path(path).name, where)
    except OSError as error:
        raise InputError(f"{where}: {error.strerror or error}") from error


def _metas(window: Window, name: str, where: str) -> Iterator[dict[str, Any]]:
    none = True
    try:
        for member in walk(window):
            none = False
            if member.isreg() and split_name(member.name)[1] == "json":
                window.seek(member.offset_data)
                content = window.read(member.size)
                if len(content) < member.size:
                    return
                yield parse_meta(f"{name}/{printable(member.name)}", content)
    except DAMAGE as error:
        if none:
            raise InputError(f"{where}: not a tar file: {error}") from error


def parse_meta(key: str, content: bytes) -> dict[str, Any]:
    """Read a sample's JSON object."""
    try:
        meta = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{key}: its .json cannot be read: {error}") from error
    if not isinstance(meta, dict):
        raise InputError(f"{key}: its .json holds no object")
    return meta


def _read_at(file: io.BufferedReader, first: int, end: int) -> bytes:
    file.seek(first)
    return file.read(end - first)


def _content_of(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except OSError:
        return None


def _save(path: Path, content: bytes) -> None:
    """Store an index; where that is not allowed, the next process scans again."""
    draft = path.with_name(f".{uuid.uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        draft.write_bytes(content)
        draft.replace(path)
    except OSError:
        with suppress(OSError):
            draft.unlink()
