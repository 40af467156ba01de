"""A video -> H.264 in closed groups of pictures of fixed length: upright, without sound, never larger.

Short groups are what sparse sampling wants: a frame costs at most so many decoded ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from itertools import pairwise
from pathlib import Path
from typing import Any, cast

import av
from av.filter import Graph
from av.video.frame import VideoFrame
from av.video.stream import VideoStream

from dali_pipelines.media import Media, opened
from dali_pipelines.options import Limits
from dali_pipelines.prepare.settings import Reencode
from megatron_elva.config.errors import InputError

_LOST_SHARE = 0.05  # of its frames that a video may lack because they are damaged
_TURNS = {1: ["cclock"], 2: ["clock", "clock"], 3: ["clock"]}  # np.rot90 turns to the left


def reencode(data: bytes, options: Reencode, limits: Limits, path: Path, alive: Callable[[], None]) -> int:
    """Encode a video again and check the result by decoding it.

    The same bytes give the same file: one thread, and no time or version in the container.

    Args:
        data: the video.
        options: how.
        limits: what it may be at most.
        path: where to write the MP4.
        alive: called now and then, since a long video takes its time.

    Returns:
        Frames that were left out because they cannot be decoded; times of the others stay.

    Raises:
        InputError: it cannot be used, or too much of it is damaged.
    """
    with opened(data, limits) as media:
        written, lost = _encode(media, options, path, alive)
    with opened(path.read_bytes(), limits) as result:
        decoded = sum(1 for _ in _frames(result, alive))
        if decoded != written or result.probe.frames != written:
            raise InputError(f"encoded again it has {decoded} frames instead of {written}")
    return lost


def _encode(media: Media, options: Reencode, path: Path, alive: Callable[[], None]) -> tuple[int, int]:
    """Returns the number of frames written and of those that could not be decoded."""
    written, last, first = 0, -1, None
    with av.open(str(path), "w", format="mp4", options={"movflags": "+faststart", "fflags": "+bitexact"}) as out:
        stream: VideoStream | None = None
        graph: Graph | None = None
        base = media.stream.time_base or Fraction(1, 1000)
        for count, frame in enumerate(_frames(media, alive)):
            if graph is None:
                size, kind = (frame.width, frame.height), frame.format.name
                graph = _graph(media, options, frame, base)
            elif (frame.width, frame.height) != size or frame.format.name != kind:
                pts = frame.pts
                frame = frame.reformat(*size, format=kind)  # some streams change theirs on the way
                frame.pts = pts
            at = frame.pts if frame.pts is not None else round(count / (media.probe.fps or 25) / base)
            first = at if first is None else first
            last = max(at - first, last + 1)  # two frames at one time would be refused by the encoder
            graph.push(frame)
            shown = cast(VideoFrame, graph.pull())
            if stream is None:
                stream = _output(out, shown, media, options, base)
            shown.pts, shown.time_base = last, base
            shown.pict_type = av.video.frame.PictureType.NONE  # or x264 would repeat the source's choice of keyframes
            out.mux(stream.encode(shown))
            written += 1
        if stream is None:
            raise InputError("no frame in it can be decoded")
        out.mux(stream.encode())
    lost = max(media.probe.frames - written, 0)
    if lost > _LOST_SHARE * media.probe.frames:
        raise InputError(f"damaged: {lost} of {media.probe.frames} frames cannot be decoded")
    return written, lost


def _frames(media: Media, alive: Callable[[], None]) -> Iterator[VideoFrame]:
    """All frames in order of display; a packet that cannot be decoded is passed over."""
    for count, packet in enumerate([*media.packets, None]):
        if not count % 32:
            alive()
        try:
            shown = media.context.decode(packet)
        except av.error.FFmpegError:
            continue
        yield from (frame for frame in shown if not frame.is_corrupt)


def _size(media: Media, options: Reencode) -> tuple[int, int]:
    """Width and height of the result: even, as 4:2:0 needs, and never larger than the source's."""
    height, width = media.probe.native
    scale = min(1.0, options.max_side / max(height, width)) if options.max_side else 1.0
    return max(2, int(width * scale) // 2 * 2), max(2, int(height * scale) // 2 * 2)


def _graph(media: Media, options: Reencode, frame: VideoFrame, base: Fraction) -> Graph:
    """Turn, scale and convert. Colours keep their matrix and range."""
    graph = Graph()
    steps: list[Any] = [
        graph.add_buffer(width=frame.width, height=frame.height, format=frame.format, time_base=base),
        *(graph.add("transpose", way) for way in _TURNS.get(media.probe.turns, [])),
    ]
    width, height = _size(media, options)
    native_height, native_width = media.probe.native
    if max(native_height - height, native_width - width) > 1:
        steps.append(graph.add("scale", f"{width}:{height}:flags=bicubic+accurate_rnd+full_chroma_int+bitexact"))
    elif (native_height, native_width) != (height, width):
        steps.append(graph.add("crop", f"{width}:{height}:0:0"))  # a last odd line is cut off, nothing is scaled
    steps += [graph.add("format", "pix_fmts=yuv420p|yuvj420p"), graph.add("buffersink")]
    for one, other in pairwise(steps):
        one.link_to(other)
    graph.configure()
    return graph


def _output(out: Any, shown: VideoFrame, media: Media, options: Reencode, base: Fraction) -> VideoStream:
    rate = Fraction(media.probe.fps or 25).limit_denominator(1001)
    # with its macroblock tree x264 gives other bytes each time where the width is no multiple of 16
    fixed = "threads=1:lookahead-threads=1:mbtree=0"
    x264 = f"keyint={options.gop}:min-keyint={options.gop}:scenecut=0:open-gop=0:{fixed}"
    stream: VideoStream = out.add_stream(
        "libx264", rate=rate, options={"crf": str(options.crf), "preset": options.preset, "x264-params": x264}
    )
    stream.width, stream.height = shown.width, shown.height
    stream.pix_fmt = shown.format.name
    stream.codec_context.time_base = base
    source = media.context
    stream.codec_context.color_range = source.color_range
    stream.codec_context.colorspace = source.colorspace
    stream.codec_context.color_primaries = source.color_primaries
    stream.codec_context.color_trc = source.color_trc
    return stream
