"""Floating-point operations of a pack, from the real lengths of its samples.

Convention: a multiply-add is two operations; attention is causal, so a sample of n tokens costs n^2 / 2 scores for each
attention head; the output layer is counted where a loss is taken, as it is computed nowhere else; the backward pass
costs twice the forward pass; padding and recomputation are not counted.
"""

from __future__ import annotations

from megatron_elva.config.schema import ModelConfig
from megatron_elva.layout import PackSpec

CONVENTION = "causal attention, backward = 2 x forward, head at loss positions, no recomputation"
PEAK_TFLOPS = {"H100 PCIe": 756.0, "H100 NVL": 835.0, "H100": 989.0, "H200": 989.0, "H800": 989.0, "A100": 312.0}
"""Dense bf16 peak by device name, longer names first (NVIDIA data sheets, without sparsity; SXM unless named).

FP8 on Hopper: twice that.
"""


def layer_matmul_parameters(model: ModelConfig) -> int:
    """Weights of one decoder layer that take part in a matrix product for every token."""
    d, h = model.head_dim, model.hidden
    return h * d * (model.heads + 2 * model.kv_heads) + d * model.heads * h + 3 * h * model.ffn_hidden


def decoder_flops(model: ModelConfig, lengths: list[int]) -> float:
    """Forward operations of one decoder layer on samples of the given lengths."""
    attention = sum(4 * (n * n / 2) * model.heads * model.head_dim for n in lengths)
    return 2.0 * layer_matmul_parameters(model) * sum(lengths) + attention


def patch_embedding_flops(model: ModelConfig, spec: PackSpec) -> float:
    """Forward operations of patch embedding and projector."""
    c = model.patch_width
    cells = sum(v.cells for v in spec.videos)
    frames = sum(v.frames for v in spec.videos)
    rows = sum(h for v in spec.videos for h, _ in v.frame_grids)
    total = 2.0 * cells * model.patch_values * c + 2.0 * (cells + frames + rows) * c * model.hidden
    if model.patch_embedding == "cross_attention":
        by_head = 2.0 * cells * model.patch_heads * c
        # both FRAME and LINE: scores of all cells and sums over them by head, the query and its product with the keys
        total += 2 * (2 * by_head + 2 * 2.0 * c * c)
        # values and output of each group
        total += 2 * 2.0 * (frames + rows) * c * c
    return total


def forward_flops(model: ModelConfig, vocab: int, spec: PackSpec, loss_positions: int) -> float:
    """Forward operations of a whole pack."""
    lengths = [s.tokens for s in spec.samples]
    head = 2.0 * model.hidden * vocab * loss_positions
    return model.layers * decoder_flops(model, lengths) + patch_embedding_flops(model, spec) + head


def training_flops(model: ModelConfig, vocab: int, spec: PackSpec, loss_positions: int) -> float:
    """Forward and backward operations of a whole pack."""
    return 3 * forward_flops(model, vocab, spec, loss_positions)


def peak_tflops(device_name: str, fp8: bool) -> float | None:
    """Dense peak of a device in TFLOP/s; None where it is not known."""
    for name, peak in PEAK_TFLOPS.items():
        if name in device_name:
            return peak * (2 if fp8 and name.startswith("H") else 1)
    return None
