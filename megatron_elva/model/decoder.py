"""The decoder: the layers that this pipeline chunk holds, in layer groups.

A layer group is what lies between two merge points. Merging is not built yet, so there is one group.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, cast

from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megatron_elva.model.attention import PackedSequence
from megatron_elva.model.norm import RMSNorm


class Decoder(MegatronModule):
    """Decoder layers of one pipeline chunk.

    Args:
        config: megatron-core's config.
        spec: what a layer is made of.
        pg_collection: process groups.
        first_layer: global number of the first layer here, from 0.
        layers: number of layers here.
        final_norm: whether the norm before the head is here (last pipeline chunk).
        recompute: recompute each layer's activations in the backward pass.
        vp_stage: number of the virtual chunk, None without interleaving.
    """

    def __init__(
        self,
        config: TransformerConfig,
        spec: ModuleSpec,
        pg_collection: ProcessGroupCollection,
        first_layer: int,
        layers: int,
        final_norm: bool,
        recompute: bool,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.tp_group = pg_collection.tp
        self.first_layer = first_layer
        self.recompute = recompute
        self.layers = nn.ModuleList(
            build_module(spec, config=config, layer_number=i + 1, pg_collection=pg_collection, vp_stage=vp_stage)
            for i in range(layers)
        )
        self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if final_norm else None

    def forward(self, hidden: Tensor, sequence: PackedSequence) -> Tensor:
        """``[S / tp, 1, H] -> [S / tp, 1, H]`` (S without sequence parallelism)."""
        for layer in self.layers:
            hidden = self._layer(layer, hidden, sequence)
        return hidden if self.final_layernorm is None else self.final_layernorm(hidden)

    def _layer(self, layer: nn.Module, hidden: Tensor, sequence: PackedSequence) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return layer(hidden_states=x, attention_mask=None, packed_seq_params=sequence)[0]

        if not (self.recompute and self.training):
            return run(hidden)
        if not hidden.requires_grad:
            # a frozen embedding below: without this the layers' own gradients would silently be lost
            hidden = hidden.detach().requires_grad_()
        return tensor_parallel.checkpoint(run, False, hidden)

    def sharded_state_dict(
        self, prefix: str = "", sharded_offsets: tuple[Any, ...] = (), metadata: dict[str, Any] | None = None
    ) -> dict[str, Any]:
        """Checkpoint entries, with layers named by their global number."""
        out: dict[str, Any] = {}
        for i, layer in enumerate(cast(Iterable[MegatronModule], self.layers)):
            local, named = f"{prefix}layers.{i}.", f"{prefix}layers.{i + self.first_layer}."
            entries = layer.sharded_state_dict(local, sharded_offsets, metadata)
            replace_prefix_for_sharding(entries, local, named)
            out.update(entries)
        if self.final_layernorm is not None:
            norm = sharded_state_dict_default(
                self.final_layernorm, f"{prefix}final_layernorm.", sharded_offsets, metadata, tp_group=self.tp_group
            )
            out.update(norm)
        return out
