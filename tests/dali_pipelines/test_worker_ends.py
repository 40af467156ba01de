"""The ends of workers: closed, forgotten, and left by parents that are killed; signals pass them by."""

import faulthandler
import gc
import os
import signal
import time
import weakref
from concurrent.futures import CancelledError

import pytest

from dali_pipelines.workers import uses_timer
from tests.dali_pipelines.worker_deeds import PARENT, SOON, alive, make_handler, new_pool, parent, results, until

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
