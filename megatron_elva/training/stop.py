"""Signals that ask a job to save and leave, heard by the trainer and by nothing that the trainer starts.

USR2 says that the time limit or a preemption is near: save, and go on in another attempt. TERM says: save and
leave. Slurm sends them to every process of a step, so every process that the trainer starts must leave them alone: the
data workers, which the last packs still come from, the one that writes a checkpoint, the one that tracks the run.
"""

from __future__ import annotations

import contextlib
import signal
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType, TracebackType
from typing import Any

SIGNALS = (signal.SIGUSR2, signal.SIGTERM)
_NOT_FOR_CHILDREN = (*SIGNALS, signal.SIGINT, signal.SIGHUP)

_Old = Callable[[int, FrameType | None], Any] | int | signal.Handlers | None


class StopSignals:
    """While it is entered, USR2 and TERM only set the flags that the training loop looks at between two steps.

    It replaces handlers that were there before, submitit's among them, which end ranks before they have agreed where to
    stop, and puts them back at the end. Python runs a handler in the main thread between two bytecodes: a signal that
    comes while the main thread is in C, as in a collective, counts when that returns; a sleep goes on after it. What
    never returns is a hang and the watchdog's business. In a thread that is not the main one nothing is heard.

    Attributes:
        requeue: USR2 came.
        end: TERM came.
        since: monotonic time of the first of them, None before.
    """

    def __init__(self) -> None:
        self.requeue = False
        self.end = False
        self.since: float | None = None
        self._old: dict[signal.Signals, _Old] = {}

    def __enter__(self) -> StopSignals:
        if threading.current_thread() is threading.main_thread():
            self._old = {number: signal.signal(number, self._hear) for number in SIGNALS}
        return self

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.since = time.monotonic() if self.since is None else self.since
        self.requeue |= number == signal.SIGUSR2
        self.end |= number == signal.SIGTERM

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, old in self._old.items():
            # None: set by someone who is not Python, who cannot be given back what was his
            signal.signal(number, signal.SIG_DFL if old is None else old)
        self._old = {}


def ignore_in_child() -> None:
    """Called first by a process that the trainer starts: what ends or requeues a job passes it by, Ctrl-C too."""
    for number in _NOT_FOR_CHILDREN:
        signal.signal(number, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _NOT_FOR_CHILDREN)


@contextlib.contextmanager
def held_back() -> Iterator[None]:
    """Start a process within it: that one inherits blocked signals, and none hits it before `ignore_in_child`.

    Signals that come meanwhile are heard at the end of the block, or by another thread.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _NOT_FOR_CHILDREN)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
