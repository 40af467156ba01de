"""CPU mode: lets megatron-core, which assumes CUDA, run on the host with gloo. Installed only when `device: cpu` asks.

Two parts: a `TorchFunctionMode` that sends every `device="cuda"` to the host and lets `Tensor.type()` answer the cuda
name (the distributed optimizer asks for it), and host stand-ins for the functions of `torch.cuda` that it calls.
Checked with megatron-core 0.16.1; `tests/parallel/test_cpu.py` says what broke when a newer one needs more.
"""

from __future__ import annotations

import contextlib
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

HOST = torch.device("cpu")


def _is_cuda(device: object) -> bool:
    if isinstance(device, torch.device):
        return device.type == "cuda"
    if isinstance(device, str):
        return device.startswith("cuda")
    return isinstance(device, int) and not isinstance(device, bool)


_MOVES = frozenset({torch.Tensor.to, torch.Tensor.cuda, torch.Tensor.type})


class HostMode(TorchFunctionMode):
    """Turns requests for a CUDA device into requests for the host."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Run `func`, on the host where it asked for CUDA."""
        kwargs = kwargs or {}
        if "device" in kwargs and _is_cuda(kwargs["device"]):
            kwargs = {**kwargs, "device": HOST}
        if func in _MOVES:
            return _move(func, args, kwargs)
        return func(*args, **kwargs)


def _move(func: Callable[..., Any], args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """The three methods that name a device by position or by type string."""
    tensor, *rest = args
    if func is torch.Tensor.cuda:
        return tensor
    if func is torch.Tensor.type:
        if not rest and not kwargs:
            return func(tensor).replace("torch.", "torch.cuda.", 1)
        rest = [r.replace("cuda.", "") if isinstance(r, str) else r for r in rest]
        return func(tensor, *rest, **kwargs)
    if rest and _is_cuda(rest[0]):
        rest[0] = HOST
    return func(tensor, *rest, **kwargs)


class _HostStream:
    """Stands for a CUDA stream: on the host everything has happened when the call returns."""

    def __init__(self, *args: object, **kwargs: object) -> None: ...

    def wait_stream(self, stream: object) -> None: ...

    def wait_event(self, event: object) -> None: ...

    def synchronize(self) -> None: ...

    def record_event(self, event: object = None) -> object:
        return event

    def query(self) -> bool:
        return True


@contextlib.contextmanager
def _no_stream(stream: object = None) -> Iterator[None]:
    yield


def _get_rng_state(device: object = None) -> torch.Tensor:
    return torch.get_rng_state()


def _set_rng_state(state: torch.Tensor, device: object = None) -> None:
    torch.set_rng_state(state)


def _manual_seed() -> Callable[[int], object]:
    return lambda seed: torch.default_generator.manual_seed(seed)


def _nothing() -> Callable[..., None]:
    """A new function that does nothing: torch's compiler refuses one object under two names."""
    return lambda *args, **kwargs: None


_STAND_INS: dict[str, object] = {
    "current_device": lambda: "cpu",
    "set_device": _nothing(),
    "synchronize": _nothing(),
    "empty_cache": _nothing(),
    "get_rng_state": _get_rng_state,
    "set_rng_state": _set_rng_state,
    "manual_seed": _manual_seed(),
    "manual_seed_all": _manual_seed(),
    "Stream": _HostStream,
    "stream": _no_stream,
    "current_stream": lambda device=None: _HostStream(),
    "default_generators": (torch.default_generator,),
    "nvtx": types.SimpleNamespace(range_push=_nothing(), range_pop=_nothing(), range=_no_stream),
}
_RANDOM = ("get_rng_state", "set_rng_state", "manual_seed", "manual_seed_all")

_installed: HostMode | None = None


def install() -> None:
    """Put the process into CPU mode; a second call does nothing. Call it before megatron-core builds anything."""
    global _installed
    if _installed is not None:
        return
    for name, stand_in in _STAND_INS.items():
        setattr(torch.cuda, name, stand_in)
    for name in _RANDOM:
        setattr(torch.cuda.random, name, _STAND_INS[name])
    _replace_random_states()
    _replace_optimizer_kernels()
    _leave_functions_plain()
    _installed = HostMode()
    _installed.__enter__()


def import_without_compiler() -> None:
    """Import megatron-core without torch's compiler, which is half of a process's start and of no use to a CPU.

    megatron-core compiles small functions as it defines them. To be called before anything else imports it.
    """

    def plain(function: Any = None, **_: Any) -> Any:
        return function or plain

    compiling = torch.compile
    setattr(torch, "compile", plain)  # noqa: B010 - it has overloads
    try:
        import_module("megatron.core")
    finally:
        setattr(torch, "compile", compiling)  # noqa: B010


def _leave_functions_plain() -> None:
    """Where megatron-core was imported with the compiler: on the host it costs more than it gives."""
    from megatron.core.jit import jit_fuser

    if jit_fuser is torch.compile:
        import_module("torch._dynamo").config.disable = True


def _replace_random_states() -> None:
    """megatron-core sets random states through a queue that waits for CUDA, here for ever and longer in each step."""
    from megatron.core.tensor_parallel import random

    random._set_cuda_rng_state = lambda new_state, device=-1, graph_safe=False: torch.set_rng_state(new_state)


def _replace_optimizer_kernels() -> None:
    """Where Transformer Engine or apex is installed megatron-core takes their fused kernels, which need a GPU."""
    from megatron.core import optimizer as building
    from megatron.core import utils
    from megatron.core.optimizer import clip_grads, distrib_optimizer, optimizer

    building.Adam, building.SGD, building.USING_PYTORCH_OPTIMIZER = torch.optim.AdamW, torch.optim.SGD, True
    distrib_optimizer.Adam = torch.optim.Adam
    distrib_optimizer.HAVE_APEX_OR_TE = distrib_optimizer.USING_TE_OPTIMIZER = False  # where it looks for the step
    distrib_optimizer.USING_APEX_OPTIMIZER = False
    clip_grads.l2_norm_impl = utils.local_multi_tensor_l2_norm
    clip_grads.multi_tensor_scale_tensor_impl = None
    for module in (clip_grads, optimizer):
        module.multi_tensor_applier = utils.local_multi_tensor_applier
        module.multi_tensor_scale_impl = utils.local_multi_tensor_scale


def is_installed() -> bool:
    """Whether this process runs in CPU mode."""
    return _installed is not None
