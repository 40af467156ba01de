"""Slurm: its commands, and whether the controller answers."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator

from megatron_elva.doctor.asking import ask
from megatron_elva.doctor.findings import Finding, one_line
from megatron_elva.doctor.snapshot import Slurm, Snapshot

_COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "sacct")
"""What the launcher and submitit call."""
_MOST_PARTITIONS = 4


def read(timeout: float) -> Slurm:
    """Ask Slurm what it is and which partitions it has."""
    job = os.environ.get("SLURM_JOB_ID")
    if shutil.which("sinfo") is None:
        return Slurm(job=job)
    version = ask(["sinfo", "--version"], timeout)
    shown = ask(["sinfo", "-h", "-o", "%P|%D|%l|%G"], timeout)
    partitions = tuple(tuple(p.strip() for p in line.split("|")) for line in shown.out.splitlines() if "|" in line)
    trouble = shown.trouble and one_line(shown.trouble)
    absent = tuple(name for name in _COMMANDS if shutil.which(name) is None)
    return Slurm(version.out.strip() or "sinfo is there", partitions, trouble, absent, job)


def findings(snapshot: Snapshot) -> Iterator[Finding]:
    """What there is to say of Slurm."""
    slurm = snapshot.slurm
    if slurm.version is None:
        yield Finding(
            "Slurm", "missing", "no sinfo on the PATH",
            "only cluster=slurm needs it: submit from a login node of the cluster, or use cluster=local",
        )  # fmt: skip
        return
    inside = f"; inside job {slurm.job}" if slurm.job else ""
    if slurm.trouble is not None:
        yield Finding(
            "Slurm", "warning", f"{slurm.version}, but its controller does not answer: {slurm.trouble}",
            "only cluster=slurm needs it: run `scontrol ping`; set SLURM_CONF if slurm.conf is not in /etc/slurm",
        )  # fmt: skip
        return
    names = [f"{p[0]} ({p[1]} nodes, {', '.join(dict.fromkeys(p[2:]))})" for p in slurm.partitions[:_MOST_PARTITIONS]]
    more = len(slurm.partitions) - len(names)
    text = ", ".join(names) + (f" and {more} more" if more > 0 else "")
    if slurm.absent:
        yield Finding(
            "Slurm", "warning", f"{slurm.version}: {text}; no {', '.join(slurm.absent)} on the PATH{inside}",
            "install Slurm's client commands (Debian: slurm-client): submitting and following a job calls them",
        )  # fmt: skip
        return
    yield Finding("Slurm", "ok", f"{slurm.version}: {text or 'no partitions'}{inside}")
