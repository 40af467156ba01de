"""Hangs of ranks that are processes of their own, as a launcher sees them; and steps that are merely long."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import signal
import socket
import threading
import time
import traceback
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from megatron_elva.config.schema import FaultConfig
from megatron_elva.training import attempts
from megatron_elva.training.hang_report import Report, Watch, missing_ranks
from megatron_elva.training.watchdog import EXIT_CODE, Watchdog
from tests.distributed import _context, _free_port

pytestmark = pytest.mark.alone

LIMIT, GRACE = 2.0, 3.0
PATIENCE = 4.0
SUSPENDED_LIMIT = 7.0  # a tick counts up to 5 s
BAD_STEP = 3
SOON = 60.0


def sleep() -> None:
    time.sleep(SOON)


def hold_the_gil() -> None:
    time.sleep(1.2)
    ctypes.PyDLL(None).sleep(int(SOON))  # PyDLL keeps the GIL


def be_stopped() -> None:
    time.sleep(1.2)  # as the line about this rank is a second old at most
    os.kill(os.getpid(), signal.SIGSTOP)


def wait_for_data() -> None:
    Future[None]().result(SOON)


def exchange(steps: int, dog: Watchdog, rank: int, deed: Any, where: str) -> None:
    """Steps with the collectives and the phases of training; `deed` is done in one of them."""
    value = torch.ones(1)
    for step in range(1, steps + 1):
        for phase in ("data", "step", "sums"):
            dog.phase(phase, step)
            if deed and step == BAD_STEP and phase == where:
                deed()
            if phase != "data":
                dist.all_reduce(value)


def rank_of(case: Case, rank: int, port: int, run: Path) -> None:
    log = (run / f"{rank}.log").open("w")
    os.dup2(log.fileno(), 1)
    os.dup2(log.fileno(), 2)
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), RANK=str(rank), WORLD_SIZE=str(case.world))
    torch.set_num_threads(1)
    try:
        dist.init_process_group("gloo")
        if rank == 0:
            attempts.begin(run, 0)
        dist.barrier()
        dog = Watchdog(run, rank, case.world, case.fault, "attempt", GRACE)
        try:
            case.play(dog, rank, run)
        finally:
            dog.close()
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


@dataclass
class Case:
    """A hang of one rank, or none."""

    culprit: int
    deed: Any
    where: str = "step"
    world: int = 4
    fault: FaultConfig = field(default_factory=lambda: FaultConfig(step_timeout_s=LIMIT, start_timeout_s=30.0))

    def play(self, dog: Watchdog, rank: int, run: Path) -> None:
        exchange(5, dog, rank, self.deed if rank == self.culprit else None, self.where)

    def outside(self, started: Started) -> None:
        """What the launcher does meanwhile."""


class Started:
    """The ranks of a case, and what a launcher does with them: when one leaves badly, it kills what is left."""

    def __init__(self, case: Case, run: Path) -> None:
        self.case, self.run, self.began = case, run, time.monotonic()
        port = _free_port()
        self.processes = [_context().Process(target=rank_of, args=(case, r, port, run)) for r in range(case.world)]
        for process in self.processes:
            process.start()

        self.ended: list[float] = []

    def poll(self) -> bool:
        """Whether all have left; those that have not some seconds after the first are killed."""
        alive = [p for p in self.processes if p.is_alive()]
        gone, now = len(self.processes) - len(alive), time.monotonic()
        self.ended += [now] * (gone - len(self.ended))
        self.case.outside(self)
        if now - self.began > SOON / 2 or (self.ended and now - self.ended[0] > PATIENCE):
            for process in alive:
                process.kill()
        return not alive

    def end(self) -> None:
        """Wait for all."""
        while not self.poll():
            time.sleep(0.02)
        for process in self.processes:
            process.join()
        self.codes = [p.exitcode for p in self.processes]
        self.logs = "\n".join(f"--- {r}\n" + (self.run / f"{r}.log").read_text() for r in range(self.case.world))

    @property
    def folder(self) -> Path:
        return self.run / "logs" / f"hang_step_{BAD_STEP}"


class LongButFine(Case):
    """Steps below the limit, a checkpoint and an evaluation below theirs, and rank 0 alone busy behind a checkpoint."""

    def play(self, dog: Watchdog, rank: int, run: Path) -> None:
        value = torch.ones(1)
        for step in range(1, 3):
            dog.phase("data", step)
            time.sleep(LIMIT / 2)
            dog.phase("step", step)
            dist.all_reduce(value)
            dog.phase("checkpoint", step)
            time.sleep(LIMIT * 1.5 if step == 1 else 0.0)
        if rank == 0:
            time.sleep(2 * LIMIT)  # within its limit, and the others wait longer than theirs
        dog.phase("data", 3)
        dist.all_reduce(value)
        dog.phase("end", 3)
        time.sleep(LIMIT * 1.5)


class Suspended(Case):
    """All ranks are stopped for longer than a step may take, and continued."""

    def play(self, dog: Watchdog, rank: int, run: Path) -> None:
        exchange(2, dog, rank, None, "step")
        dog.phase("data", 3)
        time.sleep(1.2)
        dist.barrier()
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(0.5)
        dist.barrier()

    def outside(self, started: Started) -> None:
        if time.monotonic() - started.began > 2 * SUSPENDED_LIMIT + 5:
            for process in started.processes:
                if process.is_alive():
                    os.kill(process.pid, signal.SIGCONT)


class SlowDisk(Case):
    """Writing the stacks never returns."""

    def play(self, dog: Watchdog, rank: int, run: Path) -> None:
        folder = run / "logs" / f"hang_step_{BAD_STEP}"
        folder.mkdir(parents=True)
        time.sleep(1.0)
        (folder / "attempt").write_text("attempt")
        os.mkfifo(folder / f"rank_{rank}.txt")
        exchange(5, dog, rank, sleep, "step")


class FullDisk(Case):
    """Nothing more can be written to any file."""

    def play(self, dog: Watchdog, rank: int, run: Path) -> None:
        time.sleep(1.0)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, 1))
        exchange(5, dog, rank, sleep, "step")


HANGS = {
    "sleeps": Case(2, sleep),
    "first rank sleeps": Case(0, sleep),
    "stopped": Case(1, be_stopped),
    "first rank stopped": Case(0, be_stopped, "sums"),
    "holds the GIL": Case(3, hold_the_gil),
    "waits for data": Case(2, wait_for_data, "data"),
}
OTHERS = {
    "long but fine": LongButFine(0, None, world=2),
    "suspended": Suspended(0, None, world=2, fault=FaultConfig(step_timeout_s=SUSPENDED_LIMIT, start_timeout_s=90.0)),
    "slow disk": SlowDisk(0, None, world=1),
    "full disk": FullDisk(0, None, world=1),
}


@pytest.fixture(scope="module")
def played(tmp_path_factory):
    """All of them at once."""
    started = {name: Started(case, tmp_path_factory.mktemp("run")) for name, case in {**HANGS, **OTHERS}.items()}
    while any([not one.poll() for one in started.values()]):  # noqa: C419 - each must be asked
        time.sleep(0.02)
    for one in started.values():
        one.end()
    return started


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGS)
def test_a_hang_ends_the_job_and_names_the_rank(name, played):
    one, culprit = played[name], HANGS[name].culprit
    silent = [culprit] if name.endswith(("stopped", "GIL")) else []
    assert one.codes == [-signal.SIGKILL if r in silent else EXIT_CODE for r in range(4)], one.logs
    summary = json.loads((one.folder / "summary.json").read_text())
    (missing,) = summary["missing"]
    assert (missing["rank"], missing["host"]) == (culprit, socket.gethostname())
    assert (missing["step"], missing["phase"]) == (BAD_STEP, HANGS[name].where)
    assert f"did not arrive: rank {culprit} on {socket.gethostname()}" in one.logs
    ended = attempts.read(one.run)[-1]
    assert (ended.outcome, ended.last_step) == ("hang", BAD_STEP - 1)
    assert f"rank {culprit}" in ended.reason


@pytest.mark.slow
@pytest.mark.parametrize("name", HANGS)
def test_the_stacks_say_where_each_rank_stood(name, played):
    one, culprit = played[name], HANGS[name].culprit
    summary = json.loads((one.folder / "summary.json").read_text())
    for rank in {0, 1, 2, 3} - {culprit}:
        stacks = (one.folder / f"rank_{rank}.txt").read_text()
        assert "in all_reduce" in stacks and "in exchange" in stacks
        report = json.loads((one.folder / f"rank_{rank}.json").read_text())
        assert report["in_collective"] == "all_reduce"
        assert report["where"].endswith("(exchange)")
    assert len(summary["ranks"]) == 4 - bool("stopped" in name or "GIL" in name)
    missing = summary["missing"][0]
    if "stopped" in name:
        assert missing["why"] == "its process is stopped"
        return
    deed = HANGS[name].deed.__name__
    assert f"({deed})" in missing["where"] and "test_watchdog.py:" in missing["where"]
    assert f"in {deed}" in (one.folder / f"rank_{culprit}.txt").read_text()


@pytest.mark.slow
def test_a_hang_ends_in_time(played):
    for one in (played[name] for name in HANGS):
        summary = json.loads((one.folder / "summary.json").read_text())
        assert summary["time"] - min(p.stat().st_mtime for p in one.folder.glob("rank_*.txt")) < LIMIT + GRACE + 5


@pytest.mark.slow
def test_who_waits_for_nobody_leaves_nothing_behind(played):
    for one in (played[name] for name in HANGS):
        assert not (one.run / "logs" / "watch").exists()
        assert not list((one.run / "logs").glob(".hang*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["long but fine", "suspended"])
def test_what_is_no_hang_goes_on(name, played):
    one = played[name]
    assert one.codes == [0, 0], one.logs
    assert "hang" not in one.logs
    assert not list((one.run / "logs").glob("hang_step_*"))
    assert not (one.run / "logs" / "watch").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["slow disk", "full disk"])
def test_a_disk_that_does_not_work_does_not_keep_the_job(name, played):
    one = played[name]
    assert one.codes == [EXIT_CODE], one.logs
    assert one.ended[0] - one.began < SOON / 2 - 1


# Who did not arrive, from the reports.


def report(rank: int, in_collective: str | None = "all_reduce", step: int = 7, phase: str = "step") -> Report:
    return Report(rank, f"node{rank // 2}", 1, step, phase, in_collective, f"somewhere.py:{rank} (f)")


@pytest.mark.parametrize(
    ("reports", "expected"),
    [
        ([report(0), report(1, None), report(2)], [1]),
        ([report(0), report(2)], [1]),
        ([report(0, None), report(2)], [1]),  # a rank that does not answer is the better guess
        ([report(0), report(1, step=6), report(2)], [1]),
        ([report(0), report(1, "broadcast", phase="data"), report(2)], [1]),
        ([report(0, None, phase="sums"), report(1, None, phase="data"), report(2)], [1]),
        ([report(0, None, phase="sums"), report(1, phase="data"), report(2, phase="data")], [0]),
        ([report(0), report(1), report(2)], []),
        ([report(1, None), report(2, None), report(0)], [1, 2]),
    ],
)
def test_who_did_not_arrive(reports, expected):
    found = missing_ranks({r.rank: r for r in reports}, {}, 3)
    assert [m.rank for m in found] == expected


def test_a_silent_rank_of_another_host_is_named_with_what_it_said_last():
    header = {"host": "elsewhere", "pid": os.getpid(), "step": 4, "phase": "data", "thread": 1}
    (found,) = missing_ranks({0: report(0)}, {1: Watch(header)}, 2)
    assert (found.host, found.step, found.phase, found.why) == ("elsewhere", 4, "data", "does not answer")


# The rank's own time.


def busy(seconds: float) -> None:
    """In C code that lets go of the GIL."""
    end = time.perf_counter() + seconds
    a = torch.ones(300, 300)
    while time.perf_counter() < end:
        torch.mm(a, a)


@pytest.mark.parametrize("work", [time.sleep, busy])
def test_own_seconds_are_those_of_steps(work, tmp_path):
    dog = Watchdog(tmp_path, 0, 1, FaultConfig(step_timeout_s=None, start_timeout_s=None), "x")
    try:
        time.sleep(0.3)
        assert dog.own_seconds() == 0.0
        dog.phase("data", 1)
        work(0.6)
        assert 0.4 < dog.own_seconds() < 1.2
        dog.phase("checkpoint", 1)
        time.sleep(0.1)
        dog.own_seconds()
        time.sleep(0.3)
        assert dog.own_seconds() == 0.0
    finally:
        dog.close()


def test_closing_ends_its_threads(tmp_path):
    before = set(threading.enumerate())
    dog = Watchdog(tmp_path, 0, 1, FaultConfig(), "x")
    dog.phase("data", 1)
    time.sleep(0.2)
    dog.close()
    assert set(threading.enumerate()) == before
    assert not list((tmp_path / "logs").iterdir())
