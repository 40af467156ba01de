"""Runs the ranks of a cluster one after another in a few processes, on torch's fake process group.

A rank is the product's own: `ranks.start`, `build_chunks`, `Engine`, `share_packs`, `Engine.train_step` and
`sum_over_ranks`, with the config's real sizes, and ``device: cuda``. Tensors of the device are on torch's ``meta``
device: they have shapes and dtypes and no values, so that 128 ranks of a 7B model need no memory and little time. What
needs a value, or would take too long, is handed over or left out. These are all such places:

1. `ranks._choose_device`, `cpu.HOST` and ``torch.cuda.current_device``: CPU mode with ``meta`` in the place of the GPU.
2. `ranks._join`, and the backend of every new group: the fake process group.
3. ``all_gather_object``: what other ranks would say. In `ranks._ends_group` it follows from the layout; for
   megatron-core's groups of parameters one rank of each place in the pipeline is asked before. What a rank says itself
   is compared with what the others were told.
4. `weights.draw`: weights are not drawn, as nothing could hold them.
5. `share._send_numbers`: ranks that do not read get the reader's packs from here, and run the same broadcasts.
6. `Carrier.receive`: the state of the pack comes from here, where a pack of that shape was merged alone; `Carrier.send`
   is the product's, and what is sent is compared with what the receiver is handed. The content of the carrier rows and
   its decoding are not run: `test_carrier.py` does.
7. ``P2PCommunicator._communicate_shapes``: the exchange runs, its result comes from the same source as 6.
8. Values of the device that the host reads (``item``, ``tolist``, ``bool``): 1, and `Record.reads` says where. At a
   threshold point this means that one link of each resolution class merges.
9. ``_coalescing_manager``: the fake process group has no coalesced collectives for ``meta``; they run one by one.
10. `RMSNorm.forward` and `PackedSdpaAttention.forward`: a tensor of the right shape. They are half of the time and say
   nothing to other ranks.

Loading, checkpoints and what the training loop says between steps are not run.
"""

from __future__ import annotations

import functools
import gc
import inspect
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.overrides import TorchFunctionMode

from megatron_elva.config.merge_schedule import resolve
from megatron_elva.config.schema import Config
from megatron_elva.layout import IGNORE, Kind, Pack, PackSpec, PackState, build_layout
from tests.distributed import run_distributed
from tests.parallel.fake_records import Record, Recorder

META = torch.device("meta")


# --- values ---------------------------------------------------------------------------------------------------------

_READS = {
    Tensor.item,
    Tensor.tolist,
    Tensor.__bool__,
    Tensor.__float__,
    Tensor.__int__,
    Tensor.__index__,
}


def _on_meta(value: object) -> bool:
    return isinstance(value, Tensor) and value.device.type == "meta"


class _Reads(TorchFunctionMode):
    """Substitute 8, and the type name that the distributed optimizer expects of tensors on a GPU."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self.recorder = recorder

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _READS and _on_meta(args[0]):
            return self._read(func, args[0])
        if func is torch.tensor:  # of a list, perhaps nested, of tensors
            args = (self._numbers(args[0]), *args[1:])
        if func is Tensor.type and len(args) == 1 and not kwargs and _on_meta(args[0]):
            return f"torch.cuda.{torch.empty(0, dtype=args[0].dtype).type().rpartition('.')[2]}"
        return func(*args, **(kwargs or {}))

    def _numbers(self, data: Any) -> Any:
        if isinstance(data, list | tuple):
            return [self._numbers(part) for part in data]
        return self._read(Tensor.item, data) if _on_meta(data) else data

    def _read(self, func: Any, tensor: Tensor) -> Any:
        frame = sys._getframe(2)
        while frame.f_back is not None and frame.f_globals.get("__name__", "").split(".")[0] in ("torch", "tests"):
            frame = frame.f_back
        self.recorder.record.reads[f"{frame.f_globals.get('__name__')}:{frame.f_code.co_name}"] += 1
        real = torch.ones(tensor.shape, dtype=tensor.dtype)
        return func(real)


@functools.lru_cache(maxsize=256)
def _filled(spec: PackSpec, values: int, patches: int) -> Pack:
    """A pack of the given shape; half of its text has a loss."""
    kind = build_layout(spec).kind
    text = (kind == Kind.TEXT).nonzero().flatten()
    labels = torch.full(kind.shape, IGNORE)
    labels[text[text.numel() // 2 :]] = 7
    cells = sum(v.cells for v in spec.videos)
    return Pack(
        spec, torch.zeros_like(kind), labels, torch.empty(cells * patches, values, dtype=torch.uint8, device="meta")
    )


def filled(spec: PackSpec, config: Config) -> Pack:
    """A pack of the given shape for the config's model, with pixels that have no values."""
    pack = _filled(spec.padded_to(config.pad_multiple), config.model.patch_values, config.model.cell_reduction**2)
    return replace(pack)


@functools.lru_cache(maxsize=4096)
def _prepared(spec: PackSpec, key: _Key, first: bool, last: bool) -> Any:
    from megatron_elva.model.inputs import prepare

    return prepare(filled(spec, key.config), key.config, META, first, last)


class _Shape(torch.autograd.Function):
    """Substitute 10: a tensor of the given shape that depends on the others."""

    @staticmethod
    def forward(ctx: Any, shape: tuple[int, ...], *inputs: Tensor) -> Tensor:
        ctx.inputs = [(x.shape, x.dtype) for x in inputs]
        return torch.empty(shape, dtype=inputs[0].dtype, device=META)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return None, *(torch.empty(shape, dtype=dtype, device=META) for shape, dtype in ctx.inputs)


def _attend(self: Any, query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _Shape.apply((query.shape[0], query.shape[1] * query.shape[2]), query, key, value)


def _norm(self: Any, x: Tensor) -> Tensor:
    return _Shape.apply(x.shape, x, self.weight)


def _quick_kernels() -> torch.library.Library:
    """Three operations without torch's general Python code for ``meta``, which would be most of the time of a step."""
    library = torch.library.Library("aten", "IMPL", "Meta")

    def combine(general: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def run(a: Tensor, b: Any, **kwargs: Any) -> Tensor:
            if isinstance(b, Tensor) and a.dtype == b.dtype and b.shape in (a.shape, a.shape[-1:]):
                with torch._C.DisableTorchFunction():
                    return torch.empty(a.shape, dtype=a.dtype, device=META)
            return general(a, b, **kwargs)

        return run

    def cat(tensors: list[Tensor], dim: int = 0) -> Tensor:
        first, *others = tensors
        rest = [(*t.shape[:dim], *t.shape[dim + 1 :]) if dim >= 0 else () for t in tensors]
        if dim < 0 or any(r != rest[0] for r in rest) or any(t.dtype != first.dtype for t in others):
            return torch._refs.cat(tensors, dim)
        with torch._C.DisableTorchFunction():
            shape = (*first.shape[:dim], sum(t.shape[dim] for t in tensors), *first.shape[dim + 1 :])
            return torch.empty(shape, dtype=first.dtype, device=META)

    library.impl(torch.ops.aten.add.Tensor, combine(torch._refs.add), allow_override=True)
    library.impl(torch.ops.aten.mul.Tensor, combine(torch._refs.mul), allow_override=True)
    library.impl(torch.ops.aten.cat.default, cat, allow_override=True)
    return library


class _Key:
    """A config as a key of caches: by identity."""

    def __init__(self, config: Config) -> None:
        self.config = config


class Expected:
    """What crosses pipeline boundaries: packs merged alone, outside of any rank (substitutes 6 and 7)."""

    def __init__(self, config: Config) -> None:
        self.config, self.key = config, _Key(config)
        self.points = resolve(config.merging, config.model.layers)
        self._states: dict[PackSpec, list[PackState]] = {}
        self._shapes: dict[tuple[PackSpec, int, int | None], tuple[int, ...]] = {}

    def state(self, spec: PackSpec, layer: int) -> PackState:
        """The state of a pack before the given layer."""
        from megatron_elva.model.merging import merge

        if spec not in self._states:
            states = [_prepared(spec, self.key, True, False).state]
            for point in self.points:
                hidden = torch.empty(states[-1].layout.tokens, self.config.model.hidden, device=META)
                survivor, multiple = self.config.merging.survivor, self.config.pad_multiple
                states.append(merge(hidden, states[-1], point, survivor, multiple)[1])
            self._states[spec] = states
        return self._states[spec][sum(point.layer <= layer for point in self.points)]

    def rows(self, state: PackState) -> int:
        """Rows of hidden states on each tensor rank."""
        parallel = self.config.parallel
        return state.layout.tokens // (parallel.tensor if parallel.sequence else 1)

    def shape(self, spec: PackSpec, layer: int, carrier: Any) -> tuple[int, ...]:
        """Shape of the message that goes out before the given layer."""
        from megatron_elva.parallel.carrier import Carrier

        key = (spec, sum(point.layer <= layer for point in self.points), carrier.rows)
        if key not in self._shapes:
            state = self.state(spec, layer)
            hidden = torch.empty(self.rows(state), 1, self.config.model.hidden, dtype=carrier.dtype, device=META)
            self._shapes[key] = tuple(Carrier(carrier.dtype, carrier.rows).send(hidden, state).shape)
        return self._shapes[key]


def _handed_carrier(chunk: Any, specs: Sequence[PackSpec], expected: Expected) -> Any:
    """Substitute 6: the chunk's carrier, told what comes and checked in what goes."""
    from megatron_elva.parallel.carrier import Carrier

    own = chunk.boundary
    first, behind = chunk.decoder.first_layer, chunk.decoder.first_layer + len(chunk.decoder.layers)

    def seen(state: PackState) -> tuple[Any, ...]:
        return state.spec, state.done, state.counts, state.layout.lengths, state.layout.padding, state.alive.shape

    class Handed(Carrier):
        received = sent = 0

        def receive(self, message: Tensor) -> tuple[Tensor, PackState]:
            spec = specs[self.received]
            self.received += 1
            assert tuple(message.shape) == expected.shape(spec, first, own), (message.shape, spec)
            state = expected.state(spec, first)
            return message[: expected.rows(state)], state

        def send(self, hidden: Tensor, state: PackState) -> Tensor:
            handed = expected.state(specs[self.sent], behind)
            self.sent += 1
            assert seen(state) == seen(handed), f"sent {seen(state)}, the receiver was handed {seen(handed)}"
            return own.send(hidden, state)

    return Handed(own.dtype, own.rows)


# --- one rank -------------------------------------------------------------------------------------------------------

Fault = Callable[[int], None]
"""Called on each rank after its set-up, before its step: breaks the product on some of them, to see it found."""


class _Process:
    """This process, ready to be one rank after another."""

    def __init__(self, config: Config, world: int) -> None:
        self.config, self.world = config, world
        self.recorder = Recorder()
        self.expected = Expected(config)
        self._install()
        self._scout()

    def _scout(self) -> None:
        """Set up one rank of each place in the pipeline, for what it says to all (substitute 3)."""
        from megatron_elva.parallel import ranks as product

        for place in range(self.config.parallel.pipeline):
            self.recorder.scouting = {place}
            self._begin(place * (self.world // self.config.parallel.pipeline))
            self._set_up(self.recorder.record)
            product.stop()
        self.recorder.scouting = set()

    def _begin(self, rank: int) -> Record:
        os.environ["RANK"], os.environ["LOCAL_RANK"] = str(rank), str(rank % 8)
        return self.recorder.begin(rank)

    def _install(self) -> None:
        from megatron.core.pipeline_parallel import p2p_communication

        from megatron_elva.model import attention, norm, weights
        from megatron_elva.parallel import cpu, ranks, share

        os.environ["WORLD_SIZE"] = str(self.world)
        cpu.install()
        cpu.HOST = META
        torch.cuda.current_device = lambda: META  # type: ignore[assignment,return-value]
        ranks._choose_device = lambda device: META
        ranks._join = _join
        attention.PackedSdpaAttention.forward = _attend  # type: ignore[method-assign]
        norm.RMSNorm.forward = _norm  # type: ignore[method-assign]
        weights.draw = lambda name, shape, *rest: torch.empty(shape, device=META)
        self._send_numbers = share._send_numbers
        self._exchange = p2p_communication.P2PCommunicator._communicate_shapes
        self.share, self.communicator = share, p2p_communication.P2PCommunicator
        self.recorder.install()
        self.kernels = _quick_kernels()
        _Reads(self.recorder).__enter__()
        gc.disable()  # else it walks through everything again and again; `run` collects once, what is new
        gc.freeze()

    def run(self, rank: int, specs: Sequence[PackSpec], fault: Fault | None) -> Record:
        """Set up one rank and run one step of it on packs of the given shapes."""
        from megatron_elva.parallel import ranks as product

        record = self._begin(rank)
        began = time.process_time()
        try:
            engine, ranks = self._set_up(record)
            record.step, ready = len(record.events), time.process_time()
            self._hand(engine, specs)
            if fault is not None:
                fault(rank)
            self._step(engine, ranks, specs, record)
        finally:
            product.stop()
            gc.collect()
            gc.freeze()
        record.seconds = (ready - began, time.process_time() - ready)
        return record

    def _set_up(self, record: Record) -> tuple[Any, Any]:
        from megatron_elva.parallel import ranks as product
        from megatron_elva.parallel.collectives import barrier
        from megatron_elva.parallel.engine import Engine, build_chunks

        config = self.config
        ranks = product.start(config.parallel, config.device, config.seed)
        named = {f.name: getattr(ranks.groups, f.name, None) for f in fields(ranks.groups)}
        named["ends"], numbers = ranks.ends_group, self.recorder.numbers
        record.names = {name: numbers[id(group)] for name, group in named.items() if id(group) in numbers}
        record.place = (ranks.tensor, ranks.pipeline, ranks.data)
        assert config.model.vocab_size is not None
        engine = Engine(config, build_chunks(config, config.model.vocab_size, ranks), ranks)
        record.parameters = sum(p.numel() for p in engine.names)
        barrier()
        return engine, ranks

    def _hand(self, engine: Any, specs: Sequence[PackSpec]) -> None:
        """Substitutes 5, 6 and 7 for the packs of this step."""
        numbers = self.share._to_numbers([filled(spec, self.config) for spec in specs])
        self.share._send_numbers = lambda *given: self._send_numbers(numbers, given[1])
        chunks = engine.chunks
        carrier = chunks[0].boundary
        received = [0, 0]
        # with several chunks: right where messages at all boundaries have one shape
        layers = (chunks[-1].decoder.first_layer, chunks[0].decoder.first_layer + len(chunks[0].decoder.layers))
        expected, exchange = self.expected, self._exchange

        def communicate(self: Any, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
            bound = inspect.signature(exchange).bind(self, *args, **kwargs).arguments
            exchange(self, *args, **kwargs)
            out: list[list[int]] = [[0, 0, 0], [0, 0, 0]]
            for i, flag in enumerate(("recv_prev", "recv_next")):
                if bound[flag]:
                    spec = specs[received[i] % len(specs)]
                    out[i] = list(expected.shape(spec, layers[i], carrier))
                    received[i] += 1
            return out[0], out[1]

        self.communicator._communicate_shapes = communicate
        for chunk in chunks if carrier is not None else ():
            chunk.boundary = _handed_carrier(chunk, specs, expected)

    def _step(self, engine: Any, ranks: Any, specs: Sequence[PackSpec], record: Record) -> None:
        from megatron_elva.parallel.collectives import sum_over_ranks

        packs = [filled(spec, self.config) for spec in specs] if ranks.is_reader else None
        shared = self.share.share_packs(packs, ranks, len(specs))
        inputs = [
            None if pack is None else _prepared(spec, self.expected.key, ranks.is_first, ranks.is_last)
            for pack, spec in zip(shared, specs, strict=True)
        ]
        engine.set_learning_rate(1.0, False)
        result = engine.train_step(inputs)
        record.layers = result.layers
        sum_over_ranks([result.loss_sum, float(result.loss_tokens)], ranks)


def _join(world: int, device: torch.device, timeout: Any) -> None:
    """Substitute 2."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    rank = int(os.environ["RANK"])
    dist.init_process_group("cpu:fake,meta:fake", store=FakeStore(), rank=rank, world_size=world)


def _some_ranks(
    config: Config, world: int, ranks: Sequence[int], specs: Sequence[Sequence[PackSpec]], fault: Fault | None
) -> list[Record]:
    """What each process of `run_ranks` does: every n-th rank."""
    mine, of = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    replica = config.parallel.tensor
    process = _Process(config, world)
    out = []
    for rank in ranks[mine::of]:
        data = rank % (world // config.parallel.pipeline) // replica
        out.append(process.run(rank, specs[data % len(specs)], fault))
    return out


def run_ranks(
    config: Config,
    specs: Sequence[Sequence[PackSpec]],
    ranks: Sequence[int] | None = None,
    world: int | None = None,
    processes: int = 2,
    fault: Fault | None = None,
    timeout: float = 300,
) -> list[Record]:
    """Set up ranks of a cluster, and run one step of each.

    Args:
        config: with the real sizes.
        specs: for each replica (anew from the first when there are more) the packs of its step.
        ranks: which; all by default.
        world: size of the cluster; the config's by default.
        processes: processes that share the work.
        fault: breaks some rank.
        timeout: seconds.

    Returns:
        The records in the order of the ranks.
    """
    world = world or config.world_size
    chosen = list(range(world)) if ranks is None else list(ranks)
    parts = run_distributed(_some_ranks, processes, config, world, chosen, specs, fault, timeout=timeout)
    return sorted((record for part in parts for record in part), key=lambda record: record.rank)
