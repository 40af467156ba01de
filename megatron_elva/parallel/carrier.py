"""The carrier: the form in which hidden states and merge index cross from one pipeline rank to the next.

A message is ``[s + filler + R, 1, H]``: the hidden states of this rank's s tokens, zeros (``fixed`` only), and R rows
that hold one byte in each value: the pack's specification, the merge points passed, the merge index as bits. The next
rank rebuilds layout, positions and cu_seqlens from those rows and reads no data. Two forms:

- ``rows``, the default: no filler. megatron-core exchanges the shape before every message (`variable_seq_lengths`), and
  a message is as long as its pack, so what merging saves is saved in traffic too. Packs differ in length with or
  without merging, so budgets alone would not make the shapes equal.
- ``fixed``: zeros up to a constant length, so no shape is exchanged: for clusters where that exchange hangs or costs
  (Megatron-LM issue 5100). Every message costs the longest pack.

Whole numbers up to 255 are exact in fp32, fp16 and bf16 and not in FP8, so a message must have one of those dtypes.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import isqrt

import torch
from torch import Tensor

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config
from megatron_elva.layout import PackSpec, PackState, restored_state
from megatron_elva.layout.compact import on_device
from megatron_elva.training.estimate import ASSUMED_PIXELS, pack_estimate

MAGIC = 0x45A17A5C
TRAILER = 12
"""Bytes behind the payload: its length, its checksum and the magic number, four each, low byte first."""
FIRST_LOOK = 4096
"""Values read from the end of a message at first; what holds the carrier of most packs in one copy to the host."""
DTYPES = (torch.float32, torch.float16, torch.bfloat16)


@dataclass
class Traffic:
    """Values that crossed boundaries out of this rank.

    Attributes:
        hidden: of hidden states.
        carrier: of carrier rows.
        filler: of zeros up to the constant length.
    """

    hidden: int = 0
    carrier: int = 0
    filler: int = 0

    @property
    def share(self) -> float:
        """Part of the traffic that the carrier rows are."""
        return self.carrier / max(1, self.hidden + self.carrier + self.filler)

    def line(self) -> str:
        """What crossed, for people."""
        total = max(1, self.hidden + self.carrier + self.filler)
        filler = f", {self.filler / total:.1%} zeros up to the constant length" if self.filler else ""
        return f"carrier rows were {self.share:.3%} of what this rank sent to the next pipeline rank{filler}"


@dataclass
class Carrier:
    """Encodes and decodes messages of one chunk.

    Attributes:
        dtype: of the messages (megatron-core's `pipeline_dtype`).
        rows: rows of every message of this rank with ``fixed``; None with ``rows``.
        traffic: what was sent.
    """

    dtype: torch.dtype
    rows: int | None = None
    traffic: Traffic = field(default_factory=Traffic)

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise ConfigError(f"precision.dtype={self.dtype}: the carrier needs one that holds 0..255: fp32 or bf16")

    def send(self, hidden: Tensor, state: PackState) -> Tensor:
        """``[s, 1, H]`` -> message.

        Raises:
            InputError: with ``fixed``, the pack does not fit.
        """
        if hidden.dtype != self.dtype:
            raise RuntimeError(
                f"hidden states are {hidden.dtype}, messages {self.dtype}: the receiver expects the latter"
            )
        width = hidden.shape[-1]
        values = encode(state, hidden.shape[0]).to(self.dtype)
        own = -(-values.numel() // width)
        filler = 0 if self.rows is None else self.rows - own - hidden.shape[0]
        if filler < 0:
            raise InputError(
                f"parallel.carrier=fixed: a pack needs {hidden.shape[0] + own} rows on each rank and messages have "
                f"{self.rows}: raise parallel.carrier_tokens, or set parallel.carrier=rows"
            )
        zeros = values.new_zeros((filler + own) * width - values.numel())
        self.traffic.hidden += hidden.numel()
        self.traffic.carrier += own * width
        self.traffic.filler += filler * width
        return torch.cat([hidden, torch.cat([zeros, values]).view(-1, 1, width)])

    def receive(self, message: Tensor) -> tuple[Tensor, PackState]:
        """Message -> ``[s, 1, H]`` and the state of the pack, on the message's device.

        Raises:
            RuntimeError: the message is damaged or not the expected one.
        """
        rows, state = decode(message.detach())
        return message[:rows], state.to(message.device)


def encode(state: PackState, rows: int) -> Tensor:
    """Payload and trailer as ``[n]`` int64 bytes on the device of the state, without a sync.

    Args:
        state: what is sent.
        rows: rows of hidden states in the message.
    """
    device = state.alive.device
    numbers = state.spec.to_ints()
    head = on_device(_bytes([state.done, state.layout.padding, rows, len(numbers), *numbers]), device)
    n = state.alive.numel()
    bits = torch.cat([state.alive, state.alive.new_zeros(-n % 8)]).view(-1, 8)
    mask = (bits.long() << torch.arange(8, device=device)).sum(1)
    payload = torch.cat([head, mask])
    checksum = (_checksum(payload) >> torch.arange(0, 32, 8, device=device)) & 255
    ends = on_device(_bytes([payload.numel(), MAGIC]), device)
    return torch.cat([payload, ends[:4], checksum, ends[4:]])


def decode(message: Tensor) -> tuple[int, PackState]:
    """Rows of hidden states in a message, and the state, on the host.

    Raises:
        RuntimeError: the message is damaged or not the expected one.
    """
    flat = message.reshape(-1)
    tail = flat[-FIRST_LOOK:].to("cpu", torch.float32)
    length, checksum, magic = _numbers(tail[-TRAILER:])
    if magic != MAGIC or length + TRAILER > flat.numel():
        raise RuntimeError(
            "a message between pipeline ranks carries no merge index: it is damaged or was paired with the wrong "
            "receive (check parallel.overlap_p2p, and that all ranks run the same megatron-core)"
        )
    if length + TRAILER > tail.numel():
        tail = flat[-length - TRAILER :].to("cpu", torch.float32)
    payload = tail[tail.numel() - length - TRAILER : tail.numel() - TRAILER].long()
    if int(_checksum(payload)) != checksum:
        raise RuntimeError("a message between pipeline ranks was damaged: the checksum of its merge index is wrong")
    done, padding, rows, count = _numbers(payload[:16])
    spec = PackSpec.from_ints(_numbers(payload[16 : 16 + 4 * count]))
    bits = (payload[16 + 4 * count :, None] >> torch.arange(8)) & 1
    cells = sum(v.cells for v in spec.videos)
    return rows, restored_state(spec, bits.flatten()[:cells].bool(), done, padding)


def message_tokens(config: Config) -> int | None:
    """Length of every message with ``fixed``, counted in tokens over all tensor ranks; None with ``rows``.

    ``parallel.carrier_tokens``, or the largest pack of samples with one video each, of frames up to four times as high
    as wide, and its carrier. Data with several long videos in a sample needs the key; `Carrier.send` says so.
    """
    parallel = config.parallel
    if parallel.carrier == "rows" or parallel.pipeline == 1:
        return None
    ranks, multiple = config.sequence_shards, config.pad_multiple
    if parallel.carrier_tokens is not None:
        return -(-parallel.carrier_tokens // ranks) * ranks
    pack = pack_estimate(config)
    cells = (config.data.max_pixels or ASSUMED_PIXELS) // config.model.cell_pixels**2
    frame = 1 + cells + isqrt(4 * cells)
    tokens = config.data.pack_tokens or (pack.samples or 1) * (config.data.frames * frame + config.data.max_text_tokens)
    # a bit for each cell, and at most 64 bytes for a sample's share of the specification
    own = -(-(tokens // 8 + 64 * (pack.samples or 64) + 64) // config.model.hidden)
    return -(-tokens // multiple) * multiple + own * ranks


def _bytes(numbers: list[int]) -> list[int]:
    return list(torch.tensor(numbers, dtype=torch.int64).to(torch.int32).view(torch.uint8).tolist())


def _numbers(values: Tensor) -> list[int]:
    parts = values.long().view(-1, 4)
    return (parts << torch.arange(0, 32, 8)).sum(1).tolist()


def _checksum(payload: Tensor) -> Tensor:
    """Sum of the bytes, each times its place, modulo a prime below 2^32 (detects changed and swapped bytes)."""
    return (payload * torch.arange(1, payload.numel() + 1, device=payload.device)).sum() % 4294967291
