"""A model whose weights are drawn on its device, for figures in which their values do not matter.

Drawing by name on the host, as training does, takes minutes for 7B weights.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch

from megatron_elva.config.schema import Config, ModelConfig
from megatron_elva.model.elva import ElvaModel
from megatron_elva.model.weights import named_global_parameters
from megatron_elva.parallel.engine import build_chunks
from megatron_elva.parallel.ranks import Ranks


@torch.no_grad()
def draw_on_device(chunks: Iterable[ElvaModel], model: ModelConfig, seed: int, tp_rank: int, tp_size: int) -> None:
    """Fill all weights in place with values of the distribution that `weights.draw` has, not with its values."""
    torch.manual_seed(seed)
    for name, parameter in named_global_parameters(chunks):
        if name.endswith("bias"):
            parameter.zero_()
        elif "norm" in name.rsplit(".", 2)[-2] or name.endswith("layer_norm_weight"):
            parameter.fill_(1.0)
        else:
            residual = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
            parameter.normal_(0.0, model.init_std / (math.sqrt(2 * model.layers) if residual else 1.0))


def model_on_device(config: Config, ranks: Ranks) -> ElvaModel:
    """The whole model as `build_chunks` makes it, drawn on the device.

    Args:
        config: of one process; `model.vocab_size` is set.
        ranks: this process.
    """
    if config.model.vocab_size is None:
        raise ValueError("model.vocab_size=null: a benchmark has no tokenizer to take it from; give --vocab")
    (chunk,) = build_chunks(config, config.model.vocab_size, ranks, draw_on_device)
    return chunk
