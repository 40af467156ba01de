"""The decoder: the layers that this pipeline chunk holds, in layer groups.

A layer group is what lies between two merge points. A merge point after layer k runs where layer k is, so that what it
removes does not cross to the next pipeline rank. It lies outside of recomputed regions: its decision is made once.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, cast

import torch
from megatron.core import tensor_parallel
from megatron.core.dist_checkpointing.utils import replace_prefix_for_sharding
from megatron.core.extensions.transformer_engine import te_checkpoint
from megatron.core.fp8_utils import get_fp8_context
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.spec_utils import ModuleSpec, build_module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.utils import sharded_state_dict_default
from torch import Tensor, nn

from megatron_elva.config.merge_schedule import ResolvedPoint
from megatron_elva.layout import PackState
from megatron_elva.model.attention import PackedSequence, packed_sequence
from megatron_elva.model.merging import merge
from megatron_elva.model.norm import RMSNorm


@dataclass(frozen=True)
class MergeSchedule:
    """Where and how tokens merge.

    Attributes:
        points: in the order of their layers.
        survivor: ``first`` or ``last``.
        multiple: what the length of a pack is padded to a multiple of.
    """

    points: tuple[ResolvedPoint, ...] = ()
    survivor: str = "first"
    multiple: int = 1


@dataclass(frozen=True)
class Attending:
    """What attention needs beside a layout: head width, base of the rotation, mask."""

    head_dim: int
    theta: float
    mask: str


@dataclass
class Trace:
    """What happened to packs on their way through the chunks of this rank, all host numbers.

    Attributes:
        layers: ``(layers, lengths of the samples)`` for each layer group of each pack.
        visual_tokens: visual tokens left at the end; counted by the last chunk alone.
        states: the state after each merge point, pack by pack; kept only where `keep_states` is set.
        keep_states: keep them (on the device).
    """

    layers: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)
    visual_tokens: int = 0
    states: list[PackState] = field(default_factory=list)
    keep_states: bool = False

    def clear(self) -> None:
        """Forget the packs so far."""
        self.layers.clear()
        self.states.clear()
        self.visual_tokens = 0


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
        attending: what attention needs beside a layout.
        schedule: merge points of the whole model.
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
        attending: Attending,
        schedule: MergeSchedule,
        vp_stage: int | None,
    ) -> None:
        super().__init__(config=config)
        self.attending, self.schedule = attending, schedule
        self.trace = Trace()
        self.tp_group = pg_collection.tp
        self.first_layer = first_layer
        self.recompute = recompute
        self.layers = nn.ModuleList(
            build_module(spec, config=config, layer_number=i + 1, pg_collection=pg_collection, vp_stage=vp_stage)
            for i in range(layers)
        )
        self.final_layernorm = RMSNorm(config, config.hidden_size, config.layernorm_epsilon) if final_norm else None

    def forward(self, hidden: Tensor, state: PackState) -> tuple[Tensor, PackState]:
        """``[S / tp, 1, H] -> [K / tp, 1, H]`` (without sequence parallelism whole lengths), with the pack's state."""
        with get_fp8_context(self.config):  # nothing without FP8; a merge point within it is as without
            hidden, state = self._layers_and_merges(hidden, state)
        if self.final_layernorm is not None:
            self.trace.visual_tokens += state.visual_tokens
            hidden = self.final_layernorm(hidden)
        return hidden, state

    def _layers_and_merges(self, hidden: Tensor, state: PackState) -> tuple[Tensor, PackState]:
        sequence = self._sequence(state)
        since = 0
        for i, layer in enumerate(self.layers):
            hidden = self._layer(layer, hidden, sequence)
            since += 1
            points = self._points_after(self.first_layer + i + 1, state)
            if points:
                self.trace.layers.append((since, sequence.lengths))
                since = 0
                for point in points:
                    hidden, state = self._merge(hidden, state, point)
                if i + 1 < len(self.layers):
                    sequence = self._sequence(state)
        if since:
            self.trace.layers.append((since, sequence.lengths))
        return hidden, state

    def _sequence(self, state: PackState) -> PackedSequence:
        a = self.attending
        return packed_sequence(state.layout, a.head_dim, a.theta, a.mask)

    def _points_after(self, layers: int, state: PackState) -> tuple[ResolvedPoint, ...]:
        return tuple(p for p in self.schedule.points[state.done :] if p.layer == layers)

    def _merge(self, hidden: Tensor, state: PackState, point: ResolvedPoint) -> tuple[Tensor, PackState]:
        """One merge point; every tensor rank gathers the whole pack and merges what the first of them chose."""
        shard = self.config.sequence_parallel
        if shard:
            # what follows is computed alike on all tensor ranks: their gradients are one gradient, not parts of a sum
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        agree = self._agree if self.tp_group.size() > 1 else None
        merged, state = merge(hidden[:, 0], state, point, self.schedule.survivor, self.schedule.multiple, agree)
        hidden = merged[:, None]
        if shard:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        if self.trace.keep_states:
            self.trace.states.append(state)
        return hidden, state

    def _agree(self, chosen: Tensor) -> Tensor:
        """The choice of the first tensor rank, so that a differing bit cannot give ranks packs of different lengths."""
        choice = chosen.to(torch.uint8)
        torch.distributed.broadcast(choice, torch.distributed.get_global_rank(self.tp_group, 0), group=self.tp_group)
        return choice.bool()

    def _layer(self, layer: nn.Module, hidden: Tensor, sequence: PackedSequence) -> Tensor:
        def run(x: Tensor) -> Tensor:
            return layer(hidden_states=x, attention_mask=None, packed_seq_params=sequence)[0]

        if not (self.recompute and self.training):
            return run(hidden)
        if not hidden.requires_grad:
            # a frozen embedding below: without this the layers' own gradients would silently be lost
            hidden = hidden.detach().requires_grad_()
        if self.config.fp8:  # the second forward must see the scales of the first
            return te_checkpoint(run, False, tensor_parallel.random.get_cuda_rng_tracker, self.tp_group, hidden)
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
            # Transformer Engine's FP8 scales: with them a checkpoint could not be read by layers of another kind
            out.update({name: entry for name, entry in entries.items() if not name.endswith("_extra_state")})
        if self.final_layernorm is not None:
            norm = sharded_state_dict_default(
                self.final_layernorm, f"{prefix}final_layernorm.", sharded_offsets, metadata, tp_group=self.tp_group
            )
            out.update(norm)
        return out
