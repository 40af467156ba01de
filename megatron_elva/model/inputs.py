"""From a pack to what the model reads: everything that needs the host is derived here, once for a microbatch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from megatron_elva.config.schema import ModelConfig
from megatron_elva.layout import IGNORE, Kind, Pack, TokenLayout, build_layout
from megatron_elva.model.attention import PackedSequence, packed_sequence
from megatron_elva.model.patch_embedding import VisualIndex


@dataclass(frozen=True)
class VisualInputs:
    """What only the first pipeline rank needs.

    Attributes:
        tokens: ``[S]`` int64 ids, 0 at visual positions and padding.
        patches: ``[N * r * r, P * P * 3]`` uint8.
        index: groups of cells for FRAME and LINE.
        order: ``[N + F + R]`` int64: the positions in the pack of all cells, then all FRAMEs, then all LINEs.
    """

    tokens: Tensor
    patches: Tensor
    index: VisualIndex
    order: Tensor


@dataclass(frozen=True)
class LossInputs:
    """What only the last pipeline rank needs.

    Attributes:
        positions: ``[K]`` int64, where a loss is taken; one position where a pack has none, so that every rank
            computes.
        targets: ``[K]`` int64, token ids.
        weights: ``[K]`` fp32, 1 or (at that lone position) 0.
    """

    positions: Tensor
    targets: Tensor
    weights: Tensor


@dataclass(frozen=True)
class ModelInputs:
    """One microbatch on the device of the model."""

    layout: TokenLayout
    sequence: PackedSequence
    visual: VisualInputs
    loss: LossInputs

    def to(self, device: torch.device | str) -> ModelInputs:
        """The same inputs on another device (the sequence is built there)."""
        visual, loss = self.visual, self.loss
        return replace(
            self,
            layout=self.layout.to(device),
            visual=VisualInputs(
                visual.tokens.to(device), visual.patches.to(device), visual.index.to(device), visual.order.to(device)
            ),
            loss=LossInputs(loss.positions.to(device), loss.targets.to(device), loss.weights.to(device)),
        )


def _loss_inputs(labels: Tensor) -> LossInputs:
    positions = (labels != IGNORE).nonzero().flatten()
    if positions.numel():
        return LossInputs(positions, labels[positions], torch.ones(positions.numel()))
    return LossInputs(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1))


def prepare(pack: Pack, model: ModelConfig, device: torch.device | str) -> ModelInputs:
    """Derive the model's inputs from a pack.

    Args:
        pack: a pack on the host.
        model: sizes, mask and rotation.
        device: where the model is.

    Returns:
        The inputs on `device`.
    """
    layout = build_layout(pack.spec)
    order = torch.cat([layout.where(Kind.CELL), layout.where(Kind.FRAME), layout.where(Kind.LINE)])
    visual = VisualInputs(pack.tokens, pack.patches, VisualIndex.of(pack.spec), order)
    on_device = layout.to(device)
    sequence = packed_sequence(on_device, model.head_dim, model.rope_theta, model.attention_mask)
    return ModelInputs(layout, sequence, visual, _loss_inputs(pack.labels)).to(device)
