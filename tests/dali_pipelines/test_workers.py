"""Workers that crash, hang and are killed, and parents that are."""

import contextlib
import ctypes
import faulthandler
import functools
import gc
import logging
import os
import random
import signal
import subprocess
import sys
import threading
import time
import weakref
from concurrent.futures import CancelledError, wait
from pathlib import Path

import numpy as np
import psutil
import pytest

from dali_pipelines.messages import BIG_BUFFER, MAX_BUFFERS, SMALL, pack, unpack
from dali_pipelines.worker_process import Slot, WorkerError
from dali_pipelines.workers import Lost, WorkerPool, uses_timer

pytestmark = pytest.mark.skipif(not hasattr(os, "memfd_create"), reason="workers need Linux")

new_pool = functools.partial(WorkerPool, preload=[__name__])
SOON = 30.0  # seconds: what does not come by then never comes


@pytest.fixture(autouse=True)
def hard_timeout():
    faulthandler.dump_traceback_later(150, exit=True)
    yield
    faulthandler.cancel_dump_traceback_later()


# What the workers of these tests can do.


class TwoArgumentsError(Exception):
    """Can be pickled and not unpickled."""

    def __init__(self, a, b):
        super().__init__(f"{a} and {b}")


def make_handler():
    return handle


def handle(task, report):
    what, argument = task
    if what != "silent":
        report(f"shard.tar/{what}")
    return DEEDS[what](argument, report)


def hang_in_c(seconds, _):
    ctypes.PyDLL(None).sleep(int(seconds))  # PyDLL keeps the GIL


def stop(_, __):
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(SOON)


def segfault(_, __):
    ctypes.string_at(0)


def report_slowly(seconds, report):
    for i in range(int(seconds * 10)):
        report(f"shard.tar/{i}")
        time.sleep(0.1)
    return "done"


def raise_it(error, _):
    raise error


def raise_two(_, __):
    raise TwoArgumentsError("one", "two")


def sleep(seconds, _):
    time.sleep(seconds)


def touch(path, _):
    with Path(path).open("a") as file:
        file.write(f"{os.getpid()}\n")


def signals(_, __):
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, set())
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)
    return [signal.getsignal(n) == signal.SIG_IGN and n not in blocked for n in numbers]


def threads(_, __):
    import torch

    return torch.get_num_threads()


def crash_at_random(seed, report):
    """A task that always has the same end: a value, an exception or one of three deaths."""
    draw = random.Random(seed)
    report(f"shard.tar/{seed}")
    time.sleep(draw.random() * 0.01)
    fate = draw.random()
    if fate < 0.03:
        os._exit(7)
    if fate < 0.05:
        os.kill(os.getpid(), signal.SIGKILL)
    if fate < 0.06:
        ctypes.string_at(0)
    if fate < 0.2:
        raise ValueError(f"bad {seed}")
    return np.random.default_rng(seed).integers(0, 256, int(draw.random() * 3e5), dtype=np.uint8)


DEEDS = {
    "square": lambda n, _: n * n,
    "silent": lambda _, __: os._exit(3),
    "pid": lambda _, __: os.getpid(),
    "hang": sleep,
    "hang in c": hang_in_c,
    "stop": stop,
    "segfault": segfault,
    "exit": lambda code, _: os._exit(code),
    "leave": lambda code, _: sys.exit(code),
    "slow": report_slowly,
    "raise": raise_it,
    "raise two": raise_two,
    "sleep": sleep,
    "touch": touch,
    "array": lambda array, _: array + 1,
    "say": lambda text, report: (report(text), os._exit(1)),
    "unpicklable": lambda _, __: lambda: None,
    "signals": signals,
    "threads": threads,
    "random": crash_at_random,
    "zeros": lambda size, _: np.zeros(size, np.uint8),
}


def results(pool, tasks):
    return [future.result(SOON) for future in [pool.submit(task) for task in tasks]]


def alive(pid):
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    return condition()


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


@pytest.mark.parametrize("task", [("sleep", 60), ("hang in c", 60), ("stop", 0)])
def test_closing_while_busy_is_prompt(task):
    pool = new_pool(make_handler, 2, 100)
    results(pool, [("sleep", 0.2)] * 2)
    futures = [pool.submit(task) for _ in range(5)]
    time.sleep(0.5)
    pids = pool.pids
    assert len(pids) == 2
    start = time.monotonic()
    pool.close()
    pool.close()
    assert time.monotonic() - start < 3
    assert not any(alive(pid) for pid in pids)
    for future in futures:
        with pytest.raises(CancelledError):
            future.result(SOON)
    with pytest.raises(ValueError, match="closed"):
        pool.submit(task)


def test_closing_while_starting():
    for _ in range(5):
        pool = new_pool(make_handler, 2, 20)
        future = pool.submit(("square", 1))
        pool.close()
        assert future.cancelled() or future.result(SOON) == 1
        assert not pool.pids


def test_a_forgotten_pool_ends_its_workers():
    pool = new_pool(make_handler, 2, 20)
    results(pool, [("sleep", 0.2)] * 2)
    pids, there = pool.pids, weakref.ref(pool)
    del pool
    gc.collect()
    assert there() is None
    assert until(lambda: not any(alive(pid) for pid in pids))


PARENT = """
import os, signal, sys, time, threading
from tests.dali_pipelines.test_workers import make_handler
from dali_pipelines.workers import WorkerPool
WORKERS = int(os.environ.get("WORKERS", 2))
pool = WorkerPool(make_handler, WORKERS, float(os.environ.get("TIMEOUT", 100)))
[f.result() for f in [pool.submit(("sleep", 0.3)) for _ in range(WORKERS)]]
from multiprocessing import forkserver, resource_tracker
helpers = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid
print(*pool.pids, *helpers, flush=True)
"""


@contextlib.contextmanager
def parent(script, **settings):
    """A process with workers of its own, and the ids of the processes that it has started."""
    process = subprocess.Popen(
        [sys.executable, "-c", script],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, **settings},
    )
    pids = []
    try:
        pids = [int(word) for word in process.stdout.readline().split()]
        assert len(pids) == int(settings.get("WORKERS", 2)) + 2
        yield process, pids
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stdin.close()
        left = [pid for pid in pids if not until(lambda pid=pid: not alive(pid), 5)]
        for pid in left:
            os.kill(pid, signal.SIGKILL)
        assert not left


@pytest.mark.parametrize("task", [("sleep", 0), ("sleep", 60), ("hang in c", 60), ("stop", 0)])
@pytest.mark.parametrize("end", ["killed", "os._exit"])
def test_a_parent_that_is_gone_leaves_no_process(task, end):
    script = PARENT
    script += f"futures = [pool.submit({task!r}) for _ in range(2)]; time.sleep(1); print('busy', flush=True)\n"
    script += "os._exit(3)\n" if end == "os._exit" else "time.sleep(60)\n"
    with parent(script) as (process, pids):
        assert process.stdout.readline() == "busy\n"
        if end == "killed":
            process.kill()
        process.wait(10)
        assert until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize(
    "last", ["", "raise SystemExit(5)", "futures = [pool.submit(('hang in c', 60))] * 3; time.sleep(0.3)"]
)
def test_a_parent_that_does_not_close_ends_all_the_same(last):
    with parent(PARENT + last) as (process, pids):
        assert process.wait(10) == (5 if "5" in last else 0)
        assert until(lambda: not any(alive(pid) for pid in pids))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGUSR2, signal.SIGTERM])
def test_signals_for_the_trainer_do_not_reach_its_helpers(number):
    script = f"import signal; signal.signal({int(number)}, lambda *_: print('heard', flush=True))\n" + PARENT
    script += "for line in sys.stdin: print(pool.submit(('square', 6)).result(), *pool.submit(('signals', 0)).result())"
    with parent(script, WORKERS="1", PYTHONUNBUFFERED="1") as (process, pids):
        for _ in range(3):
            os.killpg(process.pid, number)
            assert process.stdout.readline() == "heard\n"
            process.stdin.write("\n")
            process.stdin.flush()
            assert process.stdout.readline() == "36 True True True\n"
        assert all(alive(pid) for pid in pids)


def test_the_trainer_itself_still_hears_signals(pool):
    results(pool, [("square", 1)])
    assert not signal.pthread_sigmask(signal.SIG_BLOCK, set())


def tells_who_uses_the_timer(_, report):
    report("shard.tar/a")
    return uses_timer()


def make_telling_handler():
    return tells_who_uses_the_timer


def test_the_timer_of_faulthandler_is_free_between_tasks():
    with new_pool(make_telling_handler, 0, SOON) as pool:
        assert not uses_timer()
        assert pool.submit(None).result() is True
        assert not uses_timer()


def test_workers_use_one_thread(pool):
    assert results(pool, [("threads", 0)]) == [1]


# Transport.


def test_big_arrays_both_ways(pool):
    array = np.random.default_rng(0).integers(0, 200, 50_000_000, dtype=np.uint8)
    for result in results(pool, [("array", array)] * 2):
        assert np.array_equal(result, array + 1)
        assert result.flags.writeable
        result[-1] = 7
    assert results(pool, [("array", np.ones(3))])[0].flags.writeable


@pytest.mark.parametrize(
    "value",
    [
        None,
        b"x" * (SMALL - 100),
        b"x" * (SMALL + 100),
        [np.full(BIG_BUFFER - 3 + n, n, np.uint8) for n in range(7)],
        [np.full(BIG_BUFFER, n % 256, np.uint8) for n in range(MAX_BUFFERS + 5)],
        {
            "f": np.asfortranarray(np.arange(1e5).reshape(100, 1000)),
            "cut": np.arange(1e6)[::3],
            "none": np.zeros((0, 3)),
        },
    ],
    ids=["none", "small", "in memory", "around the limit", "many", "odd layouts"],
)
def test_values_survive_the_way(value):
    there = unpack(pack(value))
    np.testing.assert_equal(there, value)
    big = there.values() if isinstance(there, dict) else there if isinstance(there, list) else []
    assert all(array.flags.writeable and array.ctypes.data % 16 == 0 for array in big)


def test_a_result_outlives_its_pool():
    with new_pool(make_handler, 1, 20) as pool:
        (array,) = results(pool, [("zeros", 1_000_000)])
    part = array[-10:]
    del array
    gc.collect()
    part += 1
    assert part.sum() == 10


def test_a_result_is_let_go(pool):
    future = pool.submit(("zeros", 1_000_000))
    array = weakref.ref(future.result(SOON))
    del future
    assert until(lambda: array() is None)


def test_nothing_grows():
    """Neither descriptors nor maps nor memory, here or in the worker, whatever the sizes and however tasks end."""

    def usage():
        gc.collect()
        return [
            (process.num_fds(), len(process.memory_maps(grouped=False)), process.memory_info().rss / 2**20)
            for process in [psutil.Process(), *(psutil.Process(pid) for pid in pool.pids)]
        ]

    def work(count):
        draw = random.Random(1)
        sizes = [draw.choice([10, 1000, 70_000, 3_000_000]) for _ in range(count)]
        assert [result.size for result in results(pool, [("zeros", size) for size in sizes])] == sizes
        for _ in range(count // 10):
            with pytest.raises(ValueError, match="bad"):
                pool.submit(("raise", ValueError("bad"))).result(SOON)

    with new_pool(make_handler, 1, 20) as pool:
        work(300)
        before = usage()
        for _ in range(10):
            work(300)
        after = usage()
    for (fds, maps, memory), (fds_then, maps_then, memory_then) in zip(before, after, strict=True):
        assert fds_then <= fds + 1
        assert maps_then <= maps + 20
        assert memory_then < memory + 20


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
from tests.dali_pipelines.test_workers import make_handler
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
