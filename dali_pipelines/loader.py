"""An endless, exactly resumable stream of packs, made by worker processes."""

from __future__ import annotations

import queue
import threading
import time
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from functools import partial
from types import TracebackType
from typing import Any

import torch

from dali_pipelines.builder import Build, Builder, Built, Measure, Measured
from dali_pipelines.graph import DeviceDecoder
from dali_pipelines.plans import LaneShare, Plan, SampleShare, merged
from dali_pipelines.report import Quarantine
from dali_pipelines.workers import Lost, WorkerPool
from megatron_elva.config.errors import InputError
from megatron_elva.layout import Pack

_PRELOAD = ("dali_pipelines.builder", "transformers.models.auto.tokenization_auto")
"""What takes long to import: workers are forked from a process that has it."""

_IDLE_LOSSES = 3  # workers lost in a row without a sample to blame, before that is taken for a fault of the machine


Entry = tuple[Future[Any], Plan]
"""A pack that was asked for."""


class PackLoader:
    """Packs in order from a state on, without end.

    The stream depends on builder, share and state alone, never on the number of workers or on what was made ahead: the
    state counts the packs handed out. A sample that hangs or kills its worker is put on the list of those to pass by
    and replaced like any bad one.
    """

    def __init__(
        self,
        builder: Builder,
        share: SampleShare | LaneShare,
        state: dict[str, Any],
        quarantine: Quarantine,
        pad_multiple: int,
        workers: int = 0,
        prefetch: int = 2,
        timeout_s: float = 60.0,
        device_decoder: DeviceDecoder | None = None,
    ) -> None:
        """Start loading.

        Args:
            builder: makes packs of sample numbers.
            share: the packs of this rank.
            state: where to start, of `state` or of the share's own `start`.
            quarantine: samples to pass by.
            pad_multiple: the length of a pack becomes a multiple of this.
            workers: processes that decode; 0 decodes in this one when a pack is asked for.
            prefetch: packs that each worker makes ahead.
            timeout_s: a sample that takes longer is given up.
            device_decoder: decodes what workers leave to it.
        """
        self._state = share.own(state)
        self._error: BaseException | None = None
        makes = _Makes(builder, quarantine, pad_multiple, workers, timeout_s, device_decoder)
        submitted = makes.submitted(share.plans(self._state, makes.ask))
        self._next: Callable[[], tuple[Pack, Plan]]
        self._stages: _Stages | None = None
        if workers:
            self._stages = _Stages(submitted, makes.made, workers * max(prefetch, 1), max(prefetch, 1))
            self._next = partial(self._stages.result, makes.check_device)
        else:
            self._next = lambda: makes.made(next(submitted))
        # The threads know nothing of this object, so one that is dropped ends them all the same.
        self._end = weakref.finalize(self, _end, self._stages, makes)

    @property
    def state(self) -> dict[str, Any]:
        """Where the packs handed out so far end. Plain numbers, fit for JSON."""
        return self._state

    def __iter__(self) -> PackLoader:
        return self

    def __next__(self) -> Pack:
        """The next pack; waits for it. After an error, the same error."""
        if not self._end.alive:
            raise ValueError("the loader is closed")
        if self._error is not None:
            raise self._error
        try:
            pack, plan = self._next()
        except StopIteration:
            self._error = RuntimeError("the stream of packs was broken off by an error before")
            raise self._error from None
        except Exception as error:
            self._error = error
            raise
        self._state = merged([self._state, plan.state])
        return pack

    def close(self) -> None:
        """End the workers. Packs made ahead are dropped."""
        self._end()

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _end(stages: _Stages | None, makes: _Makes) -> None:
    if stages is not None:
        stages.stop()
    makes.pool.close()


class _Makes:
    """Has lengths measured and packs built, and blames samples for lost workers."""

    def __init__(
        self,
        builder: Builder,
        quarantine: Quarantine,
        pad_multiple: int,
        workers: int,
        timeout_s: float,
        device_decoder: DeviceDecoder | None,
    ) -> None:
        self.builder, self.quarantine, self.pad_multiple = builder, quarantine, pad_multiple
        self.timeout_s, self.device_decoder = timeout_s, device_decoder
        self.on_device: tuple[float, list[str]] | None = None
        self.pool = WorkerPool(partial(_handler, builder), workers, timeout_s, _PRELOAD, self._blame_for_all)

    def submitted(self, plans: Iterator[Plan]) -> Iterator[Entry]:
        """Ask for the packs of plans."""
        for plan in plans:
            yield self.pool.submit(Build(plan.numbers, self.quarantine.added)), plan

    def ask(self, numbers: tuple[int, ...]) -> Callable[[], list[Measured]]:
        """Ask for lengths; what is returned waits for them."""
        future = self.pool.submit(Measure(numbers, self.quarantine.added))
        return lambda: self._answer(future, lambda: Measure(numbers, self.quarantine.added))

    def made(self, entry: Entry) -> tuple[Pack, Plan]:
        """Wait for a pack, and give a device what is left to decode."""
        future, plan = entry
        built: Built = self._answer(future, lambda: Build(plan.numbers, self.quarantine.added))
        decoded = self._decoded(built)
        if decoded is None:  # what a device cannot decode, PyAV may, or else it is bad

            def again() -> Build:
                return Build(plan.numbers, self.quarantine.added, on_device=False)

            built, decoded = self._answer(self.pool.submit(again()), again), []
        built.skipped = [self.quarantine.explained(bad) for bad in (*plan.bad, *built.skipped)]
        built.drawn += len(plan.bad)
        return built.pack(self.pad_multiple, self.builder.encoder.options.patch**2 * 3, decoded), plan

    def _decoded(self, built: Built) -> list[torch.Tensor] | None:
        items = built.items
        if not items:
            return []
        assert self.device_decoder is not None
        self.on_device = (time.monotonic(), built.keys_on_device)
        try:
            out = self.device_decoder.decode(items)
        finally:
            self.on_device = None
        return None if any(isinstance(o, str) for o in out) else [o for o in out if not isinstance(o, str)]

    def _answer(self, future: Future[Any], again: Callable[[], Measure | Build]) -> Any:
        """Wait for a task. Where its worker was lost, the sample to blame is passed by from now on."""
        idle, building = 0, isinstance(again(), Build)
        while isinstance(answer := future.result(), Lost):
            if answer.doing is None or self.quarantine.has(answer.doing, building):
                idle += 1
            else:
                self.quarantine.add(answer.doing, answer.reason, building)
            if idle == _IDLE_LOSSES:
                raise InputError(f"data workers end again and again, {answer.reason}; is there enough memory?")
            future = self.pool.submit(again())
        return answer

    def _blame_for_all(self, key: str | None, reason: str) -> None:
        if key is not None:
            self.quarantine.add(key, reason, building=False)

    def check_device(self) -> None:
        """A device's decoder cannot be interrupted: end the run, and let the next one pass by what it had."""
        if self.on_device is None or time.monotonic() - self.on_device[0] < self.timeout_s:
            return
        keys = self.on_device[1]
        for key in keys:
            reason = f"in a batch whose decoding on the device hung for {self.timeout_s:g} s"
            self.quarantine.add(key, reason, building=True)
        raise RuntimeError(
            f"decoding on the device hangs since {self.timeout_s:g} s (data.decode_timeout_s) with {', '.join(keys)}; "
            f"they are in {self.quarantine.path} now, start the run again"
        )


def _handler(builder: Builder) -> Builder:
    return builder


class _Stages:
    """Two threads: one plans and submits packs, one finishes them in order; `result` hands them out."""

    def __init__(
        self,
        submitted: Iterator[Entry],
        make: Callable[[Entry], tuple[Pack, Plan]],
        ahead: int,
        finished: int,
    ) -> None:
        self._to_finish: queue.Queue[Any] = queue.Queue(ahead)
        self._done: queue.Queue[Any] = queue.Queue(finished)
        self._stopped = threading.Event()
        for name, run in (
            ("plan packs", partial(self._plan, submitted)),
            ("finish packs", partial(self._finish, make)),
        ):
            threading.Thread(target=run, name=name, daemon=True).start()

    def result(self, check: Callable[[], None]) -> tuple[Pack, Plan]:
        """The next pack; raises what ended the stream, or what `check` raises while a pack is waited for.

        Raises:
            StopIteration: the stream was stopped.
        """
        result = self._get(self._done, check)
        if isinstance(result, BaseException):
            raise result
        if result is None:
            raise StopIteration
        return result

    def stop(self) -> None:
        """End both threads."""
        self._stopped.set()

    def _plan(self, submitted: Iterator[Entry]) -> None:
        try:
            for entry in submitted:
                if not self._put(self._to_finish, entry):
                    return
        except BaseException as error:
            self._put(self._to_finish, error)

    def _finish(self, make: Callable[[Entry], tuple[Pack, Plan]]) -> None:
        try:
            while (entry := self._get(self._to_finish)) is not None:
                if isinstance(entry, BaseException):
                    raise entry
                if not self._put(self._done, make(entry)):
                    return
        except BaseException as error:
            self._put(self._done, error)

    def _put(self, into: queue.Queue[Any], item: Any) -> bool:
        while not self._stopped.is_set():
            try:
                into.put(item, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def _get(self, of: queue.Queue[Any], check: Callable[[], None] = lambda: None) -> Any:
        while not self._stopped.is_set():
            try:
                return of.get(timeout=0.2)
            except queue.Empty:
                check()
        return None
