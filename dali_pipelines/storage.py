"""Shards by URL: names, parts of files, listings, and the folder on the local disk where they are kept."""

from __future__ import annotations

import fcntl
import hashlib
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from dali_pipelines.clients import (
    Client,
    ShortError,
    Stat,
    WholeError,
    call,
    is_url,
    path_of,
    shown,
    status_of,
    url_fault,
)
from megatron_elva.config.errors import InputError

__all__ = ["Stat", "is_url", "shown", "url_fault"]

_PIECE = 64 << 20  # bytes that one request of a download asks for
_MOST_NAMES = 1_000_000  # of one pattern with braces
_INDEX_SUFFIX = ".index.json"

_listed: dict[str, Stat] = {}


def base_name(url: str) -> str:
    """The last part of a URL's path."""
    return path_of(url).rstrip("/").rpartition("/")[2]


def index_url(url: str) -> str:
    """Where the index of a shard stands: beside it."""
    bare, mark, query = url.partition("?") if not url.startswith("s3:") else (url, "", "")
    return bare + _INDEX_SUFFIX + mark + query


def expand(pattern: str) -> list[str]:
    """Write out braces: ``{000..012}`` counts with the zeros given, ``{a,b}`` lists.

    Raises:
        InputError: a range that runs backwards, or more than a million names.
    """
    done: list[str] = []
    waiting = [pattern]
    while waiting:
        name = waiting.pop()
        match = re.search(r"\{(?:(\d+)\.\.(\d+)|([^{}]*,[^{}]*))\}", name)
        if match is None:
            done.append(name)
            continue
        first, last, listed = match.groups()
        if listed is None and not 0 <= int(last) - int(first) < _MOST_NAMES:
            raise InputError(f"{shown(pattern)}: {match[0]} must count up, to {_MOST_NAMES} names at most")
        width = len(first) if listed is None and first.startswith("0") else 0
        words = listed.split(",") if listed is not None else (f"{n:0{width}}" for n in range(int(first), int(last) + 1))
        waiting.extend(reversed([name[: match.start()] + word + name[match.end() :] for word in words]))
        if len(waiting) + len(done) > _MOST_NAMES:
            raise InputError(f"{shown(pattern)}: its braces give more than {_MOST_NAMES} names")
    return done


def stat(url: str) -> Stat:
    """Ask for size and tag of a file; where `find` has just listed it, that answer is used, once.

    Raises:
        InputError: there is no such file, or it cannot be reached.
    """
    listed = _listed.pop(url, None)
    return listed or call(url, lambda client: client.stat(url), small=True)


def local_stat(path: Path) -> Stat:
    """The same for a local file."""
    try:
        stat = path.stat()
    except OSError as error:
        raise InputError(f"{path}: {error.strerror or error}") from error
    return Stat(stat.st_size, str(stat.st_mtime_ns))


def read(url: str, first: int, end: int, expected: Stat) -> bytes:
    """Read bytes ``first`` to ``end`` (not included) with one request.

    Args:
        url: the file.
        first: first byte.
        end: the byte behind the last.
        expected: what `stat` said; a file that is no longer this is refused.

    Raises:
        InputError: they cannot be read.
    """
    if end <= first:
        return b""
    if not expected.ranges:
        raise InputError(f"{shown(url)}: {WholeError(expected)}")

    async def get(client: Client) -> bytes:
        answer = await client.get(url, first, end, expected)
        if len(answer.data) != end - first:
            raise ShortError(f"{len(answer.data)} of {end - first} bytes came")
        return answer.data

    return call(url, get)


def read_small(url: str) -> bytes | None:
    """Read a whole file; None where there is none, or none for us."""

    async def get(client: Client) -> bytes | None:
        try:
            return (await client.get(url, None, None, None)).data
        except Exception as error:
            # without the right to list a bucket, S3 denies what is not there
            if status_of(error) in (401, 403, 404, 410):
                return None
            raise

    return call(url, get)


def find(pattern: str) -> list[str]:
    """The objects on S3 that a pattern with ``*``, ``?``, ``[...]`` or ``**`` matches; other URLs stand for themselves.

    Raises:
        InputError: the bucket cannot be listed.
    """
    rest = pattern.partition("://")[2]
    if not pattern.startswith("s3://") or not re.search("[*?[]", rest):
        return [pattern]
    bucket, _, key = rest.partition("/")
    prefix = re.split("[*?[]", key)[0]
    # without this a listing goes down into folders that the pattern does not want
    shallow = "/" not in key[len(prefix) :] and "**" not in key
    wanted = _regex(key)
    found = call(pattern, lambda client: client.list(bucket, prefix, "/" if shallow else ""))
    names = {f"s3://{bucket}/{name}": stat for name, stat in found if wanted.fullmatch(name)}
    names = {name: stat for name, stat in names.items() if not name.endswith(_INDEX_SUFFIX)}
    _listed.update(names)
    return sorted(names)


def _regex(pattern: str) -> re.Pattern[str]:
    """A glob as a regular expression; ``*`` stays within a folder, ``**/`` is any number of folders."""
    parts = re.split(r"(\*\*/|\*\*|\*|\?|\[!?[^]]+\])", pattern)
    known = {"**/": "(?:.*/)?", "**": ".*", "*": "[^/]*", "?": "[^/]"}
    text = [known.get(p) or (p.replace("[!", "[^") if p[:1] == "[" and p[-1:] == "]" else re.escape(p)) for p in parts]
    return re.compile("".join(text), re.DOTALL)


def cache_folder(cache_dir: str | Path | None) -> Path:
    """Where indexes and shards from URLs are kept: ``cache_dir``, or a folder in the user's cache directory."""
    if cache_dir is not None:
        return Path(cache_dir).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "megatron_elva"


def make_cache(cache_dir: str | Path) -> None:
    """Make a cache folder.

    Raises:
        InputError: nothing can be written there.
    """
    folder = cache_folder(cache_dir)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".{uuid.uuid4().hex}"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise InputError(f"data.cache_dir: {folder}: {error.strerror or error}") from error


def digest(*words: object) -> str:
    """A short name for what these words stand for."""
    return hashlib.sha256("\0".join(map(str, words)).encode()).hexdigest()[:24]


def fetch(url: str, known: Stat, cache_dir: str | Path) -> Path:
    """Keep a whole shard on the local disk; of several processes one downloads and the others wait.

    It appears under its name once it is whole. Its bytes stay until someone removes the folder.

    Raises:
        InputError: it cannot be fetched, or the disk is full.
    """
    folder = cache_folder(cache_dir) / "shards"
    make_cache(folder)
    path = folder / f"{digest(url, known.size, known.tag)}-{base_name(url)}"[:200]
    if not _is_whole(path, known):
        with _locked(path.with_name(path.name + ".lock")):
            if not _is_whole(path, known):
                _download(url, known, path)
    return path


def _is_whole(path: Path, known: Stat) -> bool:
    try:
        return path.stat().st_size == known.size
    except OSError:
        return False


def _download(url: str, known: Stat, path: Path) -> None:
    free = shutil.disk_usage(path.parent).free
    if free < known.size:
        raise InputError(
            f"data.cache_dir: {path.parent} has {free / 1e9:.1f} GB left, {shown(url)} is {known.size / 1e9:.1f} GB"
        )
    draft = path.with_name(f".{path.name[:100]}.{uuid.uuid4().hex}.part")
    try:
        with draft.open("wb") as file:
            if known.ranges:
                for first in range(0, known.size, _PIECE):
                    file.write(read(url, first, min(first + _PIECE, known.size), known))
            else:
                _save_whole(url, known, file)
        draft.replace(path)
    except OSError as error:
        raise InputError(f"data.cache_dir: {path}: {error.strerror or error}") from error
    finally:
        draft.unlink(missing_ok=True)


def _save_whole(url: str, known: Stat, file: IO[bytes]) -> None:
    async def save(client: Any) -> None:
        file.seek(0)
        file.truncate()
        await client.save(url, file, known)
        if file.tell() != known.size:
            raise ShortError(f"{file.tell()} of {known.size} bytes came")

    call(url, save)


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock that goes with its process. Where the disk knows none, two may download, and one copy stays."""
    with path.open("a") as file:
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield
