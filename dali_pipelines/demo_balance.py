"""What the demo corpus holds equally often: which digit images a split may use and how answers are dealt out."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache

import numpy as np
from sklearn.datasets import load_digits

SPLITS = ("train", "heldout")
DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
COUNTS = ("one", "two", "three", "four")


@dataclass(frozen=True)
class Slot:
    """The balanced part of a scene.

    Attributes:
        kind: ``move``, ``count``, ``order`` or ``change``.
        digit: the digit it is about.
        answer: the answer of its kind's own question; of ``order`` the digit.
        count: whether it is also asked how many digits there are.
    """

    kind: str
    digit: int
    answer: str
    count: bool = False


@cache
def digit_images(split: str) -> tuple[tuple[int, ...], ...]:
    """Indices into scikit-learn's handwritten digits that a split may use, for each of the ten digits.

    Every fifth image of a digit is held out.
    """
    target = load_digits().target
    pools = []
    for digit in range(10):
        images = np.flatnonzero(target == digit).tolist()
        held_out = images[4::5]
        pools.append(tuple(held_out if split == "heldout" else sorted(set(images) - set(held_out))))
    return tuple(pools)


@cache
def video_deck() -> tuple[Slot, ...]:
    """The slots of 150 videos, in which the answers of every type are equally frequent.

    Some of the videos that count are ``move`` (one digit) and ``order`` (two digits).
    """
    move = [Slot("move", d, way, d == 3 * i) for d in range(10) for i, way in enumerate(DIRECTIONS)]
    change = [Slot("change", d, answer) for d in range(10) for answer in ("yes", "no") * 2]
    order = [Slot("order", d, str(d), n == 0 and d % 5 < 3) for d in range(10) for n in range(4)]
    count = [Slot("count", n, COUNTS[k], True) for k, copies in enumerate((6, 4, 10, 10)) for n in range(copies)]
    return tuple(move + change + order + count)


@cache
def image_deck() -> tuple[Slot, ...]:
    """The slots of 90 images: single digits and groups."""
    single = [Slot("count", d, "one", n == 0) for d in range(10) for n in range(6)]
    return tuple(single + [Slot("count", d, answer, True) for d in range(10) for answer in COUNTS[1:]])


@lru_cache(maxsize=64)
def _order(seed: int, stream: int, block: int, size: int) -> tuple[int, ...]:
    return tuple(np.random.default_rng([seed, stream, block, 1]).permutation(size).tolist())


def deal(deck: tuple[Slot, ...], seed: int, stream: int, index: int) -> Slot:
    """The slot of sample ``index``: each block of as many samples as the deck holds gets the whole deck, shuffled."""
    block, place = divmod(index, len(deck))
    return deck[_order(seed, stream, block, len(deck))[place]]
