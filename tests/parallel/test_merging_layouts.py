"""Merging at every layout against one process with the same weights: merge index, losses, gradients."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_elva.config.schema import Config, MergePoint, MergingConfig, ParallelConfig, PrecisionConfig
from megatron_elva.layout import IGNORE, Pack, PackSpec, SampleSpec, VideoSpec
from megatron_elva.model.inputs import prepare
from tests.builders import fill, small_config, small_model
from tests.distributed import run_distributed
from tests.parallel.test_engine import engine_of, whole

LAYERS = 8


def layout(tensor: int = 1, pipeline: int = 1, sequence: bool = False, **more: Any) -> ParallelConfig:
    return ParallelConfig(tensor=tensor, pipeline=pipeline, sequence=sequence, **more)


CASES: dict[str, tuple[ParallelConfig, dict[str, Any]]] = {
    "tp2": (layout(2), {}),
    "tp2sp": (layout(2, sequence=True), {}),
    "tp2sp-recompute": (layout(2, sequence=True), {"recompute": True}),
    "pp2": (layout(pipeline=2), {}),
    "pp2-fixed": (layout(pipeline=2, carrier="fixed"), {}),
    "pp2-recompute": (layout(pipeline=2), {"recompute": True}),
    "pp4": (layout(pipeline=4), {}),
    "pp4-fixed": (layout(pipeline=4, carrier="fixed"), {}),
    "pp2vp2": (layout(pipeline=2, virtual_pipeline=2), {}),
    "pp2vp2-fixed": (layout(pipeline=2, virtual_pipeline=2, carrier="fixed"), {}),
    "pp4vp2": (layout(pipeline=4, virtual_pipeline=2), {}),
    "tp2pp2": (layout(2, 2), {}),
    "tp2pp2sp": (layout(2, 2, True), {}),
    "tp2pp2sp-fixed": (layout(2, 2, True, carrier="fixed"), {}),
    "tp2pp2sp-recompute": (layout(2, 2, True), {"recompute": True}),
    "tp2pp2vp2sp": (layout(2, 2, True, virtual_pipeline=2), {}),
}
SCHEDULES = {
    # on 4 pipeline ranks of 2 layers: two points on the first rank (the second of them at its boundary), none on the
    # second, one between the layers of the third, none on the last
    "mixed": [
        MergePoint(after=1.0, rule="threshold", tau=0.3),
        MergePoint(after=2.0, rule="budget", keep=0.7),
        MergePoint(after=5.0, rule="budget", keep=0.45),
    ],
    # a threshold behind a budget, every point at a boundary, the last one before the last rank
    "boundaries": [
        MergePoint(after=2.0, rule="budget", keep=0.8),
        MergePoint(after=4.0, rule="threshold", tau=0.3),
        MergePoint(after=6.0, rule="budget", keep=0.5),
    ],
    # several after one layer, and counts known beforehand
    "budgets": [
        MergePoint(after=3.0, rule="budget", keep=0.8),
        MergePoint(after=3.0, rule="budget", keep=0.6),
        MergePoint(after=7.0, rule="budget", keep=0.3),
    ],
}


def packs_of(config: Config) -> list[Pack]:
    """Micro-batches of different length: several samples, mixed grids, two resolution classes, text alone."""
    a, b, still = VideoSpec.uniform(6, 2, 3), VideoSpec.uniform(5, 3, 1), VideoSpec.uniform(1, 2, 2)
    hybrid = VideoSpec(((2, 3), (1, 2)), (0, 1, 1, 0, 1, 1, 0))
    specs = [
        PackSpec((SampleSpec((4, a, 5)), SampleSpec((6,)), SampleSpec((2, b, 3, still, 2)))),
        PackSpec((SampleSpec((30,)),)),
        PackSpec((SampleSpec((3, hybrid, 4)),)),
        PackSpec((SampleSpec((2, a, 3, a, 3)), SampleSpec((1, still, 4)))),
    ]
    return [fill(spec.padded_to(config.pad_multiple), config.model, i) for i, spec in enumerate(specs)]


def config_of(schedule: str, parallel: ParallelConfig | None = None, survivor: str = "first", **train: Any) -> Config:
    points = MergingConfig(kind="hierarchical", survivor=survivor, points=SCHEDULES[schedule])
    parallel = parallel or layout()
    ranks = parallel.tensor * parallel.pipeline
    config = small_config(small_model(layers=LAYERS), parallel=parallel, merging=points, tasks_per_node=ranks)
    data = replace(config.data, frames=8, max_pixels=16 * 16, max_text_tokens=24)
    return replace(config, train=replace(config.train, global_batch=8, accumulate=4, **train), data=data)


def merged_step(config: Config, packs: list[Pack]) -> dict[str, Any]:
    """Gradients, loss and merge index of one step; ranks read nothing but what their place in the pipeline needs."""
    from megatron_elva.model.weights import full_shape
    from megatron_elva.parallel.collectives import sum_over_ranks

    engine, ranks = engine_of(config)
    engine.keep_merge_states()
    ends = ranks.is_first or ranks.is_last
    own = [prepare(p, config, "cpu", first=ranks.is_first, last=ranks.is_last) if ends else None for p in packs]
    shards = {name: p for p, name in engine.names.items()}
    got = engine.gradients(own)
    gradients = {n: (g, ranks.tensor, full_shape(n, shards[n], ranks.tensor_size)) for n, g in got.items()}
    index = {(micro, point): state.merge_index() for micro, point, state in engine.merge_indices()}
    engine.set_learning_rate(1.0, False)
    history, lengths = [], []
    for _ in range(2):
        result = engine.train_step(own)
        loss_sum, tokens = sum_over_ranks([result.loss_sum, result.loss_tokens], ranks)
        history.append((loss_sum / tokens, result.grad_norm))
        lengths.append(result.visual_tokens)
    return {
        "gradients": gradients,
        "index": index,
        "history": history,
        "visual": lengths,
        "traffic": engine.traffic,
        "rank": (ranks.pipeline, ranks.tensor, ranks.is_last),
    }


@pytest.fixture(scope="module")
def references() -> dict[tuple[str, str], dict[str, Any]]:
    keys = [(name, survivor) for name in SCHEDULES for survivor in ("first", "last")]
    configs = [config_of(name, survivor=survivor) for name, survivor in keys]
    (results,) = run_distributed(several_steps, 1, configs)
    return dict(zip(keys, results, strict=True))


def several_steps(configs: list[Config]) -> list[dict[str, Any]]:
    return [merged_step(config, packs_of(config)) for config in configs]


def check_index(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Every merge point of every pack was passed on one pipeline rank, alike on its tensor ranks."""
    seen = set()
    for result in results:
        for key, matrices in result["index"].items():
            seen.add(key)
            for got, expected in zip(matrices, reference["index"][key], strict=True):
                assert torch.equal(got, expected), key
    assert seen == reference["index"].keys()


def test_the_schedules_merge_something_and_not_everything(references):
    for name, _ in references:
        for point in range(len(SCHEDULES[name])):
            kept = [m for (_, i), ms in references[name, "first"]["index"].items() if i == point for m in ms]
            share = sum(int(m.sum()) for m in kept) / sum(m.numel() for m in kept)
            assert 0.2 < share < 0.99, (name, point, share)


QUICK = ("tp2sp", "pp4", "pp2vp2", "tp2pp2sp", "tp2pp2sp-fixed", "tp2pp2sp-recompute")


@pytest.mark.parametrize("case", [c if c in QUICK else pytest.param(c, marks=pytest.mark.slow) for c in CASES])
def test_a_layout_merges_and_learns_like_one_process(case, references):
    parallel, train = CASES[case]
    survivors = {name: "last" if name == "boundaries" else "first" for name in SCHEDULES}
    configs = [config_of(name, parallel, survivor, **train) for name, survivor in survivors.items()]
    ranks = run_distributed(several_steps, parallel.tensor * parallel.pipeline, configs, timeout=240)
    for i, (name, survivor) in enumerate(survivors.items()):
        check_step([results[i] for results in ranks], references[name, survivor])


def check_step(results: list[dict[str, Any]], reference: dict[str, Any]) -> None:
    """Merge index, gradients, losses and counts of all ranks against one process."""
    check_index(results, reference)
    expected, got = whole([reference]), whole(results)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
    for result in results:
        torch.testing.assert_close(result["history"], reference["history"], rtol=1e-5, atol=1e-5)
        _, tensor, is_last = result["rank"]
        assert result["visual"] == (reference["visual"] if is_last and tensor == 0 else [0, 0])


@pytest.mark.parametrize("carrier", ["rows", "fixed"])
def test_in_bf16_a_pipeline_merges_like_one_process(carrier):
    precision = PrecisionConfig(name="bf16", dtype="bf16", fp8=None)
    alone, piped = (
        replace(config_of("mixed", parallel), precision=precision)
        for parallel in (layout(), layout(pipeline=4, carrier=carrier))
    )
    (reference,) = run_distributed(merged_step, 1, alone, packs_of(alone))
    results = run_distributed(merged_step, 4, piped, packs_of(piped), timeout=180)
    check_index(results, reference)
    for result in results:
        torch.testing.assert_close(result["history"], reference["history"], rtol=1e-3, atol=1e-3)


def test_a_decision_is_made_once_with_recompute(monkeypatch):
    """The backward pass must not choose again: rounding could change shapes between the two."""
    (calls,) = run_distributed(count_decisions, 1, config_of("mixed", recompute=True))
    assert calls == 3 * 4 - 3  # three points, four packs, of which one is text alone


def count_decisions(config: Config) -> int:
    from megatron_elva.model import merging

    made = []
    original = merging.make_plan
    merging.make_plan = lambda *args: made.append(1) or original(*args)
    engine, _ = engine_of(config)
    engine.gradients([prepare(p, config, "cpu") for p in packs_of(config)])
    return len(made)


def padded_step(config: Config, paddings: list[int]) -> list[tuple[Any, ...]]:
    """Losses, merge index and text logits of one pack with different amounts of padding."""
    engine, _ = engine_of(config)
    engine.keep_merge_states()
    out = []
    for padding in paddings:
        pack = packs_of(config)[0]
        spec = replace(pack.spec, padding=padding)
        tokens = torch.nn.functional.pad(pack.tokens, (0, padding))
        labels = torch.nn.functional.pad(pack.labels, (0, padding), value=IGNORE)
        pack = replace(pack, spec=spec, tokens=tokens, labels=labels)
        engine.set_learning_rate(0.0, False)
        result = engine.train_step([prepare(pack, config, "cpu")])
        states = engine.merge_indices()
        engine.chunks[0].eval()
        with torch.no_grad():
            logits = engine.chunks[0](prepare(pack, config, "cpu"), with_loss=False)
        layout = states[-1][2].layout
        rows = layout.origin[: logits.shape[0]] >= 0
        out.append((result.loss_sum / result.loss_tokens, [s.merge_index() for _, _, s in states], logits[rows]))
    return out


def test_padding_is_invisible():
    paddings = [0, 1, 7, 64, 500]
    (results,) = run_distributed(padded_step, 1, config_of("mixed"), paddings)
    loss, index, logits = results[0]
    for other_loss, other_index, other_logits in results[1:]:
        assert other_loss == pytest.approx(loss, abs=1e-6)
        for ours, theirs in zip(index, other_index, strict=True):
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
        torch.testing.assert_close(other_logits, logits, rtol=1e-6, atol=1e-6)


def frozen_gradients(config: Config) -> dict[str, torch.Tensor]:
    """Gradients of the decoder where nothing before it needs any."""
    engine, _ = engine_of(config)
    for parameter, name in engine.names.items():
        if not name.startswith("decoder."):
            parameter.requires_grad_(False)
    got = engine.gradients([prepare(p, config, "cpu") for p in packs_of(config)])
    return {name: g for name, g in got.items() if name.startswith("decoder.")}


def test_recompute_with_frozen_embeddings_loses_no_gradient():
    (plain,) = run_distributed(frozen_gradients, 1, config_of("mixed"))
    (again,) = run_distributed(frozen_gradients, 1, config_of("mixed", recompute=True))
    assert plain.keys() == again.keys() and all(g.abs().max() > 0 for g in plain.values())
    for name, gradient in plain.items():
        torch.testing.assert_close(again[name], gradient, rtol=1e-6, atol=1e-8)


def disagreeing_ranks(config: Config) -> list[Any]:
    """Merge index on each tensor rank where one of them sees other hidden states, as after a flipped bit."""
    from megatron_elva.model import merging

    engine, ranks = engine_of(config)
    engine.keep_merge_states()
    scores = merging.link_scores
    if ranks.tensor == 1:
        merging.link_scores = lambda *args: -scores(*args)
    engine.gradients([prepare(p, config, "cpu") for p in packs_of(config)])
    return [state.merge_index() for _, _, state in engine.merge_indices()]


@pytest.mark.parametrize("sequence", [False, True])
def test_tensor_ranks_go_on_with_one_choice(sequence):
    config = config_of("mixed", layout(2, sequence=sequence))
    first, second = run_distributed(disagreeing_ranks, 2, config)
    assert len(first) == len(second) == 3 * 4
    for ours, theirs in zip(first, second, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))
