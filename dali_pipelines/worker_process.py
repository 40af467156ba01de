"""One worker process, from both sides.

What the two sides share has no name in any file system, so that nothing is left behind when either is killed:

- a socket for messages;
- a page of memory in which the worker says what it is doing, readable after its death;
- a pipe that only the parent can write: when the parent is gone, the kernel kills the worker, even in C code.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import mmap
import os
import pickle
import select
import signal
import socket
import struct
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

from dali_pipelines.messages import Message, pack, receive, send, unpack

Report = Callable[[str], None]
Handler = Callable[[Any, Report], Any]

TRAINERS_SIGNALS = {signal.SIGINT, signal.SIGTERM, signal.SIGUSR2}  # sent to every process of a job, meant for one
DUMP_SIGNAL = signal.SIGUSR1  # asks a worker for its stacks; answered in C, so also while a C call holds the GIL


class WorkerError(RuntimeError):
    """Workers cannot be started."""


class WorkerTraceback(Exception):  # noqa: N818
    """Where in the worker an exception was raised, as text."""

    def __str__(self) -> str:
        return f'\n"""\n{self.args[0]}"""'


class DiedError(Exception):
    """A worker is gone. `innocent` means that what it was doing cannot be the cause."""

    def __init__(self, reason: str, innocent: bool = False) -> None:
        super().__init__(reason)
        self.innocent = innocent


class Slot:
    """A page that a worker writes and the parent reads, also after the worker's death; behind it, its last stacks."""

    PAGE = 4096
    TEXT = 500  # bytes of UTF-8
    _AT = (64, 64 + 1024)  # two texts: one is written while the other is valid

    def __init__(self, fd: int | None = None) -> None:
        self.fd = os.memfd_create("slot", os.MFD_CLOEXEC) if fd is None else fd
        if fd is None:
            os.truncate(self.fd, self.PAGE)
            os.lseek(self.fd, self.PAGE, os.SEEK_SET)  # where faulthandler will write; shared with the worker
        self._page = mmap.mmap(self.fd, self.PAGE)
        self._numbers = memoryview(self._page)[:16].cast("Q")  # reports, tasks taken

    def take(self) -> None:
        """A task has arrived; from now on the worker's death is the task's."""
        self.report("")
        self._numbers[1] += 1

    def report(self, doing: str) -> None:
        """Say what is being done now; costs a few microseconds."""
        text = doing.encode(errors="replace")[: self.TEXT]
        number = self._numbers[0] + 1
        at = self._AT[number % 2]
        self._page[at : at + 2 + len(text)] = struct.pack("<H", len(text)) + text
        self._numbers[0] = number

    @property
    def taken(self) -> int:
        """Tasks that have arrived."""
        return self._numbers[1]

    @property
    def beats(self) -> int:
        """Changes with every report."""
        return self._numbers[0]

    @property
    def doing(self) -> str | None:
        """What was reported last, None where the task has not reported anything."""
        at = self._AT[self._numbers[0] % 2]
        (length,) = struct.unpack_from("<H", self._page, at)
        return self._page[at + 2 : at + 2 + length].decode(errors="ignore") or None

    def stacks(self) -> str:
        """What faulthandler wrote when the worker crashed or was asked."""
        size = os.fstat(self.fd).st_size - self.PAGE
        return os.pread(self.fd, min(size, 1 << 20), self.PAGE).decode(errors="replace")

    def close(self) -> None:
        """Let go of the page."""
        self._numbers.release()
        self._page.close()
        os.close(self.fd)


@dataclass(frozen=True)
class Failure:
    """An exception on its way to the parent."""

    pickled: bytes | None
    summary: str
    trace: str

    @classmethod
    def of(cls, error: BaseException) -> Failure:
        """Take an exception that was just caught."""
        pickled = None
        with contextlib.suppress(Exception):
            pickled = pickle.dumps(error)
            pickle.loads(pickled)  # some can be pickled but not unpickled
        summary = "".join(traceback.format_exception_only(error)).strip()
        return cls(pickled, summary, "".join(traceback.format_exception(error)))

    def revive(self) -> BaseException:
        """The exception itself where it can be pickled, else a WorkerError with its text."""
        try:
            error = pickle.loads(self.pickled) if self.pickled else WorkerError(self.summary)
        except Exception:
            error = WorkerError(self.summary)
        error.__cause__ = WorkerTraceback(self.trace)
        return error


def _main(sock: socket.socket) -> None:
    """A worker's whole life."""
    for number in TRAINERS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    _, (lifeline, slot_fd), *_ = socket.recv_fds(sock, 1, 2, socket.MSG_CMSG_CLOEXEC)
    _die_with_parent(lifeline)
    slot = Slot(slot_fd)
    faulthandler.enable(slot.fd)
    faulthandler.register(DUMP_SIGNAL, slot.fd)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {*TRAINERS_SIGNALS, DUMP_SIGNAL})
    with contextlib.suppress(OSError):  # where memory runs out, better a worker than the trainer
        Path("/proc/self/oom_score_adj").write_text("500")
    with contextlib.suppress(EOFError, ConnectionError):
        _serve(sock, slot)


def _die_with_parent(lifeline: int) -> None:
    """Let the kernel kill this process when the other end of a pipe is closed.

    A thread that watches would need the GIL. The signal for a parent's death would not come either: the parent of this
    process is the fork server, which lives as long as its children do.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETSIG, signal.SIGKILL)
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)
    if select.select([lifeline], [], [], 0)[0]:  # it was closed before
        os._exit(1)


def _serve(sock: socket.socket, slot: Slot) -> None:
    """Make the handler, then answer task after task with (True, value) or (False, failure)."""
    try:
        make = unpack(receive(sock))
        _use_one_thread()
        handler: Handler = make()
        _use_one_thread()
    except Exception as error:
        _post(sock, (False, Failure.of(error)))
        return
    _post(sock, (True, None))
    while True:
        message = receive(sock)
        slot.take()
        try:
            answer = pack((True, handler(unpack(message), slot.report)))
        except MemoryError:
            os.kill(os.getpid(), signal.SIGKILL)  # as the kernel does it: a fresh worker has its memory back
            raise
        except Exception as error:
            answer = pack((False, Failure.of(error)))
        with contextlib.closing(answer):
            send(sock, answer)
        del answer, message


def _post(sock: socket.socket, value: Any) -> None:
    with contextlib.closing(pack(value)) as message:
        send(sock, message)


def _use_one_thread() -> None:
    os.environ["OMP_NUM_THREADS"] = "1"  # for what a task imports later
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)


class Worker:
    """A worker process, seen from the one thread of the parent that works with it."""

    def __init__(self, context: ForkServerContext, make: Callable[[], Handler]) -> None:
        self.sent = 0
        self.slot = Slot()
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        lifeline, write_end = os.pipe()
        self.lifeline = os.fdopen(write_end, "wb", buffering=0)
        self.process = context.Process(target=_main, args=(theirs,), name="data worker", daemon=True)
        try:
            socket.send_fds(self.sock, [b"."], [lifeline, self.slot.fd])
            _post(self.sock, make)
            self.process.start()
        except BaseException:
            self.end()
            raise
        finally:
            os.close(lifeline)
            theirs.close()

    @property
    def pid(self) -> int | None:
        """The process's id, None before and after its life."""
        try:
            return self.process.pid
        except ValueError:  # it has ended
            return None

    def send(self, message: Message) -> None:
        """Hand the worker a task.

        Raises:
            DiedError: it is gone.
        """
        try:
            send(self.sock, message)
            self.sent += 1
        except ConnectionError:
            raise DiedError(self._death(), innocent=True) from None

    def receive(self, timeout_s: float) -> Message:
        """Wait for the worker's next message.

        Raises:
            DiedError: it died, or made no progress for `timeout_s` seconds and was killed.
        """
        events = select.poll()
        events.register(self.sock, select.POLLIN)
        events.register(self.process.sentinel, select.POLLIN)
        # Time is counted in slices: when the whole job was suspended for an hour, only one of them is lost.
        slice_s = min(1.0, timeout_s / 10)
        silent, beats, before = 0.0, self.slot.beats, time.monotonic()
        while silent < timeout_s:
            if events.poll(slice_s * 1000):
                return self._receive_now()
            now = time.monotonic()
            silent += min(now - before, 2 * slice_s)
            before = now
            if self.slot.beats != beats:
                silent, beats = 0.0, self.slot.beats
        self._ask_for_stacks()
        self.kill()
        raise DiedError(f"no progress for {timeout_s:g} s")

    def _receive_now(self) -> Message:
        try:
            return receive(self.sock, socket.MSG_DONTWAIT)
        except EOFError:
            death = self._death()
            raise DiedError(death, innocent=self.slot.taken != self.sent) from None
        except BlockingIOError:  # the process ended, and yet the socket is open: only the fork server is gone
            innocent = self.process.exitcode == 255
            raise DiedError("its fork server ended" if innocent else self._death(), innocent) from None

    def _death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        if code is None:
            return "closed its connection"
        if code >= 0:
            return f"the worker exited with code {code}"
        memory = " (out of memory?)" if code == -signal.SIGKILL else ""
        return f"the worker was killed by {signal.Signals(-code).name}{memory}"

    def _ask_for_stacks(self) -> None:
        """Wait a second at most until the worker has written its stacks; a stopped one never does."""
        if self.process.pid is not None:
            with contextlib.suppress(OSError):
                os.kill(self.process.pid, DUMP_SIGNAL)
        size = 0
        for _ in range(20):
            time.sleep(0.05)
            before, size = size, len(self.slot.stacks())
            if size and size == before:
                return

    def kill(self) -> None:
        """End the process, from any thread."""
        self.lifeline.close()
        with contextlib.suppress(ValueError, OSError, AttributeError):  # it is gone, or was never there
            self.process.kill()

    def end(self) -> None:
        """End the process and let go of everything."""
        self.kill()
        if self.process.pid is not None:
            self.process.join(10)
        with contextlib.suppress(ValueError):  # not even SIGKILL ends a process that waits for a broken disk
            self.process.close()
        self.sock.close()
        self.slot.close()
