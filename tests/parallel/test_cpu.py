"""CPU mode: off until asked for, complete for the installed megatron-core, and clear about what is missing."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import pkgutil
import sys
from collections.abc import Iterator
from dataclasses import replace
from importlib import metadata
from pathlib import Path

import pytest
import torch

from megatron_elva.config.schema import Config, ParallelConfig
from tests.builders import random_pack, small_config
from tests.distributed import run_distributed

CORE = Path(importlib.util.find_spec("megatron.core").submodule_search_locations[0])
CHECKED = "0.16.1"
SCANNED = (
    "pipeline_parallel/schedules.py",
    "pipeline_parallel/p2p_communication.py",
    "tensor_parallel/*.py",
    "distributed/*.py",
    "optimizer/*.py",
    "transformer/*.py",
)
NOT_SCANNED = {
    "transformer/cuda_graphs.py": "CUDA graphs are never switched on",
    "tensor_parallel/inference_layers.py": "layers of megatron-core's own inference engine, which we do not use",
}
TYPES = "compared with the types of tensors; none is made"
# what megatron-core names and CPU mode leaves alone, by file, with the reason
ALLOWED = {
    ("transformer/module.py", "FloatTensor"): TYPES,
    ("transformer/module.py", "HalfTensor"): TYPES,
    ("transformer/module.py", "BFloat16Tensor"): TYPES,
    ("transformer/mlp.py", "OutOfMemoryError"): "caught when a checkpoint is loaded; an exception on every machine",
    ("tensor_parallel/layers.py", "amp"): "decorators of autograd functions, which do nothing without autocast",
    ("tensor_parallel/random.py", "CUDAGraph"): "asked for only while CUDA graphs are captured; they are never on",
    ("tensor_parallel/random.py", "_lazy_init"): "called only for random states of CUDA graphs",
    ("tensor_parallel/random.py", "_lazy_call"): "called only by _set_cuda_rng_state, which CPU mode replaces",
    ("tensor_parallel/random.py", "device"): "entered only by _set_cuda_rng_state, which CPU mode replaces",
    ("distributed/param_and_grad_buffer.py", "default_stream"): "used only with several optimizer instances; one here",
}
# what megatron-core 0.19.2 names beside it; with these the tests of parallel, model and training pass on it as well
ALLOWED_LATER = {
    ("optimizer/optimizer_cuda_graph.py", "CUDAGraph"): "optimizer steps captured as CUDA graphs, which are never on",
    ("optimizer/optimizer_cuda_graph.py", "graph"): "as above",
    ("tensor_parallel/generalized_tensor_parallelism.py", "Event"): "generalized tensor parallelism is never on",
    ("transformer/transformer_layer.py", "Event"): "made for routers of mixtures of experts in CUDA graphs",
    ("transformer/utils.py", "OutOfMemoryError"): "caught when a checkpoint is loaded; an exception on every machine",
}


def cuda_names(source: str) -> Iterator[str]:
    """First names after ``torch.cuda`` in attributes and imports of a module, without its strings and comments."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "torch.cuda":
            yield node.attr
        elif isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[:2] == ["torch", "cuda"]:
            yield from (
                (alias.name for alias in node.names) if node.module == "torch.cuda" else [node.module.split(".")[2]]
            )


def names_by_file() -> dict[str, set[str]]:
    files = sorted(path for pattern in SCANNED for path in CORE.glob(pattern))
    found = {str(path.relative_to(CORE)): set(cuda_names(path.read_text())) for path in files}
    return {file: names for file, names in found.items() if names and file not in NOT_SCANNED}


def stand_ins() -> set[str]:
    """Names of torch.cuda that installing CPU mode replaces."""
    from megatron_elva.parallel import cpu

    before = dict(vars(torch.cuda))
    assert not cpu.is_installed()
    cpu.install()
    cpu.install()  # a second call does nothing
    return {name for name, value in vars(torch.cuda).items() if before.get(name) is not value}


def test_all_that_megatron_core_names_of_torch_cuda_is_stood_in_for_or_allowed():
    found = names_by_file()
    assert sum(map(len, found.values())) > 20, f"the scan of {CORE} found hardly anything: have its files moved?"
    (replaced,) = run_distributed(stand_ins, 1)
    replaced |= {"random"}  # a module, whose functions are replaced one by one
    missing = [f"torch.cuda.{n} in megatron/core/{f}" for f, names in found.items() for n in sorted(names - replaced)
               if (f, n) not in ALLOWED | ALLOWED_LATER]  # fmt: skip
    assert not missing, (
        "megatron-core uses what CPU mode does not stand in for; add it to megatron_elva/parallel/cpu.py, "
        "or to ALLOWED here with a reason: " + "; ".join(missing)
    )


@pytest.mark.skipif(metadata.version("megatron-core") != CHECKED, reason=f"the list was made with {CHECKED}")
def test_every_allowance_is_still_needed():
    found = names_by_file()
    gone = [f"{file}: {name}" for file, name in ALLOWED if name not in found.get(file, ())]
    gone += [file for file in NOT_SCANNED if not (CORE / file).is_file()]
    assert not gone, f"no longer needed, remove from this test: {gone}"


def test_the_scan_sees_attributes_and_imports_but_no_text():
    source = '''
"""torch.cuda.in_text"""
import torch
from torch.cuda import _lazy as lazy, device
from torch.cuda.amp import custom_fwd
torch.cuda.nvtx.range_push("torch.cuda.in_string")  # torch.cuda.in_comment
def f(x=torch.cuda.current_device()): ...
'''
    assert set(cuda_names(source)) == {"_lazy", "device", "amp", "nvtx", "current_device"}


def imported_all() -> dict[str, bool]:
    """Imports every module of the package and says what that did to the process."""
    import megatron_elva
    from megatron_elva.parallel import cpu

    for module in pkgutil.walk_packages(megatron_elva.__path__, "megatron_elva."):
        importlib.import_module(module.name)
    return {
        "installed": cpu.is_installed(),
        "mode": torch.overrides._len_torch_function_stack() > 0,
        "foreign": torch.cuda.current_device.__module__ != "torch.cuda",
        "random": torch.cuda.random.get_rng_state.__module__ != "torch.cuda.random",
        "compiler": torch._dynamo.config.disable,
    }


def test_importing_the_package_installs_nothing():
    (result,) = run_distributed(imported_all, 1)
    assert not any(result.values()), result


def called_of_torch_cuda(config: Config, packs: list) -> set[tuple[str, str]]:
    """Trains two steps in CPU mode; which of torch's own CUDA functions megatron-core called, with the file it did."""
    from megatron_elva.model.inputs import prepare
    from megatron_elva.parallel.engine import Engine, build_chunks
    from megatron_elva.parallel.ranks import start

    own = str(Path(torch.cuda.__file__).parent)
    calls: set[tuple[str, str]] = set()

    def watch(frame, event, arg):
        if event == "call" and frame.f_back and frame.f_code.co_filename.startswith(own):
            caller = frame.f_back.f_code.co_filename
            if caller.startswith(str(CORE)):
                calls.add((str(Path(caller).relative_to(CORE)), frame.f_code.co_name))

    sys.setprofile(watch)
    ranks = start(config.parallel, "cpu", config.seed)
    engine = Engine(config, build_chunks(config, 96, ranks), ranks)
    for _ in range(2):
        engine.set_learning_rate(1.0, False)
        result = engine.train_step([prepare(p, config, "cpu") for p in packs])
    sys.setprofile(None)
    assert result.grad_norm > 0
    devices = {t.device.type for m in engine.chunks for t in [*m.parameters(), *m.buffers()]}
    assert devices == {"cpu"}
    return calls


def test_a_training_step_runs_none_of_torchs_own_cuda_code():
    config = small_config(parallel=ParallelConfig(tensor=2, pipeline=2, sequence=True))
    config = replace(config, train=replace(config.train, recompute=True))
    packs = [random_pack(config.model, i, videos) for i, videos in enumerate([(1, 0), (0, 0)])]
    calls = set().union(*run_distributed(called_of_torch_cuda, 4, config, packs))
    assert not calls, f"not stood in for, and called while training: {sorted(calls)}"


def host_mode() -> dict[str, bool]:
    """What a program that asks for CUDA gets in CPU mode."""
    from megatron_elva.parallel import cpu

    cpu.install()
    x = torch.arange(3.0)
    out = {
        "text": torch.zeros(2, device="cuda").device.type == "cpu",
        "index": torch.zeros(2, device=0).device.type == "cpu",
        "numbered": torch.empty(2, device="cuda:1").device.type == "cpu",
        "object": torch.ones(2, device=torch.device("cuda", 0)).device.type == "cpu",
        "current": torch.zeros(2, device=torch.cuda.current_device()).device.type == "cpu",
        "meta stays": torch.zeros(2, device="meta").device.type == "meta",
        "to": x.to("cuda").device.type == "cpu" and x.to(0).device.type == "cpu",
        "to keyword": x.to(device="cuda", dtype=torch.bfloat16).dtype is torch.bfloat16,
        "to dtype": x.to(torch.float64).dtype is torch.float64,
        "cuda": x.cuda() is x,
        "new": x.new_zeros(2, device="cuda").device.type == "cpu",
        "module": torch.nn.Linear(2, 2).cuda().to("cuda").weight.device.type == "cpu",
        "type name": x.type() == "torch.cuda.FloatTensor" and x.bfloat16().type() == "torch.cuda.BFloat16Tensor",
        "type cast": x.type("torch.cuda.HalfTensor").dtype is torch.float16,
        "type dtype": x.type(torch.int32).dtype is torch.int32,
    }
    torch.cuda.manual_seed(5)
    state = torch.cuda.get_rng_state()
    first = torch.rand(4)
    torch.cuda.set_rng_state(state)
    out["random state"] = torch.equal(torch.rand(4), first)
    torch.cuda.random.manual_seed(5)
    out["random module"] = torch.equal(torch.rand(4), first)
    out["generators"] = torch.cuda.default_generators[0] is torch.default_generator
    with torch.cuda.stream(torch.cuda.Stream()):
        torch.cuda.current_stream().wait_stream(torch.cuda.Stream())
    torch.cuda.synchronize()
    torch.cuda.nvtx.range_push("a")
    torch.cuda.nvtx.range_pop()
    return out


def test_host_mode_sends_every_way_of_asking_for_cuda_to_the_host():
    (result,) = run_distributed(host_mode, 1)
    assert all(result.values()), [name for name, good in result.items() if not good]


def forked_states() -> dict[str, bool]:
    """megatron-core's random states of the tensor ranks, entered and left."""
    from megatron.core.tensor_parallel.random import get_cuda_rng_tracker

    from megatron_elva.parallel.ranks import start

    start(ParallelConfig(tensor=1, pipeline=1, sequence=False), "cpu", 3)
    torch.manual_seed(1)
    expected = torch.rand(2)
    torch.manual_seed(1)
    waiting = len(torch.cuda._queued_calls)
    with get_cuda_rng_tracker().fork():
        inside = torch.rand(2)
    with get_cuda_rng_tracker().fork():
        again = torch.rand(2)
    return {
        "the state outside is untouched": torch.equal(torch.rand(2), expected),
        "inside is another state": not torch.equal(inside, expected),
        "which goes on": not torch.equal(inside, again),
        "nothing piles up, waiting for CUDA": len(torch.cuda._queued_calls) == waiting,
    }


def test_random_states_of_tensor_ranks_are_kept_apart():
    (result,) = run_distributed(forked_states, 1)
    assert all(result.values()), [name for name, good in result.items() if not good]


def test_cuda_is_refused_where_there_is_none():
    from megatron_elva.config.errors import ConfigError
    from megatron_elva.parallel.ranks import start

    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(ConfigError, match=r"device=cuda: no GPU .*device=cpu"):
        start(ParallelConfig(tensor=1, pipeline=1, sequence=False), "cuda", 1)
