"""Ends a job that hangs, and says which rank the others waited for; tells how long a rank works on its own.

Every rank has a watchdog: a thread that looks at the main thread some times a second and touches no disk, and another
one that does, as a disk may hang too. When a step takes longer than its limit, the rank writes down where it stands
(hang_report.py) and waits a little for the reports of the others. Then the lowest rank that reported finds who did not
arrive, and all leave with exit code 70.

A rank that cannot run Python any more is found by its silence. faulthandler writes its stacks where C code holds the
GIL. Such a process, or a stopped one, cannot leave by itself: the launcher ends it when the others have left.

While the whole job is suspended, time does not count.
"""

from __future__ import annotations

import contextlib
import faulthandler
import math
import os
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

from dali_pipelines.workers import uses_timer
from megatron_elva.config.schema import FaultConfig
from megatron_elva.training import attempts
from megatron_elva.training.hang_report import (
    HangFolder,
    Phase,
    Report,
    WatchFile,
    find_folder,
    forget,
    summarise,
)
from megatron_elva.training.stacks import standing, waits_in

EXIT_CODE = 70
GRACE_S = 20.0
"""Seconds in which all ranks that hang must have reported."""
TICK_S = 0.05
SLICE_S = 5.0
"""Most that one tick counts: longer ones mean that the process was stopped."""
_IN_A_STEP = ("data", "step", "sums")


class _Stamp(NamedTuple):
    phase: Phase
    step: int
    began: float
    limit_s: float


class Watchdog:
    """Watches the thread that makes it.

    Args:
        run: the run directory.
        rank: global rank.
        world: number of ranks.
        fault: limits.
        attempt: names this start of the job; the same on all ranks.
        grace_s: seconds in which all ranks that hang must have reported.
    """

    def __init__(
        self, run: Path, rank: int, world: int, fault: FaultConfig, attempt: str, grace_s: float = GRACE_S
    ) -> None:
        self.run, self.rank, self.world, self.attempt = run, rank, world, attempt
        self.grace_s = grace_s
        self._step_limit = math.inf if fault.step_timeout_s is None else fault.step_timeout_s
        self._other_limit = math.inf if fault.start_timeout_s is None else fault.start_timeout_s
        self._main = threading.get_ident()
        self._stamp = _Stamp("start", 0, time.monotonic(), self._other_limit)
        self._own = self._told = 0.0
        self._lost = 0.0  # seconds in which this process was stopped
        self._seen, self._lost_before = self._stamp.began, 0.0
        self._armed = 0.0
        self._hanging = False
        self._over = threading.Event()
        self._desk = _Desk(self)
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def phase(self, name: Phase, step: int) -> None:
        """The main thread enters a phase; costs about a microsecond.

        A step's limit counts from ``data`` on, over ``step`` and ``sums``; the other phases have theirs alone.

        Args:
            name: the phase.
            step: the step that is being done, from 1; outside of steps those that are done.
        """
        last = self._stamp
        if name in ("step", "sums") and last.phase in _IN_A_STEP and last.step == step:
            self._stamp = _Stamp(name, step, last.began, self._step_limit)
        else:
            limit = self._step_limit if name in _IN_A_STEP else self._other_limit
            self._stamp = _Stamp(name, step, time.monotonic(), limit)

    def own_seconds(self) -> float:
        """Seconds of steps that the main thread spent outside of collectives since the last call, from samples.

        Waiting for data is among them: a rank whose data are slow is slow. Waiting for the device is not: on a GPU all
        of them wait for the slowest, wherever their main threads stand.
        """
        own = self._own
        since, self._told = own - self._told, own
        return since

    def close(self) -> None:
        """Watch no more; called whatever ended training. Waits for a slow disk some seconds at most.

        Does not return while ranks that hang find out who did not arrive: that some of them have left is why this
        rank's collective has failed, and the same end is due here.
        """
        while self._hanging and self._thread.is_alive():
            time.sleep(TICK_S)
        self._over.set()
        self._thread.join()
        self._disarm()
        self._desk.close()

    def _watch(self) -> None:
        before, second = time.monotonic(), 0.0
        while not self._over.wait(TICK_S):
            now, stamp = time.monotonic(), self._stamp
            gap, before = now - before, now
            self._count(stamp, gap)
            left = self._left(stamp, now)
            if now >= second and self._arm(now, left):
                second = now + 1.0
            if left <= 0 or self._desk.others_hang:
                self._hanging = True
                self._hang(stamp)
                self._hanging = False
                before = time.monotonic()

    def _count(self, stamp: _Stamp, gap: float) -> None:
        """One sample: it stands for the time since the last."""
        if stamp.began != self._seen:
            self._seen, self._lost_before = stamp.began, self._lost
        self._lost += max(0.0, gap - SLICE_S)
        if stamp.phase in _IN_A_STEP and waits_in(sys._current_frames().get(self._main)) is None:
            self._own += min(gap, SLICE_S)

    def _left(self, stamp: _Stamp, now: float) -> float:
        """Seconds until this rank's limit."""
        stopped = self._lost - self._lost_before if stamp.began == self._seen else 0.0
        return stamp.limit_s - (now - stamp.began - stopped)

    def _arm(self, now: float, left: float) -> bool:
        """Have faulthandler write the stacks shortly after the limit if this thread cannot put that off by then.

        Not while a sample is decoded in this process: the data side then uses faulthandler's one timer to end a sample
        that hangs. Returns whether this could be done now.
        """
        if self._desk.stacks is None or uses_timer():
            return False
        self._desk.stale_stacks |= bool(self._armed) and now > self._armed  # written after a suspension
        self._disarm()
        if not math.isinf(left):
            wait = max(left, 0.0) + min(1.0, self.grace_s / 4)
            self._armed = now + wait
            faulthandler.dump_traceback_later(wait, file=self._desk.stacks)
        return True

    def _disarm(self) -> None:
        if self._armed:
            faulthandler.cancel_dump_traceback_later()
        self._armed = 0.0

    def _hang(self, stamp: _Stamp) -> None:
        """Leave when the ranks have found out who did not arrive, or cannot; return if the main thread goes on."""
        self._disarm()
        desk, began = self._desk, time.monotonic()
        desk.open(stamp)
        while not self._over.wait(TICK_S):
            if desk.decided.is_set():
                os._exit(EXIT_CODE)
            now = time.monotonic()
            if self._stamp != stamp:
                break
            limit_over = max(began, now + self._left(stamp, now), desk.hopes)
            if now > limit_over + 2 * self.grace_s:  # its disk hangs too
                os._exit(EXIT_CODE)
        desk.call_off()

    def report(self, moved: bool = False) -> Report:
        """Where this rank is now."""
        stamp, now = self._stamp, time.monotonic()
        at = standing(sys._current_frames().get(self._main))
        return Report(
            self.rank, socket.gethostname(), os.getpid(), stamp.step, stamp.phase, at.in_collective, at.where,
            round(now - stamp.began, 3), round(min(self._left(stamp, now), 1e9), 3), moved,
        )  # fmt: skip


class _Desk:
    """The thread that reads and writes files for a watchdog."""

    def __init__(self, dog: Watchdog) -> None:
        self.dog = dog
        self.stacks: int | None = None
        self.stale_stacks = False
        self.others_hang = False
        self.hopes = 0.0  # until when others may take their time
        self.decided = threading.Event()
        self._hanging: _Stamp | None = None
        self._wake, self._over = threading.Event(), threading.Event()
        self._watch: WatchFile | None = None
        self._noted: tuple[int, str] | None = None
        self._left_at: float | None = None
        self._folder: HangFolder | None = None
        self._thread = threading.Thread(target=self._work, name="watchdog's files", daemon=True)
        self._thread.start()

    def open(self, stamp: _Stamp) -> None:
        """The rank hangs."""
        self._hanging = stamp
        self._wake.set()

    def call_off(self) -> None:
        """It went on."""
        self._hanging, self.hopes, self.others_hang = None, 0.0, False
        self._wake.set()

    def close(self) -> None:
        """Training is over."""
        self._over.set()
        self._wake.set()
        self._thread.join(SLICE_S)

    def _work(self) -> None:
        while not self._over.is_set():
            try:
                self._note(self.dog._stamp)
                self._look_around(self.dog._stamp)
            except OSError:  # said when it matters: at a hang
                pass
            if self._hanging is not None:
                self._handle(self._hanging)
            if self.decided.is_set():
                return  # the process ends in a moment
            self._wake.wait(1.0)
            self._wake.clear()
        self._remove_watch()
        if self._folder is not None:
            with contextlib.suppress(OSError):
                self._folder.leave(self.dog.rank)

    def _remove_watch(self) -> None:
        watch, self._watch, self.stacks = self._watch, None, None
        if watch is not None:
            watch.remove()

    def _leave(self) -> None:
        self._remove_watch()
        self.decided.set()

    def _note(self, stamp: _Stamp) -> None:
        """Keep the line about this rank fresh."""
        if self._watch is None:
            if self.dog.rank == 0:
                forget(self.dog.run, self.dog.attempt)
            self._watch = WatchFile(self.dog.run, self.dog.rank, self.dog.attempt, self.dog._main)
            self.stacks = self._watch.stacks
        if self._noted != (stamp.step, stamp.phase):
            self._watch.note(stamp.step, stamp.phase)
            self._noted = (stamp.step, stamp.phase)
        if self.stale_stacks:
            self.stale_stacks = False
            self._watch.clear()

    def _look_around(self, stamp: _Stamp) -> None:
        """In a phase that lasts, see whether others hang already; clean up behind a hang that was none."""
        dog, now = self.dog, time.monotonic()
        lasts = now - stamp.began > min(dog._step_limit, dog._other_limit) / 2
        left = self._left_at is not None and now > self._left_at + 2 * dog.grace_s
        if not (lasts or left):
            return
        some_hang = find_folder(dog.run, dog.attempt) is not None
        self.others_hang = lasts and some_hang
        if left and not some_hang and self._folder is not None:
            self._folder.leave(dog.rank)
            self._left_at = self._folder = None

    def _handle(self, stamp: _Stamp) -> None:
        dog = self.dog
        try:
            folder = self._folder = HangFolder(dog.run, dog.attempt, stamp.step)
            self._left_at = None
            folder.dump(dog.rank)
            self._await(folder, stamp)
        except OSError as error:
            with contextlib.suppress(OSError, ValueError):
                print(f"hang: {dog.report()}; no report can be written: {error}", file=sys.stderr, flush=True)
                faulthandler.dump_traceback(2, all_threads=True)
            self._say_end(f"hang in step {stamp.step}, and no rank could write a report: {error}", stamp)
            self._over.wait(dog.grace_s)
            if self._hanging is stamp:
                self._leave()
        except Exception:
            traceback.print_exc()

    def _await(self, folder: HangFolder, stamp: _Stamp) -> None:
        """Until a rank has decided, or this one has, or the main thread goes on."""
        dog, began = self.dog, time.monotonic()
        interval = min(0.5, dog.grace_s / 8)
        report = dog.report()
        folder.write(report)
        while self._hanging is stamp:
            if folder.is_decided:
                self._leave()
                return
            reporting = folder.reporting()
            waited = time.monotonic() - began
            turn = 0.0 if reporting[:1] == [dog.rank] else 4 * interval  # if the lowest cannot, another does
            if waited > turn + (0.0 if len(reporting) == dog.world else dog.grace_s):
                if self._decide(folder, stamp):
                    time.sleep(2 * interval)  # the others see it before a launcher ends them
                    self._leave()
                    return
                began = time.monotonic()
            time.sleep(interval)
            if report.left_s > 0:  # afterwards what the others have seen stays, also when they make its collective fail
                report = dog.report()
            folder.write(report)
        self._left_at = time.monotonic()
        folder.write(dog.report(moved=True))

    def _decide(self, folder: HangFolder, stamp: _Stamp) -> bool:
        """Write the summary, unless a rank still may take its time or has gone on."""
        reports = folder.reports()
        left = max((r.left_s for r in reports.values()), default=0.0)
        if left > 0 or any(r.moved for r in reports.values()):
            self.hopes = time.monotonic() + max(left, 0.0)
            return False
        took = f"no end after {self.dog.report().seconds:.0f} s"
        reason = summarise(folder, reports, self.dog.world, stamp.step, took)
        self._say_end(f"{reason}; stacks: {folder.path}", stamp)
        return True

    def _say_end(self, reason: str, stamp: _Stamp) -> None:
        done = stamp.step - 1 if stamp.phase in _IN_A_STEP else stamp.step
        print(reason, file=sys.stderr, flush=True)
        attempts.end(self.dog.run, "hang", reason, done)
