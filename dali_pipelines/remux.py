"""A video file -> a smaller one that holds only the packets that the wanted frames need. Nothing is transcoded.

DALI decodes from the first frame on, whatever frames are asked for. So it is given, for each wanted frame, the packets
from the keyframe before it up to the frame itself, in a container written here: it never sees the header, the index or
the time stamps of the user's file.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction

import av
from av.packet import Packet

from dali_pipelines.frame_headers import headers_of
from dali_pipelines.media import Media, is_hidden, opened
from dali_pipelines.options import Limits
from megatron_elva.config.errors import InputError

CONTAINERS = {
    "h264": "mp4",
    "hevc": "mp4",
    "vp8": "matroska",
    "vp9": "matroska",
    "mjpeg": "matroska",
}
"""The container that each codec is copied into. AV1 is not: its size may change in any frame, deep in the header."""

_REORDERED = ("h264", "hevc")  # codecs whose packets may stand in another order than they are shown
_TICK = Fraction(1, 1000)
_TICKS = 40  # from one frame to the next; what they are is of no matter


class NotCopiedError(InputError):
    """The file may be good, but its packets cannot be copied safely: decode it with PyAV."""


def sparse(data: bytes, indices: Sequence[int], limits: Limits) -> tuple[bytes, list[int]]:
    """Copy the packets that some frames of a video need.

    Args:
        data: the file.
        indices: frames in order of display, in any order, repeated or not.
        limits: what the file may be at most.

    Returns:
        A file with those packets, and where the frames stand among the frames of that file.

    Raises:
        InputError: the file cannot be used, or does not have these frames.
        NotCopiedError: it can, but the packets that a frame needs cannot be told.
    """
    with opened(data, limits) as media:
        found = media.probe
        bad = [i for i in indices if not 0 <= i < found.usable]
        if bad:
            raise InputError(found.cut if found.fault else f"frame {bad[0]} is not among its {found.frames} frames")
        if found.codec not in CONTAINERS:
            raise NotCopiedError(f"packets of codec {found.codec} are not copied; PyAV decodes it")
        if any(p.has_sidedata("new_extradata") for p in media.packets):
            raise NotCopiedError("its decoder is set up anew midway; PyAV decodes it")
        order = _shown(media)
        frames = [at for at in order if not media.packets[at].is_discard]
        kept = _needed(media, [frames[i] for i in indices])
        # frames that an edit list leaves out are shown by the copy, which has no edit list
        copied = {at: i for i, at in enumerate(at for at in order if at in kept)}
        return _write(media, sorted(kept), order), [copied[frames[i]] for i in indices]


def _shown(media: Media) -> list[int]:
    """The packets that show a frame, in order of display, as positions in ``media.packets``."""
    codec, packets = media.probe.codec, media.packets
    shown = [i for i, p in enumerate(packets) if not is_hidden(codec, p)]
    stamps = [packets[i].pts for i in shown]
    told = bool(media.rank) and None not in stamps and len(set(stamps)) == len(stamps)
    by_stamp = sorted(shown, key=lambda i: packets[i].pts or 0) if told else shown
    if codec in _REORDERED and not told:
        raise NotCopiedError(f"no time stamps that tell the order of its {codec} frames; PyAV decodes it")
    if codec not in _REORDERED and by_stamp != shown:
        raise NotCopiedError(f"time stamps that put its {codec} frames in another order; PyAV decodes it")
    return by_stamp


def _needed(media: Media, wanted: Sequence[int]) -> set[int]:
    """Positions of the packets from each wanted one back to its keyframe; all with frames of one size."""
    packets, codec = media.packets, media.probe.codec
    kept: set[int] = set()
    try:
        headers = headers_of(codec, media.context.extradata or b"", media.probe.coded)
        keys = [i for i, p in enumerate(packets) if p.is_keyframe and headers.starts(bytes(p))]
        for at in set(wanted):
            before = bisect_right(keys, at) - 1
            if before < 0:
                raise ValueError("it does not start with a keyframe")
            kept.update(range(keys[before], at + 1))
        headers.check([bytes(packets[i]) for i in kept])
    except (ValueError, IndexError) as error:
        raise NotCopiedError(f"{error}; PyAV decodes it") from error
    return kept


def _write(media: Media, kept: Sequence[int], order: Sequence[int]) -> bytes:
    """A file with some of the packets; its time stamps say nothing but the two orders."""
    position = {at: i for i, at in enumerate(kept)}
    shown_at = dict(position)
    if media.probe.codec in _REORDERED:
        shown_at = {at: i for i, at in enumerate(at for at in order if at in position)}
    delay = max(position[at] - shown_at[at] for at in kept)
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=CONTAINERS[media.probe.codec]) as out:
        stream = out.add_stream_from_template(media.stream, opaque=True)  # no encoder needed
        stream.time_base = _TICK
        for at in kept:
            copy = Packet(bytes(media.packets[at]))
            copy.stream, copy.time_base = stream, _TICK
            copy.dts, copy.pts = position[at] * _TICKS, (shown_at[at] + delay) * _TICKS
            copy.is_keyframe = media.packets[at].is_keyframe
            out.mux(copy)
    return buffer.getvalue()
