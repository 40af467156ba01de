"""What a profile of a step says: time by group of operations, and what waited for the device."""

from __future__ import annotations

import re
import traceback
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch.autograd import DeviceType

ROOT = Path(__file__).resolve().parents[2]
RANGES = ("elva.merge", "elva.optimizer", "elva.grad_norm", "elva.embed")
"""Ranges that `benchmarks.gpu.profile_step` puts around parts of the step."""
GROUPS = (
    ("merge points", r"elva\.merge|_Merge"),
    ("optimizer", r"elva\.optimizer|adam"),
    ("gradient norm", r"elva\.grad_norm|l2norm"),
    ("attention", r"flash|fmha|sdp|scaled_dot_product|fused_?attn"),
    ("FP8 casts", r"cast_transpose|cast_fp8|quantiz|amax|fp8.*(cast|transpose)"),
    ("GEMM", r"gemm|nvjet|cutlass|xmma|aten::(mm|addmm|bmm|addbmm|baddbmm|linear|matmul)\b"),
    ("patch embedding, forward", r"elva\.embed"),
    ("norms", r"norm"),
    ("copies and fills", r"memcpy|memset|copy|fill|zero_|cat"),
    ("indexing and sorting", r"index|gather|scatter|sort|scan|cumsum|embedding"),
    ("element-wise and sums", r"elementwise|reduce|softmax|aten::(mul|add|sub|div|silu|sigmoid|sum|exp|log|neg|where)"),
)
"""Name and pattern, first match first; matched on a kernel's name and on the names of all that it was launched from."""
SYNC_WARNING = "called a synchronizing"
"""Torch's words for an operation that waits; when it begins to warn it says something else."""
SYNCS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize", "Memcpy DtoH")


def group_of(names: Iterable[str]) -> str:
    """The group of an operation by its own name and those of what it was called from."""
    said = "\n".join(names)
    return next((group for group, pattern in GROUPS if re.search(pattern, said, re.IGNORECASE)), "other")


def count_syncs(names: Iterable[str]) -> dict[str, int]:
    """How often each kind of waiting for the device is among the names of a trace's events."""
    found = Counter(kind for name in names for kind in SYNCS if name.startswith(kind))
    return {kind: found[kind] for kind in SYNCS}


def costs(events: Sequence[Any], on_gpu: bool) -> dict[str, float]:
    """Seconds by group, largest first: of kernels on a GPU, else the own CPU time of operations.

    Args:
        events: of `torch.profiler.profile.events`.
        on_gpu: count device time.
    """
    spent: dict[str, float] = defaultdict(float)
    if not on_gpu:
        for event in events:
            spent[group_of(_chain(event))] += event.self_cpu_time_total / 1e6
    else:
        for group, microseconds in _kernels(events):
            spent[group] += microseconds / 1e6
    return dict(sorted(((g, s) for g, s in spent.items() if s > 0), key=lambda item: -item[1]))


def _chain(event: Any) -> list[str]:
    names = []
    while event is not None:
        names.append(event.name)
        event = event.cpu_parent
    return names


def _kernels(events: Sequence[Any]) -> Iterator[tuple[str, float]]:
    """Group and microseconds of all that ran on the device.

    What was launched from an operation of torch is known with its callers; the rest by its name alone.
    """
    annotations = {event.name for event in events if event.device_type == DeviceType.CPU and _is_range(event)}
    left: dict[str, float] = defaultdict(float)
    for event in events:
        if event.device_type == DeviceType.CUDA and event.name not in annotations and not _is_marked(event):
            left[event.name] += event.time_range.elapsed_us()
    for event in events:
        if event.device_type != DeviceType.CPU:
            continue
        for kernel in event.kernels:
            if kernel.name in left:
                left[kernel.name] -= kernel.duration
                yield group_of([kernel.name, *_chain(event)]), kernel.duration
    for name, microseconds in left.items():
        if microseconds > 0.5:  # less is what rounding left
            yield group_of([name]), microseconds


def _is_range(event: Any) -> bool:
    """Whether an event of the host is a range around others. The device has an event of the same name for some."""
    return _is_marked(event) or event.name in RANGES or event.name.startswith(("ProfilerStep#", "Optimizer."))


def _is_marked(event: Any) -> bool:
    return bool(getattr(event, "is_user_annotation", False))


@contextmanager
def sync_warnings(device: str) -> Iterator[Counter[str]]:
    """Count what torch warns of as waiting for the device, by place in the code; filled in as it happens.

    Torch knows of its own operations alone; a wait within another library's is not among them.
    """
    found: Counter[str] = Counter()
    if device != "cuda":
        yield found
        return

    def note(message: Warning | str, *args: Any, **kwargs: Any) -> None:
        if SYNC_WARNING in str(message):
            stack = traceback.extract_stack()[:-1]
            found[place([f for f in stack if f.filename != warnings.__file__])] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode("default")


def place(stack: Sequence[traceback.FrameSummary]) -> str:
    """The innermost line of this project on a stack, and behind it the innermost line of all where that is another."""
    own = [f for f in stack if Path(f.filename).is_relative_to(ROOT) and "benchmarks" not in Path(f.filename).parts]
    inner = stack[-1]
    text = f"{Path(inner.filename).name}:{inner.lineno} {inner.name}"
    if not own:
        return text
    file = Path(own[-1].filename).relative_to(ROOT)
    line = f"{file}:{own[-1].lineno} {own[-1].name}"
    return line if own[-1] is inner else f"{line} -> {text}"
