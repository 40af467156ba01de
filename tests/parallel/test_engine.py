"""Training steps at every layout against one process with the same weights."""

from __future__ import annotations

import gc
import math
from dataclasses import replace

import pytest
import torch

from megatron_elva.config.errors import ConfigError
from megatron_elva.config.schema import Config, ParallelConfig, PrecisionConfig
from megatron_elva.layout import Pack
from megatron_elva.model.inputs import prepare
from tests.builders import random_pack, small_config, small_model
from tests.distributed import run_distributed

CASES = {
    "tp2": (ParallelConfig(tensor=2, pipeline=1, sequence=False), 1, {}),
    "tp2sp": (ParallelConfig(tensor=2, pipeline=1, sequence=True), 1, {}),
    "pp2": (ParallelConfig(tensor=1, pipeline=2, sequence=False), 1, {}),
    "pp4": (ParallelConfig(tensor=1, pipeline=4, sequence=False), 1, {}),
    "dp2": (ParallelConfig(tensor=1, pipeline=1, sequence=False), 2, {}),
    "tp2pp2sp": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1, {}),
    "tp2pp2sp-recompute": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1, {"recompute": True}),
    "pp2dp2": (ParallelConfig(tensor=1, pipeline=2, sequence=False), 2, {}),
    "pp2vp2": (ParallelConfig(tensor=1, pipeline=2, virtual_pipeline=2, sequence=False), 1, {}),
}


def engine_of(config: Config):
    from megatron_elva.parallel.engine import Engine, build_chunks
    from megatron_elva.parallel.ranks import start

    ranks = start(config.parallel, "cpu", config.seed)
    return Engine(config, build_chunks(config, 96, ranks), ranks), ranks


def gradients_and_steps(config: Config, packs: list[Pack], steps: int) -> dict:
    """Gradients of the first step and then losses and norms of `steps` steps; the packs are dealt to replicas."""
    from megatron_elva.model.weights import full_shape
    from megatron_elva.parallel.collectives import sum_over_ranks

    engine, ranks = engine_of(config)
    own = [prepare(p, config, "cpu") for p in packs[ranks.data :: ranks.data_size]]
    gradients = {}
    if ranks.data == 0:
        shards = {name: p for p, name in engine.names.items()}
    got = engine.gradients(own)
    if ranks.data == 0:
        gradients = {n: (g, ranks.tensor, full_shape(n, shards[n], ranks.tensor_size)) for n, g in got.items()}
    history = []
    for _ in range(steps):
        engine.set_learning_rate(1.0, False)
        result = engine.train_step(own)
        loss_sum, tokens = sum_over_ranks([result.loss_sum, result.loss_tokens], ranks)
        history.append((loss_sum / tokens, result.grad_norm))
    return {"gradients": gradients, "history": history}


def whole(results: list[dict]) -> dict[str, torch.Tensor]:
    """Whole gradients from the tensor ranks' shards."""
    out: dict[str, torch.Tensor] = {}
    for result in results:
        for name, (shard, rank, shape) in result["gradients"].items():
            if tuple(shard.shape) == shape:
                if name in out:  # replicated, or tied over the pipeline: all copies must agree
                    torch.testing.assert_close(shard, out[name], rtol=1e-5, atol=1e-7)
                out[name] = shard
                continue
            full = out.setdefault(name, torch.zeros(shape))
            if name.endswith("linear_fc1.weight"):
                half = shape[0] // 2
                gate, up = shard.chunk(2)
                full[:half].chunk(2)[rank].copy_(gate)
                full[half:].chunk(2)[rank].copy_(up)
            else:
                dim = next(i for i, (a, b) in enumerate(zip(shard.shape, shape, strict=True)) if a != b)
                full.chunk(2, dim)[rank].copy_(shard)
    return out


def packs_of_one_step(config: Config) -> list[Pack]:
    """Four packs of different lengths, one of them text alone."""
    return [random_pack(config.model, i, videos) for i, videos in enumerate([(1, 0), (0, 0), (2,), (1, 1, 1)])]


@pytest.fixture(scope="module")
def reference():
    config = small_config()
    (result,) = run_distributed(gradients_and_steps, 1, config, packs_of_one_step(config), 3)
    return result


@pytest.mark.parametrize("case", CASES)
def test_gradients_and_losses_equal_one_process(case, reference):
    parallel, data, train = CASES[case]
    config = small_config(parallel=parallel)
    config = replace(config, train=replace(config.train, **train))
    packs = packs_of_one_step(config)
    results = run_distributed(
        gradients_and_steps, parallel.tensor * parallel.pipeline * data, config, packs, 3, timeout=180
    )
    expected = whole([reference])
    got = whole(results)
    assert got.keys() == expected.keys()
    for name, gradient in expected.items():
        assert gradient.abs().max() > 0, name
        error = (got[name] - gradient).norm() / gradient.norm()
        assert error < 1e-4, f"{name}: relative error {error:.1e}"
    for result in results:
        torch.testing.assert_close(result["history"], reference["history"], rtol=1e-5, atol=1e-5)


def test_the_reference_learns(reference):
    losses = [loss for loss, _ in reference["history"]]
    assert losses[-1] < losses[0] - 0.1


def step_moves(config: Config, packs: list[Pack], frozen: bool) -> set[str]:
    """Names of the parameters that one step changes."""
    engine, _ = engine_of(config)
    before = {name: p.detach().clone() for p, name in engine.names.items()}
    engine.set_learning_rate(1.0, frozen)
    engine.train_step([prepare(p, config, "cpu") for p in packs])
    return {name for p, name in engine.names.items() if not torch.equal(p, before[name])}


@pytest.mark.parametrize("parallel", [CASES["tp2pp2sp"][0], CASES["pp4"][0]])
def test_frozen_parameters_stay_and_the_others_move(parallel):
    config = small_config(parallel=parallel)
    config = replace(config, stage=replace(config.stage, frozen=["decoder.*", "embedding.*"], frozen_share=0.5))
    packs = packs_of_one_step(config)
    world = parallel.tensor * parallel.pipeline
    moved = set().union(*run_distributed(step_moves, world, config, packs, True))
    assert moved and all(n.startswith(("patch_embedding.", "projector.")) for n in moved)
    everything = set().union(*run_distributed(step_moves, world, config, packs, False))
    assert {"embedding.word_embeddings.weight", "decoder.layers.3.mlp.linear_fc2.weight"} <= everything


def frozen_pattern_error(config: Config) -> str:
    try:
        engine_of(config)
    except ConfigError as error:
        return str(error)
    return ""


def test_a_frozen_pattern_that_matches_nothing_is_refused():
    config = small_config()
    config = replace(config, stage=replace(config.stage, frozen=["decoder.*", "vision_tower.*"]))
    (error,) = run_distributed(frozen_pattern_error, 1, config)
    assert error.startswith("stage.frozen=['vision_tower.*']: matches no parameter")


def bf16_history(config: Config, packs: list[Pack]) -> list:
    return gradients_and_steps(config, packs, 3)["history"]


def test_bf16_pipeline_equals_bf16_alone():
    from megatron_elva.config.schema import PrecisionConfig

    config = small_config(small_model(), precision=PrecisionConfig(name="bf16", dtype="bf16", fp8=None))
    packs = packs_of_one_step(config)
    (alone,) = run_distributed(bf16_history, 1, config, packs)
    for history in run_distributed(bf16_history, 2, replace(config, parallel=CASES["pp2"][0]), packs):
        torch.testing.assert_close(history, alone, rtol=1e-3, atol=1e-3)


def overflow(config: Config, packs: list[Pack]) -> tuple[float, set[str]]:
    """Gradient norm of a step whose loss is not finite, and the parameters it changed."""
    engine, _ = engine_of(config)
    with torch.no_grad():
        for parameter, name in engine.names.items():
            if name == "decoder.final_layernorm.weight":
                parameter.fill_(float("inf"))
    engine.optimizer.reload_model_params()
    before = {name: p.detach().clone() for p, name in engine.names.items()}
    engine.set_learning_rate(1.0, False)
    norm = engine.train_step([prepare(p, config, "cpu") for p in packs]).grad_norm
    return norm, {name for p, name in engine.names.items() if not torch.equal(p, before[name])}


def test_a_step_with_a_non_finite_gradient_changes_nothing():
    config = small_config(parallel=CASES["pp2"][0])
    for norm, moved in run_distributed(overflow, 2, config, packs_of_one_step(config)):
        assert not math.isfinite(norm)
        assert not moved


def bytes_left(config: Config) -> tuple[int, int]:
    """Bytes of all tensors after a step, and after the engine was released, whoever keeps it."""
    engine, _ = engine_of(config)
    engine.train_step([prepare(random_pack(config.model, i, (1,)), config, "cpu") for i in range(2)])
    before = tensor_bytes()
    engine.release()
    return before, tensor_bytes()


def tensor_bytes() -> int:
    gc.collect()
    storages = [t.untyped_storage() for t in gc.get_objects() if isinstance(t, torch.Tensor)]
    return sum({s._cdata: s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_released_engine_leaves_the_memory_to_the_next_stage(dtype):
    model = small_model(vocab_size=2048)
    config = small_config(model, precision=PrecisionConfig(name=dtype, dtype=dtype, fp8=None))
    ((before, after),) = run_distributed(bytes_left, 1, config)
    assert after < before / 20
