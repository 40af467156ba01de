"""Signals to a process and to all processes of its group, as Slurm sends them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from megatron_elva.training.stop import SIGNALS, StopSignals, held_back, ignore_in_child
from tests.distributed import run_distributed

USR2, TERM = SIGNALS


@pytest.fixture(autouse=True)
def handlers_of_submitit():
    """As submitit sets them: called, they would end this process."""
    heard: list[int] = []
    old = {number: signal.signal(number, lambda number, frame: heard.append(number)) for number in SIGNALS}
    yield heard
    for number, handler in old.items():
        signal.signal(number, handler)


def send(number: int) -> None:
    os.kill(os.getpid(), number)
    time.sleep(0.01)


@pytest.mark.parametrize(
    ("sent", "requeue", "end"),
    [([], False, False), ([USR2], True, False), ([TERM], False, True), ([USR2, TERM] * 2, True, True)],
)
def test_signals_set_flags(sent, requeue, end, handlers_of_submitit):
    before = time.monotonic()
    with StopSignals() as stop:
        for number in sent:
            send(number)
        assert (stop.requeue, stop.end) == (requeue, end)
        assert stop.since is None if not sent else before <= stop.since <= time.monotonic()
        first = stop.since
        send(USR2)
        assert stop.since == first or first is None
    assert handlers_of_submitit == []
    send(USR2)
    assert handlers_of_submitit == [USR2]  # put back


def test_handlers_are_put_back_after_an_error(handlers_of_submitit):
    before = [signal.getsignal(number) for number in SIGNALS]
    with pytest.raises(RuntimeError), StopSignals():
        raise RuntimeError
    assert [signal.getsignal(number) for number in SIGNALS] == before


def test_a_sleep_goes_on_and_the_signal_is_heard_meanwhile():
    with StopSignals() as stop:
        threading.Timer(0.1, send, [TERM]).start()
        began = time.monotonic()
        time.sleep(0.5)
        assert time.monotonic() - began >= 0.5
        assert stop.end and stop.since is not None and stop.since - began < 0.4


def test_another_thread_hears_nothing_and_changes_nothing():
    before = [signal.getsignal(number) for number in SIGNALS]
    found: list[bool] = []

    def work() -> None:
        with StopSignals() as stop:
            found.append(stop.requeue or [signal.getsignal(number) for number in SIGNALS] != before)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert found == [False]


def signalled_in_a_collective() -> tuple[bool, float, float]:
    """Rank 0 waits in a collective for rank 1, which sends it a signal before it comes."""
    dist.init_process_group("gloo")
    pids = [None, None]
    dist.all_gather_object(pids, os.getpid())
    value = torch.ones(1)
    with StopSignals() as stop:
        dist.barrier()
        if dist.get_rank() == 1:
            time.sleep(0.3)
            os.kill(pids[0], USR2)
            time.sleep(0.5)
        began = time.monotonic()
        dist.all_reduce(value)
        return stop.requeue, float(value), time.monotonic() - began


def test_a_signal_in_a_collective_is_heard_when_it_returns():
    (first, sum_0, waited), (second, sum_1, _) = run_distributed(signalled_in_a_collective, 2)
    assert (first, second) == (True, False)
    assert sum_0 == sum_1 == 2.0
    assert waited > 0.5


CHILD = """
import os, sys, time
from megatron_elva.training.stop import ignore_in_child
time.sleep(0.5)  # imports
ignore_in_child()
print("ready", flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("number", SIGNALS)
def test_a_child_hears_nothing_from_its_first_moment(number):
    with held_back():
        child = subprocess.Popen([sys.executable, "-c", CHILD], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, set()) & set(SIGNALS)
    for _ in range(3):
        os.kill(child.pid, number)
    assert child.stdout.readline() == b"ready\n"
    os.kill(child.pid, number)
    child.communicate(timeout=20)
    assert child.returncode == 0


def test_ignoring_unblocks():
    """Else a signal that another one sends on purpose, as to a grandchild, would never arrive."""
    old = {number: signal.getsignal(number) for number in SIGNALS}
    try:
        with held_back():
            ignore_in_child()
            assert not signal.pthread_sigmask(signal.SIG_BLOCK, set()) & set(SIGNALS)
        assert all(signal.getsignal(number) == signal.SIG_IGN for number in SIGNALS)
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)


TRAINER = """
import os, sys, time
from multiprocessing import forkserver, resource_tracker
from megatron_elva.training.stop import StopSignals
from dali_pipelines.workers import WorkerPool
from tests.dali_pipelines.worker_deeds import make_handler

with StopSignals() as stop:
    pool = WorkerPool(make_handler, 2, 60.0)
    print(os.getpid(), flush=True)
    for line in sys.stdin:
        if line == "pids\\n":
            helpers = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid
            print(*pool.pids, *helpers, flush=True)
        else:
            print(pool.submit(("square", int(line))).result(), stop.requeue, stop.end, flush=True)
    pool.close()
"""


def test_the_last_packs_can_still_be_read_after_a_signal_to_every_process():
    """Also when it comes while workers start."""
    trainer = subprocess.Popen(
        [sys.executable, "-c", TRAINER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        start_new_session=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip

    def ask(line: str) -> str:
        trainer.stdin.write(f"{line}\n")
        trainer.stdin.flush()
        return trainer.stdout.readline().strip()

    try:
        trainer.stdout.readline()
        for _ in range(5):
            os.killpg(trainer.pid, USR2)
            time.sleep(0.1)
        assert ask("6") == "36 True False"
        pids = ask("pids")
        assert len(pids.split()) == 4
        os.killpg(trainer.pid, TERM)
        assert ask("7") == "49 True True"
        assert ask("pids") == pids  # the same ones: none was replaced
        trainer.communicate(timeout=20)
        assert trainer.returncode == 0
    finally:
        trainer.kill()
        trainer.wait()
