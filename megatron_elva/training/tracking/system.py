"""Samples of a node's CPU, memory, disk, network and GPUs, by MLflow's own monitors, to `mlflow/system_K.jsonl`."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import psutil

from megatron_elva.training.attempts import newest
from megatron_elva.training.runs import write_atomic
from megatron_elva.training.tracking.state import FOLDER

_LONGEST_S = 300.0
_LINES_PER_AGE = 360


def describe_node(run: Path, node: int) -> None:
    """Write what this machine is to `mlflow/node_K.json`."""
    about = {
        "host": socket.gethostname(),
        "cpus": os.cpu_count(),
        "memory_gb": round(psutil.virtual_memory().total / 1e9, 1),
        "gpus": gpu_names(),
    }
    write_atomic(run / FOLDER / f"node_{node}.json", json.dumps(about))


def gpu_names() -> list[str]:
    """The GPUs of this machine, as their driver calls them; none without NVML."""
    try:
        import pynvml

        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        names = [pynvml.nvmlDeviceGetName(handle) for handle in handles]
    except Exception:  # no driver, no library, a library of another driver: there is no list of what it may raise
        return []
    return [name.decode() if isinstance(name, bytes) else str(name) for name in names]


class Sampler(threading.Thread):
    """Samples every few seconds, and writes a line with the mean of what it sampled.

    Lines become rarer as a run grows older (one in 1/360 of its age, at least one in five minutes): a month of 16 nodes
    with a line every ten seconds would be hundreds of millions of points.

    Args:
        run: the run directory.
        node: number of this node.
        every: seconds between two samples.
    """

    def __init__(self, run: Path, node: int, every: float) -> None:
        super().__init__(name="system", daemon=True)
        self._run = run
        self._node = node
        self._every = every
        self._path = run / FOLDER / f"system_{node}.jsonl"
        self._path.parent.mkdir(parents=True, exist_ok=True)
        self._ended = threading.Event()

    def run(self) -> None:
        """Sample until `close`. What cannot be sampled ends this thread alone."""
        try:
            describe_node(self._run, self._node)
            self._sample_on()
        except Exception as error:
            print(f"system metrics end: {type(error).__name__}: {error}", file=sys.stderr)

    def _sample_on(self) -> None:
        monitors = _monitors()
        step = newest(self._path).get("step", -1) + 1
        if step and not self._path.read_bytes().endswith(b"\n"):
            with self._path.open("a") as file:
                file.write("\n")  # what a killed attempt left of its last line must not spoil the next one
        began = written = time.monotonic()
        psutil.cpu_percent()  # its first answer is about nothing
        while not self._ended.wait(self._every):
            for monitor in monitors:
                monitor.collect_metrics()
            now = time.monotonic()
            if now - written < min(_LONGEST_S, (now - began) / _LINES_PER_AGE):
                continue
            written = now
            line: dict[str, Any] = {"step": step, "time": time.time()}
            for monitor in monitors:
                line |= monitor.aggregate_metrics()
                monitor.clear_metrics()
            line["run_disk_available_megabytes"] = round(shutil.disk_usage(self._run).free / 1e6, 1)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
            step += 1

    def close(self) -> None:
        """Take no more samples."""
        self._ended.set()


def _monitors() -> list[Any]:
    """MLflow's monitors, those that work on this machine."""
    from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
    from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
    from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
    from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

    found: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
    with contextlib.suppress(ImportError, RuntimeError):  # no nvidia-ml-py, or no GPU
        found.append(GPUMonitor())
    return found
