"""What there is to say of each library by itself."""

from __future__ import annotations

from collections.abc import Iterator

from megatron_elva.doctor.asking import UNANSWERED
from megatron_elva.doctor.findings import Finding
from megatron_elva.doctor.snapshot import OWN, Snapshot

_GPU_EXTRA = "pip install --no-build-isolation -e '.[gpu]'"
_APEX_OF_PYPI = "0.9.10"  # 0.9.10dev, as it is written there


def findings(snapshot: Snapshot) -> Iterator[Finding]:
    """What there is to say of each library by itself; what clashes is told by `megatron_elva.doctor.pairs`."""
    yield _python(snapshot)
    yield _torch(snapshot)
    yield _required(snapshot, "megatron-core", "megatron", "megatron-core")
    yield _optional(
        snapshot, "Transformer Engine", "te", "transformer-engine",
        f"layers=te and precision=fp8_* need it: {_GPU_EXTRA} where nvcc and cuDNN's headers are",
    )  # fmt: skip
    yield _apex(snapshot)
    yield _optional(snapshot, "Triton", "triton", "triton", "GPU runs need it: pip install triton")
    yield _optional(snapshot, "DALI", "dali", _dali_name(snapshot), f"decoding on a GPU needs it: {_GPU_EXTRA}")
    yield _decoding(snapshot)


def _python(snapshot: Snapshot) -> Finding:
    own = snapshot.version(OWN)
    if own is None or snapshot.requires is None:
        there = f"{snapshot.python}; {OWN} is not installed, so the versions that it wants are not known"
        return Finding("Python", "warning", there, "pip install -e . in the repository")
    return Finding("Python", "ok", f"{snapshot.python}, with {OWN} {own}")


def _torch(snapshot: Snapshot) -> Finding:
    facts = snapshot.facts("torch")
    if not facts or "error" in facts:
        return _required(snapshot, "torch", "torch", "torch")
    if facts["cuda"] is None:
        return Finding("torch", "ok", f"{facts['version']}, without CUDA")
    parts = [f"{facts['version']}", f"CUDA {facts['cuda']}"]
    if facts.get("cudnn"):
        parts.append("cuDNN {}.{}.{}".format(*cudnn_version(int(facts["cudnn"]))))
    parts += [f"NCCL {facts['nccl']}"] if facts.get("nccl") else []
    parts += ["cuBLAS " + ".".join(map(str, facts["cublas"]))] if facts.get("cublas") else []
    if snapshot.gpus and facts.get("refused"):
        remedy = "if no clash is told below: `nvidia-smi` shows who uses that GPU and its errors; take another one"
        return Finding("torch", "bad", f"{', '.join(parts)}; it does not compute on {facts['refused']}", remedy)
    return Finding("torch", "ok", f"{', '.join(parts)}; sees {facts.get('gpus', 0)} GPUs")


def cudnn_version(number: int) -> tuple[int, int, int]:
    """The number of cuDNN as a version: ``91900`` is 9.19.0, ``8907`` is 8.9.7."""
    if number >= 10000:
        return number // 10000, number // 100 % 100, number % 100
    return number // 1000, number // 100 % 10, number % 100


def _required(snapshot: Snapshot, topic: str, probe: str, name: str) -> Finding:
    facts, installed = snapshot.facts(probe), snapshot.version(name)
    wanted = next((r.text for r in snapshot.requirements if r.name == name and not r.extra), name)
    if "error" in facts:
        remedy = _again(facts["error"]) or f"pip install --force-reinstall '{wanted}'"
        return Finding(topic, "bad", f"{installed or 'unknown version'}, but not usable: {facts['error']}", remedy)
    if not facts:
        if installed is not None:  # its probe needs torch
            return Finding(topic, "ok", f"{installed}, not tried: torch is missing")
        return Finding(topic, "bad", "not installed", f"pip install '{wanted}'")
    return Finding(topic, "ok", f"{facts.get('version', installed)}")


def _optional(snapshot: Snapshot, topic: str, probe: str, name: str, remedy: str) -> Finding:
    facts, installed = snapshot.facts(probe), snapshot.version(name)
    runs = facts.get("runs")
    if "error" in facts and runs is None and (installed is not None or probe != "dali"):
        return _unusable(snapshot, topic, f"{installed or 'version unknown'}, but not usable: {facts['error']}")
    if not facts or ("error" in facts and runs is None):
        if installed is None:
            return Finding(topic, "missing", "not installed", remedy)
        return Finding(topic, "warning", f"{installed}, not tried: its module or torch is missing", "install it again")
    version = facts.get("version") or installed
    if runs is None:
        return Finding(topic, "ok", f"{version}")
    if runs.get("bf16") is not None:
        return _unusable(snapshot, topic, f"{version}, but a layer does not run: {runs['bf16']}")
    works = [kind for kind, error in runs.items() if error is None]
    failed = [f"{kind} fails: {error}" for kind, error in runs.items() if error is not None]
    return Finding(topic, "ok", "; ".join([f"{version}; a layer ran with {', '.join(works)}", *failed]))


def _again(error: str) -> str:
    """What to do about a probe that did not end; empty for another error."""
    slow = "look again with --timeout 600; if it still hangs, its file system or the driver does not answer"
    return slow if error.startswith(UNANSWERED) else ""


def _unusable(snapshot: Snapshot, topic: str, there: str) -> Finding:
    """An optional library that is there and does not work: bad where there is a GPU for it."""
    if not snapshot.gpus:
        return Finding(topic, "warning", there, "only a GPU needs it: uninstall it, or leave it")
    reinstall = "mend what clashes below; if nothing does, uninstall and install it again against this torch"
    return Finding(topic, "bad", there, _again(there.rpartition("usable: ")[2]) or reinstall)


def _apex(snapshot: Snapshot) -> Finding:
    facts, installed = snapshot.facts("apex"), snapshot.version("apex")
    none = "nothing here needs it; `pip install apex` brings another package of that name, a web toolkit"
    if not facts and installed is None:
        return Finding("apex", "missing", "not installed", none)
    if facts.get("nvidia"):
        if "error" in facts:
            remedy = "rebuild it against this torch, or `pip uninstall apex`: nothing here needs it"
            return Finding("apex", "warning", f"NVIDIA's {installed or ''}, but not usable: {facts['error']}", remedy)
        extensions = ", ".join(facts.get("extensions", ())) or "none of the compiled extensions that megatron-core uses"
        return Finding("apex", "ok", f"NVIDIA's {installed or '(version unknown)'}, with {extensions}")
    whose = "PyPI's, a web toolkit" if (installed or "").startswith(_APEX_OF_PYPI) else "another package"
    there = f"{installed or 'version unknown'}: {whose}, not NVIDIA's apex"
    raised = facts.get("import_error")
    if raised is not None:
        there += f" (its import fails with {raised[1]})"
    # megatron-core looks for apex in ``except ImportError``: another error goes through
    breaks = "error" in facts or (raised is not None and not facts.get("guarded"))
    return Finding("apex", "bad" if breaks else "warning", there, "pip uninstall apex: nothing here needs any apex")


def _dali_name(snapshot: Snapshot) -> str:
    """The installed distribution of DALI, else the one that is wanted."""
    installed = (name for name in snapshot.versions if name.startswith("nvidia-dali-cuda"))
    return next(installed, "nvidia-dali")


def _decoding(snapshot: Snapshot) -> Finding:
    facts = snapshot.facts("decoding")
    if "route" in facts and "error" not in facts:
        return Finding("video", "ok", facts["route"])
    if "error" in facts:
        return Finding(
            "video", "bad", f"the decoders cannot be tried: {facts['error']}",
            _again(facts["error"]) or "data.decoder=pyav if DALI is the cause; else pip install -e . in the repository",
        )  # fmt: skip
    return Finding("video", "bad", "no decoder: PyAV or torch is missing", "pip install -e . in the repository")
