"""Workers that work, crash and hang, and what becomes of their tasks."""

import faulthandler
import functools
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
from concurrent.futures import CancelledError, wait
from pathlib import Path

import numpy as np
import psutil
import pytest

from dali_pipelines.worker_process import Slot, WorkerError
from dali_pipelines.workers import Lost
from tests.dali_pipelines.worker_deeds import (
    PARENT,
    SOON,
    alive,
    handle,
    make_handler,
    new_pool,
    parent,
    results,
    touch,
    until,
)

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="workers need Linux")


@pytest.fixture(autouse=True)
def hard_timeout():
    faulthandler.dump_traceback_later(150, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def pool():
    with new_pool(make_handler, 2, 20) as pool:
        yield pool


# Work.


@pytest.mark.parametrize("workers", [0, 1, 3])
def test_results(workers):
    with new_pool(make_handler, workers, 20) as pool:
        assert results(pool, [("square", n) for n in range(200)]) == [n * n for n in range(200)]
        assert len(pool.pids) == workers


def test_tasks_start_in_order(tmp_path):
    with new_pool(make_handler, 1, 20) as pool:
        results(pool, [("touch", str(tmp_path / str(n))) for n in range(30)])
    times = [(tmp_path / str(n)).stat().st_mtime_ns for n in range(30)]
    assert times == sorted(times)


def test_all_workers_work(pool):
    assert len(set(results(pool, [("sleep", 0.2)] * 2 + [("pid", 0)] * 50))) >= 2
    futures = [pool.submit(("sleep", 0.5)) for _ in range(2)]
    start = time.monotonic()
    wait(futures)
    assert time.monotonic() - start < 0.95


@pytest.mark.parametrize("workers", [0, 1])
def test_an_exception_comes_out_and_costs_no_worker(workers):
    with new_pool(make_handler, workers, 20) as pool:
        before = results(pool, [("pid", 0)])
        with pytest.raises(KeyError, match="no such thing") as caught:
            pool.submit(("raise", KeyError("no such thing"))).result(SOON)
        if workers:
            assert "in raise_it" in str(caught.value.__cause__)
        assert results(pool, [("pid", 0)]) == before


def test_exceptions_and_values_that_cannot_be_pickled(pool):
    with pytest.raises(Exception, match="pickle"):
        pool.submit(("unpicklable", 0)).result(SOON)
    with pytest.raises(Exception, match="pickle"):
        pool.submit(("square", lambda: None)).result(SOON)  # the task itself
    with pytest.raises(WorkerError, match="one and two") as caught:
        pool.submit(("raise two", 0)).result(SOON)
    assert "raise_two" in str(caught.value.__cause__)
    assert results(pool, [("square", 3)]) == [9]


def test_a_queued_task_can_be_cancelled(tmp_path):
    with new_pool(make_handler, 1, 20) as pool:
        first = pool.submit(("sleep", 0.5))
        second = pool.submit(("touch", str(tmp_path / "no")))
        assert second.cancel()
        first.result(SOON)
        assert results(pool, [("square", 2)]) == [4]
        assert not (tmp_path / "no").exists()


# Deaths.

DEATHS = {
    "exit": (7, "exited with code 7"),
    "leave": (0, "exited with code 0"),
    "segfault": (0, "SIGSEGV"),
    "hang": (60, "no progress for 1 s"),
    "hang in c": (60, "no progress for 1 s"),
    "stop": (0, "no progress for 1 s"),
}


@pytest.mark.parametrize("death", DEATHS)
def test_a_death_costs_one_task(death, caplog):
    argument, reason = DEATHS[death]
    with new_pool(make_handler, 2, 1) as pool:
        before = set(results(pool, [("sleep", 0.2)] * 2) and pool.pids)
        others = [pool.submit(("square", n)) for n in range(50)]
        future = pool.submit((death, argument))
        others += [pool.submit(("square", n)) for n in range(50, 100)]
        assert [other.result(SOON) for other in others] == [n * n for n in range(100)]
        lost = future.result(SOON)
        assert isinstance(lost, Lost)
        assert lost.doing == f"shard.tar/{death}"
        assert reason in lost.reason
        assert until(lambda: len(pool.pids) == 2)
        gone = before - set(pool.pids)
        assert len(gone) == 1
        assert not alive(gone.pop())
        assert results(pool, [("square", 5)] * 4) == [25] * 4
    assert f"shard.tar/{death}" in caplog.text
    # The stacks of who can still tell them.
    where = {"segfault": "in segfault", "hang": "in sleep", "hang in c": "in hang_in_c"}.get(death)
    assert where is None or where in caplog.text


def test_a_kill_from_outside():
    with new_pool(make_handler, 2, 20) as pool:
        futures = [pool.submit(("sleep", 60)), pool.submit(("pid", 0))]
        idle = futures[1].result(SOON)
        (busy,) = set(pool.pids) - {idle}
        assert until(lambda: len(pool.pids) == 2)
        os.kill(busy, signal.SIGKILL)
        lost = futures[0].result(SOON)
        assert lost.doing == "shard.tar/sleep"
        assert "SIGKILL" in lost.reason
        assert idle in pool.pids


def test_the_death_of_an_idle_worker_costs_nothing(caplog):
    with new_pool(make_handler, 1, 20) as pool:
        for _ in range(3):
            (pid,) = results(pool, [("pid", 0)])
            os.kill(pid, signal.SIGKILL)
            assert until(lambda pid=pid: not alive(pid))
        assert results(pool, [("square", 4)]) == [16]


def test_the_death_of_a_worker_that_has_not_taken_its_task_costs_nothing():
    with new_pool(make_handler, 1, 20) as pool:
        (pid,) = results(pool, [("pid", 0)])
        os.kill(pid, signal.SIGSTOP)
        future = pool.submit(("square", 4))
        time.sleep(0.3)
        os.kill(pid, signal.SIGKILL)
        assert future.result(SOON) == 16


def test_the_death_of_the_fork_server_costs_nothing():
    with new_pool(make_handler, 2, 20) as pool:
        results(pool, [("sleep", 0.1)] * 2)
        pids = pool.pids
        server = psutil.Process(pids[0]).ppid()
        assert server != os.getpid()
        future = pool.submit(("sleep", 1.0))
        time.sleep(0.3)
        os.kill(server, signal.SIGKILL)
        assert future.result(SOON) is None  # done again by a fresh worker
        assert results(pool, [("square", n) for n in range(20)]) == [n * n for n in range(20)]
        pids += pool.pids
    assert until(lambda: not any(alive(pid) for pid in pids))


def test_progress_keeps_a_worker_alive():
    with new_pool(make_handler, 1, 0.5) as pool:
        assert pool.submit(("slow", 2)).result(SOON) == "done"


def test_a_suspended_parent_does_not_blame_its_workers():
    script = PARENT + "print(pool.submit(('sleep', 1)).result(), flush=True); time.sleep(60)"
    with parent(script, TIMEOUT="2") as (process, pids):
        time.sleep(0.5)
        for pid in (process.pid, *pids):
            os.kill(pid, signal.SIGSTOP)
        time.sleep(3)
        for pid in (process.pid, *pids):
            os.kill(pid, signal.SIGCONT)
        assert process.stdout.readline() == "None\n"


def test_what_a_task_did_not_report_is_not_taken_from_the_one_before():
    with new_pool(make_handler, 1, 20) as pool:
        results(pool, [("square", 2)])
        assert pool.submit(("silent", 0)).result(SOON) == Lost(None, "the worker exited with code 3")


def test_a_report_may_be_long_and_in_any_alphabet():
    with new_pool(make_handler, 1, 20) as pool:
        text = "данные/视频-" * 60
        doing = pool.submit(("say", text)).result(SOON).doing
        assert text.startswith(doing)
        assert 497 <= len(doing.encode()) <= 500
        assert pool.submit(("say", "\ud800")).result(SOON).doing == "?"


def test_a_slot_keeps_the_last_whole_report():
    slot = Slot()
    twin = Slot(os.dup(slot.fd))
    assert slot.doing is None
    for n in range(50):
        twin.report(f"key {n}")
        assert slot.doing == f"key {n}"
    twin.take()
    assert slot.doing is None
    assert slot.taken == 1
    slot.close()
    twin.close()


# Starting and ending.


def make_nothing():
    raise FileNotFoundError(2, "no tokenizer", "/there")


def die_at_once():
    os._exit(4)


def start_once(path):
    """The first two starts fail."""
    touch(path, None)
    if len(Path(path).read_text().splitlines()) <= 2:
        os._exit(1)
    return handle


def hang_at_start():
    time.sleep(60)


def test_workers_that_cannot_start_are_one_clear_error(caplog):
    with new_pool(make_nothing, 2, 20) as pool:
        futures = [pool.submit(("square", n)) for n in range(5)]
        for future in futures:
            with pytest.raises(FileNotFoundError, match="no tokenizer") as caught:
                future.result(SOON)
            assert "in make_nothing" in str(caught.value.__cause__)
        with pytest.raises(FileNotFoundError, match="no tokenizer"):
            pool.submit(("square", 1)).result(SOON)
        assert until(lambda: not pool.pids)


def test_workers_that_die_while_starting_are_an_error():
    with (
        new_pool(die_at_once, 1, 20) as pool,
        pytest.raises(WorkerError, match="a data worker does not start: the worker exited with code 4"),
    ):
        pool.submit(("square", 1)).result(SOON)


def test_workers_that_hang_while_starting_are_an_error():
    with (
        new_pool(hang_at_start, 1, 20, start_timeout_s=0.5) as pool,
        pytest.raises(WorkerError, match=r"does not start: no progress for 0\.5 s") as caught,
    ):
        pool.submit(("square", 1)).result(SOON)
    assert "in hang_at_start" in str(caught.value.__cause__)


def test_a_worker_may_fail_to_start_twice(tmp_path):
    with new_pool(functools.partial(start_once, str(tmp_path / "starts")), 1, 20) as pool:
        assert results(pool, [("square", 3)]) == [9]


def test_what_cannot_be_pickled_is_refused_at_once():
    with pytest.raises(Exception, match="pickle"):
        new_pool(lambda: handle, 1, 20)
    with pytest.raises(ValueError, match="timeout_s: 0"):
        new_pool(make_handler, 1, 0)


def test_deaths_leave_nothing_behind(caplog):
    caplog.set_level(logging.ERROR)
    with new_pool(make_handler, 2, 20) as pool:
        results(pool, [("exit", 1)] * 4 + [("sleep", 0.2)] * 4)
        fds, count = psutil.Process().num_fds(), threading.active_count()
        results(pool, [("exit", 1)] * 40)
        assert until(lambda: len(pool.pids) == 2)
        results(pool, [("sleep", 0.2)] * 4)
        assert psutil.Process().num_fds() <= fds
        assert threading.active_count() == count
    assert threading.active_count() <= count - 2


def expected(seed):
    """What `crash_at_random` ends with, found without running what kills."""
    draw = random.Random(seed)
    draw.random()
    fate = draw.random()
    if fate < 0.06:
        return Lost
    if fate < 0.2:
        return f"bad {seed}"
    return np.random.default_rng(seed).integers(0, 256, int(draw.random() * 3e5), dtype=np.uint8)


def test_random_crashes_change_no_other_result(caplog):
    caplog.set_level(logging.ERROR)
    with new_pool(make_handler, 3, 20) as pool:
        futures = [pool.submit(("random", seed)) for seed in range(600)]
        lost = 0
        for seed, future in enumerate(futures):
            wanted = expected(seed)
            if wanted is Lost:
                lost += 1
                assert future.result(SOON).doing == f"shard.tar/{seed}"
            elif isinstance(wanted, str):
                with pytest.raises(ValueError, match=wanted):
                    future.result(SOON)
            else:
                assert np.array_equal(future.result(SOON), wanted)
    assert lost > 20


# No workers.


def test_without_workers_nothing_runs_ahead(tmp_path):
    with new_pool(make_handler, 0, 20) as pool:
        futures = [pool.submit(("touch", str(tmp_path / str(n)))) for n in range(3)]
        assert not list(tmp_path.iterdir())
        futures[1].result()
        futures[1].result()
        assert (tmp_path / "1").read_text() == f"{os.getpid()}\n"
        assert futures[2].exception() is None
        assert pool.pids == []
    with pytest.raises(CancelledError):
        futures[0].result()
    with pytest.raises(ValueError, match="closed"):
        pool.submit(("square", 1))


ALONE = """
import sys
from tests.dali_pipelines.worker_deeds import make_handler
from dali_pipelines import workers
workers._Inline.GRACE_S = 1
pool = workers.WorkerPool(make_handler, 0, 1, on_fatal=lambda *what: print(*what, flush=True))
print(pool.submit(("slow", 2)).result(), flush=True)
pool.submit((sys.argv[1], 60)).result()
"""


@pytest.mark.parametrize("task", ["hang", "hang in c"])
def test_a_hang_without_workers_is_not_silent(task):
    run = subprocess.run([sys.executable, "-c", ALONE, task], capture_output=True, text=True, timeout=30)
    assert run.returncode == 1
    assert ("in sleep" if task == "hang" else "in hang_in_c") in run.stderr
    # No Python runs while a C call holds the GIL: then there are only the stacks.
    assert run.stdout == ("done\nshard.tar/hang no progress for 1 s\n" if task == "hang" else "done\n")
    assert ("data: shard.tar/hang: no progress for 1 s" in run.stderr) == (task == "hang")
