"""What only loading a library tells. Each probe runs in a process of its own, started by `megatron_elva.doctor.asking`.

A probe tells its facts as soon as it has some: the last line counts, and a crash leaves what was told before it.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import warnings
from collections.abc import Callable, Mapping
from importlib import util
from pathlib import Path
from typing import Any

from megatron_elva.doctor.findings import one_line

Facts = Mapping[str, Any]
Tell = Callable[[Facts], None]

_CUDA_LIBRARY = re.compile(r"lib(?:cublas|cublasLt|cudart|cudnn\w*|nccl|nvrtc|curand|cusparse|cusolver|cufft)\.so\.\d+")
_GROUPED = "cublasLtGroupedMatrixLayoutInit_internal"
_APEX_EXTENSIONS = ("amp_C", "fused_layer_norm_cuda", "fused_weight_gradient_mlp_cuda")


def main(name: str) -> None:
    """Run a probe and write its facts to standard output, one JSON object a line; libraries write elsewhere."""
    channel = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    told: dict[str, Any] = {}

    def tell(facts: Facts) -> None:
        told.update(facts)
        print(json.dumps(told), file=channel, flush=True)

    try:
        PROBES[name](tell)
    except BaseException as error:  # also SystemExit: what a broken library raises is not to be foreseen
        tell({"error": _why(error)})
    channel.flush()
    os._exit(0)  # some libraries crash at exit, which says nothing about their use


def probe_driver(tell: Tell) -> None:
    """The driver: ``cuda`` as ``[major, minor]``, and ``gpus`` with ``name``, ``capability`` and ``memory_gb``."""
    cuda = ctypes.CDLL("libcuda.so.1")
    number, code = ctypes.c_int(), cuda.cuInit(0)
    cuda.cuDriverGetVersion(ctypes.byref(number))
    tell({"cuda": [number.value // 1000, number.value % 1000 // 10]})
    if code != 0:
        said = ctypes.c_char_p()
        cuda.cuGetErrorString(code, ctypes.byref(said))
        raise RuntimeError(f"cuInit fails with {code}: {(said.value or b'unknown').decode()}")
    count = ctypes.c_int()
    cuda.cuDeviceGetCount(ctypes.byref(count))
    tell({"gpus": [_device(cuda, index) for index in range(count.value)]})


def _device(cuda: ctypes.CDLL, index: int) -> Facts:
    device, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    major, minor = ctypes.c_int(), ctypes.c_int()
    cuda.cuDeviceGet(ctypes.byref(device), index)
    cuda.cuDeviceGetName(name, 256, device)
    cuda.cuDeviceGetAttribute(ctypes.byref(major), 75, device)  # CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
    cuda.cuDeviceGetAttribute(ctypes.byref(minor), 76, device)
    cuda.cuDeviceTotalMem_v2(ctypes.byref(memory), device)
    return {
        "name": name.value.decode(errors="replace"),
        "capability": [major.value, minor.value],
        "memory_gb": memory.value / 1e9,
    }


def probe_nvdec(tell: Tell) -> None:
    """The driver's video decoder: nothing but whether its library can be loaded."""
    ctypes.CDLL("libnvcuvid.so.1")
    tell({"library": "libnvcuvid.so.1"})


def probe_torch(tell: Tell) -> None:
    """torch: its ``version``, ``cuda``, ``cudnn``, ``nccl``, ``libraries``, ``cublas``, and what it sees and runs.

    ``gpus`` is how many it sees, ``archs`` what it was compiled for, ``refused`` why a GPU does not run it.
    """
    import torch

    tell({"version": torch.__version__, "cuda": torch.version.cuda, "libraries": cuda_libraries()})
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        seen = torch.cuda.device_count() if torch.cuda.is_available() else 0
    tell({"gpus": seen, "warning": one_line(str(said[-1].message)) if said and not seen else None})
    if torch.version.cuda is None:
        return
    tell({"cudnn": torch.backends.cudnn.version(), **_cublas()})
    nccl = torch.cuda.nccl.version()
    tell({"nccl": ".".join(map(str, nccl)) if isinstance(nccl, tuple) else str(nccl), "refused": None})
    if seen:
        tell({"archs": torch.cuda.get_arch_list()})
        for index in range(seen):
            try:
                torch.ones(8, device=f"cuda:{index}").add(1).sum().item()
            except RuntimeError as error:
                tell({"refused": f"cuda:{index}: {_why(error)}"})
                break


def _cublas() -> Facts:
    """``cublas`` as ``[major, minor, patch]``, and ``grouped``: whether it has a symbol that some TE need."""
    path = next((paths[0] for name, paths in cuda_libraries().items() if name.startswith("libcublasLt")), None)
    if path is None:
        return {}
    library = ctypes.CDLL(path)
    library.cublasLtGetVersion.restype = ctypes.c_size_t
    number = library.cublasLtGetVersion()
    return {"cublas": [number // 10000, number // 100 % 100, number % 100], "grouped": hasattr(library, _GROUPED)}


def cuda_libraries() -> dict[str, list[str]]:
    """CUDA libraries in this process: paths by name with major version."""
    found: dict[str, set[str]] = {}
    for line in Path("/proc/self/maps").read_text().splitlines():
        path = line.split(maxsplit=5)[-1]
        match = _CUDA_LIBRARY.match(os.path.basename(path)) if path.startswith("/") else None  # noqa: PTH119
        if match is not None:
            found.setdefault(match[0], set()).add(os.path.realpath(path))
    return {name: sorted(paths) for name, paths in sorted(found.items())}


def probe_te(tell: Tell) -> None:
    """Transformer Engine: ``version``, ``libraries``, and ``runs``: per recipe None or why it does not run."""
    import torch  # first: it loads NCCL, cuBLAS and cuDNN, which TE does not look for everywhere

    te = importlib.import_module("transformer_engine.pytorch")  # without ``.pytorch`` an ImportError would be swallowed
    version = getattr(importlib.import_module("transformer_engine"), "__version__", None)
    tell({"imported": True, "version": version and str(version), "libraries": cuda_libraries()})
    if not torch.cuda.is_available():
        return
    recipes = importlib.import_module("transformer_engine.common.recipe")
    runs: dict[str, str | None] = {}
    for name, kind in (
        ("bf16", ""), ("delayed", "DelayedScaling"), ("current", "Float8CurrentScaling"),
        ("blockwise", "Float8BlockScaling"),
    ):  # fmt: skip
        tell({"runs": {**runs, name: "it crashed or hung"}})
        try:
            _step(torch, te, getattr(recipes, kind)() if kind else None)
            runs[name] = None
        except Exception as error:
            runs[name] = _why(error)
        tell({"runs": runs, "libraries": cuda_libraries()})


def _step(torch: Any, te: Any, recipe: Any) -> None:
    """A forward and backward pass of one layer; sizes suit every recipe."""
    layer = te.LayerNormLinear(256, 512, params_dtype=torch.bfloat16, device="cuda")
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    if hasattr(te, "autocast"):
        context = te.autocast(enabled=recipe is not None, recipe=recipe)
    else:  # TE before 2.9
        context = te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe)
    with context:
        y = layer(x)
    y.float().square().mean().backward()
    torch.cuda.synchronize()
    if not bool(torch.isfinite(layer.weight.grad).all()):
        raise FloatingPointError("the gradient is not finite")


def probe_apex(tell: Tell) -> None:
    """Whose ``apex`` it is (``nvidia``), its ``import_error`` as ``[class, text]``, and its compiled ``extensions``."""
    spec = util.find_spec("apex")
    folders = [Path(folder) for folder in (spec.submodule_search_locations or [])] if spec is not None else []
    nvidia = any((folder / part).is_dir() for folder in folders for part in ("multi_tensor_apply", "optimizers"))
    tell({"nvidia": nvidia, "folder": str(folders[0]) if folders else None})
    if nvidia:
        import torch  # noqa: F401  # its extensions need torch's libraries

        found = [name for name in _APEX_EXTENSIONS if util.find_spec(name) is not None]
        for name in found:
            importlib.import_module(name)
        tell({"extensions": found})
    try:
        importlib.import_module("apex")
    except Exception as error:
        tell({"import_error": [type(error).__name__, _why(error)], "guarded": isinstance(error, ImportError)})


def probe_triton(tell: Tell) -> None:
    """Triton: ``version`` and ``backends``."""
    triton = importlib.import_module("triton")
    tell({"version": str(triton.__version__)})
    tell({"backends": sorted(importlib.import_module("triton.backends").backends)})


def probe_dali(tell: Tell) -> None:
    """DALI: ``version``."""
    dali = importlib.import_module("nvidia.dali")
    importlib.import_module("nvidia.dali.fn")
    tell({"version": str(dali.__version__)})


def probe_megatron(tell: Tell) -> None:
    """megatron-core: ``version``; with the modules that the model is made of."""
    warnings.simplefilter("ignore")
    core = importlib.import_module("megatron.core")
    importlib.import_module("megatron.core.transformer.transformer_layer")
    tell({"version": str(core.__version__)})


def probe_decoding(tell: Tell) -> None:
    """What decodes video with ``data.decoder=auto``: ``route``, one line, and ``device``."""
    import torch

    from dali_pipelines.routes import choose_route

    device = "cuda:0" if torch.cuda.is_available() else "cpu"
    about = choose_route("auto", device).about
    tell({"device": device, "route": one_line(about.removeprefix("decoding: "), 400)})


PROBES: Mapping[str, Callable[[Tell], None]] = {
    "driver": probe_driver,
    "nvdec": probe_nvdec,
    "torch": probe_torch,
    "te": probe_te,
    "apex": probe_apex,
    "triton": probe_triton,
    "dali": probe_dali,
    "megatron": probe_megatron,
    "decoding": probe_decoding,
}


def _why(error: BaseException) -> str:
    return one_line(f"{type(error).__name__}: {error}")
