"""Times of a training step and of a prefill, and within them of the decoder and its merge points.

How: on a GPU by events on the current stream, else by the host's clock, or by the CPU time of this process: on a shared
machine that leaves out what others get, and is worth something with one thread alone (more would wait spinning).
Forward parts lie between two stamps. Backward parts lie between two gradients: that of a part's output, which is ready
when the backward pass enters the part, and that of its input, ready when it leaves. Hooks on those two tensors take the
stamps, so parts are timed where they run.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from megatron_elva.model.decoder import Decoder
from megatron_elva.model.elva import ElvaModel
from megatron_elva.model.inputs import LossInputs, ModelInputs


@dataclass(frozen=True)
class Clock:
    """Stamps of one device.

    Attributes:
        device: of the model.
        cpu_time: count the CPU time of this process; on the host only.
    """

    device: torch.device
    cpu_time: bool = False

    def stamp(self) -> Any:
        """Now, on the device's own time line."""
        if self.device.type != "cuda":
            return time.process_time() if self.cpu_time else time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def wait(self) -> None:
        """Wait until the device has done all it was given."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def seconds(self, start: Any, end: Any) -> float:
        """Time between two stamps; on a GPU only after `wait`."""
        return float(start.elapsed_time(end)) / 1000 if self.device.type == "cuda" else end - start


@dataclass
class Probe:
    """Times of parts of one run.

    Attributes:
        clock: of the model's device.
        spans: name, start and end of each part.
    """

    clock: Clock
    spans: list[tuple[str, Any, Any]] = field(default_factory=list)

    def backward(self, name: str, entered: Tensor, left: Tensor) -> None:
        """Time the backward pass of a part from the gradient of its output `left` to that of its input `entered`."""
        if not (entered.requires_grad and left.requires_grad):
            return
        begun: list[Any] = []
        left.register_hook(lambda grad: begun.append(self.clock.stamp()))
        entered.register_hook(lambda grad: self.spans.append((name, begun[0], self.clock.stamp())))

    def timed(self, name: str, function: Callable[..., Any], tensors: bool) -> Callable[..., Any]:
        """The function, timed; where its first argument and result are `tensors`, in the backward pass as well."""

        def run(*args: Any, **kwargs: Any) -> Any:
            start = self.clock.stamp()
            out = function(*args, **kwargs)
            self.spans.append((f"{name}_forward", start, self.clock.stamp()))
            if tensors:
                self.backward(f"{name}_backward", args[0], out[0])
            return out

        return run

    def total(self, name: str, skip: int = 0) -> float:
        """Seconds in all parts of a name, without the first `skip` of them."""
        return sum(self.clock.seconds(start, end) for n, start, end in self._of(name)[skip:])

    def _of(self, name: str) -> list[tuple[str, Any, Any]]:
        return [span for span in self.spans if span[0] == name]


@contextmanager
def watched(decoder: Decoder, probe: Probe) -> Iterator[None]:
    """Time the decoder, its merge points, and what attention derives from the layout behind each."""
    merge, sequence, forward = decoder._merge, decoder._sequence, decoder.forward
    parts = {
        "_merge": probe.timed("merge", merge, tensors=True),
        "_sequence": probe.timed("sequence", sequence, tensors=False),
        "forward": probe.timed("decoder", forward, tensors=True),
    }
    for name, function in parts.items():
        decoder.__dict__[name] = function
    try:
        yield
    finally:
        for name in parts:
            del decoder.__dict__[name]


def training_step(model: ElvaModel, inputs: ModelInputs, clock: Clock) -> dict[str, float]:
    """Forward and backward pass of one pack, without an optimizer; seconds by part."""
    if inputs.loss is None:
        raise ValueError("a training step needs labels")
    for parameter in model.parameters():
        parameter.grad = None
    probe = Probe(clock)
    clock.wait()
    with watched(model.decoder, probe):
        start = clock.stamp()
        (model(inputs) * inputs.loss.weights).sum().backward()
        end = clock.stamp()
    clock.wait()
    merge = {name: probe.total(name) for name in ("merge_forward", "merge_backward")}
    # the first sequence is that of the pack as it comes, which every model needs
    merge["merge_sequence"] = probe.total("sequence_forward", skip=1)
    return {
        "step": clock.seconds(start, end),
        "decoder": probe.total("decoder_forward") + probe.total("decoder_backward"),
        **merge,
        "merge": sum(merge.values()),
    }


@torch.no_grad()
def prefill(model: ElvaModel, inputs: ModelInputs, clock: Clock) -> dict[str, float]:
    """Forward pass of one pack without gradients, with the head at each sample's last position; seconds by part."""
    last = _last_positions(inputs)
    probe = Probe(clock)
    clock.wait()
    with watched(model.decoder, probe):
        start = clock.stamp()
        model(ModelInputs(inputs.state, inputs.visual, last))
        end = clock.stamp()
    clock.wait()
    return {
        "prefill": clock.seconds(start, end),
        "prefill_decoder": probe.total("decoder_forward"),
        "prefill_merge": probe.total("merge_forward") + probe.total("sequence_forward", skip=1),
    }


def _last_positions(inputs: ModelInputs) -> LossInputs:
    if inputs.state is None:
        raise ValueError("a prefill needs the pack")
    layout = inputs.state.layout
    ends = torch.tensor(layout.lengths[: len(inputs.state.spec.samples)]).cumsum(0) - 1
    ends = ends.to(layout.kind.device)
    return LossInputs(ends, torch.zeros_like(ends), torch.ones(ends.numel(), device=ends.device))
