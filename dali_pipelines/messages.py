"""Python values between two processes: big arrays are not copied, and nothing is left when either side is killed."""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pickle
import socket
import struct
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

SMALL = 1 << 15  # bytes: messages up to this size travel in the socket itself
BIG_BUFFER = 1 << 16  # bytes: buffers from this size on are not copied into the pickle
MAX_BUFFERS = 1000  # buffers of one message that travel beside the pickle

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


@dataclass(frozen=True)
class Message:
    """A pickled value: `head` is all of it, or, with `fd`, the sizes of the parts of that memory."""

    head: bytes
    fd: int | None

    def close(self) -> None:
        """Let go of the memory; for the side that packed it, after sending."""
        if self.fd is not None:
            os.close(self.fd)


def pack(value: Any) -> Message:
    """Pickle a value; big contiguous arrays are written once, into anonymous memory."""
    parts: list[memoryview] = []

    def inside(buffer: pickle.PickleBuffer) -> bool:
        view = buffer.raw()
        if view.nbytes < BIG_BUFFER or len(parts) == MAX_BUFFERS:
            return True
        parts.append(view)
        return False

    stream = pickle.dumps(value, protocol=5, buffer_callback=inside)
    if not parts and len(stream) <= SMALL:
        return Message(stream, None)
    parts.append(memoryview(stream))
    fd = os.memfd_create("message", os.MFD_CLOEXEC)
    try:
        for offset, part in zip(_offsets([part.nbytes for part in parts]), parts, strict=False):
            _write_all(fd, part, offset)
    except BaseException:
        os.close(fd)
        raise
    return Message(struct.pack(f"={len(parts)}Q", *(part.nbytes for part in parts)), fd)


def _write_all(fd: int, part: memoryview, offset: int) -> None:
    while part.nbytes:
        done = os.pwrite(fd, part, offset)  # at most 2 GiB at once
        part, offset = part[done:], offset + done


def _offsets(sizes: Sequence[int]) -> list[int]:
    """Where each part begins, and last the end: multiples of 64, for vector instructions."""
    starts = [0]
    for size in sizes:
        starts.append(starts[-1] + (size + 63) // 64 * 64)
    return starts


def send(sock: socket.socket, message: Message) -> None:
    """Send a message over a socket of type SOCK_SEQPACKET: all of it or nothing arrives."""
    if message.fd is None:
        sock.send(message.head)
    else:
        socket.send_fds(sock, [message.head], [message.fd])


def receive(sock: socket.socket, flags: int = 0) -> Message:
    """The next message.

    Raises:
        EOFError: the other side is gone.
        BlockingIOError: there is none, and the flags say not to wait.
    """
    try:
        head, fds, answer, _ = socket.recv_fds(sock, SMALL, 1, flags | socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        raise EOFError from None
    if not head:
        raise EOFError
    if answer & socket.MSG_CTRUNC:
        raise OSError(errno.EMFILE, "no file descriptor is left to receive a message with; raise `ulimit -n`")
    return Message(head, fds[0] if fds else None)


def unpack(message: Message) -> Any:
    """The value of a message; the message is used up. Its big arrays share memory that goes with the last of them."""
    if message.fd is None:
        return pickle.loads(message.head)
    try:
        sizes = struct.unpack(f"={len(message.head) // 8}Q", message.head)
        *starts, _ = _offsets(sizes)
        memory = _map(message.fd, starts[-1] + sizes[-1])
    finally:
        message.close()
    parts = [memory[start : start + size] for start, size in zip(starts, sizes, strict=True)]
    return pickle.loads(parts[-1], buffers=parts[:-1])


def _map(fd: int, size: int) -> memoryview:
    """Map a descriptor's memory, writable. Not by Python's mmap, which would keep one descriptor open per result."""
    flags = mmap.MAP_SHARED | getattr(mmap, "MAP_POPULATE", 0x8000)
    address = _libc.mmap(None, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, fd, 0)
    if address in (None, ctypes.c_void_p(-1).value):
        raise OSError(ctypes.get_errno(), f"no memory for a message of {size} bytes")
    owner = (ctypes.c_ubyte * size).from_address(address)
    # At exit the kernel does it, and arrays may still be in use then.
    weakref.finalize(owner, _libc.munmap, address, size).atexit = False
    return memoryview(owner).cast("B")
