"""A video or image file in memory -> patches, through PyAV.

Colours are those of DALI's decoder on a CPU, so that it does not matter which of the two decoded a clip: swscale's
BT.601 in its accurate mode, whatever the file says about matrix, range and place of the chroma samples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import av
import numpy as np
from av.packet import Packet
from av.video.frame import VideoFrame

from dali_pipelines.colours import ToRgb
from dali_pipelines.geometry import Geometry, plan
from dali_pipelines.media import Media, Probe, check_size, opened
from dali_pipelines.needed import needed
from dali_pipelines.options import Limits, VisionOptions
from dali_pipelines.patches import Cutter
from dali_pipelines.sampling import choose
from megatron_elva.config.errors import InputError
from megatron_elva.layout import VideoSpec

Take = Callable[[int, np.ndarray], None]
"""Called with the index of a wanted frame and the frame, ``[H, W, 3]`` uint8, which may not be kept."""


@dataclass(frozen=True)
class Watched:
    """What the model sees of one file.

    Attributes:
        patches: ``[N * r * r, P * P * 3]`` uint8 in the order of `megatron_elva.layout.Pack.patches`.
        video: the video in cells.
        indices: the chosen frames by their place in order of display.
        timestamps: seconds of each from the first frame of the video.
        geometry: how they became cells.
        codec: plain name of the codec.
        route: who decoded it.
    """

    patches: np.ndarray
    video: VideoSpec
    indices: tuple[int, ...]
    timestamps: tuple[float, ...]
    geometry: Geometry
    codec: str
    route: str = "pyav"


def watch(
    data: bytes,
    options: VisionOptions,
    seed: Sequence[int] = (),
    timestamps: Sequence[float] | None = None,
) -> Watched:
    """Decode the frames of a video that the options choose; an image is a video of one frame.

    Args:
        data: the file.
        options: which frames, at what size, and what the file may be at most.
        seed: whole numbers that stand for the sample and the epoch, for random clips.
        timestamps: seconds, with ``data.sampling=timestamps``.

    Raises:
        InputError: not all of the chosen frames can be had; one line says why. Nothing else is raised for any bytes.
    """
    with opened(data, options.limits) as media:
        found = media.probe
        indices, geometry = select(found, options, seed, timestamps)
        cutter = Cutter(geometry, options.patch, options.reduction)
        decoder = _Decoder(media, options.limits)
        if not decoder.run(indices, _putting(cutter, indices)):
            # It has packets that show nothing. Then only decoding tells how many frames there are, and which.
            found = decoder.shown_frames()
            indices, geometry = select(found, options, seed, timestamps)
            cutter = Cutter(geometry, options.patch, options.reduction)
            decoder.run_all(indices, _putting(cutter, indices))
        seconds = tuple(found.times[indices].tolist())
        return Watched(cutter.patches, geometry.video, tuple(indices), seconds, geometry, found.codec)


def measure(
    data: bytes, options: VisionOptions, seed: Sequence[int] = (), timestamps: Sequence[float] | None = None
) -> VideoSpec:
    """What `watch` will give, in cells, from the packets alone; at most that where packets show nothing.

    Raises:
        InputError: the file cannot be used.
    """
    with opened(data, options.limits) as media:
        return select(media.probe, options, seed, timestamps)[1].video


def frames_of(data: bytes, indices: Sequence[int], limits: Limits) -> np.ndarray:
    """Decode some frames of a video.

    Args:
        data: the file.
        indices: frames by their place in order of display, in any order, repeated or not.
        limits: what the file may be at most.

    Returns:
        ``[k, H, W, 3]`` uint8 as coded, neither turned nor scaled.

    Raises:
        InputError: one of them cannot be had.
    """
    with opened(data, limits) as media:
        found = media.probe
        bad = [i for i in indices if not 0 <= i < found.frames]
        if bad or not len(indices):
            raise InputError(f"frame {bad[0] if bad else None} is asked for, it has 0 to {found.frames - 1}")
        frames = np.empty((len(indices), *found.coded, 3), np.uint8)
        places: dict[int, list[int]] = {}
        for place, i in enumerate(indices):
            places.setdefault(int(i), []).append(place)

        def take(index: int, frame: np.ndarray) -> None:
            frames[places[index]] = frame

        wanted = sorted(places)
        decoder = _Decoder(media, limits)
        if not decoder.run(wanted, take):
            decoder.shown_frames()
            decoder.run_all(wanted, take)
        return frames


def select(
    found: Probe, options: VisionOptions, seed: Sequence[int] = (), timestamps: Sequence[float] | None = None
) -> tuple[list[int], Geometry]:
    """The frames that the options choose, and how they become cells.

    Raises:
        InputError: the file ends before one of them.
    """
    indices = choose(options.sampling, found.times, seed, timestamps)
    if indices[-1] >= found.usable:
        raise InputError(found.cut)
    return indices, plan(found.native, found.turns, len(indices), options)


def _putting(cutter: Cutter, indices: Sequence[int]) -> Take:
    place = {index: i for i, index in enumerate(indices)}
    return lambda index, frame: cutter.put(frame, place[index])


class _Decoder:
    """Runs the decoder of one file over the packets that the wanted frames need."""

    def __init__(self, media: Media, limits: Limits) -> None:
        self._media = media
        self._limits = limits
        self._rank = media.rank
        self._frames = media.probe.frames
        self._errors = 0
        self._to_rgb = ToRgb(media.probe.coded)

    def run(self, wanted: Sequence[int], take: Take) -> bool:
        """Decode the wanted frames: as few packets as possible, and if that fails all of them.

        Returns:
            False where frames are missing although nothing is damaged.

        Raises:
            InputError: some are missing because the file is damaged.
        """
        if wanted[-1] >= self._media.probe.usable:
            raise InputError(self._media.probe.cut)
        stretches = needed(self._media, wanted)
        whole = [self._media.packets]
        missing = self._pass(wanted, stretches, take)
        if missing and stretches != whole:
            missing = self._pass(wanted, whole, take)
        if missing and (self._errors or self._media.probe.fault):
            raise self._damaged(missing)
        return not missing

    def run_all(self, wanted: Sequence[int], take: Take) -> None:
        """Decode the wanted ones among all frames.

        Raises:
            InputError: some are missing.
        """
        missing = self._pass(wanted, [self._media.packets], take)
        if missing:
            raise self._damaged(missing)

    def shown_frames(self) -> Probe:
        """Count what is shown by decoding everything; from then on frames are numbered by that."""
        stamps = [frame.pts for frame in self._decoded(self._media.packets)]
        if not stamps:
            raise InputError("no frame in the file can be decoded")
        found, n = self._media.probe, len(stamps)
        known = {stamp: i for i, stamp in enumerate(stamps) if stamp is not None}
        self._rank, self._frames = known if len(known) == n else {}, n
        ticks = np.array([stamp - min(known) for stamp in sorted(known)], np.float64)
        base = self._media.stream.time_base
        if self._rank and base is not None:
            times = ticks * base.numerator / base.denominator
        else:
            times = np.arange(n) / found.fps
        return replace(found, frames=n, usable=n, times=times)

    def _damaged(self, missing: set[int]) -> InputError:
        return InputError(f"damaged: frame {min(missing)} of {self._frames} cannot be decoded")

    def _pass(self, wanted: Sequence[int], stretches: Sequence[Sequence[Packet]], take: Take) -> set[int]:
        """One pass over stretches of packets; the wanted frames that did not come."""
        missing = set(wanted)
        for packets in stretches:
            for count, frame in enumerate(self._decoded(packets)):
                index = self._rank.get(frame.pts) if self._rank and frame.pts is not None else count
                if index in missing:
                    missing.discard(index)
                    check_size(frame, self._limits)
                    take(index, self._to_rgb(frame))
                    if not missing:
                        return missing
        return missing

    def _decoded(self, packets: Sequence[Packet]) -> Iterator[VideoFrame]:
        """The frames of a stretch of packets in order of display. A packet that cannot be decoded is passed over."""
        decode = self._media.context.decode
        self._media.context.flush_buffers()
        for packet in (*packets, None):
            try:
                shown = decode(packet)
            except av.error.FFmpegError:
                self._errors += 1
                if not self._rank:
                    return  # without time stamps frames are counted, and the count is lost here
                continue
            yield from shown
