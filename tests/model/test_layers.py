"""Which layers a config means here, what FP8 asks of megatron-core, and packs of the lengths that FP8 takes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from megatron_elva.config.compose import compose
from megatron_elva.config.errors import ConfigError
from megatron_elva.config.schema import FP8_TOKENS, Config, MergePoint, MergingConfig
from megatron_elva.layout import Pack, PackSpec
from megatron_elva.model import layer_spec
from megatron_elva.model.inputs import prepare
from megatron_elva.model.layer_spec import resolve_layers
from megatron_elva.model.transformer_config import transformer_config
from tests.builders import fill, random_pack, small_config
from tests.distributed import run_distributed

MERGING = MergingConfig(
    kind="hierarchical",
    points=[MergePoint(after=1, rule="threshold", tau=0.0), MergePoint(after=2, rule="budget", keep=0.4)],
)


def test_auto_takes_transformer_engine_exactly_where_it_can_run(monkeypatch):
    monkeypatch.setattr(layer_spec, "transformer_engine_missing", lambda: None)
    assert resolve_layers("auto", "cuda") == resolve_layers("te", "cuda") == "te"
    assert resolve_layers("local", "cuda") == resolve_layers("auto", "cpu") == "local"
    assert resolve_layers("auto", "cuda", mask="frame_bidirectional") == "local"
    assert resolve_layers("auto", "cuda", dtype="fp32") == "local"
    monkeypatch.setattr(layer_spec, "transformer_engine_missing", lambda: "no GPU is visible")
    assert resolve_layers("auto", "cuda") == "local"


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        (("te", "cpu"), "layers=te: Transformer Engine needs device=cuda, not device=cpu; or layers=local"),
        (("te", "cuda"), "layers=te: no GPU is visible; or layers=local"),
        (("te", "cuda", "frame_bidirectional"), "layers=te: its fused attention over packs is causal"),
        (("te", "cuda", "causal", None, "fp32"), "layers=te: its fused attention takes bf16, not precision.dtype=fp32"),
        (("auto", "cuda", "causal", "current"), "precision.fp8=current: needs Transformer Engine layers: no GPU"),
        (("local", "cuda", "causal", "current"), "precision.fp8=current: needs Transformer Engine layers: layers="),
    ],
)
def test_what_cannot_run_here_is_refused(monkeypatch, asked, message):
    monkeypatch.setattr(layer_spec, "transformer_engine_missing", lambda: "no GPU is visible")
    with pytest.raises(ConfigError) as caught:
        resolve_layers(*asked)
    assert message in str(caught.value)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_nothing_of_transformer_engine_is_imported():
    layer_spec.transformer_engine_missing.cache_clear()
    assert layer_spec.transformer_engine_missing() == "no GPU is visible"


@pytest.mark.parametrize(
    ("recipe", "fields"),
    [
        ("bf16", (None, None)),
        ("fp8_delayed", ("hybrid", "delayed", 1024, "max")),
        ("fp8_current", ("hybrid", "tensorwise")),
        ("fp8_blockwise", ("e4m3", "blockwise")),
    ],
)
def test_a_recipe_becomes_megatron_cores_fields(recipe, fields):
    mcore = transformer_config(compose([f"precision={recipe}"]))
    found = (mcore.fp8, mcore.fp8_recipe, mcore.fp8_amax_history_len, mcore.fp8_amax_compute_algo)
    assert mcore.fp8 == fields[0]
    if mcore.fp8 is not None:
        assert tuple(map(str, found))[: len(fields)] == tuple(map(str, fields))


def losses(config: Config, packs: list[Pack], multiple: int) -> list[tuple[torch.Tensor, torch.Tensor, list[int]]]:
    """For each pack: losses, gradient of a projection, and the lengths behind each merge point."""
    from megatron_elva.parallel.engine import build_chunks
    from megatron_elva.parallel.ranks import start

    (model,) = build_chunks(config, 96, start(config.parallel, "cpu", config.seed))
    model.decoder.schedule = replace(model.decoder.schedule, multiple=multiple)
    model.decoder.trace.keep_states = True
    out = []
    for pack in packs:
        model.zero_grad()
        model.decoder.trace.clear()
        inputs = prepare(pack, config, "cpu")
        assert inputs.loss is not None
        found = model(inputs)
        (found * inputs.loss.weights).sum().backward()
        lengths = [state.layout.tokens for state in model.decoder.trace.states]
        gradient = model.decoder.layers[0].mlp.linear_fc1.weight.grad.clone()
        out.append((found.detach(), gradient, lengths))
    return out


@pytest.mark.parametrize("recipe", ["current", "blockwise"])
def test_padding_to_what_a_recipe_takes_changes_no_loss_and_no_gradient(recipe):
    multiple = FP8_TOKENS[recipe]
    config = small_config(merging=MERGING)
    specs = [random_pack(config.model, seed, multiple=1).spec for seed in range(4)]
    plain = [fill(spec, config.model, 5) for spec in specs]
    padded = [_padded(pack, pack.spec.padded_to(multiple)) for pack in plain]
    (alone,) = run_distributed(losses, 1, config, plain, 1)
    (filled,) = run_distributed(losses, 1, config, padded, multiple)
    assert any(lengths[0] > lengths[1] for *_, lengths in alone)
    for (a, grad_a, _), (b, grad_b, lengths) in zip(alone, filled, strict=True):
        assert lengths and all(length % multiple == 0 for length in lengths)
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(grad_a, grad_b, atol=1e-5, rtol=1e-4)


def _padded(pack: Pack, spec: PackSpec) -> Pack:
    tokens = torch.nn.functional.pad(pack.tokens, (0, spec.padding))
    labels = torch.nn.functional.pad(pack.labels, (0, spec.padding), value=-100)
    return replace(pack, spec=spec, tokens=tokens, labels=labels)
