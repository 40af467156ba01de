"""What there is to say of the machine: processors, GPUs, driver, NVDEC, limits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

from megatron_elva.doctor.findings import Finding, State
from megatron_elva.doctor.snapshot import Gpu, Snapshot

_SHM_BYTES = 1 << 30
_FILES = 4096
_FILES_WITHOUT_GPU = 512
_CONTAINER = "in a container: start it with --gpus all (Docker), --nv (Apptainer) or Slurm's --gpus-per-node"


def findings(snapshot: Snapshot) -> Iterator[Finding]:
    """What there is to say of the machine."""
    memory = "" if snapshot.memory_gb is None else f", {snapshot.memory_gb:.0f} GB of memory"
    yield Finding("machine", "ok", f"{snapshot.system}; {snapshot.cpus} cores{memory}")
    yield _gpu(snapshot)
    yield _driver(snapshot)
    yield _nvdec(snapshot)
    yield from _limits(snapshot)
    if snapshot.infiniband:
        yield _infiniband(snapshot)


def named(gpus: tuple[Gpu, ...]) -> str:
    """Such as ``8 x NVIDIA H100 80GB HBM3``."""
    return ", ".join(f"{count} x {name}" for name, count in Counter(gpu.name for gpu in gpus).items())


def _gpu(snapshot: Snapshot) -> Finding:
    if snapshot.gpus:
        about = [] if snapshot.capability is None else ["compute capability {}.{}".format(*snapshot.capability)]
        sizes = [gpu.memory_gb for gpu in snapshot.gpus if gpu.memory_gb is not None]
        about += [f"{min(sizes):.0f} GB each"] if sizes else []
        return Finding("GPU", "ok", named(snapshot.gpus) + (f" ({', '.join(about)})" if about else ""))
    if snapshot.smi_trouble is not None and "no devices" not in snapshot.smi_trouble.lower():
        state: State = "bad" if snapshot.on_the_bus else "warning"
        remedy = "load the kernel module of the driver's version, or reboot after a driver update"
        return Finding("GPU", state, f"nvidia-smi fails: {snapshot.smi_trouble}", f"{remedy}; {_CONTAINER}")
    if snapshot.on_the_bus:
        there = f"{snapshot.on_the_bus} NVIDIA GPUs on the PCI bus, and none that this process may use"
        return Finding("GPU", "warning", there, f"install NVIDIA's driver; {_CONTAINER}")
    return Finding("GPU", "missing", "none", "use device=cpu (cluster=local sets it); GPU runs need an NVIDIA GPU")


def _driver(snapshot: Snapshot) -> Finding:
    facts = snapshot.facts("driver")
    supports = "" if snapshot.driver_cuda is None else f", supports CUDA {'.'.join(map(str, snapshot.driver_cuda))}"
    if not snapshot.gpus:
        there = f"{snapshot.driver}{supports}, without a GPU" if snapshot.driver or supports else "none"
        return Finding("driver", "missing", there, "only a GPU needs it")
    if "error" in facts:
        remedy = "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video; or repair the driver"
        return Finding("driver", "bad", f"{snapshot.driver or 'unknown'}, but libcuda fails: {facts['error']}", remedy)
    return Finding("driver", "ok", f"{snapshot.driver or 'version unknown'}{supports}")


def _nvdec(snapshot: Snapshot) -> Finding:
    error = snapshot.facts("nvdec").get("error")
    if error is None and snapshot.facts("nvdec"):
        return Finding("NVDEC", "ok", "libnvcuvid.so.1 of the driver; what it decodes is told under `video`")
    if not snapshot.gpus:
        return Finding("NVDEC", "missing", "none", "only a GPU has it: PyAV decodes on the CPU")
    remedy = (
        "start the container with NVIDIA_DRIVER_CAPABILITIES=compute,utility,video, or install the driver's "
        "libnvidia-decode; until then PyAV decodes on the CPU"
    )
    return Finding("NVDEC", "warning", f"libnvcuvid.so.1 cannot be loaded: {error}", remedy)


def _limits(snapshot: Snapshot) -> Iterator[Finding]:
    limits = snapshot.limits
    if limits.shm_bytes is not None:
        there = f"{limits.shm_bytes / 2**30:.2f} GiB"
        if limits.shm_bytes < _SHM_BYTES:
            remedy = "start the container with --ipc=host or --shm-size=16g: NCCL's and workers' buffers are there"
            yield Finding("/dev/shm", "warning", there, remedy)
        else:
            yield Finding("/dev/shm", "ok", there)
    wanted = _FILES if snapshot.gpus else _FILES_WITHOUT_GPU
    if limits.open_files is not None:
        there = f"{limits.open_files} at once"
        if limits.open_files >= wanted:
            yield Finding("open files", "ok", there)
        elif limits.open_files_most is None or limits.open_files_most >= wanted:
            yield Finding(
                "open files", "warning", there, f"`ulimit -n {limits.open_files_most or 65536}` before the run"
            )
        else:
            remedy = f"ask the administrator for a hard limit (nofile) of {wanted} or more in limits.conf or systemd"
            yield Finding("open files", "warning", f"{there}, hard limit {limits.open_files_most}", remedy)


def _infiniband(snapshot: Snapshot) -> Finding:
    adapters, locked = ", ".join(snapshot.infiniband), snapshot.limits.locked_bytes
    if locked is None:
        return Finding("InfiniBand", "ok", f"{adapters}; locked memory is unlimited")
    remedy = (
        "`ulimit -l unlimited`, or NCCL cannot lock its memory (limits.conf: memlock; slurmd: LimitMEMLOCK=infinity; "
        "Docker: --ulimit memlock=-1)"
    )
    return Finding("InfiniBand", "warning", f"{adapters}; only {locked / 2**20:.0f} MiB may be locked", remedy)
