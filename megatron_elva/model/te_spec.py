"""Decoder layers of Transformer Engine. Imported only where they are used: it needs Transformer Engine and a GPU."""

from __future__ import annotations

from collections.abc import Iterable
from importlib import import_module

from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.models.common.embeddings.rope_utils import fused_apply_rotary_pos_emb
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_elva.model.attention import PackedSequence, rotation


class PackedTeAttention(TEDotProductAttention):
    """Fused attention over the samples of a pack (``thd``), with rotation by per-token positions.

    The padding sample is a sample like others here: the last one, which no loss looks at.
    """

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
            attn_mask_type: not used; causal.
            attention_bias: not used.
            packed_seq_params: the pack.

        Returns:
            ``[S, h * d]``.
        """
        angle, _, _ = rotation(packed_seq_params)
        # one kernel, in fp32; as a batch of one sequence the pack has an angle of its own for each token
        query, key = (fused_apply_rotary_pos_emb(x[:, None], angle[:, None, None])[:, 0] for x in (query, key))
        return super().forward(
            query, key, value, None, attn_mask_type=AttnMaskType.causal, packed_seq_params=packed_seq_params
        )


def te_layer_spec() -> ModuleSpec:
    """A Qwen2 layer with norm and projection in one module, which FP8 recipes apply to, and fused attention.

    Its parameters have the names that checkpoints use; `local_layer_spec` maps its own to them.
    """
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=IdentityOp,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=TELayerNormColumnParallelLinear,
                    core_attention=PackedTeAttention,
                    linear_proj=TERowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=IdentityOp,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=TELayerNormColumnParallelLinear, linear_fc2=TERowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
        ),
    )


def release_fp8(models: Iterable[nn.Module]) -> None:
    """Give back FP8 copies of weights and this process's scales; nothing can be computed with the models afterwards."""
    for model in models:
        for module in model.modules():
            getattr(module, "_fp8_workspaces", {}).clear()
    import_module("transformer_engine.pytorch.fp8").FP8GlobalStateManager.reset()
