"""What packets say of their frames in their own bits: whether decoding may start there, and size and format.

DALI's decoder reads beyond its buffers, or ends the process, where frames change their size midway. So what it is given
is looked at first. What cannot be read raises ValueError, and the file is left to PyAV.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from dali_pipelines.needed import nal_units

_SETS = {"h264": (7, 8, 13, 15), "hevc": (32, 33, 34)}
_OPENS = {"h264": (5,), "hevc": (19, 20)}
_JPEG_SIZES = re.compile(rb"\xff[\xc0-\xc3\xc5-\xc7\xc9-\xcb\xcd-\xcf]")  # no such bytes in a picture's own data
_RGB = 7


@dataclass(frozen=True)
class Said:
    """What one frame header says.

    Attributes:
        size: ``(H, W)``.
        format: whatever else decides the pixel format; None where the header leaves it as it is.
    """

    size: tuple[int, int]
    format: tuple[int | bytes, ...] | None


@dataclass(frozen=True)
class Headers:
    """How to read the packets of one stream.

    Attributes:
        starts: whether decoding may start at a packet, and nothing after it needs what is before.
        check: raises ValueError where packets do not all have frames of one size and format.
    """

    starts: Callable[[bytes], bool]
    check: Callable[[Sequence[bytes]], None]


def headers_of(codec: str, extradata: bytes, size: tuple[int, int]) -> Headers:
    """How to read the packets of a stream.

    Args:
        codec: plain name.
        extradata: of the stream.
        size: ``(H, W)`` that its frames should have.

    Raises:
        ValueError: they cannot be read.
    """
    if codec in ("h264", "hevc"):
        return _of_nal_units(codec, extradata)
    says = {"vp8": _vp8, "vp9": _vp9, "mjpeg": _mjpeg}.get(codec)
    if says is None:
        raise ValueError(f"packets of codec {codec} are not read")
    starts = {"vp8": lambda p: not p[0] & 1, "vp9": _is_vp9_key, "mjpeg": lambda p: True}[codec]

    def check(packets: Sequence[bytes]) -> None:
        said = [header for packet in packets for header in says(packet)]
        formats = {header.format for header in said} - {None}
        if {header.size for header in said} != {size} or len(formats) > 1:
            raise ValueError("frames change their size or format midway")

    return Headers(starts, check)


def _of_nal_units(codec: str, extradata: bytes) -> Headers:
    """H.264 and HEVC: sizes stand in parameter sets, and the packets may only repeat the one set of the extradata."""
    if len(extradata) < 23 or extradata[0] != 1:
        raise ValueError(f"{codec} without lengths before its units")
    if codec == "h264":
        length, n_sizes = extradata[4] % 4 + 1, extradata[5] & 31
    else:
        length, n_sizes = extradata[21] % 4 + 1, _hevc_sizes(extradata)
    if n_sizes != 1:
        raise ValueError(f"{n_sizes} sets of {codec} parameters")

    def kind(head: int) -> int:
        return head & 31 if codec == "h264" else head >> 1 & 63

    def starts(packet: bytes) -> bool:
        return any(kind(packet[at]) in _OPENS[codec] for at in nal_units(memoryview(packet), length))

    def check(packets: Sequence[bytes]) -> None:
        for packet in packets:
            for at in nal_units(memoryview(packet), length):
                end = at + int.from_bytes(packet[at - length : at], "big")
                if kind(packet[at]) in _SETS[codec] and packet[at:end] not in extradata:
                    raise ValueError(f"{codec} parameters change midway")

    return Headers(starts, check)


def _hevc_sizes(extradata: bytes) -> int:
    """How many sequence parameter sets an hvcC record has."""
    at, found = 23, 0
    for _ in range(extradata[22]):
        kind, count = extradata[at] & 63, int.from_bytes(extradata[at + 1 : at + 3], "big")
        at += 3
        for _ in range(count):
            at += 2 + int.from_bytes(extradata[at : at + 2], "big")
        found += count * (kind == 33)
        if at > len(extradata):
            raise ValueError("parameters reach past their end")
        if at == len(extradata):
            break
    return found


def _mjpeg(packet: bytes) -> Iterator[Said]:
    at = -1
    adobe = packet.find(b"Adobe")
    colours = packet[adobe : adobe + 12] if adobe >= 0 else b""
    for found in _JPEG_SIZES.finditer(packet):
        at = found.start() + 4
        height, width = int.from_bytes(packet[at + 1 : at + 3], "big"), int.from_bytes(packet[at + 3 : at + 5], "big")
        yield Said((height, width), (packet[at], packet[at + 5 : at + 6 + 3 * packet[at + 5]], colours))
    if at < 0:
        raise ValueError("a JPEG picture without a size")


def _vp8(packet: bytes) -> Iterator[Said]:
    if packet[0] & 1:
        return
    if packet[3:6] != b"\x9d\x01\x2a" or len(packet) < 10:
        raise ValueError("a damaged VP8 keyframe")
    width, height = (int.from_bytes(packet[i : i + 2], "little") & 0x3FFF for i in (6, 8))
    yield Said((height, width), None)


def _is_vp9_key(packet: bytes) -> bool:
    bits = _Bits(packet)
    bits.vp9_profile()
    return not bits(1) and not bits(1)  # neither shows a stored frame nor depends on one


def _vp9(packet: bytes) -> Iterator[Said]:
    for frame in _vp9_frames(packet):
        said = _vp9_frame(_Bits(frame))
        if said is not None:
            yield said


def _vp9_frames(packet: bytes) -> Iterator[bytes]:
    """The frames of a packet; several have an index at its end."""
    mark = packet[-1]
    count, size = (mark & 7) + 1, (mark >> 3 & 3) + 1
    index = packet[-(2 + count * size) :]
    if mark & 0xE0 != 0xC0 or index[0] != mark or len(index) < 2 + count * size:
        yield packet
        return
    at = 0
    for i in range(count):
        length = int.from_bytes(index[1 + i * size : 1 + (i + 1) * size], "little")
        if length:
            if at + length > len(packet) - len(index):
                raise ValueError("a VP9 frame reaches past its packet")
            yield packet[at : at + length]
        at += length


def _vp9_frame(bits: _Bits) -> Said | None:
    """The size in one frame's header, or None where it has that of the frames that it refers to."""
    profile = bits.vp9_profile()
    if bits(1):  # a stored frame is shown
        return None
    inter, shown, resilient = bits(1), bits(1), bits(1)
    if not inter:
        bits.vp9_sync()
        colour = bits.vp9_colour(profile)
        return Said(bits.vp9_size(), (profile, *colour))
    intra_only = 0 if shown else bits(1)
    if not resilient:
        bits(2)
    if intra_only:
        bits.vp9_sync()
        shape = (profile, *bits.vp9_colour(profile)) if profile else None
        bits(8)
        return Said(bits.vp9_size(), shape)
    bits(8 + 3 * 4)
    if bits(1) or bits(1) or bits(1):
        return None
    return Said(bits.vp9_size(), None)


class _Bits:
    """Reads numbers from the front of a frame, the highest bit first."""

    def __init__(self, data: bytes) -> None:
        self._left = 8 * min(len(data), 32)
        self._value = int.from_bytes(data[:32], "big")

    def __call__(self, n: int) -> int:
        self._left -= n
        if self._left < 0:
            raise ValueError("a frame header is cut")
        return self._value >> self._left & ((1 << n) - 1)

    def vp9_profile(self) -> int:
        if self(2) != 2:
            raise ValueError("not a VP9 frame")
        profile = self(1) + 2 * self(1)
        if profile == 3:
            self(1)
        return profile

    def vp9_sync(self) -> None:
        if self(24) != 0x498342:
            raise ValueError("a damaged VP9 frame")

    def vp9_colour(self, profile: int) -> tuple[int, ...]:
        """Bit depth flag, colour space and subsampling; the range does not change the pixel format."""
        deep = self(1) if profile >= 2 else 0
        space = self(3)
        if space == _RGB:
            return deep, space, self(1) if profile % 2 else 0
        self(1)
        return (deep, 0, self(3)) if profile % 2 else (deep, 0, 6)

    def vp9_size(self) -> tuple[int, int]:
        width, height = self(16) + 1, self(16) + 1
        return height, width
