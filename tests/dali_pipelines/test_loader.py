"""The stream of packs."""

import os
import pickle
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from dali_pipelines.loader import PackLoader, build_dataset
from tests.dali_pipelines.make_samples import same


@pytest.fixture
def dataset(config):
    return build_dataset(config, 0, 1, 8)


def take(loader, n):
    with loader:
        return [next(loader) for _ in range(n)]


def processes_of(loader):
    return [p.pid for p in loader._iterator._workers]


def alive(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("workers", [0, 2])
def test_resume_is_exact(dataset, workers):
    expected = [dataset[step] for step in range(9)]
    before = torch.get_rng_state()
    for start in (0, 5):
        packs = take(PackLoader(dataset, start, workers=workers, prefetch=2), 9 - start)
        assert all(same(a, b) for a, b in zip(packs, expected[start:], strict=True))
    assert torch.equal(torch.get_rng_state(), before)


def test_state_counts_what_was_handed_out(dataset):
    with PackLoader(dataset, 4, workers=2, prefetch=3) as loader:
        assert loader.state == 4  # packs made ahead do not count
        next(loader)
        next(loader)
        assert loader.state == 6
        again = next(PackLoader(dataset, loader.state))
        assert same(next(loader), again)


def test_closing_ends_the_workers(dataset):
    loader = PackLoader(dataset, workers=2)
    pack = next(loader)
    assert pack.patches.is_shared()
    pids = processes_of(loader)
    assert all(alive(pid) for pid in pids)
    loader.close()
    loader.close()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(ValueError, match="closed"):
        next(loader)


def test_a_dead_worker_is_an_error_not_a_hang(dataset):
    with PackLoader(dataset, workers=1, prefetch=1) as loader:
        next(loader)
        os.kill(processes_of(loader)[0], signal.SIGKILL)
        with pytest.raises(RuntimeError, match="worker"):
            for _ in range(10):
                next(loader)


TRAINER = """
import pickle, sys
from multiprocessing import forkserver, resource_tracker
from dali_pipelines.loader import PackLoader
loader = PackLoader(pickle.load(open(sys.argv[1], "rb")), workers=2, prefetch=1)
helpers = forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid
print(*helpers, *(p.pid for p in loader._iterator._workers), flush=True)
for line in sys.stdin:
    print(len(next(loader).keys), flush=True)
"""


@pytest.fixture
def trainer(dataset, tmp_path):
    """A process of its own with a loader, and the ids of the processes that it has started."""
    (tmp_path / "dataset").write_bytes(pickle.dumps(dataset))
    command = [sys.executable, "-c", TRAINER, str(tmp_path / "dataset")]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert len(pids) == 4
    yield process, pids
    process.kill()
    process.communicate()


def ask(process):
    process.stdin.write("pack\n")
    process.stdin.flush()
    return int(process.stdout.readline())


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_signals_for_the_trainer_do_not_reach_its_helpers(trainer, dataset):
    process, pids = trainer
    # Once while the workers start, and once while they work.
    for packs in (range(3), range(3, 6)):
        for pid in pids:
            os.kill(pid, signal.SIGUSR2)
            os.kill(pid, signal.SIGINT)
        assert [ask(process) for _ in packs] == [len(dataset[i].keys) for i in packs]
        assert all(alive(pid) for pid in pids)


def test_the_trainer_itself_still_hears_signals(dataset):
    with PackLoader(dataset, workers=1):
        assert not signal.pthread_sigmask(signal.SIG_BLOCK, set()) & {signal.SIGUSR2, signal.SIGINT}


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs /proc")
def test_a_killed_trainer_leaves_no_process(trainer):
    process, pids = trainer
    ask(process)
    process.kill()
    process.wait()
    end = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
