"""ELVA against transformers' Qwen2 and against itself at other layouts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from transformers import Qwen2Config, Qwen2ForCausalLM

from megatron_elva.config.schema import Config, ModelConfig, ParallelConfig
from megatron_elva.layout import Pack, PackSpec, SampleSpec, VideoSpec
from megatron_elva.model.hf_names import from_hf, to_hf
from megatron_elva.model.inputs import prepare
from megatron_elva.model.patch_embedding import PatchEmbedding
from megatron_elva.model.weights import load_full
from tests.builders import fill, random_pack, small_config, small_model
from tests.distributed import run_distributed

State = dict[str, torch.Tensor]

LAYOUTS = [
    ParallelConfig(tensor=1, pipeline=1, sequence=False),
    ParallelConfig(tensor=2, pipeline=1, sequence=False),
    ParallelConfig(tensor=2, pipeline=1, sequence=True),
    ParallelConfig(tensor=1, pipeline=2, sequence=False),
    ParallelConfig(tensor=2, pipeline=2, sequence=False),
    ParallelConfig(tensor=2, pipeline=2, sequence=True),
]
ids = [f"tp{p.tensor}pp{p.pipeline}{'sp' if p.sequence else ''}" for p in LAYOUTS]


def logits(
    config: Config, packs: list[Pack], state: dict[str, torch.Tensor] | None = None
) -> list[torch.Tensor] | None:
    """Whole logits ``[S, V]`` of each pack, on the last pipeline rank; None elsewhere. Runs on every rank."""
    from megatron.core import tensor_parallel

    from megatron_elva.parallel.engine import build_chunks
    from megatron_elva.parallel.ranks import start

    ranks = start(config.parallel, "cpu", config.seed)
    chunks = build_chunks(config, 96, ranks)
    if state is not None:
        full = from_hf(state, config.model)
        load_full(
            chunks,
            lambda name, shape: full.get(name, torch.zeros(shape)),
            ranks.tensor,
            ranks.tensor_size,
        )
    out = []
    with torch.no_grad():
        for pack in packs:
            inputs = prepare(pack, config, "cpu")
            width = config.model.hidden
            if not ranks.is_first:
                rows = torch.empty(1, dtype=torch.long)
                torch.distributed.recv(rows, group=ranks.groups.pp, group_src=ranks.pipeline - 1)
                received = torch.empty(int(rows), 1, width)
                torch.distributed.recv(received, group=ranks.groups.pp, group_src=ranks.pipeline - 1)
                chunks[0].set_input_tensor(received)
            y = chunks[0](inputs, with_loss=False)
            if not ranks.is_last:
                torch.distributed.send(torch.tensor([y.shape[0]]), group=ranks.groups.pp, group_dst=ranks.pipeline + 1)
                torch.distributed.send(y, group=ranks.groups.pp, group_dst=ranks.pipeline + 1)
            else:
                out.append(tensor_parallel.gather_from_tensor_model_parallel_region(y))
    return out if ranks.is_last else None


def qwen2(model: Any, seed: int = 0) -> Qwen2ForCausalLM:
    torch.manual_seed(seed)
    hf = Qwen2ForCausalLM(
        Qwen2Config(
            vocab_size=96,
            hidden_size=model.hidden,
            intermediate_size=model.ffn_hidden,
            num_hidden_layers=model.layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            rms_norm_eps=model.norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
            tie_word_embeddings=model.tied_head,
            attention_dropout=0.0,
            use_sliding_window=False,
        )
    ).eval()
    for p in hf.parameters():  # biases and norms off their defaults, or an error in their mapping would not show
        p.data += 0.1 * torch.randn_like(p)
    return hf


def several(jobs: list[tuple[Config, list[Pack], State | None]]) -> list[list[torch.Tensor] | None]:
    """Logits of several models at one layout in one start of the ranks."""
    return [logits(*job) for job in jobs]


def text_pack(model: ModelConfig) -> Pack:
    return fill(PackSpec((SampleSpec((40,)),)), model, 3)


def alone(pack: Pack) -> list[Pack]:
    """Each sample of a pack in a pack of its own."""
    out, start, cell = [], 0, 0
    for sample in pack.spec.samples:
        spec = PackSpec((sample,)).padded_to(8)
        tokens = torch.zeros(spec.tokens, dtype=torch.long)
        tokens[: sample.tokens] = pack.tokens[start : start + sample.tokens]
        n = sum(v.cells for v in sample.videos)
        out.append(Pack(spec, tokens, torch.full_like(tokens, -100), pack.patches[cell : cell + n]))
        start, cell = start + sample.tokens, cell + n
    return out


MODELS = {tied: small_model(tied_head=tied) for tied in (True, False)}
MASKS = {mask: small_model(attention_mask=mask) for mask in ("causal", "frame_bidirectional")}
THREE = random_pack(small_model(), 5, videos=(1, 0, 2), multiple=8)


@pytest.fixture(scope="module", params=LAYOUTS, ids=ids)
def at_layout(request):
    """Logits at one layout by name, from one start of its ranks."""
    jobs: dict[str, tuple[Config, list[Pack], State | None]] = {}
    for tied, model in MODELS.items():
        config = small_config(model, parallel=request.param)
        jobs[f"text-{tied}"] = (config, [text_pack(model)], qwen2(model).state_dict())
    for mask, model in MASKS.items():
        packs = [random_pack(model, seed, multiple=8) for seed in (1, 2)]
        jobs[f"videos-{mask}"] = (small_config(model, parallel=request.param), packs, None)
    jobs["three"] = (small_config(parallel=request.param), [THREE, *alone(THREE)], None)
    world = request.param.tensor * request.param.pipeline
    ranks = run_distributed(several, world, list(jobs.values()), timeout=180)
    return [dict(zip(jobs, r, strict=True)) for r in ranks if r[0] is not None]


@pytest.fixture(scope="module")
def one_process():
    """Logits of the packs with videos in one process, by mask."""
    jobs = [
        (small_config(model), [random_pack(model, seed, multiple=8) for seed in (1, 2)], None)
        for model in MASKS.values()
    ]
    (result,) = run_distributed(several, 1, jobs)
    return dict(zip(MASKS, result, strict=True))


@pytest.mark.parametrize("tied", [True, False])
def test_text_logits_equal_transformers_qwen2(at_layout, tied):
    hf = qwen2(MODELS[tied])
    with torch.no_grad():
        expected = hf(text_pack(MODELS[tied]).tokens[None]).logits[0]
    assert expected.abs().max() > 0.5
    for got in at_layout:
        torch.testing.assert_close(got[f"text-{tied}"][0], expected, atol=1e-4, rtol=0)


def test_a_pack_of_three_equals_the_three_alone(at_layout):
    for got in at_layout:
        together, *single = got["three"]
        start = 0
        for sample, y in zip(THREE.spec.samples, single, strict=True):
            part = together[start : start + sample.tokens]
            assert part.abs().max() > 0.05
            torch.testing.assert_close(part, y[: sample.tokens], atol=1e-5, rtol=1e-4)
            start += sample.tokens


@pytest.mark.parametrize("mask", MASKS)
def test_layouts_agree_on_videos(at_layout, one_process, mask):
    for got in at_layout:
        for a, b in zip(got[f"videos-{mask}"], one_process[mask], strict=True):
            torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


def one_video(pixels: torch.Tensor, model: Any) -> Pack:
    spec = PackSpec((SampleSpec((2, VideoSpec.uniform(2, 1, 2), 2)),))
    return Pack(spec, torch.zeros(spec.tokens, dtype=torch.long), torch.full((spec.tokens,), -100), pixels)


def masks_see(mask: str) -> dict[str, bool]:
    """Whether changing the last cell of a frame moves the logits before it, in its frame and in earlier tokens."""
    config = small_config(small_model(attention_mask=mask, patch_embedding="naive"))
    a = torch.randint(0, 256, (4, config.model.patch_values), dtype=torch.uint8)
    b = a.clone()
    b[1] = 255 - b[1]
    ya, yb = logits(config, [one_video(a, config.model), one_video(b, config.model)]) or []
    moved = (ya - yb).abs().amax(-1) > 1e-6
    # tokens: 0 1 text, 2 FRAME, 3 4 cells, 5 LINE, 6 FRAME, ...
    return {"text": bool(moved[:2].any()), "frame": bool(moved[2]), "cell": bool(moved[3]), "own": bool(moved[4])}


def test_causal_mask_hides_later_cells_and_frame_bidirectional_shows_them():
    (causal,) = run_distributed(masks_see, 1, "causal")
    (both,) = run_distributed(masks_see, 1, "frame_bidirectional")
    assert causal == {"text": False, "frame": False, "cell": False, "own": True}
    assert both == {"text": False, "frame": False, "cell": True, "own": True}


def test_padding_changes_no_logit():
    config = small_config()
    pack = random_pack(config.model, 9, multiple=1)
    specs = [PackSpec(pack.spec.samples, padding) for padding in (0, 1, 37)]
    padded = [Pack(s, torch.nn.functional.pad(pack.tokens, (0, s.padding)), pack.labels, pack.patches) for s in specs]
    padded = [replace(p, labels=torch.full_like(p.tokens, -100)) for p in padded]
    ((a, b, c),) = run_distributed(logits, 1, config, padded)
    n = pack.spec.tokens
    torch.testing.assert_close(a, b[:n], atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(a, c[:n], atol=1e-6, rtol=1e-5)


def test_patch_embedding_has_the_papers_nine_million_parameters():
    count = lambda m: sum(p.numel() for p in m.parameters())  # noqa: E731
    assert count(PatchEmbedding(14 * 14 * 3, 1024, 8, 4)) == 9_003_008
    assert count(PatchEmbedding(14 * 14 * 3, 1024, 8, 4, "naive")) == 602_112 + 2 * 1024


def test_hf_names_round_trip():
    for tied in (True, False):
        model = small_model(tied_head=tied)
        state = qwen2(model).state_dict()
        back = to_hf(from_hf(state, model), model)
        assert back.keys() == state.keys()
        for name in state:
            torch.testing.assert_close(back[name], state[name], atol=0, rtol=0)
