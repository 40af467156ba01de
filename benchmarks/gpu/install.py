"""Whether what a GPU run needs is there and works: ``python -m benchmarks.gpu.install``.

Versions, a forward and backward pass of one Transformer Engine layer in bf16 and in each FP8 recipe, and whether one
copy of each CUDA library is loaded then; after that what is nice to have: DALI and NVDEC.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from importlib import import_module
from typing import Any

import torch

from benchmarks.gpu import common
from benchmarks.report import table
from megatron_elva.doctor.pairs import LIBRARIES_THAT_CLASH
from megatron_elva.doctor.probes import cuda_libraries

NAME = "install"
RECIPES = {"bf16": None, "fp8_delayed": "DelayedScaling", "fp8_current": "Float8CurrentScaling",
           "fp8_blockwise": "Float8BlockScaling"}  # fmt: skip
"""What is tried, and the class of `transformer_engine.common.recipe`."""


def tried(check: Callable[[], str]) -> tuple[bool, str]:
    """Whether a check passes, and what it says."""
    try:
        return True, check()
    except Exception as error:  # whatever is wrong is a line of the report
        return False, f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


def layer(recipe: str | None) -> str:
    """Forward and backward pass of one fused norm and linear layer.

    Raises:
        RuntimeError: an output or a gradient is not finite.
    """
    te = import_module("transformer_engine.pytorch")
    recipes = import_module("transformer_engine.common.recipe")
    module = te.LayerNormLinear(256, 512, params_dtype=torch.bfloat16).cuda()
    x = torch.randn(128, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    if hasattr(te, "autocast"):
        context = te.autocast(enabled=recipe is not None, recipe=recipe and getattr(recipes, recipe)())
    else:  # its name until Transformer Engine 2.8
        context = te.fp8_autocast(enabled=recipe is not None, fp8_recipe=recipe and getattr(recipes, recipe)())
    with context:
        y = module(x)
    y.float().square().mean().backward()
    torch.cuda.synchronize()
    results: list[Any] = [y, module.weight.grad, x.grad]
    if not all(bool(torch.isfinite(tensor).all()) for tensor in results):
        raise RuntimeError("not finite")
    return f"output {tuple(y.shape)}, gradients finite"


def one_copy() -> str:
    """The CUDA libraries in this process.

    Raises:
        RuntimeError: one that keeps state is there twice.
    """
    found = {name: paths for name, paths in cuda_libraries().items() if name.startswith(LIBRARIES_THAT_CLASH)}
    twice = [f"{name} from {' and '.join(paths)}" for name, paths in found.items() if len(paths) > 1]
    if twice:
        raise RuntimeError(f"{'; '.join(twice)}: take one out of LD_LIBRARY_PATH, or export CUDNN_HOME for torch's")
    return ", ".join(f"{name} {paths[0]}" for name, paths in found.items()) or "none is loaded"


def nvdec() -> str:
    """The driver's decoder.

    Raises:
        OSError: it is not there.
    """
    ctypes.CDLL("libnvcuvid.so.1")
    return "libnvcuvid.so.1 can be loaded"


def checks(device: str) -> dict[str, dict[str, Any]]:
    """Each check: whether it is needed on this device, whether it passed, and what it says."""

    def of(needed: bool, check: Callable[[], str]) -> dict[str, Any]:
        passed, said = tried(check)
        return {"needed": needed, "passed": passed, "said": said}

    def imported(module: str) -> Callable[[], str]:
        return lambda: str(getattr(import_module(module), "__version__", "imported"))

    gpu = device == "cuda"
    found = {
        "megatron-core": of(True, imported("megatron.core")),
        "the model": of(True, imported("megatron_elva.parallel.engine")),
        "Transformer Engine": of(gpu, imported("transformer_engine.pytorch")),
    }
    if gpu:
        found |= {f"a layer in {name}": of(True, partial(layer, recipe)) for name, recipe in RECIPES.items()}
        found["one copy of each CUDA library"] = of(True, one_copy)
    return found | {
        "PyAV": of(False, imported("av")),
        "DALI": of(False, imported("nvidia.dali")),
        "NVDEC": of(False, nvdec),
        "matplotlib": of(False, imported("matplotlib")),
    }


def text(result: Mapping[str, Any]) -> str:
    """The whole report."""
    rows = [
        (name, needed, "works" if c["passed"] else "MISSING" if c["needed"] else "missing", c["said"])
        for name, c in result["checks"].items()
        for needed in ["yes" if c["needed"] else "no"]
    ]
    return f"{common.heading('What is installed', result)}\n\n{table(('what', 'needed', '', 'found'), rows)}"


def main(argv: Sequence[str]) -> int:
    """Check and report; 1 where something needed does not work."""
    a = common.options(NAME, __doc__).parse_args(argv)
    found = checks(a.device)
    good = all(check["passed"] for check in found.values() if check["needed"])
    status = {"device_kind": a.device, "status": "ok" if good else "failed", "checks": found}
    result = {**common.head(NAME, argv, a.device), **status}
    return common.finish(NAME, a, result, text(result))


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
