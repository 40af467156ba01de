"""What every benchmark writes beside its figures: command, date, machine; and the forms it writes them in."""

from __future__ import annotations

import json
import os
import platform
import shlex
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch


def origin(module: str, arguments: Sequence[str]) -> dict[str, str]:
    """Command and date (UTC) of this run."""
    threads = os.environ.get("OMP_NUM_THREADS")
    setting = [] if threads is None else [f"OMP_NUM_THREADS={threads}"]
    return {
        "command": shlex.join([*setting, "python", "-m", module, *arguments]),
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
    }


def machine(device: str) -> dict[str, Any]:
    """Where this process measures, and with which versions."""
    names = {"python": platform.python_version(), **{name: version(name) for name in ("torch", "megatron-core")}}
    cores = f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} cores, {torch.get_num_threads()} threads"
    gpu = torch.cuda.get_device_name() if device == "cuda" else None
    return {"device": gpu or f"CPU {_cpu()}", "cores": cores, "versions": names}


def _cpu() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text(encoding="utf-8").splitlines() if info.is_file() else []
    fields = dict(line.split(":", 1) for line in reversed(lines) if ":" in line)
    values = {key.strip(): value.strip() for key, value in fields.items()}
    if "model name" not in values:
        return platform.processor() or platform.machine()
    return f"{values['model name']} (family {values.get('cpu family')}, model {values.get('model')})"


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]

    def line(cells: Sequence[str]) -> str:
        first = cells[0].ljust(widths[0])
        return f"| {' | '.join([first, *(c.rjust(w) for c, w in zip(cells[1:], widths[1:], strict=True))])} |"

    rule = [f"{'-' * widths[0]}", *(f"{'-' * (w - 1)}:" for w in widths[1:])]
    return "\n".join([line(head), line(rule), *map(line, rows)])


def write(text: str, result: dict[str, Any], json_file: str | None, md_file: str | None) -> None:
    """Print the text, and write result and text to the files that are named."""
    sys.stdout.write(text + "\n")
    for name, content in ((json_file, json.dumps(result, indent=2)), (md_file, text)):
        if name is not None:
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            Path(name).write_text(content + "\n", encoding="utf-8")
