"""What the data workers do: measure samples and build packs. Pure functions of sample numbers.

A bad sample is replaced from the same source: by a sample that follows from the bad one's number alone, so that the
stream stays the same on every rank, with any number of workers and after a restart.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from dali_pipelines.blend import Blend
from dali_pipelines.packing import Budget, Length
from dali_pipelines.packs import Built, Encoded, SampleEncoder, Source, UnusableError, at_stage
from dali_pipelines.report import NONE_PASSED_BY, PassedBy, short
from dali_pipelines.shards import RawSample, SampleMeta
from megatron_elva.layout import Skipped

TRIES = 8
"""Samples that are looked at as a replacement before a pack goes without."""

_REPLACEMENT = 2  # keeps this use of the seed apart from those of the blend

Outcome = tuple[str, Encoded | UnusableError]
"""Key of a sample, and the sample or why it cannot be used."""

R = TypeVar("R", RawSample, SampleMeta)

Report = Callable[[str], None]
"""Told which sample is being worked on."""


@dataclass(frozen=True)
class Measure:
    """Ask for the lengths of samples, by their numbers in the stream; those in `passed_by` are bad."""

    numbers: tuple[int, ...]
    passed_by: PassedBy = NONE_PASSED_BY


@dataclass(frozen=True)
class Measured:
    """What a sample's length is, or why it cannot be used."""

    number: int
    length: Length | None
    bad: Skipped | None = None


@dataclass(frozen=True)
class Build:
    """Ask for a pack of samples, by their numbers in the stream; those in `passed_by` are bad.

    `on_device` is False where a device failed to decode them.
    """

    numbers: tuple[int, ...]
    passed_by: PassedBy = NONE_PASSED_BY
    on_device: bool = True


class Builder:
    """Answers `Measure` and `Build`. It can be sent to other processes.

    Args:
        sources: by name.
        blend: the order of samples.
        encoder: of samples.
        budget: of a pack; None: a pack holds what it is asked to hold.
        listed: samples to pass by; tasks name only those that came later.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        blend: Blend,
        encoder: SampleEncoder,
        budget: Budget | None = None,
        listed: PassedBy = NONE_PASSED_BY,
    ) -> None:
        self.sources, self.blend, self.encoder, self.budget, self.listed = sources, blend, encoder, budget, listed

    def __call__(self, task: Measure | Build, report: Report = lambda key: None) -> list[Measured] | Built:
        """Do a task."""
        _ = self.encoder.tokenizer  # if it cannot be loaded that ends the run; it is no fault of a sample's
        return self.measure(task, report) if isinstance(task, Measure) else self.build(task, report)

    def measure(self, task: Measure, report: Report = lambda key: None) -> list[Measured]:
        """The length of each sample asked for, in order."""
        return [self._measured(number, task.passed_by, report) for number in task.numbers]

    def build(self, task: Build, report: Report = lambda key: None) -> Built:
        """The pack asked for: each sample, or else what replaces it, or else without it."""
        outcomes = [self._sample(*self.blend[number], task, report) for number in task.numbers]
        outcomes, total = self._within_budget(outcomes)
        built = Built([], [], [], len(task.numbers))
        for number, (key, found) in zip(task.numbers, outcomes, strict=True):
            if isinstance(found, UnusableError):
                instead = self._replacement(number, total, task, report)
                built.skipped.append(Skipped(key, found.reason, found.stage, instead and instead[0]))
                if instead is None:
                    continue
                key, found = instead
                total += found.length
            built.keys.append(key)
            built.samples.append(found)
        return built

    def _within_budget(self, outcomes: list[Outcome]) -> tuple[list[Outcome], Length]:
        """Take out what is longer than it was measured to be, as far as it does not fit; and the length of the rest."""
        kept, total = [], Length(0, 0)
        for key, found in outcomes:
            if isinstance(found, Encoded):
                if self.budget is None or self.budget.takes(total + found.length):
                    total += found.length
                else:
                    found = UnusableError("length", f"{found.length.tokens} tokens, more than its metadata says")
            kept.append((key, found))
        return kept, total

    def _replacement(self, number: int, total: Length, task: Build, report: Report) -> tuple[str, Encoded] | None:
        """Another sample of the same source that fits beside ``total``; None where the first few do not."""
        name, _, epoch = self.blend[number]
        stream = np.random.PCG64(np.random.SeedSequence((_REPLACEMENT, self.encoder.seed, number)))
        for draw in stream.random_raw(TRIES):
            index = int(draw % np.uint64(len(self.sources[name])))
            key, found = self._sample(name, index, epoch, task, report)
            if isinstance(found, Encoded) and (self.budget is None or self.budget.takes(total + found.length)):
                return key, found
        return None

    def _measured(self, number: int, passed_by: PassedBy, report: Report) -> Measured:
        name, index, epoch = self.blend[number]
        shard, i = self.sources[name].locate(index)
        task = self.sources[name].task
        key = shard.name_of(i)
        watch = _Watch(self.listed, passed_by, report, building=False)
        try:
            brief = watch.fetched(shard.read_meta, i, key)
            key = brief.key
            length = self.encoder.measure_described(brief, task, epoch)
            if length is None:
                length = self.encoder.measure(watch.fetched(shard.read, i, key), task, epoch)
            if self.budget is not None and not self.budget.takes(length):
                raise UnusableError("length", self.budget.refusal(length))
        except UnusableError as bad:
            return Measured(number, None, Skipped(bad.key or key, bad.reason, bad.stage))
        return Measured(number, length)

    def _sample(self, name: str, index: int, epoch: int, task: Build, report: Report) -> Outcome:
        """Key of a sample, and the sample or why it cannot be used."""
        shard, i = self.sources[name].locate(index)
        key = shard.name_of(i)
        try:
            raw = _Watch(self.listed, task.passed_by, report, building=True).fetched(shard.read, i, key)
            key = raw.key
            return key, self.encoder(raw, self.sources[name].task, epoch, task.on_device, f"{shard.place}#{i}")
        except UnusableError as bad:
            return bad.key or key, bad


@dataclass(frozen=True)
class _Watch:
    """Tells which sample is being read, and keeps from those to be passed by."""

    listed: PassedBy
    later: PassedBy
    report: Report
    building: bool

    def fetched(self, read: Callable[[int], R], i: int, name: str) -> R:
        """What ``read`` gives of sample ``i``; ``name`` is what it is called until its key is known.

        Raises:
            UnusableError: it cannot be read, or is to be passed by.
        """
        self._begin(name)
        with at_stage("read"):
            found = read(i)
        self._begin(found.key)
        return found

    def _begin(self, key: str) -> None:
        if self.listed.has(key, self.building) or self.later.has(key, self.building):
            raise UnusableError("quarantine", "on the list of samples to pass by", key)
        self.report(short(key))
