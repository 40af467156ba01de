"""Merging at inference against the training model: merge index, logits, and generation with a shortened cache."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from megatron_elva.config.errors import ConfigError
from megatron_elva.config.schema import Config, MergePoint, MergingConfig, PoolingConfig
from megatron_elva.inference.elva import Elva
from megatron_elva.inference.model import Assistant
from megatron_elva.layout import Kind, Pack, PackSpec, PackState, SampleSpec, VideoSpec
from megatron_elva.model.inputs import prepare
from tests.builders import fill, small_config, small_model
from tests.distributed import run_distributed
from tests.inference.drawn import TP2PP2, elva_with_drawn_weights, shapes
from tests.model.test_elva import logits


def hierarchical(*points: tuple[float, str, float], survivor: str = "first") -> MergingConfig:
    made = [MergePoint(after=a, rule=r, **{"tau" if r == "threshold" else "keep": v}) for a, r, v in points]
    return MergingConfig(kind="hierarchical", survivor=survivor, points=made)


BOTH = ((1.0, "threshold", 0.3), (0.5, "budget", 0.5))
MERGINGS = {
    "both": hierarchical(*BOTH),
    "both-last": hierarchical(*BOTH, survivor="last"),
    "budgets": hierarchical((0.25, "budget", 0.7), (3.0, "budget", 0.5), (3.0, "budget", 0.3)),
    "pooling": MergingConfig(kind="pooling", pooling=PoolingConfig(window=2)),
    "pooling3": MergingConfig(kind="pooling", pooling=PoolingConfig(window=3)),
}
A, B, STILL = VideoSpec.uniform(6, 2, 3), VideoSpec.uniform(5, 3, 1), VideoSpec.uniform(1, 2, 2)
HYBRID = VideoSpec(((2, 3), (1, 2)), (0, 1, 1, 0, 1, 1, 0))
SAMPLES = {
    "one": SampleSpec((4, A, 6)),
    "several": SampleSpec((2, A, 3, B, STILL, 3, HYBRID, 4)),
    "image": SampleSpec((3, STILL, 4)),
    "text": SampleSpec((12,)),
}
CASES = [(merging, mask) for merging in MERGINGS for mask in ("causal", "frame_bidirectional")]


def config_of(merging: str, mask: str = "causal", **changes: Any) -> Config:
    model = small_model(attention_mask=mask, tied_head=False, cell_reduction=2)
    return small_config(model, merging=MERGINGS[merging], **changes)


def pack_of(config: Config, name: str) -> Pack:
    """The same numbers at every layout: a pack's random content depends on its length."""
    return fill(PackSpec((SAMPLES[name],)).padded_to(4), config.model, list(SAMPLES).index(name))


def trained(config: Config, names: list[str]) -> list[tuple[torch.Tensor, list[PackState], PackState]]:
    """Logits of the training model, the state after each merge point, and the last state; one process."""
    from megatron_elva.parallel.engine import build_chunks
    from megatron_elva.parallel.ranks import start

    (model,) = build_chunks(config, 96, start(config.parallel, "cpu", config.seed))
    trace = model.decoder.trace
    trace.keep_states = True
    out = []
    for name in names:
        trace.clear()
        inputs = prepare(pack_of(config, name), config, "cpu")
        with torch.no_grad():
            got = model(inputs, with_loss=False)
        out.append((got, list(trace.states), trace.states[-1] if trace.states else inputs.state))
    return out


def trained_cases() -> dict[Any, Any]:
    return {case: trained(config_of(*case), list(SAMPLES)) for case in CASES}


def parallel_cases() -> dict[Any, Any]:
    configs = {case: config_of(*case, parallel=TP2PP2) for case in CASES}
    return {case: logits(c, [pack_of(c, name) for name in SAMPLES]) for case, c in configs.items()}


@pytest.fixture(scope="module")
def names():
    (found,) = run_distributed(shapes, 1, config_of("both"))
    return found


@pytest.fixture(scope="module")
def one_process():
    (found,) = run_distributed(trained_cases, 1, timeout=180)
    return found


@pytest.fixture(scope="module")
def four_ranks():
    return next(r for r in run_distributed(parallel_cases, 4, timeout=180) if r[CASES[0]] is not None)


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize(("merging", "mask"), CASES)
def test_prefill_is_what_training_computes(merging, mask, sample, names, one_process, four_ranks):
    config = config_of(merging, mask)
    place = list(SAMPLES).index(sample)
    expected, states, last = one_process[merging, mask][place]
    pack, spec = pack_of(config, sample), SAMPLES[sample]
    model = elva_with_drawn_weights(config, names)
    read = model.prefill(spec, pack.tokens[: spec.tokens], pack.patches)
    assert len(read.merges) == len(states) == len(config.merging.points)
    for merged, state in zip(read.merges, states, strict=True):
        assert all(map(torch.equal, merged.state.merge_index(), state.merge_index()))
    for column in ("origin", "position", "kind"):
        ours = getattr(read.state.layout, column)
        assert torch.equal(ours, getattr(last.layout, column)[: len(ours)])
    got = model.logits(spec, pack.tokens[: spec.tokens], pack.patches)
    assert expected.abs().max() > 0.1
    # where nothing merges, a training pack keeps the padding that it came with
    assert len(expected) - len(got) == last.layout.padding
    torch.testing.assert_close(got, expected[: len(got)], atol=1e-4, rtol=0)
    torch.testing.assert_close(got, four_ranks[merging, mask][place][: len(got)], atol=1e-4, rtol=0)
    assert (read.state.layout.kind == Kind.TEXT).sum() == sum(s for s in spec.segments if isinstance(s, int))
    if sample in ("one", "several"):
        assert len(got) < spec.tokens
    else:
        assert len(got) == spec.tokens


@pytest.mark.parametrize(("merging", "mask"), [("both", "causal"), ("both-last", "frame_bidirectional")])
def test_every_merge_point_takes_tokens(merging, mask, one_process):
    """Else the comparison above would show nothing."""
    for place in (0, 1):
        _, states, _ = one_process[merging, mask][place]
        counts = [sum(s.tubes.sizes) for s in states[:1]] + [sum(s.counts) for s in states]
        assert counts == sorted(set(counts), reverse=True)


def random_elva(merging: str, mask: str) -> Elva:
    config = config_of(merging, mask)
    torch.manual_seed(5)
    model = Elva(config.model, 96, config.merging).eval()
    for name, p in model.named_parameters():
        torch.nn.init.normal_(p, mean=float("norm" in name), std=0.3)
    return model


@pytest.mark.parametrize("sample", SAMPLES)
@pytest.mark.parametrize(("merging", "mask"), CASES)
def test_generation_with_a_cache_equals_reading_everything_anew(merging, mask, sample):
    model, spec = random_elva(merging, mask), SAMPLES[sample]
    pack = pack_of(config_of(merging, mask), sample)
    tokens = pack.tokens[: spec.tokens]
    ids = model.generate(spec, tokens, pack.patches, stop=-1, known_tokens=90, max_new_tokens=6)
    assert len(ids) == 6 and max(ids) < 90 and len(set(ids)) > 1
    for n, token in enumerate(ids):
        longer = replace(spec, segments=(*spec.segments[:-1], spec.segments[-1] + n))
        so_far = torch.cat([tokens, torch.tensor(ids[:n], dtype=torch.long)])
        assert int(model.logits(longer, so_far, pack.patches)[-1, :90].argmax()) == token
    stop = model.generate(spec, tokens, pack.patches, stop=ids[-1], known_tokens=90, max_new_tokens=6)
    assert stop == ids[: ids.index(ids[-1])]


def test_the_cache_is_shorter_behind_a_merge_point():
    model, spec = random_elva("budgets", "causal"), SAMPLES["one"]
    pack = pack_of(config_of("budgets"), "one")
    read = model.prefill(spec, pack.tokens[: spec.tokens], pack.patches)
    other = spec.tokens - A.cells
    lengths = [read.cache.get_seq_length(layer) for layer in range(4)]
    assert lengths == [spec.tokens, other + 26, other + 26, other + 11]  # ceil of 0.7 and 0.3 of 36
    assert [m.point.layer for m in read.merges] == [1, 3, 3]
    assert read.next_position == spec.tokens


def test_an_assistant_merges_as_its_run_did(merging_run, run_dir, video):
    assistant = Assistant(merging_run)
    assert assistant.config.merging.kind == "hierarchical" and len(assistant.model.points) == 2
    watched = assistant.watch(video.read_bytes())
    sample, tokens = assistant.prompt([{"role": "user", "content": "What is this?"}], [watched])
    read = assistant.model.prefill(sample, tokens, watched.patches)
    cells = watched.spec.cells
    assert len(read.hidden) <= len(tokens) - cells + cells // 2 + 1
    other = Assistant(run_dir, merging=assistant.config.merging)
    assert torch.equal(other.model.prefill(sample, tokens, watched.patches).hidden, read.hidden)
    assert len(Assistant(run_dir).model.prefill(sample, tokens, watched.patches).hidden) == len(tokens)
    pooled = Assistant(merging_run, merging=MERGINGS["pooling"])
    assert len(pooled.model.prefill(sample, tokens, watched.patches).hidden) < len(tokens)
    assert isinstance(pooled.answer([{"role": "user", "content": "What?"}], [watched], 2), str)


@pytest.mark.parametrize(
    ("merging", "said"),
    [
        (hierarchical((4.0, "budget", 0.5)), "merging.points[0].after=4"),
        (hierarchical((1.0, "budget", 0.5), survivor="middle"), "merging.survivor=middle"),
        (MergingConfig(kind="pooling", pooling=PoolingConfig(window=1)), "merging.pooling.window=1"),
    ],
)
def test_an_assistant_refuses_merging_that_does_not_fit(run_dir, merging, said):
    with pytest.raises(ConfigError, match=said.replace("[", r"\[").replace("]", r"\]")) as error:
        Assistant(run_dir, merging=merging)
    assert "\n" not in str(error.value)
