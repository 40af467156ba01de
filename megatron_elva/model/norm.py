"""RMSNorm for the local layer spec: megatron-core's own torch norm refuses sequence parallelism."""

from __future__ import annotations

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension, computed in fp32.

    Args:
        config: `sequence_parallel` decides whether the gradient of the weight is summed over the tensor ranks.
        hidden_size: width of the input.
        eps: added to the mean square.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(
            torch.ones(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        """``[..., H] -> [..., H]``, same dtype."""
        return nn.functional.rms_norm(x.float(), self.weight.shape, eps=self.eps).to(x.dtype) * self.weight
