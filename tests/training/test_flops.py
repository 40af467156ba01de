"""Counted operations against torch's own counter on the real model."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_elva.config.schema import Config, ModelConfig
from megatron_elva.layout import IGNORE, Pack, PackSpec, SampleSpec, VideoSpec
from megatron_elva.training.flops import (
    decoder_flops,
    forward_flops,
    layer_matmul_parameters,
    patch_embedding_flops,
    peak_tflops,
    training_flops,
)
from tests.builders import fill, small_config, small_model
from tests.distributed import run_distributed

VOCAB = 96


def measured(config: Config, packs: list[Pack]) -> dict:
    """Operations that torch counts in a forward pass with losses, and the weights of a layer's matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_elva.model.inputs import prepare
    from megatron_elva.parallel.engine import build_chunks
    from megatron_elva.parallel.ranks import start

    ranks = start(config.parallel, "cpu", config.seed)
    (model,) = build_chunks(config, VOCAB, ranks)
    totals = []
    # the unfused attention is made of matrix products that the counter knows, masked or not
    with sdpa_kernel(SDPBackend.MATH):
        for pack in packs:
            counter = FlopCounterMode(display=False)
            inputs = prepare(pack, config.model, "cpu")
            with counter:
                model(inputs)
            totals.append(counter.get_total_flops())
    layer = sum(p.numel() for n, p in model.decoder.layers[0].named_parameters() if p.ndim == 2)
    return {"totals": totals, "layer": layer}


def packs_of(model: ModelConfig) -> list[Pack]:
    """Text alone; one video; samples of unequal lengths with videos of unequal grids."""
    video, still = VideoSpec.uniform(3, 4, 5), VideoSpec(((2, 3), (5, 1)), (0, 1, 0))
    specs = [
        PackSpec((SampleSpec((50,)),)),
        PackSpec((SampleSpec((5, video, 7)),)),
        PackSpec((SampleSpec((5, video)), SampleSpec((9,)), SampleSpec((2, still, 2, video)))),
    ]
    return [fill(spec, model, seed) for seed, spec in enumerate(specs)]


def what_the_counter_adds(model: ModelConfig, spec: PackSpec) -> float:
    """Operations that the counter sees and the convention leaves out.

    The decoder's attention runs on B samples padded to the longest (L), all ``L * L`` scores of each, where the
    convention counts the ``n * n / 2`` that causality leaves; the patch embedding's attention runs on groups padded to
    the largest.
    """
    lengths = [s.tokens for s in spec.samples]
    scores = len(lengths) * max(lengths) ** 2 - sum(n * n / 2 for n in lengths)
    extra = model.layers * 4 * scores * model.heads * model.head_dim
    if model.patch_embedding == "cross_attention":
        grids = [grid for v in spec.videos for grid in v.frame_grids]
        for sizes in ([h * w for h, w in grids], [w for h, w in grids for _ in range(h)]):
            seen = len(sizes) * max(sizes, default=0) - sum(sizes)
            extra += 4 * seen * model.patch_width
    return extra


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"patch_embedding": "naive", "tied_head": False},
        {"kv_heads": 1, "cell_reduction": 2, "ffn_hidden": 80, "layers": 3},
    ],
    ids=["small", "naive-untied", "one-kv-head"],
)
def test_a_forward_pass_costs_what_torch_counts(changes):
    model = small_model(**changes)
    packs = packs_of(model)
    (result,) = run_distributed(measured, 1, small_config(model), packs)
    assert result["layer"] == layer_matmul_parameters(model)
    for pack, total in zip(packs, result["totals"], strict=True):
        # cells are averaged before their projection, and so the counter sees one product for each cell
        counted = forward_flops(model, VOCAB, pack.spec, int((pack.labels != IGNORE).sum()))
        assert counted + what_the_counter_adds(model, pack.spec) == pytest.approx(total, rel=0.01)
        assert counted > 0.5 * total  # what is reconciled is a correction, not the bulk


def test_padding_and_positions_without_loss_cost_nothing():
    model = small_model()
    spec = PackSpec((SampleSpec((30, VideoSpec.uniform(2, 3, 3))),))
    assert forward_flops(model, VOCAB, replace(spec, padding=50), 10) == forward_flops(model, VOCAB, spec, 10)
    one = forward_flops(model, VOCAB, spec, 11) - forward_flops(model, VOCAB, spec, 10)
    assert one == 2 * model.hidden * VOCAB


def test_training_costs_three_forward_passes():
    model, spec = small_model(), PackSpec((SampleSpec((30,)),))
    assert training_flops(model, VOCAB, spec, 9) == 3 * forward_flops(model, VOCAB, spec, 9)


def test_attention_is_causal_and_stays_in_its_sample():
    model = small_model()
    products = 2 * layer_matmul_parameters(model)
    assert decoder_flops(model, [100]) - products * 100 == 4 * (100 * 100 / 2) * model.hidden
    together, apart = decoder_flops(model, [100]), decoder_flops(model, [50, 50])
    assert together - apart == 4 * 2500 * model.hidden


def test_text_alone_pays_the_two_queries_of_the_patch_embedding_at_most():
    model = small_model()
    spec = PackSpec((SampleSpec((30,)),))
    # each of FRAME and LINE: its query, and the query's product with the key weights
    assert patch_embedding_flops(model, spec) == 2 * 2 * 2 * model.patch_width**2
    assert patch_embedding_flops(small_model(patch_embedding="naive"), spec) == 0


@pytest.mark.parametrize(
    ("device", "fp8", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", False, 989.0),
        ("NVIDIA H100 80GB HBM3", True, 1978.0),
        ("NVIDIA H200", True, 1978.0),
        ("NVIDIA A100-SXM4-80GB", False, 312.0),
        ("NVIDIA A100-SXM4-80GB", True, 312.0),  # has no FP8
        ("cpu", False, None),
    ],
)
def test_peaks(device, fp8, peak):
    assert peak_tflops(device, fp8) == peak
