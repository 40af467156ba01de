"""Every kind of file: the frames that come are those drawn into its pictures, and DALI and PyAV give the same ones."""

import io

import av
import numpy as np
import pytest
from PIL import Image

from dali_pipelines.decode import frames_of, measure, select, watch
from dali_pipelines.media import probe
from dali_pipelines.options import Hybrid, Limits, Sampling, VisionOptions
from dali_pipelines.remux import sparse
from dali_pipelines.sampling import uniform
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import (
    FIXTURES,
    LIMITS,
    UNEVEN,
    encode,
    encode_audio,
    image,
    numbered_frames,
    numbers,
    textured_frames,
    turned_by_header,
    x264,
)

IMAGES = ("jpeg", "png", "webp", "jpeg_turned", "png_turned", "webp_turned")
COUNTS = {"two_angles": 9, "cover": 9, "gif": 6, "turned_90": 6, "turned_180": 6, "turned_270": 6}
COUNTS |= {"variable_rate.mp4": len(UNEVEN), "variable_rate.mkv": len(UNEVEN)} | dict.fromkeys(IMAGES, 1)
"""Frames of the fixtures; the others have 24."""
SIZES = {"odd": (57, 43), "odd_half_chroma": (57, 43), "portrait": (96, 54)} | dict.fromkeys(IMAGES, (45, 61))
TURNS = {"turned_90": 1, "turned_180": 2, "turned_270": 3, "jpeg_turned": 3, "png_turned": 1, "webp_turned": 2}
FORMATS = {
    "full_chroma": "yuv444p",
    "half_chroma": "yuv422p",
    "ten_bit": "yuv420p10le",
    "full_range": "yuvj420p",
    "mjpeg.mov": "yuvj422p",
}
NATIVE = ("vp8", "vp9", "odd_half_chroma", "mjpeg.avi", "mjpeg.mov")
"""Fixtures that DALI decodes itself on a CPU."""


def drawn(name):
    """The numbers in the frames that a player would show."""
    return list(range(7, 18)) if name == "edited" else list(range(COUNTS.get(name, 24)))


def options(mode="uniform", frames=1000, hybrid=None, max_pixels=None, patch=1, reduction=1, fit="pad", **how):
    return VisionOptions(Sampling(mode, frames, **how), patch, reduction, fit, max_pixels, hybrid, LIMITS)


def as_coded(watched):
    """``[T, H, W, 3]`` as stored, from patches of one pixel."""
    (height, width), frames = watched.video.grids[0], watched.video.frames
    return np.rot90(watched.patches.reshape(frames, height, width, 3), -watched.geometry.turns, (1, 2))


def refused(data, **bounds):
    """The one line with which a file is refused, by whatever looks at it."""
    limits = Limits(**{**vars(LIMITS), **bounds})
    how = VisionOptions(Sampling("uniform", 8), 7, 2, "crop", None, None, limits)
    said = set()
    for look in (lambda: probe(data, limits), lambda: watch(data, how), lambda: measure(data, how)):
        with pytest.raises(InputError) as caught:
            look()
        said.add(str(caught.value))
    (line,) = said
    assert "\n" not in line
    return line


@pytest.mark.parametrize("name", FIXTURES)
def test_the_frames_that_are_drawn_are_the_frames_that_come(name):
    data, expected = FIXTURES[name](), drawn(name)
    n = len(expected)
    assert numbers(frames_of(data, range(n), LIMITS)) == expected
    for i in {0, 1, n // 3, n // 2, n - 1} & set(range(n)):
        assert numbers(frames_of(data, [i], LIMITS)) == [expected[i]]
    ways = [options(frames=k) for k in (2, 5, 1000)]
    ways += [options("clip", 6, clip_seconds=0.7), options("rate", 50, rate=4.0), options("timestamps", 9)]
    for how in ways:
        watched = watch(data, how, (3, 1), (0.25, 0.95, 77.0))
        assert numbers(as_coded(watched)) == [expected[i] for i in watched.indices]
        assert len(watched.indices) == len(watched.timestamps)
        if how.sampling.mode == "uniform":
            assert list(watched.indices) == uniform(n, how.sampling.frames)
        if how.sampling.mode == "timestamps" and n == 24:
            assert watched.indices == (2, 9, 23)


@pytest.mark.parametrize("name", FIXTURES)
def test_what_the_packets_tell(name):
    found = probe(FIXTURES[name](), LIMITS)
    assert found.frames == found.usable == len(drawn(name))
    assert found.coded == SIZES.get(name, (64, 96))
    assert found.turns == TURNS.get(name, 0)
    assert found.native == (found.coded[::-1] if found.turns % 2 else found.coded)
    assert found.pixel_format == FORMATS.get(name, found.pixel_format)
    times = np.array(UNEVEN) / 1000 if name.startswith("variable") else np.arange(found.frames) / 10
    np.testing.assert_allclose(found.times, times, atol=1.5e-3)
    if len(times) > 1:
        assert found.fps == pytest.approx((len(times) - 1) / times[-1], rel=0.02)
        assert found.duration == pytest.approx(times[-1] + 1 / found.fps, rel=0.02)


@pytest.fixture(scope="module")
def dali():
    pytest.importorskip("nvidia.dali")
    from dali_pipelines.codecs import native
    from dali_pipelines.graph import DeviceDecoder

    return DeviceDecoder("cpu", 4, 7, 2), native("cpu")


@pytest.mark.parametrize("name", FIXTURES)
def test_dali_and_pyav_give_the_same_patches(name, dali):
    from dali_pipelines.graph import GraphItem

    decoder, native = dali
    data = FIXTURES[name]()
    found = probe(data, LIMITS)
    assert native.takes(found)[0] == (name in NATIVE)
    for how in (
        options(frames=5, patch=7, reduction=2),
        options(frames=5, hybrid=Hybrid(48, 24, 2), patch=7, reduction=2, fit="crop"),
        options("clip", 4, clip_seconds=0.9, max_pixels=1500, patch=7, reduction=2),
    ):
        indices, geometry = select(found, how, (1, 2))
        items = [GraphItem(None, (), frames_of(data, indices, LIMITS), geometry)]
        if name in NATIVE:
            items.append(GraphItem(*sparse(data, indices, LIMITS), None, geometry))
        watched = watch(data, how, (1, 2))
        assert watched.indices == tuple(indices)
        for patches in decoder.decode(items):
            assert not isinstance(patches, str), patches
            np.testing.assert_array_equal(patches.numpy(), watched.patches)


@pytest.mark.parametrize(
    ("pixels", "tags"),
    [
        ("yuv444p", ""),
        ("yuv444p", "colormatrix=bt709:colorprim=bt709:transfer=bt709"),
        ("yuv444p", "colormatrix=bt2020nc"),
        ("yuvj444p", ""),
        ("yuvj444p", "colormatrix=bt709:fullrange=on"),
        ("yuv444p10le", "colormatrix=bt709"),
    ],
)
def test_colours_are_bt601_whatever_the_tags(pixels, tags):
    """Against the definition in floats, on planes of full size so that no chroma is interpolated."""
    data = encode(textured_frames(3, 64, 96), pixels=pixels, options=x264(tags))
    with av.open(io.BytesIO(data)) as container:
        frames = list(container.decode(video=0))
    kind, unit = (np.dtype("<u2"), 4) if "10" in pixels else (np.dtype("u1"), 1)
    for frame, rgb in zip(frames, frames_of(data, range(3), LIMITS).astype(float), strict=True):
        y, u, v = (np.frombuffer(plane, kind).reshape(64, -1)[:, :96] / unit for plane in frame.planes)
        y, u, v = y, u - 128, v - 128
        if "j" not in frame.format.name:
            y, u, v = (y - 16) * 255 / 219, u * 255 / 224, v * 255 / 224
        expected = np.stack([y + 1.402 * v, y - 0.344136 * u - 0.714136 * v, y + 1.772 * u], -1)
        assert np.abs(np.clip(expected, 0, 255) - rgb).max() <= 2


def test_limits_are_named_before_anything_is_decoded():
    data = encode(numbered_frames(12))
    assert refused(data, bytes=len(data) - 1).endswith(f"data.max_source_mb is {(len(data) - 1) / 1e6:g}")
    assert refused(data, seconds=1.0) == "too long: 1.2 seconds, data.max_source_seconds is 1"
    assert refused(data, frames=11) == "too long: more than data.max_source_frames = 11 frames"
    assert refused(data, pixels=64 * 96 - 1) == "too large: 96x64 pixels, data.max_source_pixels is 6143"
    assert probe(data, Limits(pixels=64 * 96, frames=12, bytes=len(data), seconds=1.21)).frames == 12
    assert refused(encode(numbered_frames(len(UNEVEN)), times=UNEVEN), seconds=3.0).startswith("too long: 3.")


def test_what_is_neither_video_nor_image():
    assert refused(encode_audio()) == "no video stream in the file, audio only"
    starts = (b"\xff\xd8\xff", b"RIFF", b"RIFF\0\0\0\0WEBP", b"RIFF\0\0\0\0WEBPVP8X", b"\x89PNG\r\n\x1a\n")
    for data in (b"hello\n" * 100, bytes(5000), *starts, *(start + bytes(3000) for start in starts)):
        assert refused(data)


def test_what_phones_append_to_a_photo_is_not_the_photo():
    first, second = numbered_frames(2, 45, 61, first=9)
    tag = Image.Exif()
    tag[0x0112] = 6
    clip = encode(numbered_frames(8))
    several = io.BytesIO()
    Image.fromarray(first).save(several, "mpo", save_all=True, append_images=[Image.fromarray(second)])
    held = image(first, "jpeg", exif=tag.tobytes())
    for data, turns in (
        (several.getvalue(), 0),
        (image(first, "jpeg") + clip, 0),
        (held + clip, 3),
        (held + image(second, "jpeg"), 3),
        (image(first) + clip, 0),
        (image(first) + image(second), 0),
        (image(first, "webp") + clip, 0),
        (image(first) + b"and so on" * 100, 0),
    ):
        found = probe(data, LIMITS)
        assert (found.frames, found.turns, found.coded) == (1, turns, (45, 61))
        assert numbers(as_coded(watch(data, options()))) == [9]


def test_animated_images():
    pictures = [Image.fromarray(frame) for frame in numbered_frames(4, 48, 60)]

    def made(kind):
        buffer = io.BytesIO()
        pictures[0].save(buffer, kind, save_all=True, append_images=pictures[1:], duration=100)
        return buffer.getvalue()

    assert numbers(as_coded(watch(made("gif"), options()))) == [0, 1, 2, 3]
    assert numbers(as_coded(watch(made("png"), options()))) == [0]  # what is shown where animation is not known
    assert refused(made("webp")).startswith("an animated WebP")


def test_a_video_that_is_turned_within_matroska():
    whole = turned_by_header(encode(numbered_frames(5)))
    buffer = io.BytesIO()
    with av.open(io.BytesIO(whole)) as source, av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.video[0])
        for packet in source.demux(video=0):
            if packet.size:
                packet.stream = stream
                out.mux(packet)
    found = probe(buffer.getvalue(), LIMITS)
    assert found.turns == probe(whole, LIMITS).turns == 3
    assert found.native == (96, 64)
