"""Saving and loading of optimizer state, around what megatron-core 0.16 gets wrong for us.

1. Buckets: the whole buffer is collected without the padding between its buckets and then cut at positions that count
   it, so everything behind the first bucket is loaded shifted and its end as zeros. A tied word embedding over several
   pipeline ranks is such a second bucket. For saving, all of it would be collected on the host of every data rank;
   here each saves its own share, as pieces of the same tensors, and nothing is sent.
2. torch's Adam (used where there is no Transformer Engine): it has no state before its first step, which megatron-core
   reads in order to load one; its "step" is asked for among what a checkpoint gives for each parameter, and is not
   there; and one "step" tensor is then shared by all parameters, so that every one of them would count it up.
3. A fused Adam (Transformer Engine's, apex's) counts steps for each group, in an int that is not there before its first
   step. Files of one kind of Adam are read by the other.
4. Groups are told apart by their multipliers alone, so that groups which differ in learning rate or in being frozen
   would all become the last of them. The settings of groups come from the config, not from the checkpoint.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensor, ShardedTensorFactory
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors_and_factories
from torch import Tensor

_STATES = ("param", "exp_avg", "exp_avg_sq")


@contextmanager
def corrected(optimizer: Any) -> Iterator[None]:
    """Save or load the state of megatron-core's optimizer inside of this.

    What is given out for saving are views of the optimizer's own tensors: they hold until its next step.
    """
    parts = optimizer.chained_optimizers
    settings = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]
    for part in parts:
        _allocate(part)
        part.get_parameter_state_dp_zero = _with_padding(part)
        part.sharded_param_state_fully_reshardable = _own_share(part)
        part._set_main_param_and_optimizer_states = _leaving_what_is_not_given(part)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero, part._set_main_param_and_optimizer_states
            del part.sharded_param_state_fully_reshardable
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"].clone()
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            kept = {k: group[k] for k in ("params", "step") if k in group}
            if "step" in kept:
                kept["step"] = int(kept["step"])  # written by torch's Adam it is a float, which a fused kernel refuses
            group.clear()
            group.update(own, **kept)


def _allocate(part: Any) -> None:
    """The state that the optimizer would make in its first step."""
    adam = part.optimizer
    if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
        part.init_state_fn(adam, part.config)
        for group in adam.param_groups:
            group.setdefault("step", 0)  # fused kernels count here, and what is missing cannot be read by torch's Adam
        return
    for p in (p for group in adam.param_groups for p in group["params"]):
        if not adam.state[p]:
            moments = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            adam.state[p] = {"step": torch.tensor(0.0), **moments}


def _with_padding(part: Any) -> Any:
    """The part's own collecting of whole buffers, with each bucket put where the positions of parameters say."""
    inner = part.get_parameter_state_dp_zero

    def collect(*args: Any, **kwargs: Any) -> Any:
        state = inner(*args, **kwargs)
        for i, buffer in enumerate(part.buffers if state is not None else []):
            for tensors in state[i].values():
                for key in _STATES:
                    if key in tensors:
                        tensors[key] = _spread(tensors[key], buffer)
        return state

    return collect


def _spread(packed: Tensor, buffer: Any) -> Tensor:
    out, at = packed.new_zeros(buffer.numel), 0
    for bucket, (start, _) in zip(buffer.buckets, buffer.bucket_indices, strict=True):
        out[start : start + bucket.numel_unpadded] = packed[at : at + bucket.numel_unpadded]
        at += bucket.numel_unpadded
    return out


def _leaving_what_is_not_given(part: Any) -> Any:
    inner = part._set_main_param_and_optimizer_states

    def set_states(parameter: Tensor, given: dict[str, Tensor]) -> None:
        inner(parameter, {**part._get_main_param_and_optimizer_states(parameter), **given})

    return set_states


def _own_share(part: Any) -> Any:
    """The part's own state for saving: what this data rank holds of each tensor, cut into boxes."""
    inner = part.sharded_param_state_fully_reshardable

    def collect(model_state: Any, is_loading: bool = False, metadata: Any = None) -> Any:
        if is_loading:
            return inner(model_state, is_loading, metadata)
        entries = {e.data: e for e in nested_values(extract_sharded_tensors_and_factories(model_state)[0])}
        held = [own for ranges in part.gbuf_ranges for buckets in ranges.values() for own in buckets]
        out: dict[str, ShardedTensor] = {}
        for parameter, where in (item for own in held for item in own["param_map"].items()):
            states = part._get_main_param_and_optimizer_states(parameter)
            for key in _STATES:
                for piece in _pieces(entries[parameter], f"optimizer.state.{key}.", states[key], where["param"].start):
                    out[str(len(out))] = piece
        return out

    return collect


def _pieces(entry: Any, prefix: str, flat: Tensor, start: int) -> Iterator[ShardedTensor]:
    """What `flat`, the values of a parameter from its number `start` on, are of the tensors that are saved of it."""
    like = torch.empty(entry.data.shape, dtype=flat.dtype, device="meta")
    change: dict[str, Any] = {"key": prefix + entry.key, "data": like}
    if isinstance(entry, ShardedTensorFactory):  # several tensors in one parameter
        wholes = list(nested_values(replace(entry, **change).build()))
    else:
        wholes = [replace(entry, **change, dtype=flat.dtype)]
    for whole in wholes:
        begin, ahead = whole.data.storage_offset(), (1,) * whole.prepend_axis_num
        low, high = max(start, begin), min(start + flat.numel(), begin + whole.data.numel())
        for offsets, sizes in _boxes(tuple(whole.data.shape), low - begin, high - begin):
            at = begin + sum(o * s for o, s in zip(offsets, whole.data.stride(), strict=True)) - start
            corner = whole.global_offset[: len(ahead)] + tuple(
                a + b for a, b in zip(whole.global_offset[len(ahead) :], offsets, strict=True)
            )
            yield replace(
                whole,
                data=flat[at : at + math.prod(sizes)].view(*ahead, *sizes),
                local_shape=(*ahead, *sizes),
                global_offset=corner,
                axis_fragmentations=None,
                prepend_axis_num=0,
                replica_id=(*whole.replica_id[:-1], 0),  # no other data rank has it
            )


def _boxes(shape: tuple[int, ...], low: int, high: int) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The numbers from `low` to below `high` of an array in row order, as boxes: their corners and sizes."""
    if low >= high:
        return
    if len(shape) <= 1:
        yield (low,) * len(shape), (high - low,) * len(shape)
        return
    row, rest = math.prod(shape[1:]), shape[1:]
    first, last = -(-low // row), high // row
    if first > last:  # all within one row
        parts = [(last, low - last * row, high - last * row)]
    else:
        parts = [(first - 1, low - (first - 1) * row, row)] if low < first * row else []
        if first < last:
            yield (first, *(0 for _ in rest)), (last - first, *rest)
        parts += [(last, 0, high - last * row)] if high > last * row else []
    for index, begin, end in parts:
        for offsets, sizes in _boxes(rest, begin, end):
            yield (index, *offsets), (1, *sizes)
