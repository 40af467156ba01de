"""What will run on a machine."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_elva.doctor.findings import Finding
from megatron_elva.doctor.hardware import named
from megatron_elva.doctor.snapshot import Gpu, Snapshot

_NEEDED = ("torch", "megatron-core", "packages", "Python version")
"""Topics without which nothing is trained."""
_RECIPES = ("delayed", "current", "blockwise")


@dataclass(frozen=True)
class Verdict:
    """What will run.

    Attributes:
        layers: ``te`` or ``local``; None: nothing is trained here.
        device: ``cuda`` or ``cpu``.
        gpus: how many of them.
        fp8: recipes that run.
        video: what decodes.
        line: all of it, one line.
    """

    layers: str | None
    device: str
    gpus: int
    fp8: tuple[str, ...]
    video: str
    line: str


def judge(snapshot: Snapshot, findings: Sequence[Finding]) -> Verdict:
    """Say what will run.

    Args:
        snapshot: the machine.
        findings: what was said of it.
    """
    gpus = snapshot.torch_runs_on_gpus
    device = "cuda" if gpus else "cpu"
    clashes = {finding.topic for finding in findings if finding.state == "bad"}
    te = bool(gpus) and snapshot.te_runs
    video = str(snapshot.facts("decoding").get("route") or "nothing decodes")
    fp8 = _fp8(snapshot, findings) if te else ()
    if broken := [topic for topic in _NEEDED if topic in clashes]:
        line = f"training here: nothing until this is mended: {', '.join(broken)}"
        return Verdict(None, device, gpus, (), video, line)
    layers = "te" if te else "local"
    if gpus:
        known = snapshot.gpus[:gpus] or (Gpu("GPU"),) * gpus
        where = named(known)
    else:
        where = "CPU (device=cpu)"
    recipes = ", ".join(f"precision=fp8_{name}" for name in fp8) or "none"
    line = f"training here: layers={layers} on {where}; FP8: {recipes}; video: {video}"
    return Verdict(layers, device, gpus, fp8, video, line)


def _fp8(snapshot: Snapshot, findings: Sequence[Finding]) -> tuple[str, ...]:
    """Recipes with which a layer ran, or else those that no rule speaks against."""
    runs = snapshot.facts("te").get("runs")
    if runs is not None:
        return tuple(name for name in _RECIPES if name in runs and runs[name] is None)
    told = {finding.topic for finding in findings}
    if "FP8" in told or snapshot.capability is None:
        return ()
    return tuple(name for name in _RECIPES if name != "blockwise" or "FP8 blockwise" not in told)
