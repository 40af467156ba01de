"""What a machine has, as plain values: the rules read these alone, and tests make them up."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_elva.doctor.versions import Requirement, parse, plain, release

OWN = "megatron-elva"
"""This distribution's name."""


@dataclass(frozen=True)
class Gpu:
    """A GPU.

    Attributes:
        name: as its driver calls it.
        capability: compute capability, such as ``(9, 0)``; None where unknown.
        memory_gb: in 1e9 bytes; None where unknown.
        exclusive: whether one process alone may use it.
    """

    name: str
    capability: tuple[int, int] | None = None
    memory_gb: float | None = None
    exclusive: bool = False


@dataclass(frozen=True)
class Limits:
    """What the system allows a process. None: unlimited, or unknown.

    Attributes:
        shm_bytes: size of /dev/shm.
        open_files: soft limit.
        open_files_most: hard limit.
        locked_bytes: memory that may be locked, soft limit.
    """

    shm_bytes: int | None = None
    open_files: int | None = None
    open_files_most: int | None = None
    locked_bytes: int | None = None


@dataclass(frozen=True)
class Slurm:
    """What Slurm's commands say.

    Attributes:
        version: such as ``slurm 23.11.4``; None: there is no ``sinfo``.
        partitions: lines of name, nodes, time limit and generic resources.
        trouble: why the controller does not answer, one line, or None.
        absent: commands that a submission needs and that are not there.
        job: this process's job, or None.
    """

    version: str | None = None
    partitions: tuple[tuple[str, ...], ...] = ()
    trouble: str | None = None
    absent: tuple[str, ...] = ()
    job: str | None = None


@dataclass(frozen=True)
class Snapshot:
    """A machine. The defaults are one with nothing on it.

    Attributes:
        python: version of the interpreter.
        system: operating system, processor and C library, one line.
        cpus: cores that this process may use.
        memory_gb: memory in 1e9 bytes that it may use; None where unknown.
        versions: of the installed distributions, by name.
        requires: lines of requirements of this distribution; None: it is not installed, so they are not known.
        requires_python: what installed distributions want of Python, by name.
        gpus: of this machine.
        driver: version of the NVIDIA driver.
        smi_trouble: why ``nvidia-smi`` fails, or None.
        on_the_bus: NVIDIA GPUs on the PCI bus, whether or not they can be used.
        probes: facts by probe, as `megatron_elva.doctor.probes` tells them; a probe that was not run is not there.
        environ: environment variables.
        site: where this interpreter's packages are.
        cudnn_first: the cuDNN outside of `site` that Transformer Engine finds first, and its version where known.
        cuda_headers: the folder of CUDA headers that Transformer Engine finds.
        compiler: the C compiler that Triton finds.
        python_header: whether Python.h is there.
        infiniband: its adapters.
        limits: what the system allows.
        slurm: what Slurm says.
    """

    python: str = "3.11.0"
    system: str = ""
    cpus: int = 1
    memory_gb: float | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    requires: tuple[str, ...] | None = None
    requires_python: Mapping[str, str] = field(default_factory=dict)
    gpus: tuple[Gpu, ...] = ()
    driver: str | None = None
    smi_trouble: str | None = None
    on_the_bus: int = 0
    probes: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    environ: Mapping[str, str] = field(default_factory=dict)
    site: str = ""
    cudnn_first: tuple[str, str | None] | None = None
    cuda_headers: str | None = None
    compiler: str | None = None
    python_header: bool = False
    infiniband: tuple[str, ...] = ()
    limits: Limits = Limits()
    slurm: Slurm = Slurm()

    def facts(self, probe: str) -> Mapping[str, Any]:
        """What a probe told; empty where it was not run."""
        return self.probes.get(probe, {})

    def version(self, name: str) -> str | None:
        """Version of an installed distribution."""
        return self.versions.get(plain(name))

    @property
    def requirements(self) -> tuple[Requirement, ...]:
        """What this distribution needs, as far as it is understood."""
        return tuple(found for line in self.requires or () if (found := parse(line)) is not None)

    @property
    def torch_cuda(self) -> tuple[int, ...] | None:
        """The CUDA that torch was built with; None for a build without, or where torch is not there."""
        text = self.facts("torch").get("cuda")
        return release(str(text)) if text else None

    @property
    def driver_cuda(self) -> tuple[int, ...] | None:
        """The newest CUDA that the driver supports; None where unknown."""
        found = self.facts("driver").get("cuda")
        return tuple(found) if found else None

    @property
    def capability(self) -> tuple[int, int] | None:
        """The lowest compute capability of the GPUs; None where unknown."""
        return min((gpu.capability for gpu in self.gpus if gpu.capability is not None), default=None)

    @property
    def torch_runs_on_gpus(self) -> int:
        """GPUs that torch sees and can compute on."""
        torch = self.facts("torch")
        return 0 if torch.get("refused") or torch.get("error") else int(torch.get("gpus") or 0)

    @property
    def te_runs(self) -> bool:
        """Whether Transformer Engine was imported and, where there is a GPU, a layer of it has run."""
        runs = self.facts("te").get("runs")
        if runs is not None:
            return runs.get("bf16", "") is None
        return bool(self.facts("te").get("imported")) and "error" not in self.facts("te")
