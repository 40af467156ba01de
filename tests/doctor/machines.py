"""Machines that tests make up: a snapshot of a healthy one, and folders and programs of pretended ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from megatron_elva.doctor.snapshot import Gpu, Limits, Slurm, Snapshot

ROOT = Path(__file__).resolve().parents[2]

H100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), 85.5)

REQUIRES = (
    "torch>=2.11,<2.14",
    "megatron-core<0.20,>=0.16.1",
    "transformers<6,>=5.0",
    "numpy<3,>=1.26",
    'transformer-engine[core-cu13,pytorch]>=2.14; extra == "gpu"',
    'nvidia-dali-cuda130==2.4.0; extra == "gpu"',
)

VERSIONS = {
    "megatron-elva": "0.1.0",
    "torch": "2.11.0+cu130",
    "megatron-core": "0.16.1",
    "transformers": "5.1.0",
    "numpy": "2.4.0",
    "triton": "3.6.0",
    "transformer-engine": "2.17.1",
    "transformer-engine-torch": "2.17.1",
    "transformer-engine-cu13": "2.17.1",
    "nvidia-dali-cuda130": "2.4.0",
    "nvidia-cublas": "13.1.0.3",
}

TORCH = {
    "version": "2.11.0+cu130",
    "cuda": "13.0",
    "gpus": 8,
    "cudnn": 91900,
    "nccl": "2.28.9",
    "cublas": [13, 1, 0],
    "grouped": False,
    "archs": ["sm_80", "sm_90", "sm_100", "sm_120", "compute_120"],
    "refused": None,
    "libraries": {"libcudnn.so.9": ["/site/nvidia/cudnn/lib/libcudnn.so.9"]},
}

TE = {
    "imported": True,
    "version": "2.17.1",
    "libraries": {"libcudnn.so.9": ["/site/nvidia/cudnn/lib/libcudnn.so.9"]},
    "runs": {"bf16": None, "delayed": None, "current": None, "blockwise": None},
}

HEALTHY = Snapshot(
    python="3.11.7",
    system="Linux x86_64, glibc 2.39",
    cpus=96,
    memory_gb=2000.0,
    versions=VERSIONS,
    requires=REQUIRES,
    requires_python={"megatron-elva": "<3.13,>=3.11", "megatron-core": ">=3.10"},
    gpus=(H100,) * 8,
    driver="580.95.05",
    probes={
        "driver": {"cuda": [13, 0], "gpus": []},
        "nvdec": {"library": "libnvcuvid.so.1"},
        "torch": TORCH,
        "te": TE,
        "triton": {"version": "3.6.0", "backends": ["nvidia"]},
        "dali": {"version": "2.4.0"},
        "megatron": {"version": "0.16.1"},
        "decoding": {"device": "cuda:0", "route": "DALI on cuda:0 for h264 (yuv420p); PyAV for the rest"},
    },
    site="/site",
    cuda_headers="/usr/local/cuda/include",
    compiler="/usr/bin/gcc",
    python_header=True,
    infiniband=("mlx5_0",),
    limits=Limits(64 << 30, 1 << 20, 1 << 20, None),
    slurm=Slurm("slurm 23.11.4", (("gpu*", "16", "2-00:00:00", "gpu:h100:8"),)),
)
"""A node of eight H100 on which all is well."""


def probes(**changed: dict[str, Any] | None) -> dict[str, dict[str, Any]]:
    """The healthy machine's facts with those of some probes changed; None takes a probe away."""
    known = {**HEALTHY.probes, **dict.fromkeys(changed)}
    for name, facts in changed.items():
        if facts is not None:
            known[name] = {**HEALTHY.probes.get(name, {}), **facts}
    return {name: dict(facts) for name, facts in known.items() if facts is not None}


def write_package(site: Path, name: str, code: str = "") -> Path:
    """A package of one file."""
    folder = site.joinpath(*name.split("."))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "__init__.py").write_text(textwrap.dedent(code))
    return folder


def write_distribution(site: Path, name: str, version: str, requires: tuple[str, ...] = ()) -> None:
    """What an installer leaves beside a package."""
    folder = site / f"{name.replace('-', '_')}-{version}.dist-info"
    folder.mkdir(parents=True)
    lines = [
        "Metadata-Version: 2.1",
        f"Name: {name}",
        f"Version: {version}",
        *(f"Requires-Dist: {r}" for r in requires),
    ]
    (folder / "METADATA").write_text("\n".join(lines) + "\n")


def write_program(folder: Path, name: str, code: str) -> None:
    """A program in Python that stands for one of the system."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / name
    path.write_text(f"#!{sys.executable} -IS\n{textwrap.dedent(code)}")
    path.chmod(0o755)


def run_doctor(
    python: str | Path, *options: str, path: Path, packages: tuple[Path, ...] = (), **environ: str
) -> subprocess.CompletedProcess[str]:
    """Run the doctor as a user of a pretended machine.

    Args:
        python: the interpreter.
        options: of the doctor.
        path: the only folder with programs.
        packages: folders with packages, besides those of the interpreter.
        environ: more environment variables.
    """
    own = {"PATH": str(path), "PYTHONPATH": os.pathsep.join(map(str, packages)), "LC_ALL": "C.UTF-8", **environ}
    return subprocess.run(
        [str(python), "-m", "megatron_elva", "doctor", *options],
        capture_output=True, text=True, timeout=120, env=own, cwd=path, check=False,
    )  # fmt: skip


def by_topic(found: subprocess.CompletedProcess[str]) -> dict[str, dict[str, str]]:
    """Findings of ``--json`` by topic."""
    assert found.stdout, found.stderr
    return {finding["topic"]: finding for finding in json.loads(found.stdout)["findings"]}
