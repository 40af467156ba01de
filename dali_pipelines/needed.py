"""Which packets of a video have to be decoded for a few frames, so that no pixel differs from decoding them all.

Two savings: decoding starts at the last keyframe before each wanted frame, and on the way packets are left out that no
other frame refers to. What cannot be proven from the packets is decoded.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from av.packet import Packet

from dali_pipelines.media import Media

_INTRA = ("mjpeg", "png", "prores", "rawvideo", "dnxhd")
"""Codecs whose frames all stand alone."""
_NAL_CODECS = ("h264", "hevc")
_H264_BESIDE = (6, 9, 12)  # SEI, delimiter, filler: may go with a picture
_HEVC_BESIDE = (35, 38, 39, 40)


def needed(media: Media, wanted: Sequence[int]) -> list[list[Packet]]:
    """The packets to decode for some frames.

    Args:
        media: an open file.
        wanted: frames by their place in order of display, ascending, all of them usable.

    Returns:
        Stretches of packets in decoding order. Each starts where a decoder that has just been flushed may start.
    """
    packets = media.packets
    if not media.rank or any(p.has_sidedata("new_extradata") for p in packets):
        return [packets]
    shown = ((p.pts, i) for i, p in enumerate(packets) if not p.is_discard and p.pts is not None)
    position = {media.rank[stamp]: i for stamp, i in shown if stamp in media.rank}
    starts = _Starts(media)
    spans: list[tuple[int, int]] = []
    for frame in wanted:
        at = position[frame]
        first = starts.before(at)
        if spans and first < spans[-1][1]:
            spans[-1] = (min(first, spans[-1][0]), max(spans[-1][1], at + 1))
        else:
            spans.append((first, at + 1))
    kept = {position[frame] for frame in wanted}
    return [_without_unused(media, range(*span), kept) for span in spans]


class _Starts:
    """The places of a stream where decoding may start."""

    def __init__(self, media: Media) -> None:
        self._codec = media.probe.codec
        self._packets = media.packets
        self._length_size = _length_size(media) if self._codec in _NAL_CODECS else 0
        self._known: dict[int, bool] = {0: True}

    def before(self, at: int) -> int:
        """The last start at or before packet ``at`` from which its frame comes out right."""
        if self._codec in _INTRA:
            return at
        stamp = self._packets[at].pts
        assert stamp is not None  # it has a place in order of display
        for i in range(at, 0, -1):
            packet = self._packets[i]
            # frames shown before a keyframe but stored after it (open group of pictures) need the one before
            if packet.is_keyframe and packet.pts is not None and packet.pts <= stamp and self._is_start(i):
                return i
        return 0

    def _is_start(self, i: int) -> bool:
        if i not in self._known:
            self._known[i] = self._look_at(self._packets[i])
        return self._known[i]

    def _look_at(self, packet: Packet) -> bool:
        """Whether a packet that the container calls a keyframe is one."""
        view = memoryview(packet)
        if self._codec == "vp8":
            return not view[0] & 1
        if self._codec == "vp9":
            first = view[0] << 1 if view[0] & 0x30 == 0x30 else view[0]
            return not first & 0x0C  # shows no stored frame, and is no inter frame
        if self._codec == "h264":
            return _restarts_h264(view, self._length_size)
        if self._codec == "hevc":
            kinds = [view[at] >> 1 & 63 for at in nal_units(view, self._length_size)]
            return any(16 <= kind <= 21 for kind in kinds)
        if self._codec == "mpeg4":
            at = bytes(view).find(b"\0\0\1\xb6") + 4
            return 4 <= at < len(view) and not view[at] & 0xC0
        return self._codec == "av1" and _restarts_av1(view)


def _length_size(media: Media) -> int:
    """Bytes of the length before each NAL unit; 0 where start codes stand between them."""
    extra = media.context.extradata or b""
    if len(extra) < 7 or extra[0] != 1:
        return 0
    if media.probe.codec == "h264":
        return (extra[4] & 3) + 1
    return (extra[21] & 3) + 1 if len(extra) > 22 else 0


def nal_units(view: memoryview, length_size: int) -> Iterator[int]:
    """Where the header of each NAL unit of a packet is.

    Raises:
        ValueError: the packet is not made of whole units.
    """
    at, end = 0, len(view)
    if length_size:
        while at < end:
            size = int.from_bytes(view[at : at + length_size], "big")
            at += length_size
            if not 2 <= size <= end - at:
                raise ValueError("a unit reaches past its packet")
            yield at
            at += size
        return
    data = bytes(view)
    at = data.find(b"\0\0\1")
    if at < 0:
        raise ValueError("no start code")
    while at >= 0:
        if at + 5 > end:
            raise ValueError("a unit reaches past its packet")
        yield at + 3
        at = data.find(b"\0\0\1", at + 3)


def _restarts_h264(view: memoryview, length_size: int) -> bool:
    """Whether a packet is an IDR picture, or says that all pictures shown from it on come out exactly."""
    try:
        for at in nal_units(view, length_size):
            kind = view[at] & 31
            if kind == 5:
                return True
            if kind == 6 and _recovers_at_once(bytes(view[at + 1 : at + 257])):
                return True
    except ValueError:
        return False
    return False


def _restarts_av1(view: memoryview) -> bool:
    """Whether the first frame of a packet is a keyframe that is shown: such a frame replaces all that are stored."""
    at = 0
    while at + 2 < len(view):
        kind, extended, sized = view[at] >> 3 & 15, view[at] >> 2 & 1, view[at] >> 1 & 1
        at += 1 + extended
        size = shift = 0
        while sized and at < len(view) and shift < 32:
            size |= (view[at] & 127) << shift
            at, shift = at + 1, shift + 7
            if not view[at - 1] & 128:
                break
        if kind in (3, 6):  # the header of a frame, alone or with the frame
            return at < len(view) and view[at] & 0xF0 == 0x10  # not one shown again, a keyframe, shown
        if not sized:
            return False
        at += size
    return False


def _recovers_at_once(messages: bytes) -> bool:
    """Whether SEI messages hold a recovery point with no frames to wait for and an exact match."""
    at = 0
    while at + 2 < len(messages):
        kind, size = messages[at], messages[at + 1]
        if kind == 6:
            return messages[at + 2] & 0xC0 == 0xC0  # the number 0 and the flag of an exact match
        if kind == 255 or size == 255:
            return False
        at += 2 + size
    return False


def _without_unused(media: Media, span: range, kept: set[int]) -> list[Packet]:
    """The packets of a span less those that are not wanted and that no other frame refers to."""
    codec, packets = media.probe.codec, media.packets
    if codec in _INTRA:
        return [packets[i] for i in span if i in kept]
    if codec not in _NAL_CODECS or len(span) < 2:
        return [packets[i] for i in span]
    length_size = _length_size(media)
    layers = [_unused_layer(codec, memoryview(packets[i]), length_size) for i in span]
    # HEVC: such a picture serves none of its own temporal layer, but may serve a higher one
    top = max(layer for layer, _ in layers)
    return [packets[i] for i, (layer, free) in zip(span, layers, strict=True) if i in kept or not free or layer < top]


def _unused_layer(codec: str, view: memoryview, length_size: int) -> tuple[int, bool]:
    """The temporal layer of a packet (0 in H.264), and whether no picture of that layer refers to it."""
    layer, slices, free = 0, 0, True
    beside = _H264_BESIDE if codec == "h264" else _HEVC_BESIDE
    try:
        for at in nal_units(view, length_size):
            if codec == "h264":
                kind = view[at] & 31
                is_slice, is_reference = kind == 1, bool(view[at] & 0x60)
            else:
                kind = view[at] >> 1 & 63
                other_layer = view[at] & 1 or view[at + 1] & 0xF8
                is_slice, is_reference = kind < 32, bool(kind > 14 or kind % 2 or other_layer)
                layer = max(layer, (view[at + 1] & 7) - 1)
            slices += is_slice
            free = free and (not is_reference if is_slice else kind in beside)
    except ValueError:
        return layer, False
    return layer, free and slices > 0
