"""Token-budget packing: which samples share a pack."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipelines.packing import Budget, Lane, LaneState, Length, lanes_of
from megatron_elva.config.errors import InputError


def length_of(number, seed=0, largest=900):
    """A length that follows from the number alone, as a measured one does; some samples cannot be used."""
    rng = np.random.default_rng((seed, number))
    if rng.random() < 0.05:
        return None
    return Length(int(rng.integers(5, 80)), int(rng.integers(0, largest)))


def fill(lane, lengths=length_of):
    while not lane.is_full:
        number = lane.wanted()
        lane.give(number, lengths(number))


def packs_of(lane, n, lengths=length_of):
    out = []
    for _ in range(n):
        fill(lane, lengths)
        out.append(lane.pop())
    return out


BUDGETS = [Budget(2000), Budget(1200), Budget(2000, 300)]


@pytest.mark.parametrize("budget", BUDGETS)
def test_every_sample_is_in_one_pack_and_no_pack_is_too_long(budget):
    lanes = [Lane(v, 3, budget, 16) for v in range(3)]
    packs = [numbers for lane in lanes for numbers in packs_of(lane, 150)]
    seen = [n for numbers in packs for n in numbers]
    assert len(seen) == len(set(seen))
    for numbers in packs:
        lengths = [length_of(n) for n in numbers]
        assert all(x is not None for x in lengths)
        total = sum(lengths, Length(0, 0))
        assert budget.takes(total)
        assert total.tokens <= budget.tokens
        if budget.text is not None:
            assert total.text <= budget.text and total.visual <= budget.tokens - budget.text
    for v, lane in enumerate(lanes):
        done = {n for n in seen if n % 3 == v}
        looked_at = {v + 3 * k for k in range(lane.state.next)}
        usable = {n for n in looked_at if length_of(n) is not None}
        assert done | set(lane.state.waiting) == usable
        assert not done & set(lane.state.waiting)


def test_packs_are_full():
    lane = Lane(0, 1, Budget(4000), 64)
    used = [sum(length_of(n).tokens for n in numbers) for numbers in packs_of(lane, 200)]
    assert np.mean(used) / 4000 > 0.98


def test_nothing_waits_for_ever():
    """One sample that never fits beside the others, among many that fill packs perfectly; large or small."""
    for odd in (Length(0, 95), Length(0, 1)):

        def lengths(number, odd=odd):
            return odd if number == 7 else Length(0, 50)

        lane = Lane(0, 1, Budget(100), 16)
        packs = packs_of(lane, 12, lengths)
        assert any(7 in numbers for numbers in packs)


@settings(deadline=None)
@given(st.integers(1, 40), st.integers(0, 30), st.integers(1, 24), st.sampled_from(BUDGETS))
def test_a_state_goes_on_exactly(before, ahead, buffer, budget):
    """Whatever the number of packs taken, and however many lengths were already asked for."""
    lane = Lane(1, 2, budget, buffer)
    packs_of(lane, before)
    stored = json.loads(json.dumps(lane.state.to_dict()))
    for _ in range(ahead):
        lane.wanted()  # asked for, never told: does not count
    again = Lane(1, 2, budget, buffer, LaneState.from_dict(stored))
    unbroken = Lane(1, 2, budget, buffer)
    packs_of(unbroken, before)
    assert packs_of(again, 20) == packs_of(unbroken, 20)
    assert again.state == unbroken.state


def test_a_state_in_the_middle_of_refilling_goes_on_exactly():
    lane = Lane(0, 1, BUDGETS[0], 8)
    packs_of(lane, 3)
    for _ in range(3):
        number = lane.wanted()
        lane.give(number, length_of(number))
    again = Lane(0, 1, BUDGETS[0], 8, lane.state)
    for _ in range(2):  # and once more, before the restored one is full
        number = again.wanted()
        again.give(number, length_of(number))
    third = Lane(0, 1, BUDGETS[0], 8, again.state)
    assert packs_of(lane, 9) == packs_of(third, 9)


@given(st.integers(1, 9), st.integers(1, 9))
def test_ranks_share_the_lanes(size, per_rank):
    lanes = size * per_rank
    owned = [list(lanes_of(rank, size, lanes)) for rank in range(size)]
    assert sorted(n for own in owned for n in own) == list(range(lanes))
    assert all(len(own) == per_rank for own in owned)
    # micro-step a of the step holds lanes a * size .. (a + 1) * size - 1
    for a in range(per_rank):
        assert [own[a] for own in owned] == list(range(a * size, (a + 1) * size))


@pytest.mark.parametrize(
    ("budget", "length", "words"),
    [
        (Budget(100), Length(60, 50), "110 tokens, data.pack_tokens is 100"),
        (Budget(100, 20), Length(21, 0), "21 text tokens, data.pack_text_tokens is 20"),
        (Budget(100, 20), Length(1, 81), "81 visual tokens, data.pack_tokens - data.pack_text_tokens leaves 80"),
    ],
)
def test_what_can_be_in_no_pack_is_named(budget, length, words):
    assert not budget.takes(length)
    assert budget.refusal(length) == words


@pytest.mark.parametrize("stored", [{}, [], None, {"next": "x", "waiting": []}, {"next": 1, "waiting": 5}])
def test_a_damaged_state_is_refused(stored):
    with pytest.raises(InputError, match="state of a lane"):
        LaneState.from_dict(stored)
