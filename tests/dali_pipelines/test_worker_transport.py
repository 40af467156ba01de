"""What goes to workers and comes back, and that nothing grows by it."""

import faulthandler
import gc
import os
import random
import weakref

import numpy as np
import psutil
import pytest

from dali_pipelines.messages import BIG_BUFFER, MAX_BUFFERS, SMALL, pack, unpack
from tests.dali_pipelines.worker_deeds import SOON, make_handler, new_pool, results, until

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
