"""The decoders that `benchmarks.decode` compares: bytes of a file and frame numbers in, RGB frames out.

Each runs with one codec thread, in as many processes as the others: that is how a loader gets the most out of its
cores. Those that are not installed, or cannot take a file, say so.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import Any, Literal

import av
import numpy as np
from av.video.frame import VideoFrame

from megatron_elva.config.errors import InputError

Decode = Callable[[bytes, Sequence[int]], np.ndarray]
"""A file and ascending frame numbers -> ``[T, H, W, 3]`` uint8."""

PATCH, REDUCTION = 14, 2
"""What the routes that end in patches cut frames into."""


@dataclass(frozen=True)
class Route:
    """One way to get frames.

    Attributes:
        name: for the report.
        package: what it needs, by the name it is installed under.
        made: sets it up, once a process.
        ours: whether it is this project's.
        patches: it goes on to patches, which the others do not; shown beside them and not compared with them.
    """

    name: str
    package: str
    made: Callable[[], Decode]
    ours: bool = False
    patches: bool = False

    @property
    def installed(self) -> str | None:
        """Version of its package, or None."""
        try:
            return version(self.package)
        except PackageNotFoundError:
            return None


def _ours() -> Decode:
    from dali_pipelines.decode import frames_of

    limits = _limits()
    return lambda data, indices: frames_of(data, indices, limits)


def _limits() -> Any:
    from dali_pipelines.options import Limits

    return Limits(pixels=1 << 24, frames=100_000, bytes=1 << 31, seconds=4 * 3600.0)


def _options(frames: int) -> Any:
    from dali_pipelines.options import Sampling, VisionOptions

    return VisionOptions(Sampling("uniform", frames), PATCH, REDUCTION, "pad", None, None, _limits())


def _frames_from(patches: np.ndarray, video: Any) -> np.ndarray:
    """Patches ``[n, P*P*3]`` back to frames, so that their numbers can be read."""
    (rows, columns), r, p = video.grids[0], REDUCTION, PATCH
    split = patches.reshape(video.frames, rows, columns, r, r, p, p, 3).transpose(0, 1, 3, 5, 2, 4, 6, 7)
    return split.reshape(video.frames, rows * r * p, columns * r * p, 3)


def _ours_to_patches() -> Decode:
    from dali_pipelines.decode import watch

    def run(data: bytes, indices: Sequence[int]) -> np.ndarray:
        watched = watch(data, _options(len(indices)))
        if list(watched.indices) != list(indices):
            raise InputError(f"chose the frames {watched.indices}")
        return _frames_from(watched.patches, watched.video)

    return run


def _dali() -> Decode:
    from dali_pipelines import codecs, media, remux
    from dali_pipelines.geometry import plan
    from dali_pipelines.graph import DeviceDecoder, GraphItem

    native = codecs.native("cpu")
    decoder = DeviceDecoder("cpu", 1, PATCH, REDUCTION)

    def run(data: bytes, indices: Sequence[int]) -> np.ndarray:
        probe = media.probe(data, _limits())
        takes, why = native.takes(probe)
        if not takes:
            raise InputError(why)
        sparse, new = remux.sparse(data, indices, _limits())
        geometry = plan(probe.native, probe.turns, len(indices), _options(len(indices)))
        (patches,) = decoder.decode([GraphItem(sparse, new, None, geometry)])
        if isinstance(patches, str):
            raise InputError(patches)
        return _frames_from(patches.numpy(), geometry.video)

    return run


def _pyav() -> Decode:
    """As one writes it by hand: seek to the keyframe before each frame, decode up to it, convert."""

    def run(data: bytes, indices: Sequence[int]) -> np.ndarray:
        found: list[np.ndarray] = []
        with av.open(io.BytesIO(data), mode="r") as container:
            stream = container.streams.video[0]
            stream.codec_context.thread_count = 1
            if stream.time_base is None or stream.average_rate is None:
                raise InputError("no frame rate")
            step = 1 / (stream.average_rate * stream.time_base)  # ticks a frame: the clips have a constant rate
            keyframes = _keyframes(data)
            reached = -1
            decoder: Iterator[VideoFrame] = iter(())
            for index in indices:
                keyframe = max((k for k in keyframes if k <= index), default=0)
                if keyframe > reached:
                    container.seek(round(keyframe * step) + (stream.start_time or 0), stream=stream)
                    decoder = iter(container.decode(stream))
                for frame in decoder:
                    reached = round(((frame.pts or 0) - (stream.start_time or 0)) / step)
                    if reached >= index:
                        found.append(frame.to_ndarray(format="rgb24"))
                        break
        return np.stack(found)

    return run


@cache
def _keyframes(data: bytes) -> tuple[int, ...]:
    """Frame numbers of the keyframes, which costs this rival nothing."""
    with av.open(io.BytesIO(data), mode="r") as container:
        stream = container.streams.video[0]
        times = [(p.pts, p.is_keyframe) for p in container.demux(stream) if p.pts is not None]
    return tuple(i for i, (_, key) in enumerate(sorted(times)) if key)


def _torchcodec(seek_mode: Literal["exact", "approximate"]) -> Callable[[], Decode]:
    def made() -> Decode:
        from torchcodec.decoders import VideoDecoder

        def run(data: bytes, indices: Sequence[int]) -> np.ndarray:
            # NHWC is how it decodes; in this order the frames are not copied once more
            video = VideoDecoder(data, dimension_order="NHWC", num_ffmpeg_threads=1, seek_mode=seek_mode)
            return video.get_frames_at(list(indices)).data.numpy()

        return run

    return made


def _decord() -> Decode:
    decord = import_module("decord")

    def run(data: bytes, indices: Sequence[int]) -> np.ndarray:
        video = decord.VideoReader(io.BytesIO(data), ctx=decord.cpu(0), num_threads=1)
        return video.get_batch(list(indices)).asnumpy()

    return run


ROUTES = {
    route.name: route
    for route in (
        Route("ours", "av", _ours, ours=True),
        Route("pyav", "av", _pyav),
        Route("torchcodec exact", "torchcodec", _torchcodec("exact")),
        Route("torchcodec approximate", "torchcodec", _torchcodec("approximate")),
        Route("decord", "decord", _decord),
        Route("ours to patches", "av", _ours_to_patches, ours=True, patches=True),
        Route("dali to patches", "nvidia-dali-cuda130", _dali, ours=True, patches=True),
    )
}
