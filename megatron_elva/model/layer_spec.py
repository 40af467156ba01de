"""Which modules a decoder layer is made of. The code above the spec is the same for all of them."""

from __future__ import annotations

from megatron.core.fusions.fused_bias_dropout import get_bias_dropout_add
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.attention import SelfAttention, SelfAttentionSubmodules
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.mlp import MLP, MLPSubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayer, TransformerLayerSubmodules

from megatron_elva.config.errors import ConfigError
from megatron_elva.model.attention import PackedSdpaAttention
from megatron_elva.model.norm import RMSNorm


def local_layer_spec() -> ModuleSpec:
    """A Qwen2 layer of plain torch modules: runs on any device.

    Checkpoints name the norms as Transformer Engine's fused norm-linear does, so both specs read the same files.
    """
    return ModuleSpec(
        module=TransformerLayer,
        submodules=TransformerLayerSubmodules(
            input_layernorm=RMSNorm,
            self_attention=ModuleSpec(
                module=SelfAttention,
                params={"attn_mask_type": AttnMaskType.causal},
                submodules=SelfAttentionSubmodules(
                    linear_qkv=ColumnParallelLinear,
                    core_attention=PackedSdpaAttention,
                    linear_proj=RowParallelLinear,
                ),
            ),
            self_attn_bda=get_bias_dropout_add,
            pre_mlp_layernorm=RMSNorm,
            mlp=ModuleSpec(
                module=MLP,
                submodules=MLPSubmodules(linear_fc1=ColumnParallelLinear, linear_fc2=RowParallelLinear),
            ),
            mlp_bda=get_bias_dropout_add,
            sharded_state_dict_keys_map={
                "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
                "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
            },
        ),
    )


def layer_spec(layers: str) -> ModuleSpec:
    """The spec that the config's ``layers`` asks for.

    Raises:
        ConfigError: for ``te``, whose place is here and which is not built yet.
    """
    if layers == "te":
        raise ConfigError(
            "layers=te: the Transformer Engine spec is not built yet; allowed: layers=local or layers=auto"
        )
    return local_layer_spec()
