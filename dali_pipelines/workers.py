"""Worker processes whose death costs one task: it is named, the worker is replaced, and everything else goes on."""

from __future__ import annotations

import contextlib
import faulthandler
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import CancelledError, Future
from dataclasses import dataclass
from multiprocessing import resource_tracker, util
from multiprocessing.context import ForkServerContext
from types import TracebackType
from typing import Any

from dali_pipelines.messages import Message, pack, unpack
from dali_pipelines.worker_process import TRAINERS_SIGNALS, DiedError, Failure, Handler, Worker, WorkerError

logger = logging.getLogger(__name__)

STARTS = 3  # workers in a row that may die while starting
TRIES = 3  # workers that may die under a task through no fault of the task's


@dataclass(frozen=True)
class Lost:
    """In place of a result: the worker died or had to be killed. `doing` is what the task had last reported."""

    doing: str | None
    reason: str


class _Crew:
    """What the threads of a pool share. They know this and not the pool, so that an unused pool is collected."""

    def __init__(
        self,
        context: ForkServerContext,
        make: Callable[[], Handler],
        timeout_s: float,
        start_timeout_s: float,
        threads: int,
    ) -> None:
        self.context, self.make, self.timeout_s, self.start_timeout_s = context, make, timeout_s, start_timeout_s
        self.threads = threads
        self.tasks: queue.SimpleQueue[tuple[Future[Any], Any] | None] = queue.SimpleQueue()
        self.workers: set[Worker] = set()
        self.over = threading.Event()  # closed or failed
        self.closed = False
        self.error: Failure | None = None
        # Reentrant: the garbage collector may call stop() in a thread that holds it.
        self.lock = threading.RLock()

    def stop(self, error: Failure | None = None) -> None:
        """End everything; tasks that are not done are cancelled, or fail with `error`. Waits for nothing."""
        with self.lock:
            self.error = self.error or error
            self.closed = self.closed or error is None
            self.over.set()
            workers = list(self.workers) if error is None else []  # after a failure the others may finish their task
        for worker in workers:
            worker.kill()
        with contextlib.suppress(queue.Empty):
            while True:
                item = self.tasks.get_nowait()
                if item is not None:
                    self.drop(item[0])
        for _ in range(self.threads):
            self.tasks.put(None)

    def submit(self, task: Any) -> Future[Any]:
        """Queue a task."""
        future: Future[Any] = Future()
        with self.lock:
            if not self.over.is_set():
                self.tasks.put((future, task))
                return future
        self.drop(future)
        return future

    def drop(self, future: Future[Any]) -> None:
        """Finish the future of a task that will not be done."""
        error = self.error.revive() if self.error else CancelledError()
        if future.running():
            future.set_exception(error)
        elif self.error is None:
            future.cancel()
            future.set_running_or_notify_cancel()
        elif future.set_running_or_notify_cancel():
            future.set_exception(error)

    def thread(self) -> None:
        """One worker after the other, one task after the other."""
        # Inherited by the helpers that start now; the trainer's own threads still hear these signals.
        signal.pthread_sigmask(signal.SIG_BLOCK, TRAINERS_SIGNALS)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, TRAINERS_SIGNALS)  # starting that helper has let some through again
        worker = None
        try:
            worker = self.hire()
            while worker is not None and (item := self.tasks.get()) is not None:
                worker = self.take(worker, *item)
                del item  # or the last result would stay until the next one is here
        except BaseException as error:  # a mistake in this file: nobody shall wait for ever
            self.stop(Failure.of(error))
            raise
        finally:
            self.fire(worker)

    def take(self, worker: Worker, future: Future[Any], task: Any) -> Worker | None:
        """Have a task done unless nobody wants it any more."""
        if self.over.is_set():
            self.drop(future)
            return worker
        if not future.set_running_or_notify_cancel():
            return worker
        try:
            return self.work(worker, future, task)
        except BaseException as error:
            if future.running():
                future.set_exception(error)
            raise

    def hire(self) -> Worker | None:
        """Start a worker and wait until it is ready; None when the pool is over."""
        for attempt in range(1, STARTS + 1):
            if self.over.is_set():
                return None
            worker = None
            try:
                worker = Worker(self.context, self.make)
                with self.lock:
                    self.workers.add(worker)
                if self.over.is_set():  # stop() may have come too early to see this one
                    worker.kill()
                fine, failure = unpack(worker.receive(self.start_timeout_s))
                if fine:
                    return worker
            except (DiedError, OSError, EOFError) as error:
                summary = f"a data worker does not start: {error or 'its fork server ended'}"
                failure = Failure(None, summary, worker.slot.stacks() if worker else "")
            self.fire(worker)
            if self.over.is_set():
                return None
            logger.warning("try %d of %d: %s", attempt, STARTS, failure.summary)
            self.over.wait(0.5 * attempt)
        self.stop(failure)
        return None

    def fire(self, worker: Worker | None) -> None:
        if worker is not None:
            with self.lock:
                self.workers.discard(worker)
            worker.end()

    def work(self, worker: Worker, future: Future[Any], task: Any) -> Worker | None:
        """Have a task done. Returns the worker for the next one, None when the pool is over."""
        try:
            message = pack(task)
        except Exception as error:
            future.set_exception(error)
            return worker
        with contextlib.closing(message):
            for attempt in range(1, TRIES + 1):
                try:
                    worker.send(message)
                    answer = worker.receive(self.timeout_s)
                except DiedError as death:
                    self.bury(worker, death, future, last=attempt == TRIES)
                    fresh = self.hire()
                    if fresh is None:
                        if future.running():
                            self.drop(future)
                        return None
                    worker = fresh
                    if future.done():
                        return worker
                except OSError as error:
                    future.set_exception(error)
                    return worker
                else:
                    _finish(future, answer)
                    return worker
        return worker

    def bury(self, worker: Worker, death: DiedError, future: Future[Any], last: bool) -> None:
        """Say why a worker is gone; its task is lost, unless it was not to blame and may be tried again."""
        lost = Lost(worker.slot.doing if worker.slot.taken == worker.sent else None, str(death))
        stacks = worker.slot.stacks()
        self.fire(worker)
        if self.closed:
            self.drop(future)
            return
        logger.warning("lost a data worker in %s: %s%s", lost.doing, lost.reason, stacks and "\n" + stacks)
        if last or not death.innocent:
            future.set_result(lost)


def _finish(future: Future[Any], answer: Message) -> None:
    """Give a future the value or the exception that a worker has sent."""
    try:
        fine, value = unpack(answer)
    except Exception as error:
        future.set_exception(error)
        return
    if fine:
        future.set_result(value)
    else:
        future.set_exception(value.revive())


class _LazyFuture(Future[Any]):
    """A future that does its work when it is asked for the result."""

    def __init__(self, work: Callable[[], Any]) -> None:
        super().__init__()
        self._work: Callable[[], Any] | None = work

    def result(self, timeout: float | None = None) -> Any:
        self._force()
        return super().result(timeout)

    def exception(self, timeout: float | None = None) -> BaseException | None:
        self._force()
        return super().exception(timeout)

    def _force(self) -> None:
        work, self._work = self._work, None
        if work is None or not self.set_running_or_notify_cancel():
            return
        try:
            self.set_result(work())
        except BaseException as error:
            self.set_exception(error)


class _Inline:
    """Tasks done in the calling process, where a hang cannot be survived but must not be silent either."""

    GRACE_S = 30.0
    working = False

    def __init__(
        self, make: Callable[[], Handler], timeout_s: float, on_fatal: Callable[[str | None, str], None]
    ) -> None:
        self.make, self.timeout_s, self.on_fatal = make, timeout_s, on_fatal
        self.handler: Handler | None = None
        self.doing: str | None = None
        self.beats = 0

    def work(self, task: Any) -> Any:
        if self.handler is None:
            self.handler = self.make()
        with self.watched():
            return self.handler(task, self.report)

    def report(self, doing: str) -> None:
        _Inline.working = True
        self.doing = doing or None
        self.beats += 1
        # Written in C: it comes also where a C call holds the GIL and the thread below cannot run.
        faulthandler.dump_traceback_later(self.timeout_s + self.GRACE_S, exit=True, file=2)

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        done = threading.Event()
        self.report("")
        threading.Thread(target=self.watch, args=(done,), daemon=True).start()
        try:
            yield
        finally:
            done.set()
            faulthandler.cancel_dump_traceback_later()
            _Inline.working = False

    def watch(self, done: threading.Event) -> None:
        slice_s = min(1.0, self.timeout_s / 10)
        silent, beats = 0.0, self.beats
        while silent < self.timeout_s:
            if done.wait(slice_s):
                return
            silent, beats = (silent + slice_s, beats) if self.beats == beats else (0.0, self.beats)
        reason = f"no progress for {self.timeout_s:g} s"
        try:
            faulthandler.dump_traceback(2)
            text = f"data: {self.doing}: {reason}; the run ends, as there are no workers to lose (data.workers: 0)\n"
            os.write(2, text.encode(errors="replace"))
            self.on_fatal(self.doing, reason)
        except Exception:
            os.write(2, traceback.format_exc().encode(errors="replace"))
        finally:
            os._exit(1)


def uses_timer() -> bool:
    """Whether a task is being done in this process, whose hang faulthandler's one timer would end."""
    return _Inline.working


def _ignore(doing: str | None, reason: str) -> None:
    """The hook of who has none."""


class WorkerPool:
    """Worker processes for tasks that may crash, hang or eat all memory.

    Arrays in tasks and results arrive writable (unless they were not where they came from) and without a copy. The big
    ones of one result share one piece of memory, which is freed with the last of them.
    """

    def __init__(
        self,
        make: Callable[[], Handler],
        workers: int,
        timeout_s: float,
        preload: Sequence[str] = (),
        on_fatal: Callable[[str | None, str], None] = _ignore,
        start_timeout_s: float = 600.0,
    ) -> None:
        """Start the workers; does not wait for them.

        Args:
            make: can be pickled; called once in each worker; returns the `handler(task, report) -> value`. The handler
                calls `report("shard.tar/key")` where it begins with something: up to 500 bytes of UTF-8 that name what
                is to blame if the worker dies, and a sign of life.
            workers: processes; 0 does each task in this process when its result is asked for.
            timeout_s: a worker that gives no sign of life for so long is killed. Seconds in which this process was
                stopped do not count.
            preload: modules that are imported once, before workers are forked.
            on_fatal: `on_fatal(doing, reason)`, called before a hang ends this process, with 0 workers only.
            start_timeout_s: how long imports and `make` may take.
        """
        if workers < 0 or timeout_s <= 0:
            raise ValueError(f"workers: {workers}, timeout_s: {timeout_s}; allowed: at least 0, and above 0")
        self._closed = False
        self._inline = None if workers else _Inline(make, timeout_s, on_fatal)
        self._threads: list[threading.Thread] = []
        if not workers:
            return
        # Not fork: the trainer's threads and its GPU context do not survive in a forked process.
        if not hasattr(os, "memfd_create"):
            raise WorkerError("data workers need Linux; use 0 workers elsewhere")
        pack(make).close()  # what cannot be pickled is an error here and now
        context = multiprocessing.get_context("forkserver")
        if preload:
            context.set_forkserver_preload(list(preload))
        self._crew = _Crew(context, make, timeout_s, start_timeout_s, workers)
        self._stop = util.Finalize(self, self._crew.stop, exitpriority=100)  # before multiprocessing joins processes
        self._threads = [threading.Thread(target=self._crew.thread, daemon=True) for _ in range(workers)]
        for thread in self._threads:
            thread.start()

    @property
    def pids(self) -> list[int]:
        """Ids of the processes that are there now."""
        if self._inline is not None:
            return []
        with self._crew.lock:
            return [pid for pid in (worker.pid for worker in self._crew.workers) if pid is not None]

    def submit(self, task: Any) -> Future[Any]:
        """Queue a task; idle workers take them in order.

        Returns:
            The future of what the handler returns, or of `Lost`. What the handler raises comes out of `result()`, with
            the worker's traceback as its cause; so does what `make` raised, if it does so again and again. When the
            pool is closed, `result()` raises CancelledError.

        Raises:
            ValueError: the pool is closed.
        """
        if self._closed:
            raise ValueError("the pool is closed")
        if self._inline is not None:
            return _LazyFuture(lambda: self._work_here(task))
        return self._crew.submit(task)

    def _work_here(self, task: Any) -> Any:
        if self._closed or self._inline is None:
            raise CancelledError
        return self._inline.work(task)

    def close(self) -> None:
        """Kill the workers, whatever they do, and cancel what is not done."""
        self._closed = True
        if self._threads:
            self._stop()
        end = time.monotonic() + 15
        for thread in self._threads:
            thread.join(max(0.0, end - time.monotonic()))

    def __enter__(self) -> WorkerPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
