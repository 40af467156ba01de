"""Shards by the plan, each under its name only when it is whole."""

from __future__ import annotations

import hashlib
import io
import json
import shutil
import tarfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

from dali_pipelines.prepare.media import Fact, Handler, encoded_path, read_file, read_journals
from dali_pipelines.prepare.plan import Plan, Shard, described
from dali_pipelines.prepare.progress import progress
from dali_pipelines.prepare.scan import File, Sample, files
from dali_pipelines.prepare.settings import Room, Settings, one_line, read_json, write_json
from dali_pipelines.shards import ShardIndex
from megatron_elva.config.errors import InputError


@dataclass
class _Writer:
    """What all shards of this process share. The work list is read from disk: only its lines' places are kept."""

    room: Room
    settings: Settings
    facts: dict[int, Any] = field(init=False)
    listed: list[File] = field(init=False)
    offsets: list[int] = field(init=False)

    def __post_init__(self) -> None:
        self.facts, self.listed = read_journals(self.room), list(files(self.room))
        self.offsets = [0]
        with self.room.work.open("rb") as lines:
            self.offsets += [lines.tell() for _ in iter(lines.readline, b"")]

    def write(self, shard: Shard) -> None:
        """Write a shard and what is in it."""
        path = self.room.shard(shard.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.part")
        left_out: list[dict[str, str]] = []
        with part.open("wb") as raw:
            out = _Hashing(raw)
            with tarfile.open(fileobj=out, mode="w|", format=tarfile.USTAR_FORMAT) as tar:  # type: ignore[call-overload]
                for name, content in self._members(shard, left_out):
                    _add(tar, name, content)
        part.replace(path)
        ShardIndex(path)  # writes the index beside it
        state = {
            "name": shard.name, "split": shard.split, "samples": len(shard.samples) - len(left_out),
            "bytes": out.bytes, "sha256": out.hash.hexdigest(), "left_out": left_out,
        }  # fmt: skip
        write_json(self.room.shard_state(shard.name), state)

    def _members(self, shard: Shard, left_out: list[dict[str, str]]) -> Iterator[tuple[str, bytes]]:
        with self.room.work.open("rb") as work:
            for number in shard.samples:
                work.seek(self.offsets[number])
                sample = Sample(**json.loads(work.readline()))
                found = [self.facts[i] for i in sample.files]
                try:
                    contents = [self._content(i, fact) for i, fact in zip(sample.files, found, strict=True)]
                except (InputError, OSError) as error:
                    reason = one_line(error)
                    left_out.append({"key": sample.key, "path": sample.where, "stage": "write", "reason": reason})
                    continue
                yield f"{sample.key}.json", described(sample, found, self.listed)
                width = len(str(len(contents) - 1))
                for i, (fact, content) in enumerate(zip(found, contents, strict=True)):
                    # media of a sample are read in the order of these names
                    middle = f".{i:0{width}d}" if len(contents) > 1 else ""
                    yield f"{sample.key}{middle}.{fact.extension}", content

    def _content(self, number: int, fact: Fact) -> bytes:
        if fact.encoded:
            path = encoded_path(self.room, fact.sha256, self.settings)
            if not path.is_file():  # a shard was removed after all had been written
                again = Handler(self.room, self.settings).handle(self.listed[number], lambda _: None)
                if again != fact:
                    raise InputError(f"{self.listed[number].name}: has changed since it was looked at")
            return path.read_bytes()
        data = read_file(self.listed[number])
        if hashlib.sha256(data).hexdigest() != fact.sha256:
            raise InputError(f"{self.listed[number].name}: has changed since it was looked at")
        return data


class _Hashing:
    """A file that knows the digest of what was written to it."""

    def __init__(self, file: io.BufferedWriter) -> None:
        self.file, self.hash, self.bytes = file, hashlib.sha256(), 0

    def write(self, data: bytes) -> int:
        """As a file's."""
        self.hash.update(data)
        self.bytes += len(data)
        return self.file.write(data)


def _add(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    info = tarfile.TarInfo(name)
    info.size = len(data)
    tar.addfile(info, io.BytesIO(data))


def is_written(room: Room, shard: Shard) -> bool:
    """Whether a shard is complete."""
    state = read_json(room.shard_state(shard.name))
    path = room.shard(shard.name)
    return state is not None and path.is_file() and path.stat().st_size == state["bytes"]


def write_shards(room: Room, settings: Settings, plan: Plan, workers: int, task: int = 0, tasks: int = 1) -> None:
    """Write this task's share of the shards, those that are complete left out.

    Args:
        room: the preparation.
        settings: its settings.
        plan: its plan.
        workers: shards at a time. Threads are enough: nothing is decoded here, and hashing lets other threads run.
        task: which share: shards whose number is this modulo `tasks`.
        tasks: number of shares.
    """
    mine = [shard for i, shard in enumerate(plan.shards) if i % tasks == task]
    missing = [shard for shard in mine if not is_written(room, shard)]
    if not missing:
        return
    writer = _Writer(room, settings)
    total = sum(len(shard.samples) for shard in missing)
    with ThreadPoolExecutor(workers) as pool, progress(total, "shards", "sample") as bar:
        running = {pool.submit(writer.write, shard): shard for shard in missing}
        try:
            for future in as_completed(running):
                future.result()
                bar.update(len(running[future].samples))
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def remove_encoded(room: Room) -> None:
    """Remove files that were encoded again and are in their shards now."""
    if room.encoded.is_dir():
        shutil.rmtree(room.encoded)
