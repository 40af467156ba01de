"""The machine itself: GPUs, driver, processors, memory, limits, and where its CUDA files lie. Nothing is imported."""

from __future__ import annotations

import os
import re
import resource
import shutil
import sysconfig
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from glob import glob
from pathlib import Path

from megatron_elva.doctor.asking import ask
from megatron_elva.doctor.findings import one_line
from megatron_elva.doctor.snapshot import Gpu, Limits

_TOOLKIT = "/usr/local/cuda"
_FIELDS = ("name", "driver_version", "memory.total", "compute_mode", "compute_cap")


@dataclass(frozen=True)
class Shown:
    """What nvidia-smi shows; ``trouble`` is why it shows nothing, None where there is no nvidia-smi."""

    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    trouble: str | None = None


def ask_smi(timeout: float) -> Shown:
    """The GPUs as nvidia-smi lists them; older ones do not know the compute capability."""
    if shutil.which("nvidia-smi") is None:
        return Shown()
    for fields in (_FIELDS, _FIELDS[:-1]):
        query = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
        answer = ask(query, timeout)
        if answer.trouble is None:
            return parse_smi(answer.out)
        if "not a valid field" not in answer.out + answer.err:
            break
    return Shown(trouble=one_line(answer.err or answer.out or answer.trouble or ""))


def parse_smi(text: str) -> Shown:
    """Read lines of name, driver, MiB of memory, compute mode and, perhaps, compute capability."""
    gpus, driver = [], None
    for line in text.splitlines():
        parts = [part.strip() for part in line.split(",")]
        if len(parts) < 4:
            continue
        capability = re.fullmatch(r"(\d+)\.(\d+)", parts[4]) if len(parts) > 4 else None
        memory = float(parts[2]) * 2**20 / 1e9 if re.fullmatch(r"\d+(\.\d+)?", parts[2]) else None
        gpus.append(
            Gpu(
                parts[0],
                (int(capability[1]), int(capability[2])) if capability else None,
                memory,
                exclusive="Exclusive" in parts[3],
            )
        )
        driver = parts[1] if re.match(r"\d", parts[1]) else driver
    return Shown(tuple(gpus), driver, None if gpus else one_line(text) or None)


def kernel_driver() -> str | None:
    """Version of the NVIDIA driver in the kernel, or None."""
    found = re.search(r"Kernel Module\D*\s(\d+(?:\.\d+)+)", _text("/proc/driver/nvidia/version"))
    return found[1] if found else None


def gpus_on_the_bus() -> int:
    """NVIDIA GPUs on the PCI bus, which a container sees even where it may not use them."""
    count = 0
    for device in Path("/sys/bus/pci/devices").glob("*"):
        display = _text(device / "class").startswith(("0x0300", "0x0302"))
        count += display and _text(device / "vendor").strip() == "0x10de"
    return count


def cpus() -> int:
    """Cores that this process may use."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


def memory_gb() -> float | None:
    """Memory that this process may use in 1e9 bytes: of the machine or of its control group."""
    found = re.search(r"MemTotal:\s+(\d+) kB", _text("/proc/meminfo"))
    sizes = [int(found[1]) * 1024] if found else []
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        if (text := _text(path).strip()).isdigit():
            sizes.append(int(text))
    return min(sizes) / 1e9 if sizes else None


def limits() -> Limits:
    """What the system allows this process."""
    shm = None
    with suppress(OSError):
        where = os.statvfs("/dev/shm")
        shm = where.f_blocks * where.f_frsize
    files, most = (_finite(value) for value in resource.getrlimit(resource.RLIMIT_NOFILE))
    return Limits(shm, files, most, _finite(resource.getrlimit(resource.RLIMIT_MEMLOCK)[0]))


def infiniband() -> tuple[str, ...]:
    """Names of the InfiniBand or RoCE adapters."""
    return tuple(sorted(path.name for path in Path("/sys/class/infiniband").glob("*")))


def compiler(environ: Mapping[str, str]) -> str | None:
    """The C compiler that Triton takes: ``CC``, or else gcc or clang on the path."""
    return next((found for name in (environ.get("CC"), "gcc", "clang") if name and (found := shutil.which(name))), None)


def python_header() -> bool:
    """Whether this interpreter's Python.h is there, which what Triton compiles includes."""
    return (Path(sysconfig.get_paths()["include"]) / "Python.h").is_file()


def first_cudnn(environ: Mapping[str, str], site: str) -> tuple[str, str | None] | None:
    """The cuDNN that Transformer Engine finds before that of this interpreter's packages.

    It looks below ``CUDNN_HOME``, ``CUDNN_PATH``, ``CUDA_HOME``, ``CUDA_PATH`` and /usr/local/cuda in this order.

    Args:
        environ: environment variables.
        site: where this interpreter's packages are.

    Returns:
        Its path and, where the file's name tells it, its version; None where there is none, or where it is in ``site``.
    """
    names = ("CUDNN_HOME", "CUDNN_PATH", "CUDA_HOME", "CUDA_PATH")
    for folder in (*(environ.get(name) for name in names), _TOOLKIT):
        if not folder:
            continue
        places = (folder, f"{folder}/lib*", f"{folder}/lib*/*", f"{folder}/targets/*/lib")
        found = sorted({os.path.realpath(path) for place in places for path in glob(f"{place}/libcudnn.so*")})  # noqa: PTH207
        if found:
            path = found[-1]
            version = re.search(r"\.so\.(\d+(?:\.\d+)+)$", path)
            own = bool(site) and path.startswith(os.path.realpath(site) + os.sep)
            return None if own else (path, version[1] if version else None)
    return None


def cuda_headers(environ: Mapping[str, str], site: str) -> str | None:
    """The folder of CUDA headers that Transformer Engine finds for what it compiles at run time, or None."""
    folders = [Path(environ["NVTE_CUDA_INCLUDE_DIR"])] if environ.get("NVTE_CUDA_INCLUDE_DIR") else []
    homes = [environ.get("CUDA_HOME"), environ.get("CUDA_DIR"), _TOOLKIT]
    folders += [Path(home) / "include" for home in homes if home]
    if site:
        folders.append(Path(site) / "nvidia" / "cuda_runtime" / "include")
    return next((str(folder) for folder in folders if (folder / "cuda_runtime.h").is_file()), None)


def _finite(limit: int) -> int | None:
    return None if limit == resource.RLIM_INFINITY else limit


def _text(path: str | Path) -> str:
    try:
        return Path(path).read_text(errors="replace")
    except OSError:
        return ""
