"""Requests to file servers: ``s3://`` through s3fs, ``http://`` and ``https://`` through fsspec, loaded on first use.

Every request is tried a few times with growing pauses. What still fails is an `InputError` with the URL and the reason.
"""

from __future__ import annotations

import asyncio
import os
import random
import re
import sys
import threading
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, TypeVar

from megatron_elva.config.errors import InputError

SCHEMES = ("s3", "http", "https")
CONNECT_S = 5.0
"""Longest wait for a connection, in seconds."""
READ_S = 20.0
"""Longest silence in the middle of an answer, in seconds."""
PAUSES = (0.25, 0.5, 1.0, 2.0, 4.0)
"""Seconds between tries, each up to half as long again."""
PATIENCE_S = 40.0
"""No further try after so many seconds."""


_CREDENTIALS = "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or AWS_PROFILE"
_LIBRARIES = frozenset({"aiohttp", "aiobotocore", "botocore", "fsspec", "s3fs"})
_FATAL = frozenset({"ParamValidationError", "InvalidURL", "InvalidUrlClientError", "NonHttpUrlClientError"})
_NO_CREDENTIALS = re.compile("Credential|ProfileNotFound|Token")
_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)")

T = TypeVar("T")


@dataclass(frozen=True)
class Stat:
    """What stands behind a URL.

    Attributes:
        size: bytes.
        tag: its ETag, or else when it was changed; empty where the server says neither.
        ranges: whether the server gives parts of it.
    """

    size: int
    tag: str
    ranges: bool = True


@dataclass(frozen=True)
class Answer:
    """Bytes of a file, and what the answer says of the whole file."""

    data: bytes
    stat: Stat


class _StatusError(Exception):
    """An HTTP status from 400 on."""

    def __init__(self, status: int) -> None:
        super().__init__(f"HTTP status {status}")
        self.status = status


class ShortError(Exception):
    """An answer that ends early."""


class WholeError(Exception):
    """A server that was asked for a part and sends everything."""

    def __init__(self, stat: Stat) -> None:
        super().__init__("the server gives no parts of files; set data.cache_dir, so that shards are fetched whole")
        self.stat = stat


def is_url(name: str | Path) -> bool:
    """Whether this is a URL rather than a local path."""
    return isinstance(name, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", name) is not None


def shown(url: str) -> str:
    """A URL as messages show it: without passwords and without the query, which may hold a signature."""
    if not is_url(url):
        return url
    scheme, _, rest = url.partition("://")
    return f"{scheme}://{rest.partition('/')[0].rpartition('@')[2]}{path_of(url)}"


def path_of(url: str) -> str:
    """The path in a URL, with its first slash and without the query."""
    # a key on S3 may hold ? and #, which mean nothing there
    rest = url.partition("://")[2] if url.startswith("s3:") else re.split("[?#]", url.partition("://")[2])[0]
    return rest[rest.find("/") :] if "/" in rest else ""


def url_fault(url: str) -> str | None:
    """What is wrong with the form of a URL or of a pattern of URLs, found without asking any server."""
    scheme, _, rest = url.partition("://")
    if scheme not in SCHEMES:
        return f"scheme {scheme}; allowed: {', '.join(SCHEMES)}, or a local path"
    host, _, path = rest.partition("/")
    if not host or re.search("[*?{[]", host):
        return "names no bucket" if scheme == "s3" else "names no host"
    if not path:
        return "names no shard"
    if scheme != "s3" and "*" in path_of(url):
        return "a web server lists no files; write the names with braces, as in shard-{000..127}.tar"
    return None


def call(url: str, ask: Callable[[Client], Awaitable[T]], small: bool = False) -> T:
    """Carry a request out on the client of this process, several times if need be."""
    client = _client(url)
    from fsspec.asyn import sync

    start = time.monotonic()
    for pause in (*PAUSES, None):
        try:
            return sync(client.loop, ask, client, timeout=CONNECT_S + READ_S if small else None)
        except Exception as error:
            reason, again = _reason(error, url)
            late = time.monotonic() - start > PATIENCE_S
            if pause is None or late or not again:
                times = f" (after {time.monotonic() - start:.0f} s of tries)" if again else ""
                raise InputError(f"{shown(url)}: {reason}{times}") from error
            time.sleep(pause * (1 + _jitter.random() / 2))
    raise AssertionError("unreachable")


def _reason(error: Exception, url: str) -> tuple[str, bool]:
    """Why a request failed, in words, and whether it may succeed later. What is no fault of the request is raised."""
    text = " ".join(str(error).split()) or type(error).__name__
    name = type(error).__name__
    status, code = status_of(error), _code(error)
    if isinstance(error, InputError):
        raise error
    if status is not None:
        return _status_reason(status, code, url)
    if isinstance(error, WholeError):
        return text, False
    if _NO_CREDENTIALS.search(name):
        return f"no usable credentials ({text}); they come from {_CREDENTIALS}", False
    if isinstance(error, (TimeoutError, asyncio.TimeoutError)) or "Timeout" in name:
        return f"no answer within {READ_S:g} s", True
    if isinstance(error, ShortError | asyncio.IncompleteReadError):
        return f"the answer broke off: {text}", True
    if isinstance(error, OSError) or type(error).__module__.partition(".")[0] in _LIBRARIES:
        return text, name not in _FATAL
    raise error


def _status_reason(status: int, code: str, url: str) -> tuple[str, bool]:
    """What an HTTP status means here, and whether to try again."""
    said = f"HTTP status {status}" + (f", {code}" if code and not code.isdigit() else "")
    if code in ("ExpiredToken", "InvalidToken", "TokenRefreshRequired") or status in (401, 403):
        source = f"; credentials come from {_CREDENTIALS}" if url.startswith("s3:") else ""
        return f"access denied ({said}){source}", False
    if status in (404, 410):
        return ("no such bucket" if code == "NoSuchBucket" else "no such file") + f" ({said})", False
    if status in (412, 416):
        return f"has changed since it was indexed ({said})", False
    if status in (301, 307, 400) and url.startswith("s3:") and code not in ("RequestTimeout", "RequestTimeTooSkewed"):
        return f"refused ({said}); the server comes from AWS_ENDPOINT_URL, the region from AWS_REGION", False
    return said, status >= 500 or status in (408, 425, 429) or code == "RequestTimeout"


def status_of(error: BaseException) -> int | None:
    """The HTTP status behind an error, where there is one."""
    if isinstance(error, _StatusError):
        return error.status
    response = getattr(error, "response", None)
    return response.get("ResponseMetadata", {}).get("HTTPStatusCode") if isinstance(response, dict) else None


def _code(error: BaseException) -> str:
    """The name that S3 gives an error."""
    response = getattr(error, "response", None)
    return str(response.get("Error", {}).get("Code", "")) if isinstance(response, dict) else ""


class Client:
    """One kind of server. The methods run on fsspec's loop."""

    def __init__(self, scheme: str, options: dict[str, Any]) -> None:
        import fsspec

        self.fs: Any = fsspec.filesystem(scheme, skip_instance_cache=True, **options)
        self.loop = self.fs.loop

    async def stat(self, url: str) -> Stat:
        """Size and tag."""
        raise NotImplementedError

    async def get(self, url: str, first: int | None, end: int | None, expected: Stat | None) -> Answer:
        """A part of a file, or all of it."""
        raise NotImplementedError

    async def list(self, bucket: str, prefix: str, delimiter: str) -> list[tuple[str, Stat]]:
        """Names and stats of the files under a prefix."""
        raise NotImplementedError


class _S3Client(Client):
    def __init__(self) -> None:
        # one try at a time here: `call` is what tries again, and ten times five tries would take minutes
        options = {
            "connect_timeout": CONNECT_S,
            "read_timeout": READ_S,
            "retries": {"total_max_attempts": 1},
            "max_pool_connections": 32,
        }
        super().__init__("s3", {"config_kwargs": options})

    async def stat(self, url: str) -> Stat:
        bucket, key = _split_s3(url)
        client = await self.fs.set_session()
        head = await client.head_object(Bucket=bucket, Key=key)
        return Stat(head["ContentLength"], head["ETag"].strip('"'))

    async def get(self, url: str, first: int | None, end: int | None, expected: Stat | None) -> Answer:
        bucket, key = _split_s3(url)
        client = await self.fs.set_session()
        part = {} if first is None or end is None else {"Range": f"bytes={first}-{end - 1}"}
        answer = await client.get_object(Bucket=bucket, Key=key, **part)
        try:
            size = _total(answer.get("ContentRange"), first) if part else answer["ContentLength"]
            stat = Stat(size, answer["ETag"].strip('"'))
            _compare(url, expected, stat)
            return Answer(await answer["Body"].read(), stat)
        finally:
            answer["Body"].close()

    async def list(self, bucket: str, prefix: str, delimiter: str) -> list[tuple[str, Stat]]:
        client = await self.fs.set_session()
        found: list[tuple[str, Stat]] = []
        more: dict[str, str] = {}
        while True:
            page = await client.list_objects_v2(Bucket=bucket, Prefix=prefix, Delimiter=delimiter, **more)
            for entry in page.get("Contents", []):
                found.append((entry["Key"], Stat(entry["Size"], entry["ETag"].strip('"'))))
            if not page.get("IsTruncated"):
                return found
            more = {"ContinuationToken": page["NextContinuationToken"]}


class _HttpClient(Client):
    def __init__(self) -> None:
        import aiohttp

        timeout = aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=READ_S)
        super().__init__("https", {"client_kwargs": {"timeout": timeout, "trust_env": True}})

    async def _open(self, url: str, part: str | None) -> Any:
        session = await self.fs.set_session()
        headers = {"Accept-Encoding": "identity"} | ({"Range": part} if part else {})
        return session.get(self.fs.encode_url(url), headers=headers)

    async def stat(self, url: str) -> Stat:
        # not HEAD: signed URLs refuse it, and this shows whether parts can be had
        try:
            return (await self.get(url, 0, 1, None)).stat
        except WholeError as whole:
            if whole.stat.size < 0:
                raise InputError(f"{shown(url)}: the server does not say how large it is") from whole
            return whole.stat

    async def get(self, url: str, first: int | None, end: int | None, expected: Stat | None) -> Answer:
        if first is None or end is None:
            async with await self._open(url, None) as response:
                stat = _http_stat(response)
                return Answer(await response.read(), stat)
        async with await self._open(url, f"bytes={first}-{end - 1}") as response:
            stat = _http_stat(response)
            if response.status != 206:
                raise WholeError(Stat(stat.size, stat.tag, ranges=False))
            stat = Stat(_total(response.headers.get("Content-Range"), first), stat.tag)
            _compare(url, expected, stat)
            return Answer(await response.content.readexactly(end - first), stat)

    async def save(self, url: str, file: IO[bytes], expected: Stat) -> None:
        """Write a whole file, for servers that give no parts."""
        async with await self._open(url, None) as response:
            _compare(url, expected, _http_stat(response))
            async for piece in response.content.iter_chunked(1 << 20):
                file.write(piece)


def _http_stat(response: Any) -> Stat:
    """Status and headers of an answer; the size is that of its body, -1 where it is not said."""
    if response.status >= 400:
        raise _StatusError(response.status)
    tag = response.headers.get("ETag", "")
    tag = "" if tag.startswith("W/") else tag.strip('"')
    return Stat(int(response.headers.get("Content-Length", "-1")), tag or response.headers.get("Last-Modified", ""))


def _split_s3(url: str) -> tuple[str, str]:
    bucket, _, key = url.partition("://")[2].partition("/")
    return bucket, key


def _total(header: str | None, first: int | None) -> int:
    """Size of the whole file from an answer's Content-Range."""
    match = _RANGE.fullmatch(header or "")
    if match is None or int(match[1]) != first:
        raise ShortError(f"asked from byte {first}, the answer says {header!r}")
    return int(match[3])


def _compare(url: str, expected: Stat | None, found: Stat) -> None:
    """Refuse a file that is another by now."""
    if expected is None or (found.size, found.tag) == (expected.size, expected.tag):
        return
    if found.size != expected.size:
        how = "shorter" if found.size < expected.size else "longer"
        raise InputError(f"{shown(url)}: the shard has become {how}: {found.size} bytes, {expected.size} when opened")
    raise InputError(f"{shown(url)}: the shard has changed since it was opened (another tag, the same size)")


_clients: dict[tuple[int, str], Client] = {}
_jitter = random.SystemRandom()
_lock = threading.Lock()


def _after_fork() -> None:
    """In a forked process: another thread may have held the lock, and the thread of fsspec's loop is gone."""
    global _lock
    _lock = threading.Lock()
    asyn = sys.modules.get("fsspec.asyn")
    if asyn is not None:  # its releases before 2026 do not do this themselves
        asyn.loop[0] = asyn.iothread[0] = None
        asyn.reset_lock()


os.register_at_fork(after_in_child=_after_fork)


def _client(url: str) -> Client:
    """The client of this process for a URL.

    Raises:
        InputError: a scheme that is not known, or its library is missing.
    """
    fault = url_fault(url)
    if fault:
        raise InputError(f"{shown(url)}: {fault}")
    scheme = "s3" if url.startswith("s3://") else "http"
    with _lock:
        key = os.getpid(), scheme
        if key not in _clients:
            try:
                if scheme == "s3":
                    import s3fs  # noqa: F401 (here, for the message; fsspec finds it by name)
                _clients[key] = _S3Client() if scheme == "s3" else _HttpClient()
            except ImportError as error:
                raise InputError(f"{shown(url)}: needs s3fs: pip install 'megatron-elva[s3]' ({error})") from error
        return _clients[key]
