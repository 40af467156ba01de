"""What DALI is found to decode, and which files it is given."""

from dataclasses import replace

import numpy as np
import pytest

import dali_pipelines.codecs as codecs
from dali_pipelines.codecs import NativeCodecs, dali_missing, native
from dali_pipelines.media import probe
from dali_pipelines.options import Limits
from dali_pipelines.remux import sparse
from tests.dali_pipelines.make_samples import encode, image, textured_frames, turned_by_header

LIMITS = Limits(pixels=1 << 22, frames=1000, bytes=1 << 26, seconds=1000.0)
FRAMES = textured_frames(6, 64, 96)
ALL = NativeCodecs("cpu", frozenset((c, p) for c, formats in codecs._FORMATS.items() for p in formats))
GPU = replace(ALL, device="cuda:0")


def takes(which, data):
    return which.takes(probe(data, LIMITS))


def test_a_cpu_is_tried_and_decodes_what_dali_2_4_decodes(capfd):
    pytest.importorskip("nvidia.dali")
    native.cache_clear()
    found = native("cpu")
    assert found.missing is None and found.device == "cpu"
    assert {codec for codec, _ in found.formats} == {"vp8", "vp9", "mjpeg"}
    assert {("vp9", "yuv420p"), ("vp9", "yuv444p"), ("vp8", "yuv420p"), ("mjpeg", "yuvj420p")} <= found.formats
    assert "vp9 (yuv420p" in found.describe() and "\n" not in found.describe()
    assert capfd.readouterr() == ("", "")
    assert native("cpu") is found


def test_a_decoder_that_gives_other_frames_is_not_trusted(monkeypatch):
    pytest.importorskip("nvidia.dali")
    right = codecs.frames_of
    for wrong in (lambda f: f[::-1], lambda f: f ^ (np.arange(f.size) == 12345).reshape(f.shape).astype(np.uint8)):
        monkeypatch.setattr(codecs, "frames_of", lambda *given, wrong=wrong: wrong(right(*given)))
        native.cache_clear()
        assert native("cpu").formats == frozenset()
        assert native("cpu").describe() == "no codec"
    native.cache_clear()


def test_without_dali_there_is_nothing_and_a_reason(monkeypatch):
    def absent(name):
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(codecs, "import_module", absent)
    native.cache_clear()
    found = native("cpu")
    assert "not installed" in (dali_missing() or "") and "pip install" in (found.missing or "")
    assert found.formats == frozenset() and found.describe().startswith("no codec (DALI is not installed")
    assert takes(found, encode(FRAMES, "webm")) == (False, found.missing)
    native.cache_clear()


def test_an_installation_that_does_not_load_is_said(monkeypatch):
    def broken(name):
        raise OSError("libdali.so: cannot\nbe opened")

    monkeypatch.setattr(codecs, "import_module", broken)
    assert dali_missing() == "DALI cannot be imported: libdali.so: cannot be opened"


def test_a_gpu_that_is_not_there_is_said():
    pytest.importorskip("nvidia.dali")
    native.cache_clear()
    if codecs.torch.cuda.is_available():
        pytest.skip("there is one")
    assert native("cuda:0").describe() == "no codec (there is no cuda:0)"


def test_whole_files_of_its_codecs_are_taken():
    for container, codec in (("webm", "libvpx-vp9"), ("mp4", "libvpx-vp9"), ("webm", "libvpx"), ("avi", "mjpeg")):
        data = encode(FRAMES, container, codec)
        taken, why = takes(ALL, data)
        assert taken and "DALI decodes" in why and "on cpu" in why
        sparse(data, [0, 5], LIMITS)  # what is taken can be copied
    assert takes(ALL, turned_by_header(encode(FRAMES, "mp4", "libvpx-vp9")))[0]


def test_the_pixel_format_counts():
    some = NativeCodecs("cpu", frozenset({("vp9", "yuv420p")}))
    assert takes(some, encode(FRAMES, "webm"))[0]
    taken, why = takes(some, encode(FRAMES, "webm", pixels="yuv444p"))
    assert not taken and why == "DALI does not decode vp9 yuv444p on cpu"


@pytest.mark.parametrize(
    ("data", "said"),
    [
        (encode(FRAMES, "mp4", "mpeg4"), "mpeg4"),
        (encode(FRAMES, "avi", "libx264"), "avi does not tell the order of h264"),
        (image(FRAMES[0], "jpeg"), "jpeg_pipe"),
        (image(FRAMES[0], "png"), "png"),
        (encode(textured_frames(30, 64, 96), "avi")[:-9000], "ends early"),
    ],
)
def test_what_is_not_taken_and_why(data, said):
    taken, why = takes(ALL, data)
    assert not taken and said in why


def test_a_gpu_gets_no_odd_or_extreme_sizes():
    for size, said in (((64, 96), "outside"), ((161, 200), "odd"), ((160, 201), "odd"), ((160, 4200), "outside")):
        taken, why = takes(GPU, encode(textured_frames(2, *size), "mp4", "libx264", pixels="yuv444p"))
        assert not taken and said in why
    assert takes(GPU, encode(textured_frames(2, 160, 200)))[0]
