"""What ranks say to each other: takes note of it, and lets the notes of all ranks meet.

`Recorder` stands before the functions of torch.distributed in one process; `disagreements` and `Rendezvous` read what
it noted of every rank.
"""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections import Counter, deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

WORLD = -1
"""Number of the group of all ranks; the others are numbered as they are made."""

Value = tuple[tuple[int, ...], str]
"""Shape and dtype of a tensor."""


@dataclass(frozen=True)
class Collective:
    """One collective as this rank calls it.

    Attributes:
        kind: name of the function of torch.distributed.
        group: number of the group.
        values: tensors, in the order of the call.
        detail: root or reduction.
    """

    kind: str
    group: int
    values: tuple[Value, ...]
    detail: str = ""


@dataclass(frozen=True)
class Message:
    """One tensor to or from a global rank."""

    sends: bool
    peer: int
    value: Value


@dataclass(frozen=True)
class Exchange:
    """Messages that go together: one batch, or (not `batched`) a single one.

    Attributes:
        group: number of the group.
        messages: in the order of the batch.
        batched: one of ``batch_isend_irecv``; else every pair of ranks has a channel of its own, as with NCCL.
    """

    group: int
    messages: tuple[Message, ...]
    batched: bool = True


@dataclass(frozen=True)
class Post:
    """The rank issues an operation and goes on."""

    number: int
    operation: Collective | Exchange


@dataclass(frozen=True)
class Wait:
    """The rank waits for an operation that it issued."""

    number: int


@dataclass
class Record:
    """What one rank did.

    Attributes:
        rank: global rank.
        place: tensor, pipeline and data rank.
        groups: members of each group, in the order in which this rank made them.
        names: number of the group for each of its names in megatron-core (and ``ends``).
        events: all operations in order.
        step: number of events of the set-up, before the step begins.
        parameters: parameters of this rank.
        carried: boundary, micro-step and what was packed there, for every message sent.
        reads: how often the host read a value of the device, by place in the code.
        seconds: of this process for the set-up and for the step.
        layers: layers and lengths that the engine reports of the step.
    """

    rank: int
    place: tuple[int, int, int] = (0, 0, 0)
    groups: list[tuple[int, ...]] = field(default_factory=list)
    names: dict[str, int] = field(default_factory=dict)
    events: list[Post | Wait] = field(default_factory=list)
    step: int = 0
    parameters: int = 0
    reads: Counter[str] = field(default_factory=Counter)
    seconds: tuple[float, float] = (0.0, 0.0)
    layers: list[tuple[int, tuple[int, ...]]] = field(default_factory=list)

    def operations(self, step_only: bool = True) -> list[Collective | Exchange]:
        """The operations in order, of the step alone or with the set-up."""
        events = self.events[self.step :] if step_only else self.events
        return [e.operation for e in events if isinstance(e, Post)]


def value_of(tensor: Tensor) -> Value:
    """Shape and dtype."""
    return tuple(tensor.shape), str(tensor.dtype).removeprefix("torch.")


# --- recording ------------------------------------------------------------------------------------------------------

_COLLECTIVES = (
    *("all_reduce", "broadcast", "reduce", "gather", "scatter", "barrier", "all_to_all", "all_to_all_single"),
    *("all_gather", "all_gather_into_tensor", "_all_gather_base", "all_gather_single", "all_gather_coalesced"),
    *("reduce_scatter", "reduce_scatter_tensor", "_reduce_scatter_base", "reduce_scatter_single"),
)
_MESSAGES = ("isend", "irecv", "send", "recv")
_UNKNOWN = (
    *("broadcast_object_list", "gather_object", "scatter_object_list", "send_object_list", "recv_object_list"),
    *("monitored_barrier", "split_group", "new_subgroups", "new_subgroups_by_enumeration"),
)
"""Functions that nothing here uses; a call must not go unrecorded."""


class _Pending:
    """The handle of an operation."""

    def __init__(self, recorder: Recorder, number: int, work: Any) -> None:
        self._recorder, self._number, self._work = recorder, number, work

    def wait(self, *args: Any) -> bool:
        self._recorder.record.events.append(Wait(self._number))
        return True

    def __getattr__(self, name: str) -> Any:
        return getattr(self._work, name)


class _Together:
    """The handle of several operations."""

    def __init__(self, recorder: Recorder, numbers: list[int]) -> None:
        self._recorder, self._numbers = recorder, numbers

    def wait(self) -> None:
        self._recorder.record.events += [Wait(number) for number in self._numbers]


class Recorder:
    """Stands before the functions of torch.distributed: notes each call, then lets the fake process group have it."""

    def __init__(self) -> None:
        self.record = Record(-1)
        self.numbers: dict[int, int] = {}
        self.kept: list[Any] = []
        self.depth = self.gathers = 0
        self.together: list[int] | None = None
        self.known: dict[Any, Any] = {}
        self.scouting: set[int] = set()
        self.said: dict[tuple[int, int], Any] = {}
        self.originals: dict[str, Callable[..., Any]] = {}

    def begin(self, rank: int) -> Record:
        """Start the record of another rank."""
        self.record = Record(rank)
        self.numbers, self.kept, self.gathers = {}, [], 0
        return self.record

    def install(self) -> None:
        """Replace the functions wherever they were imported to."""
        wrappers: dict[str, Callable[..., Any]] = {
            **{name: self._collective(name) for name in _COLLECTIVES},
            **{name: self._single(name) for name in _MESSAGES},
            **{name: _refusing(name) for name in _UNKNOWN},
            "batch_isend_irecv": self._batch,
            "new_group": self._new_group,
            "all_gather_object": self._all_gather_object,
            "P2POp": self._p2p_op,
            "_coalescing_manager": self._coalescing,
        }
        self.originals = {name: getattr(dist, name) for name in wrappers if hasattr(dist, name)}
        self.originals["_coalescing_manager"] = dist.distributed_c10d._coalescing_manager
        by_identity = {id(self.originals[name]): wrappers[name] for name in self.originals}
        for name, module in list(sys.modules.items()):
            if name != "torch.distributed" and name.split(".")[0] not in ("megatron", "megatron_elva"):
                continue
            for key, held in list(vars(module).items()):
                if id(held) in by_identity:
                    setattr(module, key, by_identity[id(held)])

    def post(self, operation: Collective | Exchange) -> int:
        """Note an operation; its number."""
        number = len(self.record.events)
        operation = self.known.setdefault(operation, operation)  # thousands are equal: less to hold and to send
        self.record.events.append(Post(number, operation))
        return number

    def group_number(self, group: Any) -> int:
        """Number of a group; None stands for all ranks."""
        if group is None or group is dist.group.WORLD:
            return WORLD
        return self.numbers[id(group)]

    @contextmanager
    def _inside(self) -> Iterator[bool]:
        """Whether this call is the outermost: torch's own functions call each other."""
        self.depth += 1
        try:
            yield self.depth == 1
        finally:
            self.depth -= 1

    def _collective(self, name: str) -> Callable[..., Any]:
        original = getattr(dist, name, None)
        signature = inspect.signature(original) if original else None

        def run(*args: Any, **kwargs: Any) -> Any:
            assert original is not None and signature is not None
            with self._inside() as outermost:
                work = original(*args, **kwargs)
            if not outermost:
                return work
            given = signature.bind(*args, **kwargs).arguments
            tensors = [t for v in given.values() for t in (v if isinstance(v, list) else [v]) if isinstance(t, Tensor)]
            details = (given.get(key) for key in ("op", "src", "group_src", "dst", "group_dst"))
            detail = " ".join(str(d) for d in details if d is not None)
            kind = {"all_gather_into_tensor": "all_gather", "reduce_scatter_tensor": "reduce_scatter"}.get(name, name)
            number = self.post(
                Collective(kind, self.group_number(given.get("group")), tuple(map(value_of, tensors)), detail)
            )
            if self.together is not None:
                self.together.append(number)
            elif given.get("async_op"):
                return _Pending(self, number, work)
            else:
                self.record.events.append(Wait(number))
            return work

        return run

    @contextmanager
    def _coalescing(self, group: Any = None, device: Any = None, async_ops: bool = False) -> Iterator[Any]:
        """Substitute 9: collectives sent off together, here one after another, and waited for together."""
        assert self.together is None
        self.together = []
        pending = _Together(self, self.together)
        try:
            yield pending
        finally:
            self.together = None
        if not async_ops:
            pending.wait()

    def _message(self, sends: bool, tensor: Tensor, peer: int) -> Message:
        return Message(sends, peer, value_of(tensor))

    def _single(self, name: str) -> Callable[..., Any]:
        original = getattr(dist, name)
        signature = inspect.signature(original)

        def run(*args: Any, **kwargs: Any) -> Any:
            with self._inside() as outermost:
                work = original(*args, **kwargs)
            if not outermost:
                return work
            given = signature.bind(*args, **kwargs).arguments
            sends = name in ("isend", "send")
            group, peer = given.get("group"), given.get("dst" if sends else "src")
            if peer is None:
                peer = dist.get_global_rank(
                    group or dist.distributed_c10d._get_default_group(), given["group_dst" if sends else "group_src"]
                )
            message = self._message(sends, given["tensor"], peer)
            number = self.post(Exchange(self.group_number(group), (message,), batched=False))
            if name in ("isend", "irecv"):
                return _Pending(self, number, work)
            self.record.events.append(Wait(number))
            return work

        run.original = original  # type: ignore[attr-defined]
        return run

    def _p2p_op(self, op: Any, *args: Any, **kwargs: Any) -> Any:
        return self.originals["P2POp"](op.original, *args, **kwargs)

    def _batch(self, ops: list[Any]) -> list[Any]:
        with self._inside():
            works = self.originals["batch_isend_irecv"](ops)
        sending = self.originals["isend"]
        messages = tuple(self._message(op.op is sending, op.tensor, op.peer) for op in ops)
        number = self.post(Exchange(self.group_number(ops[0].group), messages))
        return [_Pending(self, number, work) for work in works]

    def _new_group(self, ranks: Sequence[int] | None = None, *args: Any, **kwargs: Any) -> Any:
        kwargs["backend"] = None  # substitute 2: the fake one, as the world has it
        with self._inside():
            group = self.originals["new_group"](ranks, *args, **kwargs)
        members = tuple(range(dist.get_world_size())) if ranks is None else tuple(ranks)
        self.numbers[id(group)] = len(self.record.groups)
        self.record.groups.append(members)
        self.kept.append(group)
        return group

    def _all_gather_object(self, found: list[Any], said: Any, group: Any = None) -> None:
        """Substitute 3."""
        assert group is None, "all_gather_object within a group: the harness does not know what the others say"
        number = self.post(Collective("all_gather_object", WORLD, ()))
        self.record.events.append(Wait(number))
        rank, world, call = dist.get_rank(), len(found), self.gathers
        self.gathers += 1
        if call == 0:  # `ranks._ends_group`
            found[:] = [place_in_replica(rank, world) for rank in range(world)]
        else:  # megatron-core's groups of parameters: the same on all ranks of one place in the pipeline
            place = pipeline_rank(rank, world)
            if place in self.scouting:
                self.said[call, place] = copy.deepcopy(said)
            found[:] = [
                copy.deepcopy(self.said.get((call, pipeline_rank(other, world)), said)) for other in range(world)
            ]
        assert said == found[rank], f"rank {rank} says {said}, the others were told {found[rank]}"


def _refusing(name: str) -> Callable[..., Any]:
    def refuse(*args: Any, **kwargs: Any) -> Any:
        raise AssertionError(f"{name}: the harness does not record this function; teach it")

    return refuse


def place_in_replica(rank: int, world: int) -> tuple[int, bool]:
    """First rank of this rank's replica, and whether it is at an end of the pipeline.

    Ranks count through tensor, then data, then pipeline ranks.
    """
    from megatron.core import parallel_state

    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    return rank % (world // pipeline) // tensor * tensor, pipeline_rank(rank, world) in (0, pipeline - 1)


def pipeline_rank(rank: int, world: int) -> int:
    """A global rank's place in the pipeline."""
    from megatron.core import parallel_state

    return rank // (world // parallel_state.get_pipeline_model_parallel_world_size())


# --- what the records say together ----------------------------------------------------------------------------------


def disagreements(records: Sequence[Record]) -> list[str]:
    """Where ranks do not say the same to each other, one line each.

    Compared are the groups that were made, the collectives of each group and the messages of each pair of ranks. Ranks
    that were not run are left out.
    """
    out = []
    first = records[0]
    for other in records[1:]:
        if other.groups != first.groups:
            out.append(f"ranks {first.rank} and {other.rank} make different groups, or in another order")
    sequences: dict[int, dict[int, list[Collective]]] = {}
    messages: dict[tuple[int, bool, int, int], dict[bool, list[Value]]] = {}
    for record in records:
        for operation in record.operations(step_only=False):
            if isinstance(operation, Collective):
                sequences.setdefault(operation.group, {}).setdefault(record.rank, []).append(operation)
                continue
            for message in operation.messages:
                ends = (record.rank, message.peer) if message.sends else (message.peer, record.rank)
                pair = messages.setdefault((operation.group, operation.batched, *ends), {True: [], False: []})
                pair[message.sends].append(message.value)
    present = {record.rank for record in records}
    for group, found in sequences.items():
        members = present if group == WORLD else present.intersection(first.groups[group])
        out += _differing(group, {rank: found.get(rank, []) for rank in sorted(members)})
    for (_, _, source, target), pair in messages.items():
        if {source, target} <= present:
            out += _unmatched(source, target, pair[True], pair[False])
    return out


def _differing(group: int, sequences: dict[int, list[Collective]]) -> list[str]:
    """Members whose collectives are not those of the first one."""
    name = "of all ranks" if group == WORLD else f"{group} of ranks {list(sequences)}"
    (rank, model), *others = sequences.items()
    out = []
    for other, sequence in others:
        if sequence == model:
            continue
        at = next((i for i, (a, b) in enumerate(zip(model, sequence, strict=False)) if a != b), None)
        if at is None:
            out.append(f"group {name}: rank {rank} has {len(model)} collectives, rank {other} {len(sequence)}")
        else:
            out.append(f"group {name}, collective {at}: rank {rank} {model[at]}, rank {other} {sequence[at]}")
    return out


def _unmatched(source: int, target: int, sent: list[Value], received: list[Value]) -> list[str]:
    if sent == received:
        return []
    at = next((i for i, (a, b) in enumerate(zip(sent, received, strict=False)) if a != b), None)
    if at is None:
        return [f"rank {source} sends {len(sent)} messages to rank {target}, which receives {len(received)}"]
    return [f"message {at} of rank {source} to rank {target}: sent {sent[at]}, received {received[at]}"]


class Rendezvous:
    """Lets the ranks run against each other: each goes on until it waits for an operation that others have not met yet.

    An operation takes its place in the queue of its communicator when it is issued, and what stands behind it in that
    queue cannot begin before it has ended, as on a NCCL stream. A collective ends when all members have it in front; a
    batch when every message in it has met its counterpart in the batch in front of the other rank. Messages outside of
    batches queue up by pair of ranks. A wait blocks the whole rank, which is stricter than a GPU is.
    """

    def __init__(self, records: Sequence[Record]) -> None:
        self.records = {record.rank: record for record in records}
        self.at = dict.fromkeys(self.records, 0)
        self.done: dict[int, set[int]] = {rank: set() for rank in self.records}
        self.queues: dict[Any, dict[int, deque[tuple[int, Any]]]] = {}

    def run(self) -> list[str]:
        """One line for each rank that never ends; empty if all do."""
        moving = deque(self.records)
        while moving:
            moving.extend(self._advance(moving.popleft()))
        return [self._stuck(rank) for rank, record in self.records.items() if self.at[rank] < len(record.events)]

    def _advance(self, rank: int) -> set[int]:
        """Run a rank until it must wait; the ranks that can go on because of it."""
        woken: set[int] = set()
        events = self.records[rank].events
        while self.at[rank] < len(events):
            event = events[self.at[rank]]
            if isinstance(event, Wait) and event.number not in self.done[rank]:
                break
            if isinstance(event, Post):
                woken |= self._post(rank, event)
            self.at[rank] += 1
        return woken - {rank}

    def _post(self, rank: int, event: Post) -> set[int]:
        operation = event.operation
        channel: Any = operation.group
        if isinstance(operation, Exchange) and not operation.batched:
            channel = (operation.group, frozenset((rank, operation.messages[0].peer)))
        content = list(operation.messages) if isinstance(operation, Exchange) else operation
        self.queues.setdefault(channel, {}).setdefault(rank, deque()).append((event.number, content))
        woken: set[int] = set()
        ready = [rank]
        while ready:  # what stands behind an operation that has ended may meet its counterpart now
            ended = self._meet(channel, ready.pop())
            woken |= ended
            ready += [r for r in ended if self.queues[channel].get(r)]
        return woken

    def _meet(self, channel: Any, rank: int) -> set[int]:
        """Let what is in front of a rank's queue end if it can; the ranks for which something ended."""
        queues = self.queues[channel]
        if not queues.get(rank):
            return set()
        content = queues[rank][0][1]
        if isinstance(content, Collective):
            members = set(self.records)
            if channel != WORLD:
                members &= set(self.records[rank].groups[channel])
            if not all(queues.get(r) and isinstance(queues[r][0][1], Collective) for r in members):
                return set()
            return {self._end(queues, r) for r in members}
        ended = set()
        for message in list(content):
            peer = message.peer
            if peer in self.records:
                if not queues.get(peer) or isinstance(queues[peer][0][1], Collective):
                    continue
                others = queues[peer][0][1]
                match = next((m for m in others if m.peer == rank and m.sends != message.sends), None)
                if match is None:
                    continue
                others.remove(match)
                if not others:
                    ended.add(self._end(queues, peer))
            content.remove(message)
        if not content:
            ended.add(self._end(queues, rank))
        return ended

    def _end(self, queues: dict[int, deque[tuple[int, Any]]], rank: int) -> int:
        number, _ = queues[rank].popleft()
        self.done[rank].add(number)
        return rank

    def _stuck(self, rank: int) -> str:
        events = self.records[rank].events
        wait = events[self.at[rank]]
        post = next(e for e in events if isinstance(e, Post) and e.number == wait.number)
        return f"rank {rank} waits for ever, at event {self.at[rank]} of {len(events)}: {post.operation}"


def problems(records: Sequence[Record]) -> list[str]:
    """All that is wrong with what the ranks say to each other, deadlocks first."""
    return Rendezvous(records).run() + disagreements(records)


def volumes(record: Record) -> dict[str, tuple[int, int]]:
    """How many operations of each kind a step has on this rank, and the bytes of their whole tensors.

    The whole tensor is what an all-gather gives and a reduce-scatter takes; kinds are told apart by group.
    """
    names = {number: name for name, number in reversed(record.names.items())} | {WORLD: "world"}
    out: dict[str, tuple[int, int]] = {}
    for operation in record.operations():
        if isinstance(operation, Collective):
            parts = [(f"{operation.kind} {names[operation.group]}", max(map(_bytes, operation.values), default=0))]
        else:
            parts = [("send" if m.sends else "receive", _bytes(m.value)) for m in operation.messages]
        for name, size in parts:
            count, total = out.get(name, (0, 0))
            out[name] = (count + 1, total + size)
    return out


def _bytes(value: Value) -> int:
    return math.prod(value[0]) * getattr(torch, value[1]).itemsize
