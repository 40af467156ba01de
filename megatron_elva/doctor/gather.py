"""Look at this machine: everything that is read or asked, side by side."""

from __future__ import annotations

import os
import platform
import sys
import sysconfig
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from importlib import metadata, util
from threading import Lock
from typing import Any

from megatron_elva.doctor import machine, slurm
from megatron_elva.doctor.asking import end_all, probe
from megatron_elva.doctor.snapshot import OWN, Gpu, Slurm, Snapshot
from megatron_elva.doctor.versions import plain

_NEEDS = {
    "torch": ("torch",),
    "te": ("torch", "transformer_engine"),
    "apex": ("apex",),
    "triton": ("triton",),
    "dali": ("nvidia",),
    "megatron": ("torch", "megatron"),
    "decoding": ("torch", "numpy", "av"),
}
"""Modules without which a probe has nothing to look at."""
_ON_GPU = ("torch", "te", "decoding")


def look(timeout: float) -> Snapshot:
    """Take a snapshot of this machine.

    Args:
        timeout: seconds that each single probe or command may take; all of them run side by side.
    """
    distributions = _distributions()
    with ThreadPoolExecutor(16) as pool:
        try:
            shown, gpus, probes, queue = _ask_all(pool, timeout)
        except KeyboardInterrupt:
            end_all()
            raise
    own = distributions.get(OWN)
    site = sysconfig.get_paths()["purelib"]
    return Snapshot(
        python=platform.python_version(),
        system=f"{platform.system()} {platform.machine()}, {' '.join(platform.libc_ver()).strip() or 'unknown libc'}",
        cpus=machine.cpus(),
        memory_gb=machine.memory_gb(),
        versions={name: found.version for name, found in distributions.items()},
        requires=None if own is None else tuple(own.requires or ()),
        requires_python={
            name: str(found.metadata["Requires-Python"])
            for name, found in distributions.items()
            if "Requires-Python" in found.metadata
        },
        gpus=gpus,
        driver=shown.driver or machine.kernel_driver(),
        smi_trouble=shown.trouble,
        on_the_bus=machine.gpus_on_the_bus(),
        probes=probes,
        environ=dict(os.environ),
        site=site,
        cudnn_first=machine.first_cudnn(os.environ, site),
        cuda_headers=machine.cuda_headers(os.environ, site),
        compiler=machine.compiler(os.environ),
        python_header=machine.python_header(),
        infiniband=machine.infiniband(),
        limits=machine.limits(),
        slurm=queue,
    )


def _ask_all(
    pool: ThreadPoolExecutor, timeout: float
) -> tuple[machine.Shown, tuple[Gpu, ...], dict[str, dict[str, Any]], Slurm]:
    """What nvidia-smi shows, the GPUs, the facts of each probe, and what Slurm says."""
    smi, queue = pool.submit(machine.ask_smi, timeout), pool.submit(slurm.read, timeout)
    running = {name: pool.submit(probe, name, timeout) for name in ("driver", "nvdec")}
    gpus = _gpus(smi.result().gpus, running["driver"].result())
    # a GPU that takes one process at a time would refuse all probes but one
    turn = Lock() if any(gpu.exclusive for gpu in gpus) else nullcontext()
    for name in filter(_has_what_it_needs, _NEEDS):
        running[name] = pool.submit(_in_turn, name, timeout, turn if name in _ON_GPU else nullcontext())
    return smi.result(), gpus, {name: result.result() for name, result in running.items()}, queue.result()


def _in_turn(name: str, timeout: float, turn: AbstractContextManager[Any]) -> dict[str, Any]:
    with turn:
        return probe(name, timeout)


def _has_what_it_needs(name: str) -> bool:
    for module in _NEEDS[name]:
        try:
            if module not in sys.modules and util.find_spec(module) is None:
                return False
        except (ImportError, ValueError):
            return False
    return True


def _distributions() -> dict[str, metadata.Distribution]:
    """Installed distributions by name; the first one on the path counts, as it does for imports."""
    found: dict[str, metadata.Distribution] = {}
    for each in metadata.distributions():
        try:
            found.setdefault(plain(each.metadata["Name"]), each)
            str(each.version)
        except (KeyError, TypeError, AttributeError, OSError, UnicodeDecodeError):  # the rest of a broken installation
            continue
    return found


def _gpus(shown: tuple[Gpu, ...], driver: dict[str, Any]) -> tuple[Gpu, ...]:
    """The GPUs of nvidia-smi with what it did not tell, or else those of the driver's library."""
    told = driver.get("gpus", ())
    known = tuple(Gpu(g["name"], (g["capability"][0], g["capability"][1]), g["memory_gb"]) for g in told)
    if not shown:
        return known
    by_name = {gpu.name: gpu.capability for gpu in known}  # CUDA_VISIBLE_DEVICES may hide and reorder the driver's
    return tuple(Gpu(g.name, g.capability or by_name.get(g.name), g.memory_gb, g.exclusive) for g in shown)
