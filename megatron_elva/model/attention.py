"""Core attention over packed samples, with rotation by per-token positions.

Shape letters: S tokens of the pack, B samples, L longest sample, h heads, g key/value heads, d head width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import accumulate

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor, nn

from megatron_elva.layout import Kind, TokenLayout
from megatron_elva.layout.compact import on_device


@dataclass
class PackedSequence(PackedSeqParams):
    """What attention needs to know of a pack, beside megatron-core's own fields.

    Rotation lives here and not in `rotary_pos_emb`, because megatron-core's rotary for packed sequences starts every
    sample at 0 and reads `cu_seqlens` on the host in each layer.

    Attributes:
        angle: ``[S, d]`` fp32, what each pair of features of a token is turned by.
        cos: ``[S, d]`` fp32, of `angle`.
        sin: ``[S, d]`` fp32, of `angle`.
        lengths: tokens of each sample; the padding sample, at the end of the pack, is not among them.
        slot: ``[S - padding]`` int64, the place of each token in the ``B * L`` slots of the padded form.
        block: ``[B, L]`` int64 or None; tokens of one sample with the same block >= 0 see each other both ways.
    """

    angle: Tensor | None = None
    cos: Tensor | None = None
    sin: Tensor | None = None
    lengths: tuple[int, ...] = ()
    slot: Tensor | None = None
    block: Tensor | None = None


def rotary_angles(position: Tensor, head_dim: int, theta: float) -> Tensor:
    """Angles of the rotation of each token, in Qwen2's half-split form.

    Args:
        position: ``[S]`` position ids.
        head_dim: d, even.
        theta: the base.

    Returns:
        ``[S, d]`` fp32.
    """
    inverse = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float32, device=position.device) / head_dim)
    angle = position.float()[:, None] * inverse
    return torch.cat([angle, angle], dim=-1)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate ``[S, h, d]`` by ``[S, d]`` angles; computed in fp32, returned in the dtype of ``x``."""
    first, second = x.float().chunk(2, dim=-1)
    turned = torch.cat([-second, first], dim=-1)
    return (x.float() * cos[:, None] + turned * sin[:, None]).to(x.dtype)


def rotation(pack: PackedSequence | None) -> tuple[Tensor, Tensor, Tensor]:
    """Angles of a pack, their cosines and their sines, each ``[S, d]``.

    Raises:
        ValueError: attention was called without them.
    """
    if pack is None or pack.angle is None or pack.cos is None or pack.sin is None:
        raise ValueError("attention needs a PackedSequence with its rotation: build it with packed_sequence()")
    return pack.angle, pack.cos, pack.sin


def packed_sequence(layout: TokenLayout, head_dim: int, theta: float, mask: str = "causal") -> PackedSequence:
    """Derive from a layout what attention needs.

    Args:
        layout: the token layout, on the device of the model.
        head_dim: width of an attention head.
        theta: base of the rotation.
        mask: ``causal`` or ``frame_bidirectional``.
    """
    device = layout.position.device
    angle = rotary_angles(layout.position, head_dim, theta)
    real = layout.tokens - layout.padding
    samples = len(layout.lengths) - (layout.padding > 0)
    longest = max(layout.lengths[:samples], default=1)
    bound = _rounded_up(max(longest, layout.padding))
    cu_seqlens = on_device([0, *accumulate(layout.lengths)], device).to(torch.int32)
    slot = layout.sample * longest + (torch.arange(layout.tokens, device=device) - cu_seqlens[layout.sample])
    slot = slot[:real]
    block = None
    if mask == "frame_bidirectional":
        frame_id = layout.video * (layout.tokens + 1) + layout.frame
        frame_id = torch.where(layout.kind == Kind.CELL, frame_id, torch.full_like(frame_id, -1))
        block = frame_id.new_full((samples * longest,), -1).index_copy(0, slot, frame_id[:real])
        block = block.view(samples, longest)
    return PackedSequence(
        qkv_format="thd",
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_kv=cu_seqlens,
        max_seqlen_q=bound,
        max_seqlen_kv=bound,
        angle=angle,
        cos=angle.cos(),
        sin=angle.sin(),
        lengths=layout.lengths[:samples],
        slot=slot,
        block=block,
    )


def _rounded_up(length: int) -> int:
    """A bound on lengths that takes few values, eight for each doubling: fused kernels are planned anew for each."""
    step = max(64, 1 << max(0, length.bit_length() - 4))
    return -(-length // step) * step


class PackedSdpaAttention(nn.Module):
    """Core attention of the local layer spec: torch's fused attention on samples filled up to the longest.

    The filling stands behind each sample, so the causal mask alone keeps it out of every token's sight. The padding
    sample takes no part, so its length changes nothing; its output is zero.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        cp_comm_type: str | None = None,
        softmax_scale: float | None = None,
        pg_collection: ProcessGroupCollection | None = None,
    ) -> None:
        super().__init__()
        self.scale = softmax_scale or 1.0 / math.sqrt(config.kv_channels)

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSequence | None = None,
    ) -> Tensor:
        """Attend.

        Args:
            query: ``[S, h, d]``.
            key: ``[S, g, d]``.
            value: ``[S, g, d]``.
            attention_mask: not used; the pack says what sees what.
            attn_mask_type: not used.
            attention_bias: not used.
            packed_seq_params: the pack.

        Returns:
            ``[S, h * d]``.
        """
        pack = packed_seq_params
        _, cos, sin = rotation(pack)
        query, key = rotate(query, cos, sin), rotate(key, cos, sin)
        if pack is None or pack.slot is None:
            raise ValueError("attention needs the places of tokens in their samples: build them with packed_sequence()")
        samples, longest = len(pack.lengths), max(pack.lengths)
        repeat = query.shape[1] // key.shape[1]
        if repeat > 1:
            key, value = (x.repeat_interleave(repeat, dim=1) for x in (key, value))
        q, k, v = (self._spread(x, pack.slot, samples, longest) for x in (query, key, value))
        mask = None if pack.block is None else _visible(pack.block)
        out = nn.functional.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=self.scale
        )
        out = out.transpose(1, 2).reshape(samples * longest, -1)
        out = out if samples == 1 else out.index_select(0, pack.slot)
        padding = query.shape[0] - out.shape[0]
        return torch.cat([out, out.new_zeros(padding, out.shape[1])]) if padding else out

    @staticmethod
    def _spread(x: Tensor, slot: Tensor, samples: int, longest: int) -> Tensor:
        """``[S, h, d] -> [B, h, L, d]`` with zeros behind each sample."""
        x = x[: slot.numel()]
        if samples > 1:
            x = x.new_zeros(samples * longest, *x.shape[1:]).index_copy(0, slot, x)
        return x.view(samples, longest, *x.shape[1:]).transpose(1, 2)


def _visible(block: Tensor) -> Tensor:
    """``[B, 1, L, L]`` bool: earlier tokens, and those of the same block."""
    length = block.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=block.device).tril()
    same = (block[:, :, None] == block[:, None, :]) & (block >= 0)[:, :, None]
    return (causal | same)[:, None]
