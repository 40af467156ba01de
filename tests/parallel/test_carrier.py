"""Messages between pipeline ranks: what they bring back, what they cost, and what happens to damaged ones."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.merge_schedule import ResolvedPoint
from megatron_elva.config.schema import ParallelConfig
from megatron_elva.layout import PackSpec, PackState, SampleSpec, VideoSpec, initial_state
from megatron_elva.model.merging import merge
from megatron_elva.parallel.carrier import FIRST_LOOK, Carrier, encode, message_tokens
from tests.builders import small_config, small_model

HYBRID = VideoSpec(((3, 4), (1, 2)), (0, 1, 1, 0, 1))
PACKS = {
    "two videos": PackSpec((SampleSpec((3, VideoSpec.uniform(5, 3, 4), 7)), SampleSpec((2, HYBRID, 1))), 3),
    "text alone": PackSpec((SampleSpec((300,)), SampleSpec((1,)))),
    "one cell": PackSpec((SampleSpec((1, VideoSpec.uniform(1, 1, 1))),)),
    "long text": PackSpec((SampleSpec((70_000, VideoSpec.uniform(2, 3, 3))),)),
    "8 videos of 64 frames": PackSpec(tuple(SampleSpec((5, VideoSpec.uniform(64, 12, 12), 3)) for _ in range(8))),
    "many samples": PackSpec(tuple(SampleSpec((i + 1, VideoSpec.uniform(2, 1, 1 + i % 3))) for i in range(400))),
}


def merged(spec: PackSpec, keep: float = 0.5) -> PackState:
    """A state that a merge has left."""
    state = initial_state(spec)
    hidden = torch.randn(spec.tokens, 4, generator=torch.Generator().manual_seed(0))
    return merge(hidden, state, ResolvedPoint(0, 1, "budget", None, keep), multiple=4)[1]


def same(a: PackState, b: PackState) -> bool:
    """Whether two states are equal in everything."""
    layouts = [(getattr(a.layout, f.name), getattr(b.layout, f.name)) for f in fields(a.layout)]
    columns = all(torch.equal(x, y) if isinstance(x, torch.Tensor) else x == y for x, y in layouts)
    return columns and (a.spec, a.counts, a.done) == (b.spec, b.counts, b.done) and torch.equal(a.alive, b.alive)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [4, 32, 3584])
@pytest.mark.parametrize("name", PACKS)
def test_a_state_crosses_unchanged(name, width, dtype):
    for state in (initial_state(PACKS[name]), merged(PACKS[name])):
        hidden = torch.randn(min(state.layout.tokens, 64), 1, width).to(dtype)
        message = Carrier(dtype).send(hidden, state)
        assert message.dtype == dtype and message.is_contiguous()
        back, received = Carrier(dtype).receive(message)
        assert torch.equal(back, hidden)
        assert same(received, state)


def test_a_carrier_longer_than_the_first_look_is_read_whole():
    state = merged(PACKS["8 videos of 64 frames"])
    assert encode(state, 1).numel() > 2 * FIRST_LOOK
    hidden = torch.randn(8, 1, 16)
    _, received = Carrier(torch.bfloat16).receive(Carrier(torch.bfloat16).send(hidden.bfloat16(), state))
    assert same(received, state)


def test_fixed_messages_have_one_length_and_the_same_content():
    lengths = set()
    for name in ("two videos", "text alone", "one cell"):
        state = merged(PACKS[name])
        hidden = torch.randn(state.layout.tokens, 1, 32)
        carrier = Carrier(torch.float32, rows=400)
        message = carrier.send(hidden, state)
        lengths.add(message.shape[0])
        back, received = carrier.receive(message)
        assert torch.equal(back, hidden) and same(received, state)
        assert carrier.traffic.filler > 0
    assert lengths == {400}


def test_a_pack_that_does_not_fit_a_fixed_message_is_refused():
    state = merged(PACKS["text alone"])
    with pytest.raises(
        InputError, match=r"^parallel\.carrier=fixed: a pack needs \d+ rows .* parallel\.carrier_tokens"
    ):
        Carrier(torch.float32, rows=100).send(torch.randn(state.layout.tokens, 1, 32), state)


@pytest.mark.parametrize("at", [-1, -6, -9, -13, -20])
def test_damage_is_found(at):
    state = merged(PACKS["two videos"])
    message = Carrier(torch.float32).send(torch.randn(state.layout.tokens, 1, 32), state)
    message.view(-1)[at] += 1
    with pytest.raises(RuntimeError, match="between pipeline ranks"):
        Carrier(torch.float32).receive(message)


def test_a_message_without_a_carrier_is_found():
    """What a wrongly paired receive gets: some gradient, or hidden states of another length."""
    with pytest.raises(RuntimeError, match="carries no merge index"):
        Carrier(torch.float32).receive(torch.randn(40, 1, 32))


def test_swapped_bytes_are_found():
    state = initial_state(PACKS["two videos"])
    message = Carrier(torch.float32).send(torch.randn(state.layout.tokens, 1, 32), state)
    flat = message.view(-1)
    payload = encode(state, 1).numel() - 12
    start = flat.numel() - 12 - payload
    different = next(i for i in range(start, flat.numel() - 13) if flat[i] != flat[i + 1])
    flat[different : different + 2] = flat[different : different + 2].flip(0)
    with pytest.raises(RuntimeError, match="damaged"):
        Carrier(torch.float32).receive(message)


def test_the_carrier_needs_a_dtype_that_holds_a_byte():
    with pytest.raises(ConfigError, match=r"holds 0\.\.255"):
        Carrier(torch.float8_e4m3fn)
    assert all(torch.arange(256).to(d).long().equal(torch.arange(256)) for d in (torch.float16, torch.bfloat16))


def test_hidden_states_of_another_dtype_are_not_sent():
    state = merged(PACKS["two videos"])
    with pytest.raises(RuntimeError, match="bfloat16"):
        Carrier(torch.float32).send(torch.randn(state.layout.tokens, 1, 32).bfloat16(), state)


def test_gradients_pass_and_the_carrier_gets_none():
    state = merged(PACKS["two videos"])
    hidden = torch.randn(state.layout.tokens, 1, 32, requires_grad=True)
    message = Carrier(torch.float32).send(hidden, state)
    leaf = message.detach().requires_grad_()
    received, _ = Carrier(torch.float32).receive(leaf)
    weight = torch.randn_like(received)
    (received * weight).sum().backward()
    assert leaf.grad.shape == leaf.shape and not leaf.grad[received.shape[0] :].any()
    message.backward(leaf.grad)
    assert torch.equal(hidden.grad, weight)


def test_the_carrier_of_the_7b_model_is_below_one_percent():
    """32 frames of 336 x 336 at width 3584: 157 tokens a frame, and at tensor 4 each rank sends a quarter of them."""
    state = initial_state(PackSpec((SampleSpec((64, VideoSpec.uniform(32, 12, 12))),)))
    for point in (None, ResolvedPoint(0, 2, "budget", None, 0.2)):
        if point is not None:
            hidden = torch.randn(state.layout.tokens, 4)
            state = merge(hidden, state, point, multiple=4)[1]
        for tensor in (1, 4):
            carrier = Carrier(torch.bfloat16)
            carrier.send(torch.zeros(state.layout.tokens // tensor, 1, 3584, dtype=torch.bfloat16), state)
            assert 0 < carrier.traffic.share < 0.01
            print(f"tensor {tensor}, {state.layout.tokens} tokens: {carrier.traffic.line()}")


@pytest.mark.parametrize("tensor", [1, 2])
def test_the_default_length_of_fixed_messages_holds_the_largest_pack(tensor):
    parallel = ParallelConfig(tensor=tensor, pipeline=2, sequence=tensor > 1, carrier="fixed")
    config = small_config(small_model(hidden=32), parallel=parallel, tasks_per_node=2 * tensor)
    config = replace(config, data=replace(config.data, frames=6, max_pixels=24 * 24, max_text_tokens=20))
    tokens = message_tokens(config)
    assert tokens is not None and tokens % tensor == 0
    for rows, columns in ((6, 6), (12, 3), (3, 12)):
        sample = SampleSpec((10, VideoSpec.uniform(6, rows, columns), 10))
        state = initial_state(PackSpec((sample, sample)).padded_to(tensor))
        Carrier(torch.float32, tokens // tensor).send(torch.zeros(state.layout.tokens // tensor, 1, 32), state)
    free = replace(config, parallel=replace(parallel, carrier_tokens=1001))
    assert message_tokens(free) == 1000 + tensor
    assert message_tokens(replace(config, precision=replace(config.precision, fp8="current"))) in range(
        tokens, tokens + 16 * tensor
    )
    assert message_tokens(replace(config, parallel=replace(parallel, carrier="rows"))) is None
