"""Pixels of the demo corpus: scenes become frames, frames become MP4 (H.264) or PNG bytes."""

from __future__ import annotations

import io
from functools import cache, lru_cache

import av
import numpy as np
from av.video.reformatter import VideoReformatter
from numpy.typing import NDArray
from PIL import Image
from sklearn.datasets import load_digits, load_sample_images

from dali_pipelines.demo_scenes import Scene, Sprite

Pixels = NDArray[np.uint8]
Floats = NDArray[np.float32]

TINTS = {
    "white": (255, 255, 255),
    "yellow": (255, 240, 70),
    "green": (90, 255, 110),
    "blue": (110, 200, 255),
    "pink": (255, 150, 215),
    "orange": (255, 175, 70),
}
DARK = (5.0, 80.0)
"""Range of a background's colours; digits are brighter."""
PHOTO_SPLIT = 0.7
"""Share of a photograph's width that training backgrounds come from; held-out ones come from the rest."""
H264 = {"preset": "veryfast", "crf": "20", "x264-params": "mbtree=0"}
"""x264's macroblock tree makes the bytes of such small frames differ between runs now and then."""


@cache
def _digits() -> Floats:
    return (load_digits().images / 16).astype(np.float32)


@cache
def _photos() -> tuple[Pixels, ...]:
    return tuple(load_sample_images().images)


@lru_cache(maxsize=4096)
def _glyph(image: int, size: int) -> Floats:
    """Opacity of a handwritten digit, enlarged to ``size`` pixels."""
    enlarged = Image.fromarray(_digits()[image]).resize((size, size), Image.Resampling.BICUBIC)
    return np.clip(np.asarray(enlarged) * 1.25, 0, 1).astype(np.float32)[..., None]


def photo_columns(split: str, photo_width: int) -> tuple[int, int]:
    """First column and the one after the last of the part of a photograph that a split takes backgrounds from."""
    border = int(PHOTO_SPLIT * photo_width)
    return (0, border) if split == "train" else (border, photo_width)


def _smooth(rng: np.random.Generator, cells: int, width: int, height: int, channels: int) -> Floats:
    """A random field that varies over ``cells`` cells a side, ``[height, width, channels]``."""
    planes = [
        Image.fromarray(rng.random((cells, cells), dtype=np.float32)).resize((width, height), Image.Resampling.BILINEAR)
        for _ in range(channels)
    ]
    return np.stack([np.asarray(p) for p in planes], axis=-1)


def _photo(rng: np.random.Generator, split: str, width: int, height: int) -> Floats:
    """A darkened crop of a photograph, taken from up to 2.5 times its size."""
    photo = _photos()[int(rng.integers(2))]
    left, right = photo_columns(split, photo.shape[1])
    zoom = rng.uniform(1, min(2.5, (right - left) / width))
    w, h = int(zoom * width), int(zoom * height)
    x, y = int(rng.integers(left, right - w + 1)), int(rng.integers(photo.shape[0] - h + 1))
    crop = Image.fromarray(photo[y : y + h, x : x + w]).resize((width, height), Image.Resampling.BILINEAR)
    return np.asarray(crop, dtype=np.float32) * (DARK[1] / 255)


def background(scene: Scene) -> Floats:
    """The background of a scene, ``[height, width, 3]``."""
    rng = np.random.default_rng(scene.background_seed)
    width, height = scene.width, scene.height
    if scene.background == "photo":
        return _photo(rng, scene.split, width, height)
    one, two = rng.uniform(*DARK, (2, 3)).astype(np.float32)
    if scene.background == "plain":
        share = np.zeros((height, width, 1), np.float32)
    elif scene.background == "noise":
        share = _smooth(rng, int(rng.integers(4, 20)), width, height, 3)
    else:
        angle, wave = rng.uniform(0, 2 * np.pi), rng.uniform(6, 16)
        y, x = np.mgrid[:height, :width].astype(np.float32)
        way = (x * np.cos(angle) + y * np.sin(angle))[..., None]
        if scene.background == "gradient":
            share = (way - way.min()) / (way.max() - way.min())
        else:
            share = 0.5 + 0.5 * np.sin(way * (2 * np.pi / wave))
    return (one + (two - one) * share).astype(np.float32)


def _draw(canvas: Floats, sprite: Sprite, frame: int) -> None:
    """Blend a digit into a frame; what lies outside is cut off."""
    opacity = _glyph(sprite.image, sprite.size)
    x, y = (c - sprite.size // 2 for c in sprite.centre(frame))
    height, width = canvas.shape[:2]
    top, left = max(-y, 0), max(-x, 0)
    opacity = opacity[top : height - y, left : width - x]
    target = canvas[y + top : y + top + opacity.shape[0], x + left : x + left + opacity.shape[1]]
    target += opacity * (np.array(TINTS[sprite.colour], np.float32) - target)


def draw_frames(scene: Scene) -> Pixels:
    """The frames of a scene, ``[frames, height, width, 3]``."""
    canvas = np.repeat(background(scene)[None], scene.frames, axis=0)
    for sprite in scene.sprites:
        for frame in range(sprite.start, sprite.stop):
            _draw(canvas[frame], sprite, frame)
    return np.clip(canvas + 0.5, 0, 255).astype(np.uint8)


def encode_video(frames: Pixels, fps: int) -> bytes:
    """An MP4 file of the frames: H.264, one thread, so that the same frames always give the same bytes."""
    out = io.BytesIO()
    height, width = frames.shape[1:3]
    converter = VideoReformatter()
    with av.open(out, "w", format="mp4", options={"fflags": "+bitexact"}) as container:
        stream = container.add_stream("libx264", rate=fps, options=H264)
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.thread_count = 1
        for pixels in frames:
            rgb = av.VideoFrame.from_ndarray(pixels, format="rgb24")
            container.mux(stream.encode(converter.reformat(rgb, width, height, "yuv420p", threads=1)))
        container.mux(stream.encode(None))
    return out.getvalue()


def encode_image(frames: Pixels) -> bytes:
    """A PNG file of the first frame."""
    out = io.BytesIO()
    Image.fromarray(frames[0]).save(out, "PNG", compress_level=4)
    return out.getvalue()
