"""What a thread is doing, read from its Python frames by another thread."""

from __future__ import annotations

import linecache
import os
import re
import site
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch.distributed.c10d_logger as c10d_logger
import torch.distributed.distributed_c10d as c10d

import dali_pipelines
import megatron_elva
from megatron_elva.parallel import cpu

_COLLECTIVES = {c10d.__file__, c10d_logger.__file__}
_WRAPPERS = {"wrapper", "__torch_function__"}
# Waits that have no Python frame of their own: of a handle that an asynchronous collective gave, or for the device.
_WAITING_CALL = re.compile(r"\.(wait|synchronize|item|tolist|cpu)\(")
_FOREIGN = tuple(
    {*(sysconfig.get_paths()[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")), *site.getsitepackages()}
)
_OWN = tuple(f"{Path(package.__file__ or '').parent}{os.sep}" for package in (megatron_elva, dali_pipelines))
_lines: dict[tuple[str, int], str | None] = {}


@dataclass(frozen=True)
class Standing:
    """Where a thread is.

    Attributes:
        in_collective: the function of torch.distributed that it is in, or the wait for an earlier one or for the
            device (``wait``, ``synchronize``, ``item``, ...); None outside.
        where: ``file:line (function)`` of the innermost frame that belongs to no library.
    """

    in_collective: str | None
    where: str


def waits_in(frame: FrameType | None) -> str | None:
    """What the thread of an innermost frame waits in: see `Standing.in_collective`. Microseconds."""
    found = None
    inner = frame
    while frame is not None:
        code = frame.f_code
        if code.co_filename in _COLLECTIVES and code.co_name not in _WRAPPERS:
            found = code.co_name  # the outermost: all_gather_object rather than the all_gather in it
        frame = frame.f_back
    return found or (_waiting_call(inner) if inner is not None else None)


def _waiting_call(frame: FrameType) -> str | None:
    place = (frame.f_code.co_filename, frame.f_lineno or 0)
    if place not in _lines:
        found = _WAITING_CALL.search(linecache.getline(*place))
        _lines[place] = found.group(1) if found else None
    return _lines[place]


def is_own(file: str) -> bool:
    """Whether a source file belongs to no library; the one through which CPU mode sends every call does not count."""
    return file != cpu.__file__ and (file.startswith(_OWN) or not file.startswith(("<", *_FOREIGN)))


def standing(frame: FrameType | None) -> Standing:
    """Where the thread of an innermost frame is."""
    inner, waiting = frame, waits_in(frame)
    while frame is not None and not is_own(frame.f_code.co_filename):
        frame = frame.f_back
    frame = frame or inner
    where = "" if frame is None else place(frame.f_code.co_filename, frame.f_lineno or 0, frame.f_code.co_name)
    return Standing(waiting, where)


def place(file: str, line: int, function: str) -> str:
    """``package/file.py:12 (function)``."""
    return f"{'/'.join(Path(file).parts[-2:])}:{line} ({function})"


def standing_in_dump(text: str, thread: int) -> str | None:
    """Where a thread was, from what faulthandler wrote; None where it says nothing of that thread.

    Args:
        text: the dump.
        thread: the thread's ident.
    """
    parts = re.split(r"^(?:Current thread|Thread) 0x([0-9a-f]+).*$", text, flags=re.MULTILINE)
    stacks = [body for ident, body in zip(parts[1::2], parts[2::2], strict=True) if int(ident, 16) == thread]
    if not stacks:
        return None
    frames = re.findall(r'^  File "(.*)", line (\d+) in (.*)$', stacks[-1], flags=re.MULTILINE)
    own = [frame for frame in frames if is_own(frame[0])]
    return next((place(file, int(line), function) for file, line, function in own or frames), None)
