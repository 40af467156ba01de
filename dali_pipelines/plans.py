"""Which samples a data-parallel rank's packs are made of, pack after pack, and where that stands."""

from __future__ import annotations

import itertools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from dali_pipelines.builder import Measured
from dali_pipelines.packing import Budget, Lane, LaneState, lanes_of
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.layout import Skipped

HOPELESS = 1000
"""Bad samples in a row after which no good one is expected any more."""

_AHEAD = 4  # lanes whose lengths are asked for before their turn: the first pack shall not wait for all lanes
_CHUNK = 8  # samples measured by one task: a task costs about as much as one of them

Measuring = Callable[[], list[Measured]]
"""Waits for lengths that were asked for."""

Ask = Callable[[tuple[int, ...]], Measuring]
"""Asks for the lengths of samples by their numbers."""


@dataclass(frozen=True)
class Plan:
    """One pack to be built.

    Attributes:
        numbers: its samples.
        bad: samples that were found to be bad on the way to it.
        state: what of the state changes once the pack was used.
    """

    numbers: tuple[int, ...]
    bad: list[Skipped] = field(default_factory=list)
    state: dict[str, Any] = field(default_factory=dict)


class SampleShare:
    """Without a token budget: of each micro-step's samples, this rank's share is one pack.

    Of the ``per_step`` samples of micro-step m, which are numbers ``m * per_step`` and on of the stream, rank d of D
    packs those from ``d * per_step // D`` to ``(d + 1) * per_step // D``. The state is ``{"micro_step": m}``.
    """

    def __init__(self, per_step: int, rank: int, size: int) -> None:
        if not 0 <= rank < size <= per_step:
            raise ConfigError(
                f"train.global_batch: {per_step} samples a micro-step cannot be shared by {size} data-parallel "
                f"ranks (this is rank {rank}); allowed: at least one for each"
            )
        self.per_step = per_step
        self.share = range(rank * per_step // size, (rank + 1) * per_step // size)

    def start(self, step: int, accumulate: int) -> dict[str, Any]:
        """The state after so many steps of ``accumulate`` micro-steps."""
        return {"micro_step": step * accumulate}

    def own(self, state: dict[str, Any]) -> dict[str, Any]:
        """What of a state concerns this rank."""
        return state

    def numbers(self, micro_step: int) -> tuple[int, ...]:
        """Samples of a micro-step."""
        return tuple(micro_step * self.per_step + n for n in self.share)

    def plans(self, state: dict[str, Any], ask: Ask) -> Iterator[Plan]:
        """The packs from a state on, without end."""
        for m in itertools.count(state["micro_step"]):
            yield Plan(self.numbers(m), state={"micro_step": m + 1})


class LaneShare:
    """With a token budget: this rank's lanes, a pack of each in turn.

    The state is ``{"lanes": {lane: ...}, "total": V, "turn": t, "size": D}``, t packs into a step on each of D ranks;
    `merged` puts those of all ranks together, and a rank takes its own of it. Between steps t is 0, and D may change.
    """

    def __init__(self, budget: Budget, buffer: int, lanes: int, rank: int, size: int) -> None:
        if lanes % size or not 0 <= rank < size:
            raise ConfigError(
                f"train.global_batch: {lanes} packs a step cannot be shared evenly by {size} data-parallel ranks"
            )
        self.budget, self.buffer, self.lanes = budget, buffer, lanes
        self.owned, self.size = lanes_of(rank, size, lanes), size

    def start(self, step: int, accumulate: int) -> dict[str, Any]:
        """The state at the beginning; later ones come with a checkpoint."""
        if step:
            raise InputError(
                f"step {step}: the checkpoint has no state of the token-budget packing; was it written with "
                "data.pack_tokens=null? Set that, or start another run_dir with init_from"
            )
        lanes = {str(lane): LaneState().to_dict() for lane in self.owned}
        return {"lanes": lanes, "total": self.lanes, "turn": 0, "size": self.size}

    def own(self, state: dict[str, Any]) -> dict[str, Any]:
        """What of a state concerns this rank: other ranks' lanes go on there, and what is known of them here gets old.

        Raises:
            InputError: the state is damaged, is of another number of lanes, or was saved within a step of another
                number of ranks.
        """
        try:
            lanes, total, turn, size = state["lanes"], state["total"], int(state["turn"]), state["size"]
            kept = {str(lane): LaneState.from_dict(lanes[str(lane)]).to_dict() for lane in self.owned}
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"the state of the data is damaged or not complete: {error!r}") from error
        if total != self.lanes:
            raise InputError(f"train.global_batch={self.lanes}: the state of the data is that of {total} packs a step")
        if turn and size != self.size:
            raise InputError(
                f"the data's state was saved within a step on {size} data-parallel ranks, and these are {self.size}; "
                "go on from a checkpoint, which stands between steps"
            )
        return {"lanes": kept, "total": self.lanes, "turn": turn, "size": self.size}

    def plans(self, state: dict[str, Any], ask: Ask) -> Iterator[Plan]:
        """The packs from a state on, without end."""
        state = self.own(state)
        feeds = []
        for number in self.owned:
            saved = LaneState.from_dict(state["lanes"][str(number)])
            feeds.append(_Feed(Lane(number, self.lanes, self.budget, self.buffer, saved), ask))
        for turn in itertools.count(state["turn"]):
            for soon in range(turn, turn + min(_AHEAD, len(feeds))):
                feeds[soon % len(feeds)].order()
            feed = feeds[turn % len(feeds)]
            bad = feed.fill()
            numbers = feed.lane.pop()
            lanes = {str(feed.lane.lane): feed.lane.state.to_dict()}
            after = {"lanes": lanes, "total": self.lanes, "turn": (turn + 1) % len(feeds), "size": self.size}
            yield Plan(numbers, bad, after)


class _Feed:
    """Keeps a lane supplied with lengths."""

    def __init__(self, lane: Lane, ask: Ask) -> None:
        self.lane = lane
        self._ask = ask
        self._asked: deque[Measuring] = deque()

    def order(self) -> None:
        """Ask for what is missing in the lane's buffer."""
        while self.lane.missing:
            numbers = tuple(self.lane.wanted() for _ in range(min(self.lane.missing, _CHUNK)))
            self._asked.append(self._ask(numbers))

    def fill(self) -> list[Skipped]:
        """Wait until the buffer is full; returns the bad samples met.

        Raises:
            InputError: there are only bad ones.
        """
        bad: list[Skipped] = []
        in_a_row = 0
        while not self.lane.is_full:
            self.order()
            for measured in self._asked.popleft()():
                self.lane.give(measured.number, measured.length)
                in_a_row = 0 if measured.bad is None else in_a_row + 1
                if measured.bad is not None:
                    bad.append(measured.bad)
            if in_a_row >= HOPELESS:
                raise InputError(f"{in_a_row} samples in a row are bad, the last one {bad[-1].key}: {bad[-1].reason}")
        return bad


def merged(states: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The states of all data-parallel ranks, or a state and what changed in it, as one."""
    out: dict[str, Any] = {}
    for state in states:
        for key, value in state.items():
            out[key] = {**out.get(key, {}), **value} if isinstance(value, dict) else value
    return out
