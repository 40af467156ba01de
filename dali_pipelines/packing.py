"""Which samples share a pack, under a token budget: first-fit over a buffer of samples of known length.

The stream of samples is dealt out to lanes, one for each pack of a step: lane v of V gets samples v, v + V, v + 2V and
so on, and packs them on its own. A data-parallel rank owns whole lanes, so the number of ranks changes no pack, and a
rank reads its own samples only. All that a lane remembers are sample numbers.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from megatron_elva.config.errors import InputError


@dataclass(frozen=True)
class Length:
    """Tokens of a sample, or of several: of text, and of the visual spans before any merging."""

    text: int
    visual: int

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.text + self.visual

    def __add__(self, other: Length) -> Length:
        return Length(self.text + other.text, self.visual + other.visual)


@dataclass(frozen=True)
class Budget:
    """What a pack may hold.

    Attributes:
        tokens: all tokens at most, without padding.
        text: of these, text tokens at most; visual ones then have the rest. None: the two share it.
    """

    tokens: int
    text: int | None = None

    def takes(self, length: Length) -> bool:
        """Whether so much fits."""
        if self.text is None:
            return length.tokens <= self.tokens
        return length.text <= self.text and length.visual <= self.tokens - self.text

    def refusal(self, length: Length) -> str:
        """Why a sample of this length can be in no pack, in one line."""
        if self.text is None:
            return f"{length.tokens} tokens, data.pack_tokens is {self.tokens}"
        if length.text > self.text:
            return f"{length.text} text tokens, data.pack_text_tokens is {self.text}"
        return (
            f"{length.visual} visual tokens, data.pack_tokens - data.pack_text_tokens leaves {self.tokens - self.text}"
        )


@dataclass(frozen=True)
class LaneState:
    """Where a lane stands: plain numbers, whatever was prefetched.

    Attributes:
        next: samples of the lane that were looked at.
        waiting: global numbers of those that are in no pack yet, oldest first.
    """

    next: int = 0
    waiting: tuple[int, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON."""
        return {"next": self.next, "waiting": list(self.waiting)}

    @classmethod
    def from_dict(cls, stored: Any) -> LaneState:
        """Read what `to_dict` wrote.

        Raises:
            InputError: it is not that.
        """
        try:
            state = cls(int(stored["next"]), tuple(int(n) for n in stored["waiting"]))
            if min(state.next, *state.waiting, 0) < 0:
                raise ValueError("a negative number")
            return state
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"state of a lane: {error!r}; the checkpoint's data file is damaged") from error


class Lane:
    """Packs one lane's samples. Lengths come from outside, in the order in which `wanted` names the samples."""

    def __init__(self, lane: int, lanes: int, budget: Budget, buffer: int, state: LaneState | None = None) -> None:
        self.lane, self.lanes, self.budget, self.buffer = lane, lanes, budget, buffer
        state = state or LaneState()
        self._next = state.next
        self._again = list(state.waiting)  # after a resume their lengths are asked for once more
        self._asked = 0
        self._known: dict[int, Length] = {}

    def wanted(self) -> int:
        """Number of the next sample whose length is needed; call `give` for each in turn."""
        if self._asked < len(self._again):
            number = self._again[self._asked]
        else:
            number = self.lane + (self._next + self._asked - len(self._again)) * self.lanes
        self._asked += 1
        return number

    @property
    def missing(self) -> int:
        """How many lengths are still to be asked for until the buffer is full."""
        return max(self.buffer - len(self._known) - self._asked, 0)

    @property
    def is_full(self) -> bool:
        """Whether the next pack can be formed."""
        return len(self._known) >= self.buffer

    def give(self, number: int, length: Length | None) -> None:
        """Tell the length of the sample asked for first of those not told yet; None: it cannot be used."""
        self._asked -= 1
        if self._again:
            self._again.pop(0)
        else:
            self._next += 1
        if length is not None:
            self._known[number] = length

    def pop(self) -> tuple[int, ...]:
        """Numbers of the next pack in the order of the stream: the oldest sample, and of the rest the largest that fit.

        The oldest one is always in, so that none waits for ever.
        """
        oldest = next(iter(self._known))
        chosen, total = {oldest}, self._known[oldest]
        by_size = sorted(self._known.items(), key=lambda item: (-item[1].tokens, item[0]))
        for number, length in by_size:
            if number not in chosen and self.budget.takes(total + length):
                chosen.add(number)
                total += length
        for number in chosen:
            del self._known[number]
        return tuple(sorted(chosen))

    @property
    def state(self) -> LaneState:
        """Where the lane stands now."""
        return LaneState(self._next, (*self._known, *self._again))


def lanes_of(rank: int, size: int, lanes: int) -> Sequence[int]:
    """The lanes of a data-parallel rank in the order of their micro-steps: r, r + D, r + 2D ..."""
    return range(rank, lanes, size)
