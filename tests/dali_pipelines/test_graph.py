"""The DALI graph on a CPU: the same patches as the PyAV route, bit for bit, and no bad video hurts another."""

import io
from dataclasses import replace

import av
import numpy as np
import pytest
import torch

from dali_pipelines.codecs import native
from dali_pipelines.decode import frames_of, select, watch
from dali_pipelines.geometry import Fit, Geometry, plan
from dali_pipelines.graph import DeviceDecoder, GraphItem
from dali_pipelines.media import probe
from dali_pipelines.options import Hybrid, Limits, Sampling, VisionOptions
from dali_pipelines.patches import to_patches
from dali_pipelines.remux import sparse
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import encode, image, textured_frames, turned_by_header

pytest.importorskip("nvidia.dali")

LIMITS = Limits(pixels=1 << 22, frames=1000, bytes=1 << 26, seconds=1000.0)
OPTIONS = VisionOptions(Sampling("uniform", 5), 7, 2, "crop", None, None, LIMITS)
VPX = {"deadline": "realtime", "cpu-used": "8", "g": "6"}
FILES = {
    "vp9.webm": lambda: encode(textured_frames(14, 96, 160), "webm", options=VPX),
    "vp9-odd.mp4": lambda: encode(textured_frames(14, 95, 127), "mp4", "libvpx-vp9", options=VPX),
    "vp9-turned.mp4": lambda: turned_by_header(encode(textured_frames(9, 60, 100), "mp4", "libvpx-vp9", options=VPX)),
    "vp8.webm": lambda: encode(textured_frames(14, 64, 96), "webm", "libvpx", options=VPX),
    "mjpeg.avi": lambda: encode(textured_frames(14, 90, 150), "avi"),
    "mjpeg-422.mov": lambda: encode(textured_frames(7, 64, 96), "mov", "mjpeg", "yuvj422p"),
    "h264.mp4": lambda: encode(textured_frames(14, 150, 90), "mp4", options={"g": "5", "bf": "2"}),
    "h264-turned.mp4": lambda: turned_by_header(encode(textured_frames(9, 60, 100))),
    "hevc-10bit.mkv": lambda: encode(
        textured_frames(7, 64, 96), "matroska", "libx265", "yuv420p10le", {"x265-params": "log-level=none:pools=1"}
    ),
    "small.webm": lambda: encode(textured_frames(3, 16, 10), "webm", pixels="yuv444p"),
    "image.png": lambda: image(textured_frames(1, 57, 83)[0]),
    "image.jpeg": lambda: image(textured_frames(1, 57, 83)[0], "jpeg"),
}


@pytest.fixture(scope="module")
def files():
    return {name: make() for name, make in FILES.items()}


@pytest.fixture(scope="module")
def decoders():
    return {r: DeviceDecoder("cpu", 8, 14 // r, r) for r in (1, 2)}


@pytest.fixture(scope="module")
def clean(files):
    """A good video and its patches, to stand beside bad ones."""
    return native_item(files["vp9.webm"]), watch(files["vp9.webm"], OPTIONS).patches


def native_item(data, options=OPTIONS):
    found = probe(data, LIMITS)
    indices, geometry = select(found, options)
    taken, why = native("cpu").takes(found)
    if not taken:
        raise InputError(why)
    return GraphItem(*sparse(data, indices, LIMITS), None, geometry)


def decoded_item(data, options=OPTIONS):
    indices, geometry = select(probe(data, LIMITS), options)
    return GraphItem(None, (), frames_of(data, indices, LIMITS), geometry)


def assert_same(out, want):
    assert not isinstance(out, str), out
    assert out.dtype == torch.uint8 and out.is_contiguous()
    assert out.shape == want.shape and (out.numpy() == want).all()


@pytest.mark.parametrize("reduction", [1, 2])
@pytest.mark.parametrize("fit", ["crop", "pad"])
@pytest.mark.parametrize("hybrid", [None, Hybrid(80, 40, 2), Hybrid(500, 60, 1)])
def test_both_routes_give_the_patches_of_pyav(files, decoders, hybrid, fit, reduction):
    items, wanted = [], []
    for max_pixels in (None, 1 << 20, 3000):
        options = VisionOptions(Sampling("uniform", 5), 14 // reduction, reduction, fit, max_pixels, hybrid, LIMITS)
        for data in files.values():
            makers = [decoded_item]
            if native("cpu").takes(probe(data, LIMITS))[0]:
                makers.append(native_item)
            items += [make(data, options) for make in makers]
            wanted += [watch(data, options).patches] * len(makers)
    assert {item.data is None for item in items} == {True, False}
    order = np.random.default_rng(reduction).permutation(len(items))  # routes and sizes mixed within batches
    for i, out in zip(order, decoders[reduction].decode([items[i] for i in order]), strict=True):
        assert_same(out, wanted[i])


def test_every_turn_and_odd_geometries(decoders):
    rng = np.random.default_rng(0)
    items = []
    for i in range(60):
        coded = tuple(int(n) for n in rng.integers(1, 150, 2))
        turns, n_frames = i % 4, 1 + i % 6
        options = VisionOptions(
            Sampling("uniform", 8),
            7,
            2,
            ("crop", "pad")[i % 2],
            (None, 300, 4000)[i % 3],
            (None, Hybrid(70, 30, 1 + i % 3))[i // 2 % 2],
            LIMITS,
        )
        geometry = plan(coded[::-1] if turns % 2 else coded, turns, n_frames, options)
        frames = rng.integers(0, 256, (n_frames, *coded, 3), dtype=np.uint8)
        items.append(GraphItem(None, (), frames, geometry))
    assert {len(item.geometry.classes) for item in items} == {1, 2}
    for item, out in zip(items, decoders[2].decode(items), strict=True):
        assert_same(out, to_patches(item.frames, item.geometry, 7, 2))


def test_batches_of_any_size_keep_their_order(files, decoders):
    one = [native_item(files["vp9.webm"]), decoded_item(files["h264.mp4"]), native_item(files["mjpeg.avi"])]
    want = [watch(files[name], OPTIONS).patches for name in ("vp9.webm", "h264.mp4", "mjpeg.avi")]
    assert decoders[2].decode([]) == []
    for n in (1, 2, 8, 9, 23, 1):
        for i, out in enumerate(decoders[2].decode([one[k % 3] for k in range(n)])):
            assert_same(out, want[i % 3])


def test_earlier_results_stay_what_they_were(files, decoders):
    data = files["vp9.webm"]
    (first,) = decoders[2].decode([native_item(data)])
    copy = first.clone()
    for name in ("mjpeg.avi", "vp8.webm", "h264.mp4", "vp9.webm"):
        for _ in range(5):
            decoders[2].decode([decoded_item(files[name])] * 3)
    assert torch.equal(first, copy)


def test_a_batch_is_cut_where_it_would_take_too_much_memory(monkeypatch, files, decoders):
    runs = []
    run = DeviceDecoder._run
    monkeypatch.setattr(DeviceDecoder, "_run", lambda self, batch: runs.append(len(batch)) or run(self, batch))
    item = decoded_item(files["h264.mp4"])
    monkeypatch.setattr("dali_pipelines.graph._BATCH_BYTES", 3 * item.source_bytes)
    assert len(decoders[2].decode([item] * 7)) == 7 and runs == [3, 3, 1]
    monkeypatch.setattr("dali_pipelines.graph._BATCH_BYTES", 1)
    assert len(decoders[2].decode([item] * 2)) == 2 and runs[3:] == [1, 1]


def with_broken_frame(data):
    """The packets of a VP9 file, zeros in place of the last one."""
    buffer = io.BytesIO()
    with av.open(io.BytesIO(data)) as source, av.open(buffer, "w", format="matroska") as out:
        stream = out.add_stream_from_template(source.streams.video[0], opaque=True)
        packets = [p for p in source.demux(video=0) if p.size]
        for i, packet in enumerate(packets):
            content = bytes(packet)
            copy = av.Packet(bytes(len(content)) if i == len(packets) - 1 else content)
            copy.stream, copy.time_base, copy.pts, copy.dts = stream, packet.time_base, packet.pts, packet.dts
            copy.is_keyframe = packet.is_keyframe
            out.mux(copy)
    return buffer.getvalue()


def test_bad_videos_are_named_and_the_others_come_all_the_same(files, decoders, clean):
    good, want = clean
    rubbish = replace(good, data=b"this is no video" * 20)
    beyond = replace(good, indices=[0, 1, 2, 3, 10_000])
    broken = replace(good, data=with_broken_frame(good.data))
    for bad in (rubbish, beyond, broken, replace(good, data=b"")):
        for at in (0, 3, 6):
            batch = [good] * 7
            batch[at] = bad
            for i, out in enumerate(decoders[2].decode(batch)):
                if i == at:
                    assert isinstance(out, str) and out.startswith("DALI cannot decode it: ") and "\n" not in out
                else:
                    assert_same(out, want)
    outs = decoders[2].decode([rubbish, good, beyond, broken, good, rubbish])
    assert [isinstance(out, str) for out in outs] == [True, False, True, True, False, True]
    assert "10000" in outs[2] or "range" in outs[2]


def test_frames_of_another_size_than_said_are_an_error(decoders, clean):
    good, want = clean
    for coded in ((400, 500), (90, 160), (96, 161), (160, 96)):
        whole = Fit(coded, 0, 0, 84, 84)
        bad = replace(good, geometry=Geometry(0, coded, 14, (whole,), good.geometry.frame_class))
        outs = decoders[2].decode([good, bad, good])
        assert_same(outs[0], want)
        assert_same(outs[2], want)
        assert isinstance(outs[1], str) and "[5, 96, 160, 3], not [5, " in outs[1]


def test_damaged_files_never_show_frames_of_another_clip(files, decoders, clean):
    """Whatever is damaged: the route refuses it, DALI fails, or the patches depend on that file alone."""
    good, want = clean
    other = native_item(files["mjpeg.avi"])
    rng = np.random.default_rng(5)
    seen = set()
    for i in range(120):
        name = ("vp9.webm", "vp8.webm", "mjpeg.avi", "mjpeg-422.mov")[i % 4]
        data = bytearray(files[name])
        if i // 4 % 3 == 0:
            data = data[: int(rng.integers(len(data) // 4, len(data)))]
        else:
            at, n = int(rng.integers(len(data) // 5, len(data) - 200)), int(rng.integers(1, 200))
            data[at : at + n] = bytes(n) if i // 4 % 3 == 1 else rng.integers(0, 256, n, dtype=np.uint8).tobytes()
        try:
            item = native_item(bytes(data))
        except InputError:
            seen.add("refused")
            continue
        before, out, after = decoders[2].decode([good, item, good])
        assert_same(before, want)
        assert_same(after, want)
        seen.add("failed" if isinstance(out, str) else "decoded")
        _, again = decoders[2].decode([other, item])
        if isinstance(out, str):
            assert again == out
            continue
        assert_same(again, out.numpy())
        if name != "vp8.webm":  # what is missing after a damaged VP8 keyframe, either decoder fills in its own way
            assert_same(out, watch(bytes(data), OPTIONS).patches)
    assert seen == {"refused", "failed", "decoded"}


def test_a_cut_avi_gives_no_frame_that_is_not_there(files):
    """Its header promises more frames than the file has; DALI itself filled them from the clip before."""
    data = files["mjpeg.avi"]
    for end in range(len(data) // 2, len(data) - 600, len(data) // 11):
        with pytest.raises(InputError):
            native_item(data[:end])


def test_items_that_cannot_be_are_refused(files, clean):
    good, _ = clean
    with pytest.raises(ValueError, match="either data or frames"):
        replace(good, frames=np.zeros((5, 96, 160, 3), np.uint8))
    with pytest.raises(ValueError, match="either data or frames"):
        replace(good, data=None)
    with pytest.raises(ValueError, match="4 frames for a geometry of 5"):
        replace(good, indices=[0, 1, 2, 3])
    with pytest.raises(ValueError, match="3 resolution classes"):
        replace(good, geometry=replace(good.geometry, classes=good.geometry.classes * 3))
    with pytest.raises(ValueError, match="cells of 14 pixels; the graph's have 16"):
        DeviceDecoder("cpu", 1, 16, 1).decode([good])
