"""The process that puts a rank's files of a checkpoint on disk while the rank trains on.

It imports torch and nothing of the model. What it writes reaches it in a block of anonymous shared memory, so that
nothing is pickled but names and sizes, and nothing is left behind on any disk however the two processes end. It
ignores the signals that end or requeue a job, which are sent to every process of it, and dies with its trainer.
megatron-core's own callers start it by fork, under threads of gloo and CUDA, or need a GPU, keep a manager process
that outlives a killed trainer, and tell of a failed write only in a collective.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import pickle
import signal
import socket
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from megatron_elva.training.runs import sync_folder
from megatron_elva.training.stop import held_back, ignore_in_child

_PR_SET_PDEATHSIG = 1
_ALIGN = 64


@dataclass(frozen=True)
class Placed:
    """A tensor in the shared memory: where it begins in bytes, and what it is."""

    offset: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass(frozen=True)
class File:
    """A file to write.

    Attributes:
        path: of the file.
        parts: what stands in it one after another: bytes as they are, tensors as `torch.save` writes them.
    """

    path: str
    parts: Sequence[bytes | Tensor | Placed]


@dataclass(frozen=True)
class Outcome:
    """How the writing ended.

    Attributes:
        extents: ``(offset, bytes)`` of each part of each file, where it went well.
        error: what went wrong, or None.
        code: its errno, or None where it was no error of the file system.
    """

    extents: list[list[tuple[int, int]]]
    error: str | None = None
    code: int | None = None


def write_files(files: Sequence[File]) -> list[list[tuple[int, int]]]:
    """Write files so that a power cut does not lose them; gives ``(offset, bytes)`` of each part of each.

    Raises:
        OSError: the file system does not take them.
    """
    extents = []
    for file in files:
        with Path(file.path).open("wb", buffering=1 << 20) as stream:
            own = []
            for part in file.parts:
                begin = stream.tell()
                if isinstance(part, bytes):
                    stream.write(part)
                else:
                    assert isinstance(part, Tensor)
                    torch.save(_alone(part.cpu()), stream)
                own.append((begin, stream.tell() - begin))
            stream.flush()
            os.fsync(stream.fileno())
        extents.append(own)
    for folder in {str(Path(file.path).parent) for file in files}:
        sync_folder(folder)
    return extents


def _alone(tensor: Tensor) -> Tensor:
    """The tensor on a storage of its own: `torch.save` writes whole storages."""
    whole = tensor.is_contiguous() and tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
    return tensor if whole else tensor.clone(memory_format=torch.contiguous_format)


def attempt(files: Sequence[File]) -> Outcome:
    """Write files in this process."""
    try:
        return Outcome(write_files(files))
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> Outcome:
    if isinstance(error, RuntimeError) and isinstance(error.__context__, OSError):
        error = error.__context__  # torch's file writer raises its own over that of the stream
    if isinstance(error, OSError) and error.errno is not None:
        return Outcome([], os.strerror(error.errno), error.errno)
    return Outcome([], f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")


class Writer:
    """This rank's writing process, started at the first use, and the memory shared with it, kept between uses.

    Args:
        device: where the tensors live; for a GPU the shared memory is pinned.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._process: subprocess.Popen[bytes] | None = None
        self._socket: socket.socket | None = None
        self._memory: _Memory | None = None
        self._counts: list[int] = []
        self._results = 0

    @property
    def pid(self) -> int | None:
        """Of the process, while there is one."""
        return None if self._process is None else self._process.pid

    def submit(self, files: Sequence[File]) -> None:
        """Copy what is to be written and let it be written; returns after the copy.

        Raises:
            OSError: there is no memory for the copy or no process to be had.
        """
        self._start()
        assert self._socket is not None
        size, placed = _place(files)
        plan = pickle.dumps(placed)
        self._counts = [len(file.parts) for file in files]
        results = _aligned(size + len(plan))
        total = results + 16 * sum(self._counts)
        if self._memory is None or self._memory.size < total:
            self._release()
            self._memory = _Memory(total, pinned=self._device.type == "cuda")
        for source, target in zip(files, placed, strict=True):
            for tensor, place in zip(source.parts, target.parts, strict=True):
                if isinstance(place, Placed):
                    assert isinstance(tensor, Tensor)
                    self._memory.tensor(place).copy_(tensor.detach(), non_blocking=True)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        self._memory.map[size : size + len(plan)] = plan
        self._results = results
        request = json.dumps({"size": self._memory.size, "plan": [size, len(plan)], "results": results})
        with suppress(OSError):  # it died while it was idle: poll tells
            socket.send_fds(self._socket, [request.encode()], [self._memory.handle])

    def poll(self, wait: bool = False) -> Outcome | None:
        """How the writing went; None while it goes on."""
        assert self._socket is not None and self._process is not None and self._memory is not None
        try:
            answer = self._socket.recv(4096, 0 if wait else socket.MSG_DONTWAIT)
        except BlockingIOError:
            return None
        except OSError:
            answer = b""
        if not answer:
            code = self._process.wait()
            self.kill()
            how = f"killed by signal {-code}" if code < 0 else f"ended with status {code}"
            return Outcome([], f"its writing process was {how}")
        said = json.loads(answer)
        if said["error"] is not None:
            return Outcome([], said["error"], said["code"])
        flat = self._memory.extents(self._results, sum(self._counts))
        return Outcome([[flat.pop(0) for _ in range(count)] for count in self._counts])

    def kill(self) -> None:
        """End the process at once; what it writes stays half-written."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        if self._socket is not None:
            self._socket.close()
        self._process = self._socket = None

    def close(self) -> None:
        """End the process and free the memory."""
        self.kill()
        self._release()

    def _release(self) -> None:
        if self._memory is not None:
            self._memory.release()
            self._memory = None

    def _start(self) -> None:
        if self._process is not None:
            if self._process.poll() is None:
                return
            self.kill()
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = str(Path(__file__).resolve().parents[2])
        env = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])]),
            "OMP_NUM_THREADS": "1",
            "CUDA_VISIBLE_DEVICES": "",
        }
        with theirs, held_back():
            self._process = subprocess.Popen(
                [sys.executable, "-c", f"from {__name__} import serve; serve({os.getpid()})"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                env=env,
            )
        self._socket = ours


class _Memory:
    """Anonymous memory that can be handed to another process.

    It belongs to no file system, so that the small /dev/shm of a container does not limit it.
    """

    def __init__(self, size: int, pinned: bool) -> None:
        self.size = size
        self.handle = os.memfd_create("checkpoint")
        os.ftruncate(self.handle, size)
        self.map = mmap.mmap(self.handle, size)
        self._bytes: Tensor | None = torch.frombuffer(self.map, dtype=torch.uint8)
        self._pinned = pinned
        if pinned:
            _check(torch.cuda.cudart().cudaHostRegister(self._bytes.data_ptr(), size, 0))

    def tensor(self, place: Placed) -> Tensor:
        """The tensor at a place."""
        return _view(self.map, place)

    def extents(self, offset: int, count: int) -> list[tuple[int, int]]:
        """The pairs of numbers that the process left."""
        pairs = torch.frombuffer(self.map, dtype=torch.int64, count=2 * count, offset=offset) if count else None
        return [] if pairs is None else [(int(a), int(b)) for a, b in pairs.view(-1, 2).tolist()]

    def release(self) -> None:
        """Give the memory back."""
        assert self._bytes is not None
        if self._pinned:
            _check(torch.cuda.cudart().cudaHostUnregister(self._bytes.data_ptr()))
        self._bytes = None
        self.map.close()
        os.close(self.handle)


def _check(status: object) -> None:
    if int(status) != 0:  # type: ignore[call-overload]
        raise OSError(errno.ENOMEM, f"the host memory of a checkpoint cannot be pinned (CUDA error {status})")


def _aligned(offset: int) -> int:
    return -(-offset // _ALIGN) * _ALIGN


def _place(files: Sequence[File]) -> tuple[int, list[File]]:
    """The same files with each tensor replaced by its place in the shared memory, and the bytes taken by them."""
    at, out = 0, []
    for file in files:
        parts: list[bytes | Tensor | Placed] = []
        for part in file.parts:
            if isinstance(part, Tensor):
                parts.append(Placed(at, part.dtype, tuple(part.shape)))
                at = _aligned(at + part.numel() * part.element_size())
            else:
                parts.append(part)
        out.append(File(file.path, parts))
    return at, out


def _view(memory: mmap.mmap, place: Placed) -> Tensor:
    """A tensor over the memory, on a storage that begins and ends with it."""
    numbers = 1
    for size in place.shape:
        numbers *= size
    if numbers == 0:
        return torch.empty(place.shape, dtype=place.dtype)
    return torch.frombuffer(memory, dtype=place.dtype, count=numbers, offset=place.offset).view(place.shape)


def serve(trainer: int) -> None:
    """Write what is asked for until the trainer ends."""
    ignore_in_child()
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0)
    if os.getppid() != trainer:  # it died before
        return
    os.nice(5)
    torch.set_num_threads(1)
    requests = socket.socket(fileno=0)
    while True:
        request, handles, _, _ = socket.recv_fds(requests, 4096, 1)
        if not request:
            return
        outcome = _write_from(handles[0], json.loads(request))
        requests.send(json.dumps({"error": outcome.error, "code": outcome.code}).encode())


def _write_from(handle: int, request: dict) -> Outcome:
    """Write the files described in the shared memory, and leave there what stands where in them."""
    with mmap.mmap(handle, request["size"]) as memory:
        os.close(handle)
        begin, length = request["plan"]
        placed: list[File] = pickle.loads(memory[begin : begin + length])
        files = [File(f.path, [_view(memory, p) if isinstance(p, Placed) else p for p in f.parts]) for f in placed]
        outcome = attempt(files)
        del files
        flat = [number for own in outcome.extents for pair in own for number in pair]
        if flat:
            memory[request["results"] : request["results"] + 8 * len(flat)] = torch.tensor(flat).numpy().tobytes()
    return outcome
