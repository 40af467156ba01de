"""Weights under global names: drawn, loaded and compared independently of the parallel layout.

The global names are those of the checkpoints: layers carry their global number, norms are named as in Transformer
Engine's fused norm-linear, and a tied head is the word embedding.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterable, Iterator

import torch
from torch import Tensor, nn

from megatron_elva.config.schema import ModelConfig
from megatron_elva.model.elva import ElvaModel

_NORMS = (
    (".input_layernorm.weight", ".self_attention.linear_qkv.layer_norm_weight"),
    (".pre_mlp_layernorm.weight", ".mlp.linear_fc1.layer_norm_weight"),
)


def global_name(local: str, first_layer: int, tied: bool) -> str:
    """Global name of a parameter of a chunk whose first layer has the global number `first_layer`."""
    if local.startswith("decoder.layers."):
        _, _, number, rest = local.split(".", 3)
        local = f"decoder.layers.{int(number) + first_layer}.{rest}"
    if local == "output_layer.weight" and tied:
        return "embedding.word_embeddings.weight"
    for own, named in _NORMS:
        if local.endswith(own):
            return local.removesuffix(own) + named
    return local


def named_global_parameters(chunks: Iterable[ElvaModel]) -> Iterator[tuple[str, nn.Parameter]]:
    """Global name and local shard of every parameter of the chunks on this rank."""
    for chunk in chunks:
        for local, parameter in chunk.named_parameters():
            yield global_name(local, chunk.decoder.first_layer, chunk.share_embeddings_and_output_weights), parameter


def full_shape(name: str, shard: nn.Parameter, tp_size: int) -> tuple[int, ...]:
    """Shape of the whole parameter of which `shard` is a tensor rank's part."""
    shape = list(shard.shape)
    if getattr(shard, "tensor_model_parallel", False):
        shape[shard.partition_dim] *= tp_size  # type: ignore[attr-defined]
    return tuple(shape)


def shard_of(name: str, full: Tensor, shard: nn.Parameter, tp_rank: int, tp_size: int) -> Tensor:
    """The part of a whole parameter that a tensor rank holds."""
    if not getattr(shard, "tensor_model_parallel", False) or tp_size == 1:
        return full
    if name.endswith("mlp.linear_fc1.weight"):
        # gate and up are stacked in the whole tensor and in each shard
        gate, up = full.chunk(2)
        return torch.cat([gate.chunk(tp_size)[tp_rank], up.chunk(tp_size)[tp_rank]])
    return full.chunk(tp_size, dim=shard.partition_dim)[tp_rank]  # type: ignore[attr-defined]


@torch.no_grad()
def load_full(
    chunks: Iterable[ElvaModel], full: Callable[[str, tuple[int, ...]], Tensor], tp_rank: int, tp_size: int
) -> None:
    """Fill every parameter of this rank from whole tensors.

    Args:
        chunks: the model chunks of this rank.
        full: gives the whole tensor of a global name and shape.
        tp_rank: this rank among the tensor ranks.
        tp_size: number of tensor ranks.

    Raises:
        ValueError: a tensor has the wrong shape.
    """
    for name, parameter in named_global_parameters(chunks):
        shape = full_shape(name, parameter, tp_size)
        tensor = full(name, shape)
        if tuple(tensor.shape) != shape:
            raise ValueError(f"{name}: shape {tuple(tensor.shape)} in the weights, {shape} in the model")
        parameter.copy_(shard_of(name, tensor, parameter, tp_rank, tp_size))


def draw(name: str, shape: tuple[int, ...], seed: int, std: float, layers: int) -> Tensor:
    """Initial value of a parameter, a function of its global name alone.

    Norm weights are 1, biases 0, matrices and learned tokens normal with `std`; the two projections that write to the
    residual stream are scaled by ``1 / sqrt(2 * layers)`` (GPT-2's rule).
    """
    if name.endswith("bias"):
        return torch.zeros(shape)
    if "norm" in name.rsplit(".", 2)[-2] or name.endswith("layer_norm_weight"):
        return torch.ones(shape)
    if name.endswith(("linear_proj.weight", "linear_fc2.weight")):
        std = std / math.sqrt(2 * layers)
    key = hashlib.sha256(f"{seed}/{name}".encode()).digest()
    generator = torch.Generator().manual_seed(int.from_bytes(key[:8], "little") >> 1)
    return torch.randn(shape, generator=generator) * std


def initialise(chunks: Iterable[ElvaModel], model: ModelConfig, seed: int, tp_rank: int, tp_size: int) -> None:
    """Draw all weights of this rank: the same model at every parallel layout."""
    load_full(
        chunks,
        lambda name, shape: draw(name, shape, seed, model.init_std, model.layers),
        tp_rank=tp_rank,
        tp_size=tp_size,
    )
