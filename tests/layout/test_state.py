"""The state of a pack: rebuilt from the merge index alone, and the host numbers in it."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_elva.layout import PackSpec, PackState, SampleSpec, VideoSpec, initial_state, restored_state
from megatron_elva.layout.compact import compact, on_device
from megatron_elva.model.merging import merge
from tests.model.merging_reference import SCENES, hidden_states, lay_out, merge_packs, schedules

EXAMPLES = settings(max_examples=200, derandomize=True, database=None, deadline=None)


def assert_same(a: PackState, b: PackState) -> None:
    """Two states say the same in every field, host numbers and tensors alike."""
    assert (a.spec, a.counts, a.done, a.tubes.classes) == (b.spec, b.counts, b.done, b.tubes.classes)
    assert (a.layout.lengths, a.layout.padding) == (b.layout.lengths, b.layout.padding)
    for x, y in ((a.layout, b.layout), (a.tubes, b.tubes)):
        for field in fields(x):
            one, two = getattr(x, field.name), getattr(y, field.name)
            if isinstance(one, torch.Tensor):
                assert one.dtype == two.dtype == torch.long and torch.equal(one, two), field.name
    assert a.alive.dtype == b.alive.dtype == torch.bool and torch.equal(a.alive, b.alive)


@EXAMPLES
@given(
    merge_packs(), schedules(), st.sampled_from(["first", "last"]), st.sampled_from([1, 2, 4, 8]),
    st.sampled_from(SCENES), st.integers(0, 2**31), st.integers(0, 40),
)  # fmt: skip
def test_a_restored_state_is_the_merged_one(spec, points, survivor, multiple, scene, seed, padding):
    spec = replace(spec, padding=padding)
    hidden, state = torch.from_numpy(hidden_states(spec, scene, seed, 3)), initial_state(spec)
    assert_same(restored_state(spec, state.alive, 0, padding), state)
    for point in points:
        hidden, state = merge(hidden, state, point, survivor, multiple)
        assert_same(restored_state(spec, state.alive, state.done, state.layout.padding), state)


@EXAMPLES
@given(merge_packs(), st.integers(0, 2**31), st.integers(0, 12), st.integers(0, 12))
def test_a_restored_state_drops_what_is_not_alive(spec, seed, before, padding):
    spec = replace(spec, padding=before)
    start = initial_state(spec)
    alive = torch.rand(start.tubes.cells, generator=torch.Generator().manual_seed(seed)) < 0.5
    alive |= torch.arange(start.tubes.cells) == start.tubes.start  # a tube never loses all of its tokens
    state = restored_state(spec, alive, 3, padding)

    gone = set(start.tubes.token[~alive].tolist())
    kept = [t for t in lay_out(replace(spec, padding=0)) if t.origin not in gone]
    n = len(kept)
    for name in ("sample", "video", "frame", "cell", "position", "origin"):
        assert getattr(state.layout, name)[:n].tolist() == [getattr(t, name) for t in kept], name
    assert state.layout.tokens == n + padding == sum(state.layout.lengths)
    assert torch.bincount(state.layout.sample, minlength=len(state.layout.lengths)).tolist() == [*state.layout.lengths]
    assert len(state.layout.lengths) == len(spec.samples) + (padding > 0)
    assert state.visual_tokens == sum(t.video >= 0 for t in kept)
    assert [int(m.sum()) for m in state.merge_index()] == [*state.counts] and state.done == 3


def test_the_merge_index_is_one_matrix_for_each_class():
    hybrid = VideoSpec(((1, 2), (9, 9), (1, 1)), (0, 2, 0))  # no frame of the second class
    spec = PackSpec((SampleSpec((1, hybrid)), SampleSpec((VideoSpec.uniform(2, 1, 1),))))
    alive = torch.tensor([True, False, True, True, True, False, True])  # tube by tube
    state = restored_state(spec, alive, 1, 0)
    assert [m.tolist() for m in state.merge_index()] == [[[1, 1], [0, 1]], [[1]], [[0], [1]]]
    assert state.counts == (3, 1, 1) and all(m.dtype == torch.uint8 for m in state.merge_index())
    assert state.layout.lengths == (1 + 4 + 3 + 4 - 1, 3 + 3 - 1)


def test_text_alone_has_no_merge_index():
    state = initial_state(PackSpec((SampleSpec((4,)),), 4))
    assert state.merge_index() == [] and state.counts == () and state.visual_tokens == 0
    assert_same(restored_state(state.spec, state.alive, 2, 4), replace(state, done=2))


def test_a_state_moves_as_a_whole():
    spec = PackSpec((SampleSpec((2, VideoSpec.uniform(2, 1, 2))),), 1)
    moved = initial_state(spec).to("meta")
    tensors = [moved.alive, *vars(moved.layout).values(), *vars(moved.tubes).values()]
    assert {t.device.type for t in tensors if isinstance(t, torch.Tensor)} == {"meta"}
    assert moved.counts == (4,) and moved.layout.lengths == initial_state(spec).layout.lengths


@EXAMPLES
@given(st.lists(st.booleans(), max_size=30))
def test_compact_is_nonzero(marks):
    mask = torch.tensor(marks, dtype=torch.bool)
    assert compact(mask, sum(marks)).tolist() == mask.nonzero().flatten().tolist()


@pytest.mark.parametrize("numbers", [(), (3,), (5, 0, 2**40)])
def test_host_numbers_become_a_tensor(numbers):
    moved = on_device(numbers, torch.device("cpu"))
    assert moved.dtype == torch.long and moved.tolist() == [*numbers]
