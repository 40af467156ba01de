"""Saving and loading of optimizer state, around what megatron-core 0.16 gets wrong for us.

1. Buckets: the whole buffer is collected without the padding between its buckets and then cut at positions that count
   it, so everything behind the first bucket is saved shifted and its end as zeros. A tied word embedding over several
   pipeline ranks is such a second bucket.
2. torch's Adam (used where there is no Transformer Engine): it has no state before its first step, which megatron-core
   reads in order to load one; its "step" is asked for among what a checkpoint gives for each parameter, and is not
   there; and one "step" tensor is then shared by all parameters, so that every one of them would count it up.
3. Groups are told apart by their multipliers alone, so that groups which differ in learning rate or in being frozen
   would all become the last of them. The settings of groups come from the config, not from the checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def corrected(optimizer: Any) -> Iterator[None]:
    """Save or load the state of megatron-core's optimizer inside of this."""
    parts = optimizer.chained_optimizers
    settings = [{k: v for k, v in g.items() if k not in ("params", "step")} for g in optimizer.param_groups]
    for part in parts:
        _allocate(part.optimizer)
        part.get_parameter_state_dp_zero = _with_padding(part)
        part._set_main_param_and_optimizer_states = _leaving_what_is_not_given(part)
    try:
        yield
    finally:
        for part in parts:
            del part.get_parameter_state_dp_zero, part._set_main_param_and_optimizer_states
            for state in part.optimizer.state.values():
                if "step" in state:
                    state["step"] = state["step"].clone()
        for group, own in zip(optimizer.param_groups, settings, strict=True):
            kept = {k: group[k] for k in ("params", "step") if k in group}
            group.clear()
            group.update(own, **kept)


def _allocate(adam: torch.optim.Optimizer) -> None:
    """The state that torch's Adam would make in its first step."""
    if not isinstance(adam, torch.optim.Adam | torch.optim.AdamW):
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
                for key in ("param", "exp_avg", "exp_avg_sq"):
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
