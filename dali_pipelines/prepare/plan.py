"""Which samples are used and which shard each goes to: decided once, from the work list and the journals alone."""

from __future__ import annotations

import hashlib
import json
import tarfile
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from dali_pipelines.prepare.media import Bad, Fact, read_journals
from dali_pipelines.prepare.scan import File, Sample, files, samples
from dali_pipelines.prepare.settings import TRAIN, Room, Settings, read_json, write_json
from megatron_elva.config.errors import InputError

_BLOCK = 512


@dataclass(frozen=True)
class Shard:
    """One shard before it is written.

    Attributes:
        name: below the folder of the preparation; splits other than that for training have a folder each.
        split: whose it is.
        samples: numbers of its samples in the work list, in order.
    """

    name: str
    split: str
    samples: list[int]


@dataclass(frozen=True)
class Plan:
    """The shards, and what is left out.

    Attributes:
        shards: all of them.
        left_out: lines of the report, scan, files and duplicates together.
        duplicates: samples left out since an earlier one has their files and text.
        shared: samples of which another one has the same files with another text.
    """

    shards: list[Shard]
    left_out: list[dict[str, str]]
    duplicates: int
    shared: int


def load_plan(room: Room) -> Plan | None:
    """The plan of a preparation that has one already."""
    content = read_json(room.plan)
    return None if content is None else Plan(**{**content, "shards": [Shard(**s) for s in content["shards"]]})


def make_plan(room: Room, settings: Settings) -> Plan:
    """Make the plan, or read it where it was made. Whoever makes it, makes the same.

    Raises:
        InputError: no sample is left.
    """
    made = load_plan(room)
    if made is not None:
        return made
    facts, listed = read_journals(room), list(files(room))
    keep = _Keep(settings.dedup)
    for number, sample in enumerate(samples(room)):
        keep.add(number, sample, facts, listed)
    faults = [json.loads(line) for line in (room.state / "faults.jsonl").read_text().splitlines()]
    if not keep.used:
        first = (faults + keep.left_out)[0]
        raise InputError(f"no usable sample; the first: {first['path']}: {first['reason']}")
    shards = [
        shard
        for split, numbers in _split(keep.used, settings).items()
        for shard in _cut(split, _shuffled(numbers, settings.shuffle), keep.sizes, settings)
    ]
    contents = Counter(sample.content for sample in keep.used if sample.content)
    shared = sum(n for n in contents.values() if n > 1)
    plan = Plan(shards, faults + keep.left_out, keep.duplicates, shared)
    write_json(room.plan, {**vars(plan), "shards": [vars(shard) for shard in shards]})
    return plan


@dataclass(frozen=True)
class _Used:
    """A sample that is used: its number, the digests of its files, and all of them as one digest."""

    number: int
    hashes: tuple[str, ...]
    content: str
    text: str


class _Keep:
    """Goes through the samples in order and keeps those that can be used, once each."""

    def __init__(self, dedup: bool) -> None:
        self.used: list[_Used] = []
        self.sizes: dict[int, int] = {}
        self.left_out: list[dict[str, str]] = []
        self.duplicates = 0
        self._first: dict[tuple[str, str], str] | None = {} if dedup else None

    def add(self, number: int, sample: Sample, facts: dict[int, Fact | Bad], listed: list[File]) -> None:
        """Take a sample in, or write down why not."""
        found: list[Fact] = []
        for i in sample.files:
            fact = facts[i]
            if isinstance(fact, Bad):
                self._leave(sample, listed[i].name, fact.stage, fact.reason)
                return
            found.append(fact)
        hashes = tuple(fact.sha256 for fact in found)
        content = hashlib.sha256("".join(hashes).encode()).hexdigest()[:32] if hashes else ""
        if self._first is not None:
            first = self._first.setdefault((content, sample.text), sample.key)
            if first != sample.key:
                self.duplicates += 1
                self._leave(sample, sample.where, "dedup", f"same files and text as {first}")
                return
        self.used.append(_Used(number, hashes, content, sample.text))
        sizes = [len(described(sample, found, listed)), *(fact.bytes for fact in found)]
        self.sizes[number] = sum(_BLOCK + -(-size // _BLOCK) * _BLOCK for size in sizes)  # as tar members

    def _leave(self, sample: Sample, path: str, stage: str, reason: str) -> None:
        self.left_out.append({"key": sample.key, "path": path, "stage": stage, "reason": reason})


def described(sample: Sample, found: list[Fact], listed: list[File]) -> bytes:
    """The JSON member of a sample: its text, and what its files are."""
    media = [{**fact.described, "file": listed[i].name} for i, fact in zip(sample.files, found, strict=True)]
    meta: dict[str, Any] = {**sample.meta, **({"media": media} if media else {})}
    return json.dumps(meta, ensure_ascii=False).encode(errors="backslashreplace")  # the escapes are those of JSON


def _split(used: list[_Used], settings: Settings) -> dict[str, list[int]]:
    """Share the samples out. Samples with a file in common stay together, so that none is trained on and tested."""
    groups: dict[str, list[int]] = {}
    for sample, root in zip(used, _roots(used), strict=True):
        groups.setdefault(root, []).append(sample.number)
    seed = "" if settings.shuffle is None else str(settings.shuffle)
    order = sorted(groups, key=lambda root: hashlib.sha256(f"{seed}/{root}".encode()).digest())
    split_of: dict[int, str] = {}
    for name, share in settings.splits:
        left = max(1, round(share * len(used)))
        for root in order:
            numbers = groups[root]
            if numbers[0] not in split_of and len(numbers) <= left and len(split_of) + len(numbers) < len(used):
                split_of.update(dict.fromkeys(numbers, name))
                left -= len(numbers)
    splits: dict[str, list[int]] = {name: [] for name in (TRAIN, *(name for name, _ in settings.splits))}
    for sample in used:
        splits[split_of.get(sample.number, TRAIN)].append(sample.number)
    return {name: numbers for name, numbers in splits.items() if numbers}


def _roots(used: list[_Used]) -> list[str]:
    """For each sample a name of the group of samples that it is joined to by files in common."""
    parent: dict[str, str] = {}

    def root(name: str) -> str:
        while parent.setdefault(name, name) != name:
            parent[name] = parent[parent[name]]
            name = parent[name]
        return name

    for sample in used:
        for other in sample.hashes[1:]:
            a, b = sorted((root(sample.hashes[0]), root(other)))
            parent[b] = a
    return [root(sample.hashes[0]) if sample.hashes else f"text {sample.text}" for sample in used]


def _shuffled(numbers: list[int], seed: int | None) -> list[int]:
    if seed is None:
        return numbers
    return np.random.default_rng(seed).permutation(np.array(numbers, np.int64)).tolist()


def _cut(split: str, numbers: list[int], sizes: dict[int, int], settings: Settings) -> Iterator[Shard]:
    """Cut a split into shards by size or number of samples."""
    most = settings.shard_mb * 10**6 - tarfile.RECORDSIZE  # the end of a tar file is at most so long
    shard = Shard(_name(split, 0), split, [])
    size = 0
    for number in numbers:
        full = len(shard.samples) == settings.shard_samples if settings.shard_samples else size + sizes[number] > most
        if shard.samples and full:
            yield shard
            shard = replace(shard, name=_name(split, int(shard.name[-9:-4]) + 1), samples=[])
            size = 0
        shard.samples.append(number)
        size += sizes[number]
    if shard.samples:
        yield shard


def _name(split: str, number: int) -> str:
    name = f"{split}-{number:05d}.tar"
    return name if split == TRAIN else f"{split}/{name}"
