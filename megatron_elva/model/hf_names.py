"""The one mapping between global names and those of transformers' Qwen2, used in both directions.

Three tensors are stacked here and apart there: q, k, v (interleaved by key/value group, as megatron-core splits them)
and gate, up. Everything else is a change of name. Patch embedding and projector keep their names.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from megatron_elva.config.schema import ModelConfig

_TOP = {
    "embedding.word_embeddings.weight": "model.embed_tokens.weight",
    "decoder.final_layernorm.weight": "model.norm.weight",
    "output_layer.weight": "lm_head.weight",
}
_LAYER = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "self_attention.linear_proj.weight": "self_attn.o_proj.weight",
    "mlp.linear_fc1.layer_norm_weight": "post_attention_layernorm.weight",
    "mlp.linear_fc2.weight": "mlp.down_proj.weight",
}
VISUAL = ("patch_embedding.", "projector.")


def _stack_qkv(q: Tensor, k: Tensor, v: Tensor, model: ModelConfig) -> Tensor:
    groups, d = model.kv_heads, model.head_dim
    parts = [x.reshape(groups, -1, d, *x.shape[1:]) for x in (q, k, v)]
    return torch.cat(parts, dim=1).reshape(-1, *q.shape[1:])


def _split_qkv(qkv: Tensor, model: ModelConfig) -> tuple[Tensor, Tensor, Tensor]:
    groups, d = model.kv_heads, model.head_dim
    per_group = model.heads // groups
    x = qkv.reshape(groups, per_group + 2, d, *qkv.shape[1:])
    q, k, v = (t.reshape(-1, *qkv.shape[1:]) for t in x.split([per_group, 1, 1], dim=1))
    return q, k, v


def from_hf(state: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """Whole tensors under global names from a transformers Qwen2 state dict.

    Raises:
        KeyError: the state dict lacks a tensor of this model.
    """
    out = {own: state[theirs] for own, theirs in _TOP.items() if theirs in state}
    if model.tied_head:
        out.pop("output_layer.weight", None)
    for i in range(model.layers):
        own, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for a, b in _LAYER.items():
            out[own + a] = state[theirs + b]
        for kind in ("weight", "bias"):
            q, k, v = (state[f"{theirs}self_attn.{p}_proj.{kind}"] for p in "qkv")
            out[f"{own}self_attention.linear_qkv.{kind}"] = _stack_qkv(q, k, v, model)
        gate, up = (state[f"{theirs}mlp.{p}_proj.weight"] for p in ("gate", "up"))
        out[f"{own}mlp.linear_fc1.weight"] = torch.cat([gate, up])
    out.update({name: tensor for name, tensor in state.items() if name.startswith(VISUAL)})
    return out


def to_hf(full: Mapping[str, Tensor], model: ModelConfig) -> dict[str, Tensor]:
    """A transformers Qwen2 state dict from whole tensors under global names; the inverse of `from_hf`."""
    out = {theirs: full[own] for own, theirs in _TOP.items() if own in full}
    if model.tied_head:
        out["lm_head.weight"] = out["model.embed_tokens.weight"]
    for i in range(model.layers):
        own, theirs = f"decoder.layers.{i}.", f"model.layers.{i}."
        for a, b in _LAYER.items():
            out[theirs + b] = full[own + a]
        for kind in ("weight", "bias"):
            parts = _split_qkv(full[f"{own}self_attention.linear_qkv.{kind}"], model)
            for p, tensor in zip("qkv", parts, strict=True):
                out[f"{theirs}self_attn.{p}_proj.{kind}"] = tensor
        gate, up = full[f"{own}mlp.linear_fc1.weight"].chunk(2)
        out[f"{theirs}mlp.gate_proj.weight"], out[f"{theirs}mlp.up_proj.weight"] = gate, up
    out.update({name: tensor for name, tensor in full.items() if name.startswith(VISUAL)})
    return out
