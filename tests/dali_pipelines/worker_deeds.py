"""What workers can do in tests: work, crash, hang, and answer for it."""

import contextlib
import ctypes
import functools
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from dali_pipelines.workers import WorkerPool

new_pool = functools.partial(WorkerPool, preload=[__name__])
SOON = 30.0  # seconds: what does not come by then never comes


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


PARENT = """
import os, signal, sys, time, threading
from tests.dali_pipelines.worker_deeds import make_handler
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
