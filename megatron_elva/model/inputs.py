"""From a pack to what the model reads: everything that needs the host is derived here, once for a microbatch."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_elva.config.schema import Config, MergingConfig
from megatron_elva.layout import IGNORE, Kind, Pack, PackState, initial_state
from megatron_elva.layout.compact import moved
from megatron_elva.layout.pooling import pool_columns
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

    def to(self, device: torch.device | str) -> VisualInputs:
        """The same inputs on another device."""
        return VisualInputs(
            moved(self.tokens, device), moved(self.patches, device), self.index.to(device), moved(self.order, device)
        )


@dataclass(frozen=True)
class LossInputs:
    """What only the last pipeline rank needs.

    Attributes:
        positions: ``[K]`` int64, where a loss is taken, counted in the pack before any merge; one position where a
            pack has none, so that every rank computes.
        targets: ``[K]`` int64, token ids.
        weights: ``[K]`` fp32, 1 or (at that lone position) 0.
    """

    positions: Tensor
    targets: Tensor
    weights: Tensor

    def to(self, device: torch.device | str) -> LossInputs:
        """The same inputs on another device."""
        return LossInputs(moved(self.positions, device), moved(self.targets, device), moved(self.weights, device))


@dataclass(frozen=True)
class ModelInputs:
    """One microbatch on the device of the model. A rank in the middle of the pipeline needs nothing of it.

    Attributes:
        state: the pack before any merge; first pipeline rank.
        visual: first pipeline rank.
        loss: last pipeline rank.
    """

    state: PackState | None
    visual: VisualInputs | None
    loss: LossInputs | None


def pooling_window(merging: MergingConfig) -> int:
    """Frames averaged into one at the input; 1: none are."""
    return merging.pooling.window if merging.kind == "pooling" else 1


def _loss_inputs(labels: Tensor) -> LossInputs:
    positions = (labels != IGNORE).nonzero().flatten()
    if positions.numel():
        return LossInputs(positions, labels[positions], torch.ones(positions.numel()))
    return LossInputs(torch.zeros(1, dtype=torch.long), torch.zeros(1, dtype=torch.long), torch.zeros(1))


def prepare(
    pack: Pack, config: Config, device: torch.device | str, first: bool = True, last: bool = True
) -> ModelInputs:
    """Derive the model's inputs from a pack.

    Args:
        pack: a pack on the host, as the data gave it.
        config: sizes and merging; with ``merging.kind=pooling`` windows of frames become one here.
        device: where the model is.
        first: derive what the first pipeline rank needs.
        last: derive what the last pipeline rank needs.

    Returns:
        The inputs on `device`.
    """
    window = pooling_window(config.merging)
    spec, tokens, labels = pack.spec, pack.tokens, pack.labels
    if window > 1:
        spec = pack.spec.pooled(window).padded_to(config.pad_multiple)
        tokens, labels = pool_columns(pack.spec, spec, tokens, labels)
    loss = _loss_inputs(labels).to(device) if last else None
    if not first:
        return ModelInputs(None, None, loss)
    state = initial_state(spec)
    layout = state.layout
    order = torch.cat([layout.where(Kind.CELL), layout.where(Kind.FRAME), layout.where(Kind.LINE)])
    visual = VisualInputs(tokens, pack.patches, VisualIndex.of(pack.spec, window), order)
    return ModelInputs(state.to(device), visual.to(device), loss)
