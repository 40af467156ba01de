"""Each distinct file once: read, hash, probe, and encode again where that is wanted. Results go to a journal.

A journal line is one file's `Fact` or why it is bad. It is written as soon as the file is done, so that a run that was
killed goes on behind it; a last line that the kill cut is not counted.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Callable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, wait
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TextIO

from dali_pipelines.media import Probe, probe
from dali_pipelines.prepare.progress import progress
from dali_pipelines.prepare.reencode import reencode
from dali_pipelines.prepare.scan import File, files
from dali_pipelines.prepare.settings import Room, Settings, one_line
from dali_pipelines.prepare.sources import parquet_bytes
from dali_pipelines.shards import MEDIA
from dali_pipelines.workers import Lost, WorkerPool
from megatron_elva.config.errors import InputError

_EXTENSIONS = {"mov": "mp4", "matroska": "mkv", "avi": "avi", "gif": "gif", "png": "png", "webp": "webp"}
"""Of files that have none of `MEDIA`, by a word in their container's name; others are JPEG."""


@dataclass(frozen=True)
class Fact:
    """What is known of one file.

    Attributes:
        sha256: of the bytes that were found.
        source_bytes: their number.
        bytes: of what is stored.
        extension: of its member in a shard.
        encoded: it was encoded again and waits in the folder of those.
        width: upright, in pixels, as stored.
        height: likewise.
        frames: as counted in the packets; an image has 1.
        seconds: length; 0 for an image.
        codec: plain name, as stored.
        source_codec: as found.
        lost: frames that encoding had to leave out because they are damaged.
    """

    sha256: str
    source_bytes: int
    bytes: int
    extension: str
    encoded: bool
    width: int
    height: int
    frames: int
    seconds: float
    codec: str
    source_codec: str
    lost: int = 0

    @property
    def described(self) -> dict[str, Any]:
        """What a sample's JSON says of the file, enough to know its length in tokens."""
        return {
            "width": self.width, "height": self.height, "frames": self.frames,
            "seconds": round(self.seconds, 3), "codec": self.codec,
        }  # fmt: skip


@dataclass(frozen=True)
class Bad:
    """Why a file cannot be used, and at which stage that was found."""

    stage: str
    reason: str


def encoded_path(room: Room, sha256: str, settings: Settings) -> Path:
    """Where a file that was encoded again waits for its shard."""
    tag = settings.reencode.tag if settings.reencode else ""
    return room.encoded / sha256[:2] / f"{sha256}-{tag}.mp4"


def read_file(file: File, most: int | None = None) -> bytes:
    """The bytes of a file, from the first of its folders that has it.

    Raises:
        InputError: none has it, or it has more than ``most`` bytes.
        OSError: it cannot be read.
    """
    if isinstance(file.reference, dict):
        return parquet_bytes(file.reference)
    for base in file.bases:
        path = Path(base, file.reference)
        if path.is_file():
            if most is not None and (size := path.stat().st_size) > most:
                raise InputError(f"too large: {size / 1e6:,.1f} MB, --max-source-mb is {most / 1e6:g}")
            return path.read_bytes()
        if path.is_dir():
            raise InputError(f"{path}: is a folder; frames as single images are not read as a video")
    raise InputError(f"{Path(file.bases[0], file.reference)}: no such file")


_DISK_FAULTS = ("No space left", "Disk quota", "Read-only file system")


@dataclass(frozen=True)
class Handler:
    """What a worker does with a file. Makes itself ready in the worker process, as `WorkerPool` wants it."""

    room: Room
    settings: Settings

    def __call__(self) -> Callable[[Any, Callable[[str], None]], Fact | Bad]:
        """Called once in the worker."""
        return self.handle

    def handle(self, file: File, note: Callable[[str], None]) -> Fact | Bad:
        """Learn what there is to know of a file; nothing is raised, whatever it holds.

        Raises:
            OSError: what comes out of it cannot be written.
        """
        note(file.name)
        stage = "read"
        try:
            data = read_file(file, self.settings.limits.bytes)
            stage = "probe"
            found = probe(data, self.settings.limits)
            if found.fault:
                raise InputError(found.cut)
            fact = _fact(file, data, found)
            stage = "encode"
            if self.settings.reencode and found.frames > 1:
                return self._encoded(data, fact, lambda: note(file.name))
            return fact
        except (InputError, OSError) as error:
            if stage == "encode" and (isinstance(error, OSError) or any(w in str(error) for w in _DISK_FAULTS)):
                raise OSError(one_line(error)) from error  # a full disk is no fault of the file's
            return Bad(stage, one_line(error).replace("data.max_source_", "--max-source-"))  # the option of this tool
        except Exception as error:  # a fault of ours must not stop the other files either
            return Bad(stage, f"{type(error).__name__}: {one_line(error)}")

    def _encoded(self, data: bytes, fact: Fact, alive: Callable[[], None]) -> Fact:
        path = encoded_path(self.room, fact.sha256, self.settings)
        about = path.with_suffix(".json")
        if not (
            about.is_file() and path.is_file()
        ):  # the same bytes may come under another name, or a killed run had done them
            assert self.settings.reencode is not None
            path.parent.mkdir(parents=True, exist_ok=True)
            part = path.with_name(f"{path.name}.{uuid.uuid4().hex[:8]}.part")  # another task may have the same bytes
            try:
                lost = reencode(data, self.settings.reencode, self.settings.limits, part, alive)
                content = part.read_bytes()
                found = probe(content, self.settings.limits)
                part.replace(path)
            finally:
                part.unlink(missing_ok=True)
            new = {
                "bytes": len(content), "extension": "mp4", "encoded": True, "lost": lost, "codec": found.codec,
                "width": found.native[1], "height": found.native[0], "frames": found.frames, "seconds": found.duration,
            }  # fmt: skip
            draft = about.with_name(f"{about.name}.{part.name}")
            draft.write_text(json.dumps(new))
            draft.replace(about)
        return Fact(**{**asdict(fact), **json.loads(about.read_text())})


def _fact(file: File, data: bytes, found: Probe) -> Fact:
    extension = Path(file.name).suffix.lower().lstrip(".")
    if extension not in MEDIA:
        extension = next((e for word, e in _EXTENSIONS.items() if word in found.container), "jpg")
    height, width = found.native
    if not (height and width):
        raise InputError("its size cannot be read")
    seconds = found.duration if found.frames > 1 else 0.0
    sha256 = hashlib.sha256(data).hexdigest()
    return Fact(
        sha256, len(data), len(data), extension, False, width, height, found.frames, seconds, found.codec, found.codec
    )


def journal(room: Room, task: int) -> Path:
    """The journal of one task."""
    return room.state / "journal" / f"{task:05d}.jsonl"


def read_journals(room: Room) -> dict[int, Fact | Bad]:
    """What is known of the files so far, by their number."""
    known: dict[int, Fact | Bad] = {}
    for path in sorted((room.state / "journal").glob("*.jsonl")):
        with path.open() as lines:
            for line in lines:
                try:
                    content = json.loads(line)
                    number = content.pop("file")
                    known[number] = Bad(**content) if "reason" in content else Fact(**content)
                except (ValueError, KeyError, TypeError, AttributeError):
                    continue  # cut by a kill
    return known


def look_at_files(room: Room, settings: Settings, workers: int, task: int = 0, tasks: int = 1) -> None:
    """Handle this task's share of the files that no journal has.

    Args:
        room: the preparation.
        settings: its settings.
        workers: processes.
        task: which share: files whose number is this modulo `tasks`.
        tasks: number of shares.
    """
    known = read_journals(room)
    path = journal(room, task)
    path.parent.mkdir(parents=True, exist_ok=True)
    _end_line(path)
    todo = ((i, file) for i, file in enumerate(files(room)) if i % tasks == task and i not in known)
    left = sum(1 for i, _ in enumerate(files(room)) if i % tasks == task and i not in known)
    if not left:
        return
    with path.open("a") as out, progress(left, "files", "file") as bar:
        for number, result in _results(Handler(room, settings), todo, min(workers, left), settings.timeout_s):
            _record(out, number, result)
            bar.update()


def _record(out: TextIO, number: int, result: Fact | Bad) -> None:
    out.write(json.dumps({"file": number, **asdict(result)}) + "\n")
    out.flush()


def _end_line(path: Path) -> None:
    """End the last line of a journal whose writer was killed."""
    if path.is_file() and path.stat().st_size and not path.read_bytes().endswith(b"\n"):
        with path.open("a") as file:
            file.write("\n")


def _results(
    handler: Handler, todo: Iterator[tuple[int, File]], workers: int, timeout_s: float
) -> Iterator[tuple[int, Fact | Bad]]:
    """Results as they come, with a few tasks ahead of each worker."""
    pool = WorkerPool(handler, workers, timeout_s, preload=(__name__,))  # the imports once for all workers
    running: dict[Future[Any], int] = {}
    try:
        while True:
            for number, file in islice(todo, max(0, 3 * workers - len(running))):
                running[pool.submit(file)] = number
            if not running:
                return
            done, _ = wait(running, return_when=FIRST_COMPLETED)
            for future in done:
                result = future.result()
                yield running.pop(future), Bad("worker", result.reason) if isinstance(result, Lost) else result
    finally:
        pool.close()
