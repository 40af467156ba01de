"""Which modules a decoder layer is made of. The code above the spec is the same for all of them."""

from __future__ import annotations

from functools import cache
from importlib import import_module

import torch
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
    """The spec of a layer, ``local`` or ``te``: what `resolve_layers` gives."""
    if layers == "te":
        from megatron_elva.model.te_spec import te_layer_spec

        return te_layer_spec()
    return local_layer_spec()


def resolve_layers(layers: str, device: str, mask: str = "causal", fp8: str | None = None, dtype: str = "bf16") -> str:
    """Which layers the config's ``layers`` means here.

    Args:
        layers: ``local``, ``te`` or ``auto``: ``te`` where it can run, else ``local``.
        device: ``cuda`` or ``cpu``.
        mask: the model's attention mask.
        fp8: the FP8 recipe, which needs ``te``; None without one.
        dtype: of the weights, ``bf16`` or ``fp32``.

    Returns:
        ``local`` or ``te``.

    Raises:
        ConfigError: what is asked for cannot run here.
    """
    if layers == "local" and fp8 is None:
        return "local"
    why = "layers=local" if layers == "local" else _te_cannot_run(device, mask, dtype)
    if why is None:
        return "te"
    if layers == "te":
        raise ConfigError(f"layers=te: {why}; or layers=local")
    if fp8 is not None:
        raise ConfigError(f"precision.fp8={fp8}: needs Transformer Engine layers: {why}; or precision=bf16")
    return "local"


def _te_cannot_run(device: str, mask: str, dtype: str) -> str | None:
    if device != "cuda":
        return f"Transformer Engine needs device=cuda, not device={device}"
    if mask != "causal":
        return f"its fused attention over packs is causal, not model.attention_mask={mask}"
    if dtype != "bf16":  # it would fall back to attention that writes all scores out
        return f"its fused attention takes bf16, not precision.dtype={dtype}"
    return transformer_engine_missing()


@cache
def transformer_engine_missing() -> str | None:
    """Why Transformer Engine's layers cannot run on this machine, in one line; None where they can."""
    if not torch.cuda.is_available():
        return "no GPU is visible"
    try:
        import_module("transformer_engine.pytorch")  # the package itself would swallow the error of a part
    except (ImportError, OSError, RuntimeError) as error:  # a library that it loads may be missing or too old
        reason = " ".join(str(error).split())
        return f"it cannot be imported ({reason[:200]}); `megatron-elva doctor` says what is missing"
    return None
