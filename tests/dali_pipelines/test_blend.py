"""The order of samples."""

import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipelines.blend import BLOCK, Blend, shuffled
from megatron_elva.config.errors import ConfigError

weights = st.dictionaries(st.sampled_from("abcdef"), st.floats(1e-4, 10), min_size=1)


@settings(max_examples=150, deadline=None)
@given(weights=weights, n=st.integers(0, 10**9), step=st.integers(0, 3000))
def test_counts_follow_the_weights_without_drift(weights, n, step):
    blend = Blend(dict.fromkeys(weights, 10), weights, 0)
    total = sum(weights.values())
    here, later = blend.counts(n), blend.counts(n + step)
    assert sum(here) == n
    assert all(b >= a for a, b in zip(here, later, strict=True))
    for name, count in zip(blend.names, here, strict=True):
        assert abs(count - n * weights[name] / total) <= len(weights) + 1e-6 * n**0.5


@settings(max_examples=25, deadline=None)
@given(weights=weights, sizes=st.lists(st.integers(1, 400), min_size=6, max_size=6), seed=st.integers(0, 9))
def test_each_epoch_of_a_source_is_complete_and_disjoint(weights, sizes, seed):
    blend = Blend(dict(zip("abcdef", sizes, strict=True)), weights, seed)
    seen: dict = {}
    for i in range(3 * BLOCK):
        source, index, epoch = blend[i]
        seen.setdefault((source, epoch), []).append(index)
    for (source, epoch), indices in seen.items():
        size = sizes["abcdef".index(source)]
        assert len(set(indices)) == len(indices)
        assert all(0 <= i < size for i in indices)
        if (source, epoch + 1) in seen:
            assert sorted(indices) == list(range(size))


def test_stateless():
    blend = Blend({"a": 50, "b": 7}, {"a": 3.0, "b": 1.0}, 5)
    expected = [blend[i] for i in range(5000)]
    again = pickle.loads(pickle.dumps(Blend({"b": 7, "a": 50}, {"b": 1.0, "a": 3.0}, 5)))
    for i in np.random.default_rng(0).integers(0, 5000, 600):
        assert again[int(i)] == expected[i]
    # Far into a run a number costs no more than at its beginning.
    assert blend[10**12][0] in "ab"


def test_shares_of_every_block():
    blend = Blend({"a": 10, "b": 10, "c": 10}, {"a": 0.5, "b": 0.3, "c": 0.2}, 1)
    for block in range(5):
        names = [blend[block * BLOCK + i][0] for i in range(BLOCK)]
        for name, share in [("a", 0.5), ("b", 0.3), ("c", 0.2)]:
            assert abs(names.count(name) - share * BLOCK) <= 2
        first = names[: BLOCK // 2].count("a")
        assert 0 < first < BLOCK // 2  # mixed, not one source after the other


def test_seed_epoch_and_source_change_the_order():
    def order(seed, epoch, name="a"):
        blend = Blend({name: 100}, {name: 1.0}, seed)
        return [blend[epoch * 100 + i][1] for i in range(100)]

    base = order(0, 0)
    assert base == order(0, 0)
    assert base != list(range(100))
    assert len({tuple(o) for o in (base, order(1, 0), order(0, 1), order(0, 0, "b"))}) == 4


def test_the_order_is_pinned():
    """Runs are resumed with later versions: what was drawn once must stay."""
    assert shuffled(8, 0, 1, 2).tolist() == PINNED
    with pytest.raises(IndexError):
        Blend({"a": 1}, {"a": 1.0}, 0)[-1]


PINNED = [3, 4, 7, 6, 1, 5, 2, 0]


@pytest.mark.parametrize(
    ("sizes", "weights", "message"),
    [
        ({"a": 1}, {"b": 1.0}, "stage.blend.b: no such source; allowed: a"),
        ({"a": 0}, {"a": 1.0}, "has no samples"),
        ({"a": 1}, {"a": -1.0}, "at least 0"),
        ({"a": 1}, {"a": float("nan")}, "at least 0"),
        ({"a": 1}, {"a": 0.0}, "weight above 0"),
        ({"a": 1}, {}, "weight above 0"),
    ],
)
def test_what_cannot_be_blended(sizes, weights, message):
    with pytest.raises(ConfigError, match=message):
        Blend(sizes, weights, 0)


def test_a_source_of_weight_zero_is_left_out():
    blend = Blend({"a": 3, "b": 0}, {"a": 1.0, "b": 0.0}, 0)
    assert {blend[i][0] for i in range(2000)} == {"a"}
