"""Clips whose frames carry their own number, rendered for `benchmarks.decode`.

Textured pictures that pan, sprites that move, film grain and a scene cut every few seconds: enough for a codec to spend
the bits that it spends on videos from the web. The number stands in the top left corner as black and white blocks, once
plain and once inverted below.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import av
import numpy as np
from av.video.stream import VideoStream
from numpy.typing import NDArray
from PIL import Image

Pixels = NDArray[np.uint8]

BITS = 12
BLOCK = 16
"""Side of a block of the number in pixels."""
SCENE_SECONDS = 8
"""A cut comes after so long; no multiple of it is a multiple of a group of pictures."""
GRAIN = 4.0
"""Standard deviation of the film grain, in levels."""
DETAIL = 0.8
"""Contrast of a texture's next finer layer as a share of the one before."""


@dataclass(frozen=True)
class Clip:
    """One file to render.

    Attributes:
        codec: encoder of libavcodec.
        container: format of the file.
        height: in pixels.
        width: in pixels.
        gop: frames from one keyframe to the next at most.
        frames: frames in it.
        rate: frames a second.
        seed: of the picture.
    """

    codec: str
    container: str
    height: int
    width: int
    gop: int
    frames: int
    rate: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its file."""
        return (
            f"{self.codec}_{self.width}x{self.height}_gop{self.gop}_{self.frames}at{self.rate}_{self.seed}"
            f".{ {'matroska': 'mkv'}.get(self.container, self.container) }"
        )


def write_number(picture: Pixels, number: int) -> None:
    """Draw a number into a picture ``[H, W, 3]`` uint8, in place; one that is too small for it stays as it is."""
    if not _has_room(picture):
        return
    bits = np.array([number >> b & 1 for b in range(BITS)], np.uint8)
    blocks = np.stack([bits, 1 - bits]) * 219 + 16
    picture[: 2 * BLOCK, : BITS * BLOCK] = blocks.repeat(BLOCK, 0).repeat(BLOCK, 1)[..., None]


def read_number(picture: Pixels) -> int | None:
    """The number in a picture ``[H, W, 3]`` uint8; None: there is none to be read."""
    if not _has_room(picture):
        return None
    corner = picture[: 2 * BLOCK, : BITS * BLOCK].astype(np.float32).mean(-1)
    inner = corner.reshape(2, BLOCK, BITS, BLOCK)[:, 4:-4, :, 4:-4].mean((1, 3))
    plain, inverted = inner > 128
    if (plain == inverted).any() or (np.abs(inner - 128) < 40).any():
        return None
    return int((plain << np.arange(BITS)).sum())


def _has_room(picture: Pixels) -> bool:
    return picture.shape[0] >= 2 * BLOCK and picture.shape[1] >= BITS * BLOCK


def _texture(rng: np.random.Generator, height: int, width: int) -> NDArray[np.float32]:
    """Noise whose power falls with frequency as in photographs, ``[H, W, 3]`` float32 in 0..255."""
    total = np.zeros((height, width, 3), np.float32)
    cells, weight = 4, 1.0
    while cells < width:
        small = rng.random((max(cells * height // width, 2), cells, 3), dtype=np.float32)
        planes = [Image.fromarray(small[..., c]).resize((width, height), Image.Resampling.BICUBIC) for c in range(3)]
        total += weight * np.stack([np.asarray(p) for p in planes], -1)
        cells, weight = cells * 2, weight * DETAIL
    total = 0.4 * total + 0.6 * total.mean(-1, keepdims=True)  # mostly light and dark, as pictures are
    total -= total.min()
    return total * (255 / total.max())


def _scene(rng: np.random.Generator, height: int, width: int, frames: int) -> Iterator[Pixels]:
    """Frames of one scene: a picture that pans, and three textured discs that cross it."""
    big = Image.fromarray(_texture(rng, int(1.4 * height), int(1.4 * width)).astype(np.uint8))
    room = np.array([0.4 * height, 0.4 * width])
    start, speed = rng.uniform(0.2, 0.8, 2) * room, rng.uniform(-1, 1, 2) * height / 360
    side = height // 4
    yy, xx = np.mgrid[:side, :side] / (side - 1) - 0.5
    disc = (yy**2 + xx**2 < 0.25)[..., None]
    sprites = [_texture(rng, side, side).astype(np.uint8) for _ in range(3)]
    paths = rng.uniform(0, 1, (3, 4))
    for t in range(frames):
        y, x = np.clip(start + speed * t, 0, room)
        view = (1, 0, x, 0, 1, y)
        picture = np.array(big.transform((width, height), Image.Transform.AFFINE, view, Image.Resampling.BILINEAR))
        for sprite, (a, b, c, d) in zip(sprites, paths, strict=True):
            top = int((height - side) * (0.5 + 0.5 * math.sin(6.3 * a + t * (0.02 + 0.04 * b))))
            left = int((width - side) * (0.5 + 0.5 * math.cos(6.3 * c + t * (0.02 + 0.04 * d))))
            at = picture[top : top + side, left : left + side]
            np.copyto(at, sprite, where=disc)
        yield picture


def render(height: int, width: int, frames: int, rate: int, seed: int) -> Iterator[Pixels]:
    """The frames of a clip, ``[H, W, 3]`` uint8 each, with their numbers."""
    rng = np.random.default_rng(seed)
    grain = [rng.normal(0, GRAIN, (height + 64, width + 64, 1)).round().astype(np.int16) for _ in range(4)]
    number = 0
    while number < frames:
        for picture in _scene(rng, height, width, min(SCENE_SECONDS * rate, frames - number)):
            dy, dx = rng.integers(0, 64, 2)
            noisy = picture + grain[number % 4][dy : dy + height, dx : dx + width]
            shown = np.clip(noisy, 0, 255).astype(np.uint8)
            write_number(shown, number)
            number += 1
            yield shown


def options_of(clip: Clip) -> dict[str, str]:
    """Encoder options of a clip."""
    gop = {"g": str(clip.gop)}
    return {
        "libx264": {**gop, "preset": "medium", "crf": "23"},
        "libvpx-vp9": {**gop, "crf": "34", "b": "0", "deadline": "realtime", "cpu-used": "6"},
        "mjpeg": {"qmin": "3", "qmax": "5"},
    }.get(clip.codec, gop)


def make(clips: Sequence[Clip], folder: Path) -> list[Path]:
    """Files of the clips; those that are there already stay. Clips of one picture are rendered together."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [c for c in clips if not (folder / c.name).is_file()]
    pictures = {(c.height, c.width, c.frames, c.rate, c.seed) for c in missing}
    for picture in sorted(pictures):
        _encode([c for c in missing if (c.height, c.width, c.frames, c.rate, c.seed) == picture], folder)
    return [folder / c.name for c in clips]


def _encode(clips: Sequence[Clip], folder: Path) -> None:
    parts = [folder / f"part_{c.name}" for c in clips]
    outs = [av.open(str(p), "w", format=c.container) for p, c in zip(parts, clips, strict=True)]
    streams = []
    for clip, out in zip(clips, outs, strict=True):
        stream = cast(VideoStream, out.add_stream(clip.codec, rate=Fraction(clip.rate), options=options_of(clip)))
        stream.height, stream.width = clip.height, clip.width
        stream.pix_fmt = "yuvj420p" if clip.codec == "mjpeg" else "yuv420p"
        stream.codec_context.thread_count = 2
        streams.append(stream)
    first = clips[0]
    for picture in render(first.height, first.width, first.frames, first.rate, first.seed):
        for out, stream in zip(outs, streams, strict=True):
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    for part, clip, out, stream in zip(parts, clips, outs, streams, strict=True):
        out.mux(stream.encode())
        out.close()
        part.replace(folder / clip.name)
