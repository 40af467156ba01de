"""A video or image file in memory -> RGB frames, through PyAV.

One route for every codec for now. A second decoder slots in behind `decode`: it takes bytes and gives a `Decoded`.
Colours follow the file's own tags (matrix and range), in swscale's accurate mode.
"""

from __future__ import annotations

import io
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import av
import numpy as np
from av.container import InputContainer
from av.packet import Packet
from av.stream import Disposition
from av.video.codeccontext import VideoCodecContext
from av.video.frame import VideoFrame
from av.video.reformatter import Interpolation, VideoReformatter
from av.video.stream import VideoStream

from dali_pipelines.sampling import uniform
from megatron_elva.config.errors import InputError

# Playlists and the like would open other files by name: only containers that hold their own data are let in.
_CONTAINERS = "mov,matroska,avi,png_pipe,jpeg_pipe,mjpeg,webp_pipe,gif"
_ACCURATE = Interpolation.ACCURATE_RND | Interpolation.FULL_CHR_H_INT | Interpolation.BITEXACT
_SAME_SIZE = int(Interpolation.BILINEAR | _ACCURATE)
_SMALLER = int(Interpolation.BICUBIC | _ACCURATE)


@dataclass(frozen=True)
class Decoded:
    """Frames taken from one file.

    Attributes:
        frames: ``[T, H, W, 3]`` uint8 RGB, upright.
        indices: the frame number of each in order of display.
        timestamps: seconds from the first frame of the video.
        native: ``(H, W)`` of the file, upright, before any scaling.
    """

    frames: np.ndarray
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    native: tuple[int, int]


@dataclass(frozen=True)
class _Packets:
    """The compressed frames of a file in decoding order.

    Attributes:
        items: one packet for each frame.
        rank: display position by time stamp, empty where the container has no usable time stamps.
        frames: frames that the video has, or should have if the file ends early.
        usable: the first so many frames in order of display are there.
        fault: why demuxing ended before the end, or None.
    """

    items: list[Packet]
    rank: dict[int, int]
    frames: int
    usable: int
    fault: str | None

    @property
    def cut(self) -> str:
        """Where and why the file ends early."""
        return f"truncated at frame {self.usable} of {self.frames}: {self.fault}"


def decode(data: bytes, frames: int, max_pixels: int | None, max_source_pixels: int, max_source_frames: int) -> Decoded:
    """Decode frames spread uniformly over a video; an image is a video of one frame.

    Args:
        data: the file.
        frames: frames wanted at most.
        max_pixels: area of a frame at most; larger ones are scaled down with their aspect ratio.
        max_source_pixels: files with larger frames are refused before they are decoded.
        max_source_frames: files with more frames are refused.

    Returns:
        All wanted frames, in order.

    Raises:
        InputError: not all of them can be had; one line says why. Nothing else is raised for any bytes.
    """
    if not data:
        raise InputError("empty file")
    try:
        with _opened(data, max_source_pixels) as (container, stream):
            packets = _demux(container, stream, max_source_frames)
            wanted = uniform(packets.frames, frames)
            decoder = _Decoder(stream.codec_context, packets, _Converter(max_pixels, max_source_pixels))
            if not decoder.run(wanted):
                wanted = decoder.run_by_shown_frames(wanted, frames)
            return decoder.result(wanted, stream)
    except InputError:
        raise
    except av.error.FFmpegError as error:
        raise InputError(f"cannot be decoded: {error.strerror or error}") from error
    except Exception as error:  # whatever a damaged file brings about concerns this file alone
        raise InputError(f"cannot be decoded: {type(error).__name__}: {' '.join(str(error).split())}") from error


@contextmanager
def _opened(data: bytes, max_source_pixels: int) -> Iterator[tuple[InputContainer, VideoStream]]:
    """Open a file and pick its video stream, refusing what is not one or is too large."""
    # libavcodec counts the padding around a frame as well: its own bound only keeps a lie in the header from memory
    bound = {"max_pixels": str(2 * max_source_pixels + (1 << 18))}
    options = {"format_whitelist": _CONTAINERS, **bound}
    try:
        container = av.open(io.BytesIO(data), mode="r", options=options, metadata_errors="replace")
    except av.error.FFmpegError as error:
        raise InputError(f"not a readable video or image: {error.strerror or error}") from error
    with container:
        stream = container.streams.best("video")
        if not isinstance(stream, VideoStream) or stream.disposition & Disposition.attached_pic:
            raise InputError("no video stream in the file" + (", audio only" if container.streams.audio else ""))
        context = stream.codec_context
        if context is None:
            raise InputError("no decoder for its codec")
        _check_size(context, max_source_pixels)
        context.thread_type = "NONE"  # the loader's workers are the parallelism; threads cost more than small clips
        context.options = bound
        yield container, stream


def _check_size(has_size: VideoCodecContext | VideoFrame, max_source_pixels: int) -> None:
    width, height = has_size.width, has_size.height
    if width * height > max_source_pixels:
        raise InputError(f"too large: {width}x{height} pixels, data.max_source_pixels is {max_source_pixels}")


def _demux(container: InputContainer, stream: VideoStream, max_source_frames: int) -> _Packets:
    """Read the packets of a stream; their number, not the header's, is the number of frames."""
    items: list[Packet] = []
    fault = None
    try:
        for packet in container.demux(stream):
            if not packet.size or packet.is_discard:
                continue
            if packet.is_corrupt:
                fault = "a frame's data is cut off"
                break
            items.append(packet)
            if len(items) > max_source_frames:
                raise InputError(f"too long: more than data.max_source_frames = {max_source_frames} frames")
    except av.error.FFmpegError as error:
        fault = error.strerror or str(error)
    if not items:
        raise InputError(f"no frames in the file{': ' + fault if fault else ''}")
    n = len(items)
    if fault is not None:
        # The header alone knows how long the video should have been; the frames before the cut may be all it takes.
        n = stream.frames
        if not len(items) < n <= max_source_frames:
            raise InputError(f"truncated after frame {len(items)}: {fault}")
    times = [p.pts for p in items]
    known = sorted({t for t in times if t is not None})
    rank = {t: i for i, t in enumerate(known)} if len(known) == len(items) else {}
    usable = n
    if fault is not None:
        # What is missing would have been decoded, and so shown, later than the last packet was decoded.
        last = items[-1].dts
        usable = bisect_right(known, last) if rank and last is not None else 0
    return _Packets(items, rank, n, usable, fault)


class _Converter:
    """Decoded frames -> upright RGB arrays of one size. One converter a file: setting swscale up costs most."""

    def __init__(self, max_pixels: int | None, max_source_pixels: int) -> None:
        self.max_pixels = max_pixels
        self.max_source_pixels = max_source_pixels
        self.native: tuple[int, int] = (0, 0)
        self._size: tuple[int, int] | None = None
        self._turns = 0
        self._scaler = VideoReformatter()

    def __call__(self, frame: VideoFrame) -> np.ndarray:
        """``[H, W, 3]`` uint8; size and rotation are those of the first frame converted."""
        _check_size(frame, self.max_source_pixels)
        if self._size is None:
            self._turns = round(frame.rotation / 90) % 4
            h, w = frame.height, frame.width
            self.native = (w, h) if self._turns % 2 else (h, w)
            self._size = fit_area(h, w, self.max_pixels)
        height, width = self._size
        same = (frame.height, frame.width) == self._size
        rgb = self._scaler.reformat(
            frame, width, height, "rgb24", interpolation=_SAME_SIZE if same else _SMALLER, threads=1
        )
        return np.rot90(rgb.to_ndarray(), self._turns)


def fit_area(height: int, width: int, max_pixels: int | None) -> tuple[int, int]:
    """The largest size of (nearly) the same aspect ratio whose area is at most ``max_pixels``."""
    if max_pixels is None or height * width <= max_pixels:
        return height, width
    scale = (max_pixels / (height * width)) ** 0.5
    h, w = max(int(height * scale), 1), max(int(width * scale), 1)
    return min(h, max(max_pixels // w, 1)), min(w, max(max_pixels // h, 1))  # a very thin frame has a side of 1


@dataclass
class _Decoder:
    """Runs the decoder over the packets that the wanted frames need."""

    context: VideoCodecContext
    packets: _Packets
    convert: _Converter
    images: dict[int, np.ndarray] = field(default_factory=dict)
    errors: int = 0

    def run(self, wanted: list[int]) -> bool:
        """Decode the wanted frames: from the nearest keyframes first, and if that fails from the beginning."""
        if wanted[-1] >= self.packets.usable:
            raise InputError(self.packets.cut)
        ranges = self._ranges(wanted)
        whole = [(0, len(self.packets.items))]
        return self._pass(wanted, ranges) or (ranges != whole and self._pass(wanted, whole))

    def run_by_shown_frames(self, wanted: list[int], frames: int) -> list[int]:
        """Second try for streams with packets that show nothing (hidden reference frames): count what is shown."""
        if self.errors or self.packets.fault:
            return wanted  # frames are missing because they are damaged
        times = [f.pts for f in self._decoded(self.packets.items)]
        if not times:
            raise InputError("no frame in the file can be decoded")
        rank = {t: i for i, t in enumerate(times) if t is not None}
        n = len(times)
        self.packets = _Packets(self.packets.items, rank if len(rank) == n else {}, n, n, None)
        wanted = uniform(n, frames)
        self._pass(wanted, [(0, len(self.packets.items))])
        return wanted

    def result(self, wanted: list[int], stream: VideoStream) -> Decoded:
        """Stack what was decoded, or say which frame is missing."""
        missing = [i for i in wanted if i not in self.images]
        if missing:
            raise InputError(f"damaged: frame {missing[0]} of {self.packets.frames} cannot be decoded")
        by_rank = {i: t for t, i in self.packets.rank.items()}
        if by_rank and stream.time_base is not None:
            seconds = tuple(float((by_rank[i] - by_rank[0]) * stream.time_base) for i in wanted)
        else:
            seconds = tuple(float(i / (stream.average_rate or 1)) for i in wanted)
        frames = np.stack([self.images[i] for i in wanted])
        return Decoded(frames, tuple(wanted), seconds, self.convert.native)

    def _ranges(self, wanted: list[int]) -> list[tuple[int, int]]:
        """The stretches of packets to decode: for each wanted frame from its keyframe to itself, joined."""
        items, rank = self.packets.items, self.packets.rank
        if not rank:
            return [(0, len(items))]
        shown = [rank[p.pts] for p in items if p.pts is not None]
        position = {shown_at: i for i, shown_at in enumerate(shown)}
        spans: list[tuple[int, int]] = []
        for frame in wanted:
            at = position[frame]
            # Frames shown before a keyframe but stored after it (open group of pictures) need the one before.
            first = at
            while first and not (items[first].is_keyframe and shown[first] <= frame):
                first -= 1
            if spans and first <= spans[-1][1]:
                spans[-1] = (spans[-1][0], max(spans[-1][1], at + 1))
            else:
                spans.append((first, at + 1))
        return spans

    def _pass(self, wanted: list[int], ranges: list[tuple[int, int]]) -> bool:
        """One pass over ranges of packets; True when every wanted frame is there."""
        self.images.clear()
        todo = set(wanted)
        for first, last in ranges:
            for count, frame in enumerate(self._decoded(self.packets.items[first:last])):
                index = self.packets.rank.get(frame.pts) if self.packets.rank and frame.pts is not None else count
                if index is not None and index in todo:
                    todo.discard(index)
                    self.images[index] = self.convert(frame)
                    if not todo:
                        return True
        return False

    def _decoded(self, packets: list[Packet]) -> Iterator[VideoFrame]:
        """The frames of a stretch of packets in order of display. A packet that cannot be decoded is passed over."""
        self.context.flush_buffers()
        for packet in [*packets, None]:
            try:
                shown = self.context.decode(packet)
            except av.error.FFmpegError:
                self.errors += 1
                if not self.packets.rank:
                    return  # without time stamps frames are counted, and the count is lost here
                continue
            yield from shown
