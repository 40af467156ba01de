"""Estimates against known totals."""

from __future__ import annotations

import dataclasses

import pytest

from megatron_elva.config.compose import compose
from megatron_elva.training import estimate


@pytest.mark.parametrize(("name", "total"), [("elva_1_5b", 1_543_714_304), ("elva_7b", 7_615_616_512)])
def test_language_model_parameters(name, total):
    model = compose([f"model={name}"]).model
    assert estimate.language_model_parameters(model, model.vocab_size) == total


def test_patch_embedding_parameters():
    model = compose(["model=elva_7b"]).model
    assert estimate.patch_embedding_parameters(model) == 9_003_008
    naive = dataclasses.replace(model, patch_embedding="naive")
    assert estimate.patch_embedding_parameters(naive) == 602_112 + 2_048
    assert estimate.projector_parameters(model) == 1024 * 3584 + 3584


def test_rank_parameters_add_up():
    config = compose(["model=elva_7b", "parallel.tensor=1", "parallel.pipeline=2"])
    whole = estimate.language_model_parameters(config.model, 152_064) + 9_003_008 + 1024 * 3584 + 3584
    assert sum(estimate.rank_parameters(config, 152_064)) == whole
    tied = compose(["model=elva_1_5b", "parallel.pipeline=2"])
    first, last = estimate.rank_parameters(tied, 151_936)
    words = 151_936 * 1536
    assert (
        first - estimate.patch_embedding_parameters(tied.model) - estimate.projector_parameters(tied.model)
        == last - 1536
    )
    assert first > words


def test_tensor_parallelism_splits_all_but_norms():
    model = compose(["model=elva_7b"]).model
    split = estimate.layer_parameters(model, 4)
    assert split * 4 - estimate.layer_parameters(model) == 3 * 2 * model.hidden


def test_tokens():
    config = compose([])
    assert estimate.frame_tokens(config) == 157  # 336 x 336 at cells of 28 pixels
    assert estimate.frame_tokens(compose(["data.max_pixels=null"])) == 157
    assert estimate.frame_tokens(compose(["data.max_pixels=100"])) == 3
    pack = estimate.pack_estimate(compose(["nodes=16"]))
    assert (pack.samples, pack.visual, pack.text) == (1, 16 * 157, 1024)
    budget = estimate.pack_estimate(compose(["nodes=16", "data.pack_tokens=8192"]))
    assert (budget.samples, budget.tokens) == (None, 8192)


def test_budgets_and_pooling_lower_the_tokens_of_the_layers_behind_them():
    # 16 frames of 12 x 12 cells with a FRAME and 12 LINEs, 1,024 text tokens
    whole, other = 16 * 157 + 1024, 16 * 13 + 1024

    def layers(*overrides):
        return estimate.layer_tokens(compose(["nodes=16", *overrides]))

    assert layers("merging=none") == [whole] * 28
    # keep 40% after layer 2 of 28 and 20% after layer 5: 922 and 461 of 2,304 cells
    assert layers("merging=fast") == [whole] * 2 + [other + 922] * 3 + [other + 461] * 23
    # a threshold may remove nothing, the budget after layer 7 halves
    assert layers("merging=paper") == [whole] * 7 + [other + 1152] * 21
    # one frame never merges, and images may fill a token budget
    assert layers("merging=fast", "data.frames=1") == [157 + 1024] * 28
    assert layers("merging=fast", "data.pack_tokens=8192") == [8192] * 28
    assert layers("merging=pooling", "data.frames=5") == [3 * 157 + 1024] * 28  # windows of 2: 2, 2 and 1


def test_layers_of_a_pipeline_rank():
    config = compose(["nodes=16", "parallel.pipeline=2"])
    assert [estimate.rank_layers(config, rank) for rank in (0, 1)] == [list(range(14)), list(range(14, 28))]
    chunks = compose(["nodes=16", "parallel.pipeline=2", "parallel.virtual_pipeline=7"])
    assert estimate.rank_layers(chunks, 1)[:5] == [2, 3, 6, 7, 10]


@pytest.mark.parametrize("recompute", ["true", "false"])
def test_merging_lowers_activations_where_it_has_happened(recompute):
    def activations(rank, *overrides):
        overrides = ["nodes=16", "parallel.pipeline=2", f"train.recompute={recompute}", *overrides]
        return estimate.activation_bytes(compose(overrides), 152_064, rank)

    for rank in (0, 1):
        whole = activations(rank, "merging=none")
        assert activations(rank, "merging=fast") < activations(rank, "merging=paper") < whole
        assert activations(rank, "merging=pooling") < whole
    # the second rank has nothing but layers behind the last point
    logits = 1024 * (152_064 // 4) * 6
    fast, none = (activations(1, f"merging={name}", "parallel.tensor=4") - logits for name in ("fast", "none"))
    assert fast / none == pytest.approx((16 * 13 + 1024 + 461) / (16 * 157 + 1024))
    # a threshold promises nothing
    point = "merging.points=[{after: 2, rule: threshold, tau: 0.6}]"
    assert activations(1, "merging=paper", point) == activations(1, "merging=none")


def test_memory_of_weights_and_optimizer():
    config = compose(["model=elva_1_5b"])
    size = estimate.rank_parameters(config, 151_936)[0]
    memory = estimate.memory_estimate(config, 151_936)
    assert (memory.weights, memory.gradients, memory.optimizer) == (2 * size, 4 * size, 12 * size // 8)
    fp32 = estimate.memory_estimate(compose(["model=elva_1_5b", "precision=fp32"]), 151_936)
    assert (fp32.weights, fp32.gradients, fp32.optimizer) == (4 * size, 4 * size, 8 * size // 8)


def test_activations_move_as_they_should():
    def activations(*overrides):
        return estimate.memory_estimate(compose(["nodes=16", *overrides]), 152_064).activations

    plain = activations()
    assert activations("train.recompute=true") < plain / 3
    assert activations("parallel.sequence=false") > plain
    assert activations("data.frames=32") > 1.5 * plain
    # 1F1B holds as many packs on the first of two pipeline ranks as there are ranks, of half the layers each
    deeper = compose(["nodes=16", "parallel.pipeline=4", "train.accumulate=32"])
    assert estimate.activation_bytes(deeper, 152_064, 0) > estimate.activation_bytes(deeper, 152_064, 2)
    chunks = ["parallel.virtual_pipeline=7"]
    assert plain < activations(*chunks) < 1.2 * plain


def test_vocabulary():
    tiny, big = compose(["model=tiny"]).model, compose(["model=elva_7b"]).model
    assert estimate.vocabulary(tiny, 100) == 128
    assert estimate.vocabulary(tiny, 128) == 128
    assert estimate.vocabulary(tiny) is None
    assert estimate.vocabulary(big, 100) == 152_064
