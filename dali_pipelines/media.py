"""A video or image file in memory -> its packets and what they tell, without decoding.

The number of frames is the number of packets that are shown, whatever the header claims.
"""

from __future__ import annotations

import io
import math
import re
from bisect import bisect_right
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Literal, cast

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Discard, Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dali_pipelines.options import Limits
from megatron_elva.config.errors import InputError

# Playlists and the like would open other files by name: only containers that hold their own data are let in.
_CONTAINERS = "mov,matroska,avi,png_pipe,jpeg_pipe,mjpeg,webp_pipe,gif"
# Told by their first bytes, since what is appended to a photo may look like a video. Of JPEG only what a camera writes
# is: pictures that follow one another without a container are a video.
_IMAGES = (
    (re.compile(rb"\x89PNG\r\n\x1a\n"), "png_pipe"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), "webp_pipe"),
    (re.compile(rb"\xff\xd8\xff.{0,65536}?(?:Exif\0|MPF\0)", re.DOTALL), "jpeg_pipe"),
)
_PHOTOS = ("jpeg_pipe", "mjpeg", "png_pipe", "webp_pipe")
_PHOTO_TURNS = {3: 2, 4: 2, 5: 3, 6: 3, 7: 1, 8: 1}
"""Quarter turns for each orientation of EXIF; those that mirror as well are only turned."""
_EXIF = re.compile(rb"(?:Exif\0\0|eXIf|EXIF.{4}(?:Exif\0\0)?)(?=II\*\0|MM\0\*)", re.DOTALL)
_PLAIN_NAMES = {"libdav1d": "av1", "libaom-av1": "av1", "libvpx": "vp8", "libvpx-vp9": "vp9", "h265": "hevc"}


@dataclass(frozen=True)
class Probe:
    """What a file says without being decoded.

    Attributes:
        codec: plain name, such as ``h264 hevc vp8 vp9 av1 mjpeg mpeg4 png``.
        pixel_format: such as ``yuv420p``; empty where only decoding shows it.
        coded: ``(H, W)`` as stored, before rotation.
        turns: ``np.rot90(frame, turns)`` makes a stored frame upright (0..3).
        frames: frames that the packets show; of a file that ends early, as many as there should have been.
        usable: the first so many of them in order of display are there.
        times: ``[frames]`` float64, seconds from the first frame, in order of display.
        fps: frames a second on average.
        duration: seconds, the last frame's own time included.
        container: the format's name.
        fault: why reading ended early, or None.
    """

    codec: str
    pixel_format: str
    coded: tuple[int, int]
    turns: int
    frames: int
    usable: int
    times: np.ndarray
    fps: float
    duration: float
    container: str
    fault: str | None

    @property
    def native(self) -> tuple[int, int]:
        """``(H, W)`` upright."""
        height, width = self.coded
        return (width, height) if self.turns % 2 else (height, width)

    @property
    def cut(self) -> str:
        """Where and why the file ends early, in words."""
        return f"truncated at frame {self.usable} of {self.frames}: {self.fault}"


@dataclass(frozen=True)
class Media:
    """An open file with all its packets.

    Attributes:
        container: open as long as `opened` is.
        stream: its video.
        packets: in decoding order, those included that are decoded but never shown (edit lists).
        rank: display position by time stamp; empty where the container has no time stamps to be trusted.
        probe: what they tell.
    """

    container: InputContainer
    stream: VideoStream
    packets: list[Packet]
    rank: dict[int, int]
    probe: Probe

    @property
    def context(self) -> VideoCodecContext:
        """The decoder."""
        return self.stream.codec_context


def probe(data: bytes, limits: Limits) -> Probe:
    """Read a file's packets without decoding them.

    Raises:
        InputError: it cannot be used, or is larger than the limits. Nothing else is raised for any bytes.
    """
    with opened(data, limits) as media:
        return media.probe


@contextmanager
def opened(data: bytes, limits: Limits) -> Iterator[Media]:
    """Open a file, pick its video and read its packets.

    Args:
        data: the file.
        limits: what it may be at most.

    Raises:
        InputError: it cannot be used, or is larger than the limits; also in place of whatever goes wrong inside the
            ``with`` block, since that is the file's fault as well.
    """
    if not data:
        raise InputError("empty file")
    if len(data) > limits.bytes:
        raise InputError(f"too large: {len(data) / 1e6:.1f} MB, data.max_source_mb is {limits.bytes / 1e6:g}")
    try:
        with _container(data, limits) as container:
            stream = _video_of(container, limits)
            packets, fault = _demux(container, stream, limits)
            rank, found = _probe(data, container, stream, packets, fault, limits)
            yield Media(container, stream, packets, rank, found)
    except InputError:
        raise
    except av.error.FFmpegError as error:
        raise InputError(f"cannot be decoded: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged file brings about concerns this file alone
        raise InputError(f"cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}") from error


def check_size(has_size: VideoCodecContext | VideoFrame, limits: Limits) -> None:
    """Refuse frames that are too large.

    Raises:
        InputError: they are.
    """
    width, height = has_size.width, has_size.height
    if width * height > limits.pixels:
        raise InputError(f"too large: {width}x{height} pixels, data.max_source_pixels is {limits.pixels}")


def _bound(limits: Limits) -> dict[str, str]:
    # libavcodec counts the padding around a frame as well: its own bound only keeps a lie in the header from memory
    return {"max_pixels": str(2 * limits.pixels + (1 << 18))}


def _container(data: bytes, limits: Limits) -> InputContainer:
    if data[:4] == b"RIFF" and data[8:16] == b"WEBPVP8X" and data[20:] and data[20] & 2:
        raise InputError("an animated WebP, which the decoder does not know; convert it to a GIF or a video")
    kind = next((name for start, name in _IMAGES if start.match(data)), None)
    try:
        try:
            return _opened_as(kind, data, limits)
        except av.error.FFmpegError:
            if kind is not None or data[:3] != b"\xff\xd8\xff":
                raise
            return _opened_as("jpeg_pipe", data, limits)
    except av.error.FFmpegError as error:
        why = str(error.strerror or error)
        if why == "Invalid argument":  # what a container off the list gives
            why = "or not in mp4, mov, mkv, webm, avi, gif, png, jpg or webp; try ffmpeg -i FILE -c copy FILE.mkv"
        raise InputError(f"not a readable video or image: {why}") from error


def _opened_as(kind: str | None, data: bytes, limits: Limits) -> InputContainer:
    options = {"format_whitelist": _CONTAINERS, **_bound(limits)}
    return av.open(io.BytesIO(data), mode="r", format=kind, options=options, metadata_errors="replace")


def _video_of(container: InputContainer, limits: Limits) -> VideoStream:
    """The stream that a player would show; the others are not even read."""
    stream = container.streams.best("video")
    if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
        raise InputError("no video stream in the file" + (", audio only" if container.streams.audio else ""))
    context = stream.codec_context
    if context is None:
        raise InputError("no decoder for its codec")
    check_size(context, limits)
    for other in container.streams:
        if other.index != stream.index:
            other.discard = Discard.all
    context.thread_type = "NONE"  # the data workers are the parallelism
    context.thread_count = 1
    context.options = _bound(limits)
    return stream


def _demux(container: InputContainer, stream: VideoStream, limits: Limits) -> tuple[list[Packet], str | None]:
    """All packets, and why there are no more if that is not the end of the file."""
    packets: list[Packet] = []
    most = limits.frames
    shown = 0
    try:
        for packet in container.demux(stream):
            if not packet.size:
                continue
            if packet.is_corrupt:
                return packets, "a frame's data is cut off"
            packets.append(packet)
            if container.format.name.endswith("_pipe"):
                break  # one image: what phones append to it is a depth map, a gain map or a clip
            shown += not packet.is_discard
            if shown > most or len(packets) > 2 * most + 1000:
                raise InputError(f"too long: more than data.max_source_frames = {most} frames")
    except av.error.FFmpegError as error:
        return packets, error.strerror or str(error)
    return packets, None


def _probe(
    data: bytes,
    container: InputContainer,
    stream: VideoStream,
    packets: list[Packet],
    fault: str | None,
    limits: Limits,
) -> tuple[dict[int, int], Probe]:
    """Display positions by time stamp, and what the packets tell."""
    context = stream.codec_context
    codec = _PLAIN_NAMES.get(context.name, context.name)
    shown = [p for p in packets if not p.is_discard and not is_hidden(codec, p)]
    if not shown:
        raise InputError(f"no frames in the file{': ' + fault if fault else ''}")
    there = frames = len(shown)
    if fault is not None:
        # The header alone knows how long the video should have been; the frames before the cut may be all it takes.
        frames = stream.frames
        if not there < frames <= limits.frames:
            raise InputError(f"truncated after frame {there}: {fault}")
    stamps = sorted({p.pts for p in shown if p.pts is not None})
    # AVI stores no time stamps: where frames are reordered, those that libavformat makes up are wrong
    trusted = len(stamps) == there and not (container.format.name == "avi" and context.has_b_frames)
    rank = {stamp: i for i, stamp in enumerate(stamps)} if trusted else {}
    usable = frames
    if fault is not None:
        # What is missing would have been decoded, and so shown, later than the last packet was decoded.
        last = shown[-1].dts
        usable = bisect_right(stamps, last) if rank and last is not None else 0
    times, fps, duration = _timing(stream, stamps if rank else [], frames)
    if duration > limits.seconds:
        raise InputError(f"too long: {duration:.1f} seconds, data.max_source_seconds is {limits.seconds:g}")
    coded = (context.height, context.width)
    if not min(coded):
        raise InputError("the size of its frames cannot be found out: the file is damaged")
    turns = _turns(data, container, context, packets)
    name, pixel_format = container.format.name, context.pix_fmt or ""
    return rank, Probe(codec, pixel_format, coded, turns, frames, usable, times, fps, duration, name, fault)


def _timing(stream: VideoStream, stamps: list[int], frames: int) -> tuple[np.ndarray, float, float]:
    """Seconds of each frame from the first, frames a second and length; at the stream's rate where none is known."""
    rate = float(stream.average_rate or stream.base_rate or 1) or 1.0
    if not stamps or stream.time_base is None:
        return np.arange(frames) / rate, rate, frames / rate
    ticks = np.array(stamps, np.float64) - stamps[0]
    known = ticks * stream.time_base.numerator / stream.time_base.denominator
    if len(known) > 1 and known[-1] > 0:
        rate = (len(known) - 1) / float(known[-1])
    missing = np.arange(1, frames - len(known) + 1) / rate
    times = np.concatenate([known, known[-1] + missing])
    return times, rate, float(times[-1]) + 1 / rate


def is_hidden(codec: str, packet: Packet) -> bool:
    """Whether a packet is decoded but shows nothing: VP8 and VP9 may store reference frames on their own."""
    if codec not in ("vp8", "vp9"):
        return False
    view = memoryview(packet)
    if codec == "vp8":
        damaged = not view[0] & 1 and view[3:6] != b"\x9d\x01\x2a"  # a keyframe without the mark of one
        return not (damaged or view[0] & 0x10)
    if view[0] & 0xC0 != 0x80:  # no VP9: a frame that is missing, so that those after it keep their numbers
        return False
    if view[-1] & 0xE0 == 0xC0:  # several frames in one packet, of which one is shown
        return False
    profile_3 = view[0] & 0x30 == 0x30
    below_profile = view[0] << 1 if profile_3 else view[0]
    shows_stored, shown = below_profile & 0x08, below_profile & 0x02
    return not (shows_stored or shown)


def _turns(data: bytes, container: InputContainer, context: VideoCodecContext, packets: list[Packet]) -> int:
    """Quarter turns that make frames upright. Of a video only a decoded frame says it, so one is if need be."""
    if container.format.name in _PHOTOS:
        return _PHOTO_TURNS.get(_orientation(data), 0)
    if not _may_be_turned(data, container.format.name):
        return 0
    context.flush_buffers()
    for packet in [*packets[:64], None]:
        try:
            frames = context.decode(packet)
        except av.error.FFmpegError:
            continue
        if frames:
            context.flush_buffers()
            return turns_of(frames[0])
    context.flush_buffers()
    return 0


def _may_be_turned(data: bytes, container: str) -> bool:
    """A quick look for anything that could turn the picture."""
    if container.startswith("mov"):
        return _has_odd_matrix(_index_box(data)) or b"irot" in data[: 1 << 16]
    if container.startswith("matroska"):
        head = data[: max(data.find(b"\x1f\x43\xb6\x75"), 0)]  # up to the first cluster
        return b"\x76\x75" in head  # the roll of its projection
    return False


def _orientation(photo: bytes) -> int:
    """The number by which EXIF says how the camera was held, 1 where it says nothing."""
    marks = (photo.find(b"Exif\0\0", 0, 1 << 17), photo.find(b"eXIf"), photo.find(b"EXIF"))
    first = min((at for at in marks if at >= 0), default=len(photo))
    found = _EXIF.search(photo, first)
    if found is None:
        return 1
    tiff = photo[found.end() : found.end() + (1 << 16)]
    order: Literal["little", "big"] = "little" if tiff[:2] == b"II" else "big"

    def number(at: int, size: int) -> int:
        return int.from_bytes(tiff[at : at + size], order)

    entries = number(4, 4) + 2
    for at in range(entries, entries + 12 * min(number(entries - 2, 2), 1000), 12):
        if number(at, 2) == 0x0112:
            return number(at + 8, 2)
    return 1


def _index_box(data: bytes) -> bytes:
    """The box of an MP4 or MOV file that describes its tracks; the whole file where there is no way to it."""
    at = 0
    while at + 8 <= len(data):
        size, kind = int.from_bytes(data[at : at + 4], "big"), data[at + 4 : at + 8]
        if size == 1:
            size = int.from_bytes(data[at + 8 : at + 16], "big")
        if kind == b"moov":
            return data[at : at + size] if size else data[at:]
        if size < 8:
            break
        at += size
    return data


def _has_odd_matrix(index: bytes) -> bool:
    """Whether the movie or a track has a display matrix that does more than scale."""
    for kind, offset in ((b"mvhd", 36), (b"tkhd", 40)):
        at = index.find(kind)
        while at >= 0:
            first = at + 4 + offset + (12 if index[at + 4 : at + 5] == b"\1" else 0)  # version 1 has longer times
            a, b, _, c, d = (int.from_bytes(index[i : i + 4], "big", signed=True) for i in range(first, first + 20, 4))
            if b or c or a < 0 or d < 0:
                return True
            at = index.find(kind, at + 4)
    return False


def turns_of(frame: VideoFrame) -> int:
    """Quarter turns that make a decoded frame upright, by its display matrix; mirroring is not undone."""
    extras = cast("Mapping[str, bytes]", frame.side_data)  # in truth any buffer
    try:
        matrix = np.frombuffer(extras["DISPLAYMATRIX"], np.int32)
    except KeyError:
        return 0
    except ValueError:  # PyAV has no name for something else that comes with the frame, and shows nothing then
        return round(frame.rotation / 90) % 4
    a, b, _, c, d = (int(n) for n in matrix[:5])
    if a * d - b * c < 0:  # mirrored left to right first
        a, b = -a, -b
    return round(-math.degrees(math.atan2(b, a)) / 90) % 4
