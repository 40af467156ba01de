"""Pairs that are known to clash, as a table of rules over a snapshot.

What the rules know of versions comes from Transformer Engine 2.11 to 2.20 with torch 2.11 (CUDA 13.0, cuBLAS 13.1.0.3).
Before 2.17 it opens its core library with RTLD_NOW, so that a symbol which cuBLAS lacks fails the import; from then on
with RTLD_LAZY.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_elva.doctor.findings import Finding, State
from megatron_elva.doctor.libraries import cudnn_version
from megatron_elva.doctor.snapshot import OWN, Snapshot
from megatron_elva.doctor.versions import Requirement, release, within

_TE = "transformer-engine"
_TE_PARTS = (_TE, "transformer-engine-torch", "transformer-engine-cu12", "transformer-engine-cu13")
_TE_NEEDS_GROUPED = ((2, 12), (2, 17))
_CUBLAS_WITHOUT_GROUPED = (13, 1, 0, 3)
_FEW = 3
_FP8 = (8, 9)
_BLOCKWISE = (9, 0)
_BLOCKWISE_CUDA = (12, 9)
LIBRARIES_THAT_CLASH = ("libcudnn", "libcublas", "libnccl")


@dataclass(frozen=True)
class Rule:
    """A clash.

    Attributes:
        name: what clashes.
        state: how bad it is.
        clash: what of a snapshot clashes, one line; None: nothing.
        remedy: what to do about it, one line.
    """

    name: str
    state: State
    clash: Callable[[Snapshot], str | None]
    remedy: str | Callable[[Snapshot], str]


def findings(snapshot: Snapshot) -> Iterator[Finding]:
    """One for each rule that a snapshot breaks."""
    for rule in RULES:
        clash = rule.clash(snapshot)
        if clash is not None:
            remedy = rule.remedy if isinstance(rule.remedy, str) else rule.remedy(snapshot)
            yield Finding(rule.name, rule.state, clash, remedy)


def _dotted(version: tuple[int, ...] | None) -> str:
    return ".".join(map(str, version or ()))


# requirements of this distribution


def _absent(s: Snapshot) -> list[Requirement]:
    return [r for r in s.requirements if not r.extra and not r.marked and r.name not in s.versions]


def _absent_text(s: Snapshot) -> str | None:
    names = ", ".join(r.name for r in _absent(s))
    return f"not installed: {names}" if names else None


def _outside(s: Snapshot, extra: str) -> list[Requirement]:
    """Requirements of an extra that are installed in a version outside of their range."""
    return [r for r in s.requirements if r.extra == extra and r.name in s.versions and not _fits(s, r)]


def _fits(s: Snapshot, requirement: Requirement) -> bool:
    return within(s.versions[requirement.name], requirement.ranges)


def _outside_text(s: Snapshot, extra: str) -> str | None:
    return ", ".join(f"{r.name} {s.versions[r.name]} (wanted {r.ranges})" for r in _outside(s, extra)) or None


def _install(requirements: list[Requirement]) -> str:
    return "pip install " + " ".join(f"'{r.text}'" for r in requirements)


def _python_outside(s: Snapshot) -> str | None:
    names = [OWN, *(r.name for r in s.requirements)]
    wanted = {name: s.requires_python[name] for name in names if name in s.requires_python}
    wrong = [f"{n} {s.versions.get(n, '')} wants {w}" for n, w in wanted.items() if not within(s.python, w)]
    return f"Python {s.python}: {', '.join(wrong)}" if wrong else None


# torch and the driver


def _cpu_build(s: Snapshot) -> str | None:
    torch = s.facts("torch")
    built_without = "version" in torch and torch.get("cuda") is None
    return f"torch {torch['version']} is built without CUDA, and there is a GPU" if s.gpus and built_without else None


def _cuda_build(s: Snapshot) -> str:
    tag = "cu130" if (s.driver_cuda or (13, 0)) >= (13, 0) else "cu126"
    wanted = next((r.text for r in s.requirements if r.name == "torch" and not r.extra), "torch")
    return f"pip install --force-reinstall '{wanted}' --index-url https://download.pytorch.org/whl/{tag}"


def _old_driver(s: Snapshot) -> str | None:
    """CUDA's minor versions work with any driver of their major one."""
    if not s.gpus or s.torch_cuda is None or s.driver_cuda is None or s.torch_runs_on_gpus:
        return None
    if s.torch_cuda[0] <= s.driver_cuda[0]:
        return None
    return f"torch is built with CUDA {_dotted(s.torch_cuda)}, the driver supports {_dotted(s.driver_cuda)} at most"


def _unseen(s: Snapshot) -> str | None:
    torch = s.facts("torch")
    if not s.gpus or s.torch_cuda is None or "gpus" not in torch or torch["gpus"] >= len(s.gpus):
        return None
    if _old_driver(s) is not None:
        return None
    chosen = s.environ.get("CUDA_VISIBLE_DEVICES")
    why = f"CUDA_VISIBLE_DEVICES={chosen}" if chosen is not None else torch.get("warning") or "for an unknown reason"
    return f"torch sees {torch['gpus']} of {len(s.gpus)} GPUs: {why}"


def _other_chip(s: Snapshot) -> str | None:
    archs = s.facts("torch").get("archs")
    if not archs or s.capability is None:
        return None
    for gpu in s.gpus:
        if gpu.capability is not None and not any(_covers(arch, gpu.capability) for arch in archs):
            return f"torch is compiled for {' '.join(archs)}, {gpu.name} is sm_{_joined(gpu.capability)}"
    return None


def _covers(arch: str, capability: tuple[int, int]) -> bool:
    """Machine code runs on its own and later minor versions, PTX (``compute_``) on everything later."""
    match = re.fullmatch(r"(sm|compute)_(\d+)(\d)([af]?)", arch)
    if match is None:
        return False
    built = (int(match[2]), int(match[3]))
    if match[4] == "a":
        return built == capability
    return built <= capability and (match[1] == "compute" or built[0] == capability[0])


def _joined(capability: tuple[int, int]) -> str:
    return f"{capability[0]}{capability[1]}"


# Transformer Engine and CUDA's libraries


def _te_failed(s: Snapshot) -> bool:
    return s.version(_TE) is not None and not s.facts("te").get("imported")


def _te_cublas(s: Snapshot) -> str | None:
    version = release(s.version(_TE) or "")
    first, last = _TE_NEEDS_GROUPED
    if not _te_failed(s) or not first <= version < last or (s.torch_cuda or (0,))[0] != 13:
        return None
    has, cublas = s.facts("torch").get("grouped"), s.version("nvidia-cublas")
    if has is None:  # torch has not loaded it, or is not usable
        has = cublas is None or release(cublas) > _CUBLAS_WITHOUT_GROUPED
    loaded = cublas or _dotted(tuple(s.facts("torch").get("cublas") or ())) or "unknown"
    if has:
        return None
    return f"Transformer Engine {s.version(_TE)} needs symbols of cuBLAS that torch's cuBLAS {loaded} does not have"


def _bind_now(s: Snapshot) -> str | None:
    if s.version(_TE) is None or not s.environ.get("LD_BIND_NOW"):
        return None
    return f"LD_BIND_NOW={s.environ['LD_BIND_NOW']} makes Transformer Engine fail on symbols that it never uses"


def _doubled(s: Snapshot, clashing: bool) -> str | None:
    """Libraries of which two copies are loaded; those that keep state for each other clash."""
    told = s.facts("te").get("libraries") or s.facts("torch").get("libraries") or {}
    doubled = {
        name: paths
        for name, paths in told.items()
        if len(paths) > 1 and name.startswith(LIBRARIES_THAT_CLASH) == clashing
    }
    return ", ".join(f"{name} from {' and '.join(paths)}" for name, paths in doubled.items()) or None


def _one_copy(s: Snapshot) -> str:
    return f"{_cudnn_home(s)}; take folders of another CUDA out of LD_LIBRARY_PATH, CUDA_HOME and CUDA_PATH"


def _toolkit_cudnn(s: Snapshot) -> str | None:
    number = s.facts("torch").get("cudnn")
    if not _te_failed(s) or s.cudnn_first is None or not number:
        return None
    path, version = s.cudnn_first
    loaded = [p for name, paths in s.facts("torch").get("libraries", {}).items() for p in paths if "cudnn" in name]
    ours = cudnn_version(int(number))
    if path in loaded or (version is not None and release(version)[:3] == ours):
        return None
    return f"Transformer Engine finds cuDNN {version or 'of unknown version'} at {path}, torch brings {_dotted(ours)}"


def _cudnn_home(s: Snapshot) -> str:
    return f"export CUDNN_HOME={os.path.join(s.site, 'nvidia', 'cudnn')}"  # noqa: PTH118


def _no_headers(s: Snapshot) -> str | None:
    if not s.gpus or s.version(_TE) is None or s.cuda_headers is not None:
        return None
    if s.environ.get("NVTE_DISABLE_NVRTC", "0") not in ("", "0"):
        return None
    return "Transformer Engine compiles kernels at run time, and finds no cuda_runtime.h"


def _headers(s: Snapshot) -> str:
    folder = os.path.join(s.site, "nvidia", "cu13", "include")  # noqa: PTH118
    return f"export NVTE_CUDA_INCLUDE_DIR={folder} (from torch's packages), or the include folder of a CUDA toolkit"


def _te_parts(s: Snapshot) -> str | None:
    parts = {name: s.versions[name] for name in _TE_PARTS if name in s.versions}
    if len(set(parts.values())) < 2:
        return None
    return ", ".join(f"{name} {version}" for name, version in parts.items())


def _te_major(s: Snapshot) -> str | None:
    cores = [name for name in _TE_PARTS[2:] if name in s.versions]
    if s.torch_cuda is None or not cores or f"transformer-engine-cu{s.torch_cuda[0]}" in cores:
        return None
    return f"{' and '.join(cores)} with a torch of CUDA {_dotted(s.torch_cuda)}"


def _te_install(s: Snapshot) -> str:
    wanted = next((r.ranges for r in s.requirements if r.name == _TE), "")
    major = 13 if s.torch_cuda is None else s.torch_cuda[0]
    wanted = f"'transformer-engine[core_cu{major},pytorch]{wanted}'"
    return (
        f"pip uninstall {' '.join(n for n in _TE_PARTS if n in s.versions)}; pip install --no-build-isolation {wanted}"
    )


def _te_grouped_remedy(s: Snapshot) -> str:
    return (
        "pip install --no-build-isolation 'transformer-engine[core_cu13,pytorch]>=2.17', or a torch with a newer cuBLAS"
    )


# FP8


def _no_fp8(s: Snapshot) -> str | None:
    if s.capability is None or s.capability >= _FP8:
        return None
    return f"compute capability {_dotted(s.capability)}, FP8 needs {_dotted(_FP8)}"


def _no_blockwise(s: Snapshot) -> str | None:
    if s.capability is None or not _FP8 <= s.capability < _BLOCKWISE:
        return None
    return f"compute capability {_dotted(s.capability)}, FP8 by blocks needs {_dotted(_BLOCKWISE)}"


def _no_blockwise_cuda(s: Snapshot) -> str | None:
    if s.capability is None or s.capability < _BLOCKWISE or s.torch_cuda is None:
        return None
    cublas = tuple(s.facts("torch").get("cublas") or s.torch_cuda)  # its version numbers are CUDA's
    oldest = min(cublas[:2], s.torch_cuda[:2])
    return f"cuBLAS of CUDA {_dotted(oldest)}, FP8 by blocks needs 12.9" if oldest < _BLOCKWISE_CUDA else None


# DALI, Triton


def _dali_builds(s: Snapshot) -> list[str]:
    return sorted(name for name in s.versions if re.fullmatch(r"nvidia-dali-cuda\d+", name))


def _dali_driver(s: Snapshot) -> str | None:
    if not s.gpus or s.driver_cuda is None:
        return None
    for name in _dali_builds(s):
        major = int(name.removeprefix("nvidia-dali-cuda")) // 10
        if major > s.driver_cuda[0]:
            return f"{name} is built with CUDA {major}, the driver supports {_dotted(s.driver_cuda)} at most"
    return None


def _dali_twice(s: Snapshot) -> str | None:
    builds = _dali_builds(s)
    return f"{' and '.join(builds)} are in the same folder and overwrite each other" if len(builds) > 1 else None


def _no_compiler(s: Snapshot) -> str | None:
    if not s.gpus or s.version("triton") is None:
        return None
    absent = [*(["no C compiler"] if s.compiler is None else []), *([] if s.python_header else ["no Python.h"])]
    return f"Triton compiles its launchers at run time: {' and '.join(absent)}" if absent else None


def _compiler(s: Snapshot) -> str:
    python = ".".join(s.python.split(".")[:2])
    return f"apt-get install gcc python{python}-dev, or set CC to a compiler"


RULES: tuple[Rule, ...] = (
    Rule(
        "packages", "bad",
        _absent_text,
        lambda s: _install(_absent(s)) if len(_absent(s)) <= _FEW else "pip install -e . in the repository",
    ),
    Rule("packages", "bad", lambda s: _outside_text(s, ""), lambda s: _install(_outside(s, ""))),
    Rule("GPU packages", "warning", lambda s: _outside_text(s, "gpu"), lambda s: _install(_outside(s, "gpu"))),
    Rule("Python version", "bad", _python_outside, "make the environment anew with a Python that all of them take"),
    Rule("torch build", "bad", _cpu_build, _cuda_build),
    Rule("torch and driver", "bad", _old_driver, lambda s: f"update the NVIDIA driver, or {_cuda_build(s)}"),
    Rule("visible GPUs", "warning", _unseen, "if that is not meant: unset CUDA_VISIBLE_DEVICES"),
    Rule("torch and GPU", "bad", _other_chip, lambda s: f"a torch that is built for this GPU: {_cuda_build(s)}"),
    Rule("TE and cuBLAS", "bad", _te_cublas, _te_grouped_remedy),
    Rule("TE and LD_BIND_NOW", "bad", _bind_now, "unset LD_BIND_NOW"),
    Rule("two copies", "bad", lambda s: _doubled(s, True), _one_copy),
    Rule("two copies", "warning", lambda s: _doubled(s, False), _one_copy),
    Rule("TE and cuDNN", "bad", _toolkit_cudnn, _cudnn_home),
    Rule("TE and CUDA headers", "warning", _no_headers, _headers),
    Rule("parts of TE", "bad", _te_parts, _te_install),
    Rule("TE and torch", "bad", _te_major, _te_install),
    Rule("FP8", "warning", _no_fp8, "use precision=bf16 on this GPU"),
    Rule("FP8 blockwise", "warning", _no_blockwise, "use precision=fp8_current or fp8_delayed on this GPU"),
    Rule("FP8 blockwise", "warning", _no_blockwise_cuda, "use precision=fp8_current, or a torch of CUDA 12.9 or later"),
    Rule(
        "DALI and driver", "bad", _dali_driver,
        "update the NVIDIA driver, or put the DALI build of its CUDA in place of this one (nvidia-dali-cuda120)",
    ),
    Rule(
        "DALI twice", "bad", _dali_twice,
        lambda s: f"pip uninstall {' '.join(_dali_builds(s))}; then install the one that the driver supports",
    ),
    Rule("Triton and compiler", "bad", _no_compiler, _compiler),
)  # fmt: skip
"""What is checked, in the order in which it is told."""
