"""Merging against plain loops over tokens, its gradient, its cost, and that it never waits for the device."""

from __future__ import annotations

import itertools
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from megatron_elva.config.merge_schedule import ResolvedPoint, budget, kept_cells
from megatron_elva.layout import Kind, PackSpec, PackState, SampleSpec, VideoSpec, initial_state
from megatron_elva.model import merging
from megatron_elva.model.merging import cell_sizes, merge
from tests.model import merging_reference as ref
from tests.model.merging_reference import SCENES, Step, Token, hidden_states, lay_out, merge_packs, schedules


def checked(examples: int) -> settings:
    """The same examples in every run."""
    return settings(max_examples=examples, derandomize=True, database=None, deadline=None)


SURVIVORS = st.sampled_from(["first", "last"])
MULTIPLES = st.sampled_from([1, 2, 4, 8])
SEEDS = st.integers(0, 2**31)
WIDTHS = st.sampled_from([1, 2, 3, 4, 8])


def threshold(tau: float) -> ResolvedPoint:
    return ResolvedPoint(0, 1, "threshold", tau, None)


def keep(share: float) -> ResolvedPoint:
    return ResolvedPoint(0, 1, "budget", None, share)


def pack(*segments: int | VideoSpec, padding: int = 0) -> PackSpec:
    return PackSpec((SampleSpec(segments),), padding)


def bits(x: torch.Tensor) -> torch.Tensor:
    return x.view(torch.int32 if x.dtype == torch.float32 else torch.int16)


def assert_state(state: PackState, tokens: list[Token], survivor: str) -> None:
    """Everything a state says, on the tensors and on the host, is what the list of tokens says."""
    spec, layout, tubes = state.spec, state.layout, state.tubes
    assert [Kind(k).name for k in layout.kind.tolist()] == [t.kind for t in tokens]
    for name in ("sample", "video", "frame", "cell", "position", "origin"):
        assert getattr(layout, name).tolist() == [getattr(t, name) for t in tokens], name
    assert layout.padding == sum(t.kind == "PADDING" for t in tokens)
    per_sample = Counter(t.sample for t in tokens)
    assert layout.lengths == tuple(per_sample[s] for s in range(len(spec.samples) + bool(layout.padding)))
    assert layout.tokens == len(tokens)

    names = ref.class_names(spec)
    assert [(c.video, c.number) for c in tubes.classes] == names
    cells = Counter((t.video, t.klass) for t in tokens if t.kind == "CELL")
    assert state.counts == tuple(cells[name] for name in names)
    assert all(type(n) is int for n in (*state.counts, *layout.lengths, layout.padding))
    assert [m.tolist() for m in state.merge_index()] == [ref.merge_matrix(tokens, spec, *name) for name in names]
    assert state.visual_tokens == sum(t.video >= 0 for t in tokens)

    slots = layout.slot.tolist()
    assert [s >= 0 for s in slots] == [t.kind == "CELL" for t in tokens]
    sizes = cell_sizes(state.alive, state, survivor).tolist()
    start, end = tubes.start.tolist(), tubes.end.tolist()
    whole: Counter[int] = Counter()
    for slot, token in zip(slots, tokens, strict=True):
        if slot >= 0:
            assert tubes.token[slot] == token.origin and bool(state.alive[slot])
            assert sizes[slot] == token.stands
            whole[start[slot]] += sizes[slot]
    assert whole == {a: b - a for a, b in zip(start, end, strict=True)}  # each tube stands for all of its frames


def assert_values(out: torch.Tensor, hidden: torch.Tensor, step: Step) -> None:
    """Hidden states after a merge point: means in the merged places, anything else as it was."""
    assert out.dtype == hidden.dtype
    values = hidden.float().numpy()
    expected = ref.weighted(step, values)
    for i, members in enumerate(step.sources):
        rows = values[[j for j, _ in members]]
        if not members:
            assert not out[i].any()
        elif step.tokens[i].kind not in ("CELL", "PADDING"):
            assert torch.equal(bits(out[i]), bits(hidden[members[0][0]]))
        elif len(members) == 1:
            np.testing.assert_array_equal(out[i].float().numpy(), rows[0])
        else:
            slack = 1e-6 * np.abs(rows).max(0, initial=0.0, where=np.isfinite(rows))
            if out.dtype == torch.bfloat16:  # rounded once, from the fp32 mean
                low, high = (torch.tensor(expected[i] + s).bfloat16().float().numpy() for s in (-slack, slack))
            else:
                low, high = expected[i] - slack, expected[i] + slack
            got = out[i].float().numpy()
            assert np.all(((got >= low) & (got <= high)) | ((got != got) & (expected[i] != expected[i])))


def follow(
    hidden: torch.Tensor, spec: PackSpec, points: list[ResolvedPoint], survivor: str, multiple: int
) -> tuple[torch.Tensor, PackState, list[Token], list[Step]]:
    """Pass all points, and compare with the loops after each."""
    state, tokens, steps = initial_state(spec), lay_out(spec), []
    assert_state(state, tokens, survivor)
    for number, point in enumerate(points):
        out, after = merge(hidden, state, point, survivor, multiple)
        gone = set(state.layout.origin.tolist()) - set(after.layout.origin.tolist())
        step = ref.merge_step(tokens, hidden.detach().float().numpy(), spec, point, survivor, multiple, gone)
        assert_state(after, step.tokens, survivor)
        assert_values(out.detach(), hidden.detach(), step)
        assert after.done == number + 1
        if point.rule == "budget":
            assert after.counts == tuple(
                min(n, budget(point.keep, c.frames, c.cells))
                for n, c in zip(state.counts, state.tubes.classes, strict=True)
            )
        if sum(after.counts) == sum(state.counts):
            assert out is hidden and after.layout is state.layout
        else:
            assert out.shape[0] % multiple == 0 and after.layout.padding < multiple
        hidden, state, tokens = out, after, step.tokens
        steps.append(step)
    return hidden, state, tokens, steps


@pytest.mark.parametrize("scene", SCENES)
@checked(200)
@given(merge_packs(), schedules(), SURVIVORS, MULTIPLES, WIDTHS, SEEDS)
def test_merging_equals_plain_loops(scene, spec, points, survivor, multiple, width, seed):
    spec = spec.padded_to(multiple)
    hidden = torch.from_numpy(hidden_states(spec, scene, seed, width))
    _, state, _, steps = follow(hidden, spec, points, survivor, multiple)
    if scene in ("integers", "signs", "equal", "zeros", "static_integers", "opposite"):
        assert steps[0].undecided == 0  # exact in fp32: nothing was left to the tested code
    if scene == "zeros" and points[0].rule == "threshold":
        merged = points[0].tau < 0  # a zero vector is at a right angle to all
        assert state.counts == tuple(
            c.cells if merged else n for n, c in zip(state.counts, state.tubes.classes, strict=True)
        )


@checked(150)
@given(merge_packs(), schedules(), SURVIVORS, MULTIPLES, st.sampled_from(SCENES), SEEDS)
def test_means_are_rounded_once_in_bf16(spec, points, survivor, multiple, scene, seed):
    spec = spec.padded_to(multiple)
    hidden = torch.from_numpy(hidden_states(spec, scene, seed, 4)).bfloat16()
    follow(hidden, spec, points, survivor, multiple)


@checked(150)
@given(merge_packs(), schedules(("budget",)), SURVIVORS, SEEDS)
def test_counts_of_budgets_are_known_beforehand(spec, points, survivor, seed):
    hidden, state = torch.from_numpy(hidden_states(spec, "normal", seed, 3)), initial_state(spec)
    known = [kept_cells(points, c.frames, c.cells) for c in state.tubes.classes]
    for number, point in enumerate(points):
        hidden, state = merge(hidden, state, point, survivor)
        assert state.counts == tuple(kept[number].count for kept in known)
        assert all(kept[number].exact for kept in known)
        assert hidden.shape[0] == state.layout.tokens == sum(state.layout.lengths)


@checked(150)
@given(
    merge_packs(), schedules(), SURVIVORS, MULTIPLES, st.sampled_from(SCENES), SEEDS,
    st.lists(st.integers(0, 40), min_size=2, max_size=3),
)  # fmt: skip
def test_padding_is_invisible(spec, points, survivor, multiple, scene, seed, paddings):
    real = torch.from_numpy(hidden_states(spec, scene, seed, 4))
    seen = []
    for padding, fill in zip(paddings, (0.0, float("nan"), 1e30), strict=False):
        hidden, state = torch.cat([real, torch.full((padding, 4), fill)]), initial_state(replace(spec, padding=padding))
        for point in points:
            hidden, state = merge(hidden, state, point, survivor, multiple)
            n = state.layout.tokens - state.layout.padding
            assert (state.layout.kind[n:] == Kind.PADDING).all()
            seen.append((state.alive, hidden[:n], state.layout.origin[:n], state.layout.position[:n], state.counts))
    for number, (alive, values, origin, position, counts) in enumerate(seen):
        first = seen[number % len(points)]
        assert torch.equal(alive, first[0]) and torch.equal(bits(values), bits(first[1]))
        assert torch.equal(origin, first[2]) and torch.equal(position, first[3]) and counts == first[4]


@checked(200)
@given(
    merge_packs(), schedules(), SURVIVORS, MULTIPLES, st.sampled_from(["integers", "normal", "static", "pan"]), SEEDS
)
def test_gradient_is_that_of_a_matrix(spec, points, survivor, multiple, scene, seed):
    spec = spec.padded_to(multiple)
    values = torch.from_numpy(hidden_states(spec, scene, seed, 4))
    hidden, plain = values.clone().requires_grad_(), values.clone().requires_grad_()
    out, _, _, steps = follow(hidden, spec, points, survivor, multiple)
    expected = plain
    for step in steps:
        expected = torch.from_numpy(ref.dense(step, expected.shape[0])) @ expected
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(seed))
    (got,) = torch.autograd.grad(out, hidden, upstream)
    (wanted,) = torch.autograd.grad(expected, plain, upstream)
    torch.testing.assert_close(got, wanted, rtol=1e-6, atol=1e-6)
    if any(len(step.tokens) != spec.tokens for step in steps) and spec.padding:
        assert not got[-spec.padding :].any()


@checked(150)
@given(merge_packs(), schedules(), SURVIVORS, SEEDS)
def test_weights_of_a_run_sum_to_one(spec, points, survivor, seed):
    hidden, state = torch.from_numpy(hidden_states(spec, "cuts", seed, 3)), initial_state(spec)
    for point in points:
        chosen = merging.choose(hidden, state, point)
        if chosen is not None:
            plan, _ = merging.make_plan(state, *chosen, survivor, 4)
            assert sum(plan.sizes.tolist()) == plan.members.numel() == sum(state.counts)
            sums = torch.stack([part.sum() for part in plan.share.split(plan.sizes.tolist())])
            torch.testing.assert_close(sums, torch.ones_like(sums), rtol=0, atol=1e-6)
            assert (plan.share > 0).all() and plan.into.unique().numel() == plan.into.numel()
        hidden, state = merge(hidden, state, point, survivor, 4)


@checked(200)
@given(
    st.lists(st.lists(st.sampled_from([-1.0, -0.5, -1e-30, -0.0, 0.0, 1e-30, 0.5, 1.0]), max_size=9), max_size=4),
    st.lists(st.integers(0, 9), min_size=4, max_size=4),
)
def test_most_similar_is_a_stable_sort(classes, take):
    take = [min(n, len(scores)) for n, scores in zip(take, classes, strict=False)]
    expected = []
    for n, scores in zip(take, classes, strict=True):
        best = sorted(range(len(scores)), key=lambda i, scores=scores: -scores[i])[:n]
        expected += [i in best for i in range(len(scores))]
    scores = torch.tensor([x for scores in classes for x in scores])
    assert merging.most_similar(scores, [*map(len, classes)], take).tolist() == expected


@pytest.mark.parametrize("survivor", ["first", "last"])
@pytest.mark.parametrize("point", [threshold(0.6), keep(0.1)])
def test_twins_do_not_merge_with_each_other(survivor, point):
    video = VideoSpec.uniform(4, 2, 3)
    for spec in (
        pack(video, video, video, padding=2),
        PackSpec(tuple(SampleSpec((video,)) for _ in range(3))),
        PackSpec((SampleSpec((2, video)), SampleSpec((video, video, 1)))),
    ):
        hidden, state = merge(torch.ones(spec.tokens, 4), initial_state(spec), point, survivor)
        stays = 0 if survivor == "first" else 3
        for m in state.merge_index():
            assert m.tolist() == [[int(frame == stays)] * 6 for frame in range(4)]
        assert state.counts == (6, 6, 6)
        assert (hidden == 1).all()


def test_classes_of_one_video_do_not_merge_with_each_other():
    hybrid = VideoSpec(((1, 2), (1, 2), (2, 1)), (0, 1, 2, 0, 1, 2, 0))  # equal grids, and yet two classes
    _, state = merge(torch.ones(hybrid.tokens, 4), initial_state(pack(hybrid)), threshold(0.6))
    assert [m.tolist() for m in state.merge_index()] == [
        [[1, 1], [0, 0], [0, 0]],
        [[1, 1], [0, 0]],
        [[1, 1], [0, 0]],
    ]


def test_a_similarity_of_tau_does_not_merge():
    spec = pack(VideoSpec.uniform(2, 1, 2))  # FRAME cell cell LINE, twice
    hidden = torch.zeros(8, 2)
    hidden[1], hidden[5] = torch.tensor([3.0, 4.0]), torch.tensor([1.0, 0.0])  # 3 / 5
    hidden[2], hidden[6] = torch.tensor([3.0, 4.0]), torch.tensor([8.0, 1.0])  # 28 / (5 * 8.06)
    out, state = merge(hidden, initial_state(spec), threshold(0.6))
    assert [m.tolist() for m in state.merge_index()] == [[[1, 1], [1, 0]]]
    assert out[2].tolist() == [5.5, 2.5]


def test_ties_go_to_the_earlier_frame_then_to_the_smaller_cell():
    spec = pack(VideoSpec.uniform(3, 2, 2))
    _, state = merge(torch.ones(spec.tokens, 2), initial_state(spec), keep(0.5))  # 6 links of 8
    assert [m.tolist() for m in state.merge_index()] == [[[1, 1, 1, 1], [0, 0, 0, 0], [0, 0, 1, 1]]]
    _, state = merge(torch.ones(spec.tokens, 2), initial_state(spec), keep(0.5), survivor="last")
    assert [m.tolist() for m in state.merge_index()] == [[[0, 0, 0, 0], [0, 0, 1, 1], [1, 1, 1, 1]]]


def test_a_slow_pan_is_one_run_and_its_ends_are_never_compared():
    spec = pack(VideoSpec.uniform(9, 1, 1))
    angle = torch.arange(9) * 0.4
    hidden = torch.zeros(spec.tokens, 2)
    cells = initial_state(spec).layout.where(Kind.CELL)
    hidden[cells] = torch.stack([angle.cos(), angle.sin()], 1)
    out, state = merge(hidden, initial_state(spec), threshold(0.6))
    assert state.counts == (1,) and hidden[cells[0]] @ hidden[cells[-1]] < -0.9
    torch.testing.assert_close(out[1], hidden[cells].mean(0), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf"), 3e38])
@pytest.mark.parametrize("point", [threshold(0.6), keep(0.5)])
def test_a_broken_row_stays_in_its_own_run(bad, point):
    spec = pack(2, VideoSpec.uniform(6, 1, 2), 2, VideoSpec.uniform(4, 1, 1), padding=3)
    state = initial_state(spec)
    hidden = torch.ones(spec.tokens, 4)
    cells = state.layout.where(Kind.CELL)
    hidden[cells[4]] = bad
    hidden[0] = bad
    out, after = merge(hidden, state, point)
    touched = (out != 1).any(1) & (after.layout.kind != Kind.PADDING)
    # the links of the broken cell come last, and there are enough others: it stays alone
    assert after.layout.origin[touched].tolist() == [0, int(cells[4])]


def test_nothing_to_merge_changes_nothing():
    for spec in (pack(5, padding=3), pack(2, VideoSpec.uniform(1, 3, 3), 1), PackSpec((SampleSpec((1,)),) * 3)):
        for point in (threshold(-0.5), keep(0.01)):
            hidden, state = torch.ones(spec.tokens, 4), initial_state(spec)
            out, after = merge(hidden, state, point, multiple=8)
            assert out is hidden and after.layout is state.layout and after.done == 1
            assert after == replace(state, done=1)


# Cost


class Ops(TorchDispatchMode):
    """Counts the operations, and those of them that would wait for a GPU."""

    WAITING = ("_local_scalar_dense", "nonzero", "masked_select", "unique", "_unique", "is_nonzero", "equal")

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.waits: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        name = func.__name__.split(".")[0]
        self.calls[name] += 1
        if name.startswith(self.WAITING):
            self.waits.append(name)
        if name in ("index", "index_put", "index_put_", "_index_put_impl_") and any(
            i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1]
        ):
            self.waits.append(f"{name} with a mask")
        if name == "repeat_interleave" and kwargs.get("output_size") is None:
            self.waits.append("repeat_interleave of unknown length")
        if name == "segment_reduce" and not kwargs.get("unsafe"):
            self.waits.append("segment_reduce that checks its lengths")
        return func(*args, **kwargs)


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Ops, Counter[str]]]:
    """Operations, and the methods of a tensor that hand values to Python (some of which dispatch nothing)."""
    reads: Counter[str] = Counter()
    with monkeypatch.context() as patch:
        for name in ("tolist", "item", "__bool__", "__int__", "__float__", "__index__", "nonzero", "numpy", "cpu"):
            original = getattr(torch.Tensor, name)

            def read(self, *args, name=name, original=original, **kwargs):
                reads[name] += 1
                return original(self, *args, **kwargs)

            patch.setattr(torch.Tensor, name, read)
        with Ops() as ops:
            yield ops, reads


def long_pack(frames: int, padding: int = 5) -> PackSpec:
    hybrid = VideoSpec(((2, 2), (1, 2)), tuple(i % 2 for i in range(frames)))
    return PackSpec((SampleSpec((3, VideoSpec.uniform(frames, 2, 3), 2)), SampleSpec((hybrid, 4))), padding)


@pytest.mark.parametrize("survivor", ["first", "last"])
@pytest.mark.parametrize(("point", "allowed"), [(keep(0.5), {}), (threshold(0.2), {"tolist": 1})])
def test_merging_does_not_wait_for_the_device(monkeypatch, survivor, point, allowed):
    spec = long_pack(8)
    hidden, state = torch.randn(spec.tokens, 8, generator=torch.Generator().manual_seed(1)), initial_state(spec)
    for first in (hidden, hidden.clone().requires_grad_()):
        now, before = first, state
        for _ in range(2):
            with counted(monkeypatch) as (ops, reads):
                out, after = merge(now, before, replace(point, keep=point.keep and point.keep / 2), survivor, 8)
                if out.requires_grad:
                    out.sum().backward(retain_graph=True)
            assert ops.waits == [] and dict(reads) == allowed
            if before is state:
                assert sum(after.counts) < sum(state.counts)
            now, before = out, after


def test_the_counter_sees_what_waits(monkeypatch):
    x, mask = torch.arange(4.0), torch.tensor([True, False, True, True])
    with counted(monkeypatch) as (ops, reads):
        x[mask], mask.nonzero(), bool(mask.any()), x.sum().item(), int(x[0]), x.tolist(), x.unique()
        torch.repeat_interleave(x, torch.tensor([1, 0, 2, 1]))
        torch.segment_reduce(x, "sum", lengths=torch.tensor([1, 3]))
        x[mask] = 0.0
    assert {"tolist", "__bool__", "item", "__int__", "nonzero"} <= set(reads)
    assert {"nonzero", "index with a mask", "repeat_interleave of unknown length"} <= set(ops.waits)
    assert "segment_reduce that checks its lengths" in ops.waits
    assert any(name.startswith("index_put") for name in ops.waits) and any("unique" in name for name in ops.waits)


@pytest.mark.parametrize("point", [keep(0.5), threshold(0.2)])
def test_longer_videos_take_no_more_operations(monkeypatch, point):
    found = []
    for frames in (32, 512):
        spec = long_pack(frames)
        hidden = torch.randn(spec.tokens, 8, generator=torch.Generator().manual_seed(1)).requires_grad_()
        state = initial_state(spec)
        with counted(monkeypatch) as (ops, _):
            out, after = merge(hidden, state, point, "first", 1)  # padded to nothing: the same operations
            out.sum().backward()
        assert sum(after.counts) < sum(state.counts)
        found.append(ops.calls)
    assert found[0] == found[1]


def seconds(frames: int) -> float:
    spec = pack(VideoSpec.uniform(frames, 8, 8))
    hidden, state = torch.randn(spec.tokens, 16, generator=torch.Generator().manual_seed(1)), initial_state(spec)
    times = []
    for _ in range(6):
        start = time.perf_counter()
        merge(hidden, state, keep(0.5))
        times.append(time.perf_counter() - start)
    return min(times)


def test_time_grows_with_the_number_of_cells(request):
    request.addfinalizer(partial(torch.set_num_threads, torch.get_num_threads()))
    torch.set_num_threads(1)  # threads that wait for each other on a busy machine measure the machine
    for _ in range(4):  # another process may spoil a try
        times = [seconds(frames) for frames in (32, 128, 512)]  # 2k, 8k and 32k cells
        if all(after < 6 * before for before, after in itertools.pairwise(times)):
            return
    pytest.fail(f"2k, 8k and 32k cells took {times} seconds")


def test_blocks_change_nothing(monkeypatch):
    """Large packs are taken in blocks, so that fp32 copies stay small."""
    spec = PackSpec((SampleSpec((3, VideoSpec.uniform(7, 3, 4), 2)),))
    for dtype in (torch.float32, torch.bfloat16):
        results = []
        for block in (2**25, 64, 1):
            monkeypatch.setattr(merging, "BLOCK", block)
            torch.manual_seed(0)
            hidden = torch.randn(spec.tokens, 24, dtype=dtype).requires_grad_()
            out, state = merging.merge(
                hidden, initial_state(spec), ResolvedPoint(0, 1, "budget", None, 0.4), "first", 4
            )
            (out.float() * torch.randn(out.shape)).sum().backward()
            results.append((out, state.alive, hidden.grad))
        assert results[0][0].shape[0] < spec.tokens
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(other, results[0], strict=True))
