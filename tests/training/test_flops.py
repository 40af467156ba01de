"""Counted operations against torch's own counter on the real model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from benchmarks.packs import video_pack
from megatron_elva.config.compose import compose
from megatron_elva.config.schema import Config, MergePoint, MergingConfig, ModelConfig, ParallelConfig
from megatron_elva.layout import IGNORE, Pack, PackSpec, SampleSpec, VideoSpec
from megatron_elva.training.flops import (
    decoder_flops,
    ends_flops,
    forward_flops,
    layer_groups_flops,
    layer_matmul_parameters,
    merged_groups,
    patch_embedding_flops,
    peak_tflops,
    training_flops,
)
from tests.builders import fill, small_config, small_model
from tests.distributed import run_distributed

VOCAB = 96


def measured(config: Config, packs: list[Pack]) -> dict[str, Any]:
    """What torch counts in a forward pass with losses, layer groups, and the weights of a layer's matrix products."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_elva.model.inputs import prepare
    from megatron_elva.parallel.engine import build_chunks
    from megatron_elva.parallel.ranks import start

    ranks = start(config.parallel, "cpu", config.seed)
    (model,) = build_chunks(config, VOCAB, ranks)
    totals, groups = [], []
    # the unfused attention is made of matrix products that the counter knows, masked or not
    with sdpa_kernel(SDPBackend.MATH):
        for pack in packs:
            counter = FlopCounterMode(display=False)
            inputs = prepare(pack, config, "cpu")
            model.decoder.trace.clear()
            with counter:
                model(inputs)
            totals.append(counter.get_total_flops())
            groups.append(list(model.decoder.trace.layers))
    layer = sum(p.numel() for n, p in model.decoder.layers[0].named_parameters() if p.ndim == 2)
    return {"totals": totals, "groups": groups, "layer": layer}


def packs_of(model: ModelConfig) -> list[Pack]:
    """Text alone; one video; samples of unequal lengths with videos of unequal grids."""
    video, still = VideoSpec.uniform(3, 4, 5), VideoSpec(((2, 3), (5, 1)), (0, 1, 0))
    specs = [
        PackSpec((SampleSpec((50,)),)),
        PackSpec((SampleSpec((5, video, 7)),)),
        PackSpec((SampleSpec((5, video)), SampleSpec((9,)), SampleSpec((2, still, 2, video)))),
    ]
    return [fill(spec, model, seed) for seed, spec in enumerate(specs)]


def what_the_counter_adds(model: ModelConfig, spec: PackSpec, groups: Sequence[tuple[int, Sequence[int]]]) -> float:
    """Operations that the counter sees and the convention leaves out.

    The decoder's attention runs on B samples padded to the longest (L), all ``L * L`` scores of each, where the
    convention counts the ``n * n / 2`` that causality leaves; the patch embedding's attention runs on groups padded to
    the largest.
    """
    scores = sum(
        layers * (len(lengths) * max(lengths) ** 2 - sum(n * n / 2 for n in lengths)) for layers, lengths in groups
    )
    extra = 4 * scores * model.heads * model.head_dim
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
    for pack, total, groups in zip(packs, result["totals"], result["groups"], strict=True):
        # cells are averaged before their projection, and so the counter sees one product for each cell
        counted = forward_flops(model, VOCAB, pack.spec, int((pack.labels != IGNORE).sum()))
        assert counted + what_the_counter_adds(model, pack.spec, groups) == pytest.approx(total, rel=0.01)
        assert counted > 0.5 * total  # what is reconciled is a correction, not the bulk


def half(after: float) -> MergePoint:
    return MergePoint(after=after, rule="budget", keep=0.5)


MERGING = {
    "threshold-and-budget": MergingConfig(
        kind="hierarchical", points=[MergePoint(after=1, rule="threshold", tau=0.9), half(2)]
    ),
    "budgets": MergingConfig(kind="hierarchical", points=[half(1), MergePoint(after=3, rule="budget", keep=0.25)]),
    "two-at-one-place": MergingConfig(
        kind="hierarchical", points=[MergePoint(after=1, rule="threshold", tau=0.9), half(1)]
    ),
    "pooling": MergingConfig(kind="pooling"),
}


def alone(name: str, merging: MergingConfig, **changes: Any) -> Config:
    """A shipped model in one process, with a small vocabulary."""
    config = compose([f"model={name}", "cluster=local", "device=cpu", "precision=fp32"])
    parallel = ParallelConfig(tensor=1, pipeline=1, sequence=False)
    model = replace(config.model, vocab_size=VOCAB, **changes)
    return replace(config, model=model, merging=merging, parallel=parallel)


def check(config: Config, pack: Pack, total: float, groups: list[tuple[int, tuple[int, ...]]]) -> None:
    """Groups and ends of a pack that ran, with what the counter adds, against what it counted."""
    model, spec = config.model, pack.spec
    spec = spec.pooled(config.merging.pooling.window) if config.merging.kind == "pooling" else spec
    ends = ends_flops(model, VOCAB, spec, int((pack.labels != IGNORE).sum()))
    assert sum(layers for layers, _ in groups) == model.layers
    counted = layer_groups_flops(model, groups) + ends
    assert counted + what_the_counter_adds(model, spec, groups) == pytest.approx(total, rel=0.01)
    assert counted < 0.95 * forward_flops(model, VOCAB, pack.spec, int((pack.labels != IGNORE).sum()))
    if len(spec.samples) == 1:  # nothing is padded then, so that counting every score is all there is to reconcile
        assert layer_groups_flops(model, groups, "full") + ends == pytest.approx(total, rel=0.01)


@pytest.mark.parametrize("merging", MERGING.values(), ids=MERGING)
def test_merging_costs_what_torch_counts(merging):
    config = alone("tiny", merging)
    demo, single = (video_pack(config.model, n, frames=6, grid=4, text=20, vocab=VOCAB, seed=n) for n in (5, 1))
    still = VideoSpec(((2, 3), (5, 1)), (0, 1, 0, 0))
    mixed = fill(
        PackSpec((SampleSpec((5, VideoSpec.uniform(6, 4, 4))), SampleSpec((9,)), SampleSpec((2, still, 2)))),
        config.model, 3,
    )  # fmt: skip
    packs = [demo, single, mixed]
    (result,) = run_distributed(measured, 1, config, packs)
    for pack, total, groups in zip(packs, result["totals"], result["groups"], strict=True):
        check(config, pack, total, groups)
    if merging.points and merging.points[0].rule == "threshold":
        # it merged some links and not all, so these lengths are none that the config alone could have given
        before, after = 5 * 6 * 16, 5 * 6 * 16 - (sum(demo.spec.lengths) - sum(result["groups"][0][-1][1]))
        assert 5 * 16 < after < before


@pytest.mark.slow
def test_a_slice_of_the_7b_model_costs_what_torch_counts():
    merging = MergingConfig(kind="hierarchical", points=[half(1)])
    config = alone("elva_7b", merging, layers=2)
    model = config.model
    pack = video_pack(model, samples=1, frames=8, grid=12, text=64, vocab=VOCAB, seed=0)
    (result,) = run_distributed(measured, 1, config, [pack])
    assert result["layer"] == layer_matmul_parameters(model)
    (groups,) = result["groups"]
    assert groups == merged_groups(model, merging, pack.spec) == [(1, (1320,)), (1, (1320 - 576,))]
    check(config, pack, result["totals"][0], groups)


def test_groups_known_beforehand_are_those_that_run():
    config = alone("tiny", MERGING["budgets"])
    packs = packs_of(config.model)
    (result,) = run_distributed(measured, 1, config, packs)
    for pack, groups in zip(packs, result["groups"], strict=True):
        assert merged_groups(config.model, config.merging, pack.spec) == groups


def test_groups_with_an_assumed_threshold():
    model = small_model()
    spec = PackSpec((SampleSpec((5, VideoSpec.uniform(10, 4, 5), 7)), SampleSpec((9, VideoSpec.uniform(1, 4, 5)))))
    other, still = 12 + 10 * 5, 9 + 25  # text, FRAMEs and LINEs; one frame never merges
    merging = MERGING["threshold-and-budget"]

    def lengths(kept):
        return merged_groups(model, merging, spec, kept)

    assert lengths(1.0) == [(1, (other + 200, still)), (1, (other + 200, still)), (2, (other + 100, still))]
    assert lengths(0.8) == [(1, (other + 200, still)), (1, (other + 160, still)), (2, (other + 100, still))]
    assert lengths(0.3) == [(1, (other + 200, still)), (1, (other + 60, still)), (2, (other + 60, still))]
    # one token for each of the 20 places at least
    assert lengths(0.01)[-1] == (2, (other + 20, still))
    with pytest.raises(ValueError, match="threshold_kept"):
        lengths(None)
    # of two points at one place no layer sees what lies between
    together = merged_groups(model, MERGING["two-at-one-place"], spec, 0.8)
    assert together == [(1, (other + 200, still)), (3, (other + 100, still))]
    pooled = merged_groups(model, MERGING["pooling"], spec)
    assert pooled == [(4, (12 + 5 * 25, still))]


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


def test_the_patch_embedding_counts_rows_and_frames_of_all_classes():
    video = VideoSpec(((2, 3), (5, 1)), (0, 1, 0))
    model = small_model(patch_embedding="naive")
    # 6 + 5 + 6 cells, 3 FRAMEs, 2 + 5 + 2 LINEs; 48 values a patch, C = 16, H = 32
    assert patch_embedding_flops(model, PackSpec((SampleSpec((4, video)),))) == 2 * 17 * 48 * 16 + 2 * 29 * 16 * 32


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
