"""The writing process: what it writes, what stops it and what does not, and that nothing of it is left."""

from __future__ import annotations

import errno
import io
import os
import resource
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
import torch

from megatron_elva.training.writer import File, Outcome, Writer, attempt

TENSORS = [
    torch.randn(7, 5),
    torch.randn(4, 6).bfloat16()[1:3],
    torch.arange(9000.0)[2:4],
    torch.tensor(3.0),
    torch.empty(0, 4),
    torch.randn(3, 4).t(),
]


@pytest.fixture(scope="module")
def writer() -> Iterator[Writer]:
    made = Writer(torch.device("cpu"))
    yield made
    made.close()


def files_in(folder: Path) -> list[File]:
    folder.mkdir()
    parts = [TENSORS[0], b"between", *TENSORS[1:]]
    return [File(str(folder / "a"), parts), File(str(folder / "b"), [b"alone"]), File(str(folder / "c"), [])]


def read(path: Path, extent: tuple[int, int]) -> torch.Tensor:
    return torch.load(io.BytesIO(path.read_bytes()[extent[0] :][: extent[1]]))


def test_the_process_writes_what_this_one_would(tmp_path, writer):
    here, there = files_in(tmp_path / "here"), files_in(tmp_path / "there")
    expected = attempt(here)
    writer.submit(there)
    assert writer.poll(wait=True) == expected and expected.error is None
    (first, between, *rest), alone, none = expected.extents
    assert (alone, none) == ([(0, 5)], [])
    for extent, tensor in zip([first, *rest], TENSORS, strict=True):
        assert torch.equal(read(tmp_path / "there" / "a", extent), tensor)
        assert extent[1] < 2500  # a tensor's own numbers, not those of the memory around it
    for name in "abc":
        assert (tmp_path / "here" / name).stat().st_size == (tmp_path / "there" / name).stat().st_size
    assert (tmp_path / "there" / "a").read_bytes()[between[0] :][: between[1]] == b"between"


def paused(writer: Writer) -> psutil.Process:
    process = psutil.Process(writer.pid)
    process.suspend()
    return process


def test_what_changes_after_submit_is_not_written(tmp_path, writer):
    tensor = torch.ones(1000)
    writer.submit([File(str(tmp_path / "a"), [tensor])])
    process = paused(writer)
    tensor.zero_()
    assert writer.poll() is None
    process.resume()
    outcome = writer.poll(wait=True)
    assert outcome is not None and read(tmp_path / "a", outcome.extents[0][0]).eq(1).all()


def test_signals_that_end_or_requeue_a_job_do_not_reach_the_process(tmp_path, writer):
    """Slurm sends them to every process of a step, from the process's first moment on."""
    for name in "ab":
        writer.submit([File(str(tmp_path / name), [torch.ones(10)])])
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            os.kill(writer.pid, number)
        outcome = writer.poll(wait=True)
        assert outcome is not None and outcome.error is None


def wait_for(condition, seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


TRAINER = """
import os, sys, time, torch
from megatron_elva.training.writer import File, Writer
writer = Writer(torch.device("cpu"))
writer.submit([File(sys.argv[1] + "/first", [torch.ones(10)])])
writer.poll(wait=True)
writer.submit([File(sys.argv[1] + "/second", [torch.ones(1000)])])
os.kill(writer.pid, 19)  # in the middle of the second
print(writer.pid, flush=True)
time.sleep(float(sys.argv[2]))
"""


@pytest.mark.parametrize("end", ["killed", "returns"])
def test_the_process_ends_with_its_trainer(tmp_path, end):
    """Also one that forgets to close, and that is not held up by it."""
    command = [sys.executable, "-c", TRAINER, str(tmp_path), "60" if end == "killed" else "0"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as trainer:
        assert trainer.stdout is not None
        child = psutil.Process(int(trainer.stdout.readline()))
        if end == "killed":
            trainer.kill()
        assert trainer.wait(20) == (-9 if end == "killed" else 0)
    wait_for(lambda: not child.is_running() or child.status() == psutil.STATUS_ZOMBIE)
    assert (tmp_path / "first").stat().st_size > 0


def test_a_killed_process_is_an_error_and_the_next_use_starts_another(tmp_path, writer):
    writer.submit([File(str(tmp_path / "a"), [torch.ones(10)])])
    paused(writer).kill()
    assert writer.poll(wait=True) == Outcome([], "its writing process was killed by signal 9")
    for name in "bc":
        writer.submit([File(str(tmp_path / name), [torch.ones(10)])])
        outcome = writer.poll(wait=True)
        assert outcome is not None and outcome.error is None
        psutil.Process(writer.pid).kill()  # while it is idle
        wait_for(lambda: psutil.Process(writer.pid).status() == psutil.STATUS_ZOMBIE)


@pytest.mark.parametrize(("size", "beside"), [(0, 1 << 16), (1 << 16, 100), (1 << 18, 0)])
def test_an_error_of_the_file_system_keeps_its_number(tmp_path, writer, size, beside):
    """A file may grow to 100 kB: torch raises errors of its own over those of the file system."""
    (tmp_path / "folder").mkdir()
    writer.submit([File(str(tmp_path / "folder"), [b""])])
    assert writer.poll(wait=True) == Outcome([], os.strerror(errno.EISDIR), errno.EISDIR)
    resource.prlimit(writer.pid, resource.RLIMIT_FSIZE, (50_000, 50_000))
    writer.submit([File(str(tmp_path / "a"), [b"x" * beside, torch.ones(size)])])
    assert writer.poll(wait=True) == Outcome([], os.strerror(errno.EFBIG), errno.EFBIG)
    writer.kill()  # the next one has no limit


def mapped() -> int:
    """Blocks of shared memory in this process."""
    return Path("/proc/self/maps").read_text().count("memfd:checkpoint")


def test_nothing_grows_and_nothing_is_left(tmp_path):
    own = psutil.Process()
    before = own.num_fds(), len(own.children()), mapped()
    writer = Writer(torch.device("cpu"))
    handles: set[tuple[int, ...]] = set()
    memory: list[tuple[int, int]] = []
    for i in range(20):
        writer.submit([File(str(tmp_path / str(i % 2)), [torch.ones(1_000_000)])])
        assert writer.poll(wait=True) is not None
        handles.add((own.num_fds(), psutil.Process(writer.pid).num_fds(), mapped()))
        if i in (4, 19):
            memory.append((own.memory_info().rss, psutil.Process(writer.pid).memory_info().rss))
    assert len(handles) == 1, handles
    assert all(abs(late - early) < 30e6 for early, late in zip(*memory, strict=True)), memory
    writer.close()
    assert (own.num_fds(), len(own.children()), mapped()) == before
