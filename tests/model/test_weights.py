"""Weights under global names: drawn from the name alone, split and put together again."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor, nn

from megatron_elva.config.schema import Config, ParallelConfig
from megatron_elva.model.weights import draw, full_shape, global_name, load_full, shard_of
from tests.builders import small_config, small_model
from tests.distributed import run_distributed

LAYER = "decoder.layers.2."
QKV = LAYER + "self_attention.linear_qkv.weight"
QKV_BIAS = LAYER + "self_attention.linear_qkv.bias"
PROJ = LAYER + "self_attention.linear_proj.weight"
FC1 = LAYER + "mlp.linear_fc1.weight"
FC2 = LAYER + "mlp.linear_fc2.weight"
WORDS = "embedding.word_embeddings.weight"
SPLIT = {QKV: 0, QKV_BIAS: 0, PROJ: 1, FC1: 0, FC2: 1, WORDS: 0}


def test_draw_depends_on_name_and_seed_and_on_nothing_else():
    args = ((6, 5), 7, 0.02, 4)
    first = draw(QKV, *args)
    torch.manual_seed(123)
    torch.randn(10)
    assert torch.equal(draw(QKV, *args), first)
    state = torch.get_rng_state()
    draw(QKV, *args)
    assert torch.equal(torch.get_rng_state(), state)  # nor does it move the global state
    assert not torch.equal(draw(QKV.replace(".2.", ".3."), *args), first)
    assert not torch.equal(draw(QKV, (6, 5), 8, 0.02, 4), first)


@pytest.mark.parametrize(
    ("name", "std"),
    [
        (QKV, 0.02),
        (FC1, 0.02),
        (WORDS, 0.02),
        ("output_layer.weight", 0.02),
        (PROJ, 0.02 / math.sqrt(2 * 8)),
        (FC2, 0.02 / math.sqrt(2 * 8)),
        ("patch_embedding.proj.weight", 0.02),
        ("patch_embedding.frame.kv.weight", 0.02),
        ("projector.weight", 0.02),
    ],
)
def test_matrices_are_normal_with_their_own_width(name, std):
    values = draw(name, (400, 300), 1, 0.02, 8)
    assert values.dtype == torch.float32
    assert values.std().item() == pytest.approx(std, rel=0.02)
    assert abs(values.mean().item()) < 5 * std / math.sqrt(values.numel())


@pytest.mark.parametrize("name", ["patch_embedding.line.token", "patch_embedding.frame_token"])
def test_learned_tokens_are_drawn(name):
    assert draw(name, (4000,), 1, 0.02, 8).std().item() == pytest.approx(0.02, rel=0.1)


@pytest.mark.parametrize(
    "name",
    [
        "decoder.final_layernorm.weight",
        LAYER + "self_attention.linear_qkv.layer_norm_weight",
        LAYER + "mlp.linear_fc1.layer_norm_weight",
        "patch_embedding.frame.norm_q.weight",
        "patch_embedding.line.norm_kv.weight",
    ],
)
def test_norms_are_one(name):
    assert torch.equal(draw(name, (5,), 1, 0.02, 8), torch.ones(5))


@pytest.mark.parametrize("name", [QKV_BIAS, "patch_embedding.frame.norm_q.bias", "projector.bias"])
def test_biases_are_zero(name):
    assert torch.equal(draw(name, (5,), 1, 0.02, 8), torch.zeros(5))


@pytest.mark.parametrize(
    ("local", "first_layer", "tied", "expected"),
    [
        ("decoder.layers.1.mlp.linear_fc2.weight", 6, False, "decoder.layers.7.mlp.linear_fc2.weight"),
        ("decoder.layers.0.input_layernorm.weight", 2, True, LAYER + "self_attention.linear_qkv.layer_norm_weight"),
        ("decoder.layers.2.pre_mlp_layernorm.weight", 0, True, LAYER + "mlp.linear_fc1.layer_norm_weight"),
        ("decoder.final_layernorm.weight", 6, True, "decoder.final_layernorm.weight"),
        ("output_layer.weight", 6, True, WORDS),
        ("output_layer.weight", 6, False, "output_layer.weight"),
        (WORDS, 0, True, WORDS),
        ("patch_embedding.line.norm_q.weight", 0, True, "patch_embedding.line.norm_q.weight"),
    ],
)
def test_global_name(local, first_layer, tied, expected):
    assert global_name(local, first_layer, tied) == expected


def shard_parameter(shape: tuple[int, ...], dim: int | None) -> nn.Parameter:
    """A parameter marked as megatron-core marks the shards of a split weight."""
    p = nn.Parameter(torch.zeros(shape))
    if dim is not None:
        p.tensor_model_parallel, p.partition_dim = True, dim
    return p


def together(name: str, shards: list[Tensor]) -> Tensor:
    """The whole weight from all tensor ranks' shards, by the rules of each kind of layer."""
    if name == FC1 or name.endswith("mlp.linear_fc1.weight"):
        half = shards[0].shape[0] // 2
        return torch.cat([s[:half] for s in shards] + [s[half:] for s in shards])
    row = name.endswith(("linear_proj.weight", "linear_fc2.weight"))
    return torch.cat(shards, dim=1 if row else 0)


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("name", SPLIT)
def test_shards_make_the_whole_again(name, size):
    full = torch.randn((16,) if name == QKV_BIAS else (16, 8))
    shape = list(full.shape)
    shape[SPLIT[name]] //= size
    p = shard_parameter(tuple(shape), SPLIT[name])
    shards = [shard_of(name, full, p, rank, size) for rank in range(size)]
    assert all(tuple(s.shape) == tuple(shape) for s in shards)
    assert full_shape(name, p, size) == tuple(full.shape)
    assert torch.equal(together(name, shards), full)


@pytest.mark.parametrize("size", [2, 4])
def test_each_rank_holds_its_rows_of_gate_and_of_up(size):
    gate, up = torch.arange(8.0)[:, None], 100 + torch.arange(8.0)[:, None]
    p = shard_parameter((16 // size, 1), 0)
    for rank in range(size):
        rows = range(rank * 8 // size, (rank + 1) * 8 // size)
        got = shard_of(FC1, torch.cat([gate, up]), p, rank, size).flatten().tolist()
        assert got == [float(r) for r in rows] + [100.0 + r for r in rows]


def test_what_no_rank_splits_is_whole_everywhere():
    full, p = torch.randn(4, 3), shard_parameter((4, 3), None)
    assert torch.equal(shard_of("projector.weight", full, p, 1, 2), full)
    assert full_shape("projector.weight", p, 2) == (4, 3)


def drawn(config: Config) -> dict[str, tuple[int, Tensor]]:
    """This rank's shards by global name, with its tensor rank; and that a wrong shape is refused."""
    from megatron_elva.model.weights import named_global_parameters
    from megatron_elva.parallel.engine import build_chunks
    from megatron_elva.parallel.ranks import start

    ranks = start(config.parallel, "cpu", config.seed)
    chunks = build_chunks(config, 96, ranks)
    out = {name: (ranks.tensor, p.detach().clone()) for name, p in named_global_parameters(chunks)}
    with pytest.raises(ValueError, match=r"shape \(1, 1\) in the weights"):
        load_full(chunks, lambda name, shape: torch.zeros(1, 1), ranks.tensor, ranks.tensor_size)
    return out


@pytest.mark.parametrize(
    "parallel",
    [
        ParallelConfig(tensor=4, pipeline=1, sequence=False),
        ParallelConfig(tensor=2, pipeline=2, sequence=True),
        ParallelConfig(tensor=1, pipeline=2, virtual_pipeline=2, sequence=False),
    ],
    ids=["tp4", "tp2pp2sp", "pp2vp2"],
)
def test_every_layout_holds_the_same_model(parallel):
    config = small_config(small_model(kv_heads=4, tied_head=False), parallel=parallel)
    shards: dict[str, dict[int, Tensor]] = {}
    for result in run_distributed(drawn, parallel.tensor * parallel.pipeline, config):
        for name, (rank, shard) in result.items():
            assert rank not in shards.setdefault(name, {}), f"{name} twice on tensor rank {rank}"
            shards[name][rank] = shard
    model = config.model
    layer = {
        "self_attention.linear_qkv.weight": (3 * model.hidden, model.hidden),
        "self_attention.linear_qkv.bias": (3 * model.hidden,),
        "self_attention.linear_proj.weight": (model.hidden, model.hidden),
        "mlp.linear_fc1.weight": (2 * model.ffn_hidden, model.hidden),
        "mlp.linear_fc2.weight": (model.hidden, model.ffn_hidden),
    }
    split = {f"decoder.layers.{i}.{n}": s for i in range(model.layers) for n, s in layer.items()}
    split |= {WORDS: (96, model.hidden), "output_layer.weight": (96, model.hidden)}
    assert split.keys() <= shards.keys()
    for name, parts in shards.items():
        assert sorted(parts) == list(range(parallel.tensor)), name
        in_order = [parts[r] for r in range(parallel.tensor)]
        if name in split:
            whole = together(name, in_order) if parallel.tensor > 1 else in_order[0]
            assert tuple(whole.shape) == split[name], name
        else:
            whole = in_order[0]
            assert all(torch.equal(p, whole) for p in in_order), name
        assert torch.equal(whole, draw(name, tuple(whole.shape), config.seed, model.init_std, model.layers)), name
