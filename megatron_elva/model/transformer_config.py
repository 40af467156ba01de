"""Qwen2's sizes and the parallel layout as megatron-core's `TransformerConfig`."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_elva.config.schema import Config

_RECIPES = {"delayed": "delayed", "current": "tensorwise", "blockwise": "blockwise"}
"""Our names of FP8 recipes to megatron-core's."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


def transformer_config(config: Config) -> TransformerConfig:
    """Translate the config tree; what is not named here keeps megatron-core's default."""
    model, parallel = config.model, config.parallel
    dtype, on_gpu = DTYPES[config.precision.dtype], config.device == "cuda"
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden,
        ffn_hidden_size=model.ffn_hidden,
        num_attention_heads=model.heads,
        num_query_groups=model.kv_heads,
        kv_channels=model.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_eps,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=True,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        # weights.py draws every weight again from its global name, so that none depends on the layout; megatron-core's
        # own drawing is left on because it also marks which dimension of a weight is split
        perform_initialization=True,
        use_cpu_initialization=not on_gpu,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        bf16=dtype is torch.bfloat16,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if parallel.interleaved else None,
        sequence_parallel=parallel.sequence and parallel.tensor > 1,
        variable_seq_lengths=parallel.pipeline > 1 and parallel.carrier == "rows",
        # megatron-core takes variable lengths only with this dispatcher, dense model or not
        moe_token_dispatcher_type="alltoall",
        # validate.py refuses what is known to corrupt data
        overlap_p2p_comm=parallel.overlaps_p2p,
        batch_p2p_comm=not parallel.overlaps_p2p,
        deallocate_pipeline_outputs=parallel.deallocates_outputs,
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=on_gpu,
        bias_activation_fusion=on_gpu,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        attention_softmax_in_fp32=True,
        deterministic_mode=False,
        **_fp8(config.precision.fp8),
    )


def _fp8(recipe: str | None) -> dict[str, Any]:
    """megatron-core's fields of a recipe; ``delayed`` looks back as far as Transformer Engine itself does."""
    if recipe is None:
        return {}
    fields: dict[str, Any] = {"fp8": "e4m3" if recipe == "blockwise" else "hybrid", "fp8_recipe": _RECIPES[recipe]}
    if recipe == "delayed":
        fields |= {"fp8_amax_history_len": 1024, "fp8_amax_compute_algo": "max"}
    return fields
