"""Looking at what the model would see of a file."""

import json
import subprocess
import sys
import tarfile

import numpy as np
import pytest
from PIL import Image

from dali_pipelines import inspect
from dali_pipelines.decode import watch
from dali_pipelines.inspect_sheet import Label, draw, frames_of_patches
from dali_pipelines.options import Hybrid, Limits, Sampling, VisionOptions
from dali_pipelines.patches import to_patches
from megatron_elva.layout import VideoSpec
from tests.dali_pipelines.make_samples import (
    encode,
    encode_audio,
    gray_frames,
    image,
    textured_frames,
    turned_by_header,
    write_shard,
)

LIMITS = Limits(pixels=1 << 24, frames=10_000, bytes=1 << 28, seconds=3600.0)


def options(frames=4, hybrid=None, bound=None, mode="uniform", **more):
    return VisionOptions(Sampling(mode, frames, **more), 14, 2, "crop", bound, hybrid, LIMITS)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    file = tmp_path_factory.mktemp("clips") / "clip.mp4"
    file.write_bytes(encode(textured_frames(40, 90, 150)))
    return file


def look(capsys, *words):
    """Exit code, lines on stdout, lines on stderr."""
    code = inspect.main([str(w) for w in words])
    said = capsys.readouterr()
    return code, said.out.splitlines(), said.err.splitlines()


def stored(folder):
    with np.load(folder / "patches.npz") as file:
        return dict(file), json.loads((folder / "report.json").read_text())


def test_one_file_goes_into_the_folder_itself(clip, tmp_path, capsys):
    code, out, err = look(capsys, clip, "--frames", 4, "--out", tmp_path / "seen", "--decoder", "pyav")
    assert (code, err) == (0, [])
    assert {p.name for p in (tmp_path / "seen").iterdir()} == {"sheet.png", "patches.npz", "report.json"}
    arrays, report = stored(tmp_path / "seen")
    assert set(arrays) == {"patches", "grid", "indices", "timestamps"}
    assert arrays["patches"].dtype == np.uint8
    assert arrays["patches"].shape == (4 * 3 * 5 * 4, 14 * 14 * 3)
    assert arrays["grid"].tolist() == [[3, 5]] * 4
    assert arrays["grid"].dtype.kind == "i"
    assert arrays["indices"].tolist() == [5, 15, 25, 35]
    np.testing.assert_allclose(arrays["timestamps"], [0.5, 1.5, 2.5, 3.5])
    same = watch(clip.read_bytes(), options())
    np.testing.assert_array_equal(arrays["patches"], same.patches)
    assert report["tokens"] == {"FRAME": 4, "cells": 60, "LINE": 12, "visual_span": 76}
    assert report["native"] == [90, 150]
    assert report["times_s"].keys() == {"probe", "decode", "patches"}
    text = "\n".join(out)
    for said in ("h264 yuv420p", "40 frames", "pyav: --decoder=pyav", "150 x 90 native", "140 x 84 used = 5 x 3 cells",
                 "76 tokens", "probe ", "chosen: #5 0.500 s, #15 1.500 s, #25 2.500 s, #35 3.500 s"):  # fmt: skip
        assert said in text, said


def test_hybrid_has_two_sizes(clip, tmp_path, capsys):
    words = ("--frames", 6, "--hybrid", "hi=112,lo=56,k=2", "--out", tmp_path)
    assert look(capsys, clip, *words)[0] == 0
    arrays, report = stored(tmp_path)
    same = watch(clip.read_bytes(), options(6, Hybrid(112, 56, 2)))
    np.testing.assert_array_equal(arrays["patches"], same.patches)
    large, small = same.video.grids
    assert large[0] * large[1] > small[0] * small[1]
    assert [tuple(g) for g in arrays["grid"]] == [large, small, small, large, small, small]
    assert [c["frames"] for c in report["classes"]] == [2, 4]
    assert sum(h * w * 4 for h, w in arrays["grid"]) == len(arrays["patches"])


def test_rotation_is_undone(tmp_path, capsys):
    file = tmp_path / "turned.mp4"
    file.write_bytes(turned_by_header(encode(textured_frames(6, 56, 84))))
    assert look(capsys, file, "--frames", 2, "--out", tmp_path / "o")[0] == 0
    arrays, report = stored(tmp_path / "o")
    assert report["native"] == [84, 56]
    assert arrays["grid"].tolist() == [[3, 2]] * 2
    assert "turned by" in " ".join(inspect.lines_of(report))


def test_several_files_have_folders_and_bad_ones_a_line(clip, tmp_path, capsys):
    bad = {"empty.mp4": b"", "text.mp4": b"this is no video", "sound.mp4": encode_audio()}
    for name, data in bad.items():
        (tmp_path / name).write_bytes(data)
    still = tmp_path / "clip.png"
    still.write_bytes(image(textured_frames(1, 60, 60)[0]))
    files = [clip, *(tmp_path / name for name in bad), tmp_path / "absent.mp4", still]
    code, out, err = look(capsys, *files, "--frames", 4, "--out", tmp_path / "seen")
    assert code == 2
    assert [line.split(": ")[0] for line in err] == [str(f) for f in files[1:-1]]
    assert "empty" in err[0]
    assert "no video" in err[2]
    assert "No such file" in err[3]
    assert sorted(p.name for p in (tmp_path / "seen").iterdir()) == ["clip", "clip-2"]
    assert stored(tmp_path / "seen" / "clip")[0]["indices"].tolist() == [5, 15, 25, 35]
    assert stored(tmp_path / "seen" / "clip-2")[0]["indices"].tolist() == [0]
    assert sum(not line.startswith(" ") for line in out) == 2


@pytest.mark.parametrize(
    ("words", "chosen"),
    [
        (["--rate", "2"], [0, 5, 10, 15]),
        (["--timestamps", "0.31", "2", "3.95"], [3, 20, 39]),
        (["--sampling", "uniform", "--rate", "2"], [5, 15, 25, 35]),
    ],
)
def test_other_ways_to_choose(clip, tmp_path, capsys, words, chosen):
    limit = ["--frames", 100 if words[0] == "--rate" else 4]
    assert look(capsys, clip, *words, *limit, "--out", tmp_path)[0] == 0
    assert stored(tmp_path)[0]["indices"].tolist()[:4] == chosen


def test_a_clip_is_drawn_by_the_seed(clip, tmp_path, capsys):
    found = []
    for seed in (0, 0, 1, 2, 3):
        assert look(capsys, clip, "--clip-seconds", 1, "--seed", seed, "--frames", 3, "--out", tmp_path)[0] == 0
        found.append(tuple(stored(tmp_path)[0]["indices"].tolist()))
    assert found[0] == found[1]
    assert len(set(found)) > 2
    assert all(f[-1] - f[0] < 10 for f in found)


def test_other_cells(clip, tmp_path, capsys):
    words = ("--patch", 8, "--cell-reduction", 1, "--fit", "pad", "--max-pixels", 60 * 100, "--out", tmp_path)
    assert look(capsys, clip, *words, "--frames", 1)[0] == 0
    arrays, report = stored(tmp_path)
    (height, width), (rows, columns) = report["classes"][0]["scaled"], arrays["grid"][0]
    assert height * width <= 6000
    assert (rows, columns) == (-(-height // 8), -(-width // 8))
    assert arrays["patches"].shape == (rows * columns, 8 * 8 * 3)


def test_a_sample_of_a_shard(clip, tmp_path, capsys):
    shard = write_shard(
        tmp_path / "s.tar",
        [
            ("a/one", {"json": {"caption": "x"}, "mp4": clip.read_bytes()}),
            ("two", {"json": {}, "0.mp4": clip.read_bytes(), "1.png": image(gray_frames(1)[0])}),
            ("text", {"json": {"text": "x"}}),
        ],
    )
    assert look(capsys, shard / "a/one", "--frames", 4, "--out", tmp_path / "1")[0] == 0
    assert stored(tmp_path / "1")[0]["indices"].tolist() == [5, 15, 25, 35]
    assert look(capsys, shard / "two", "--frames", 4, "--out", tmp_path / "2")[0] == 0
    assert [len(stored(tmp_path / "2" / part)[0]["indices"]) for part in "01"] == [4, 1]
    for key, why in (("text", "no video or image"), ("three", "no such sample")):
        code, _, err = look(capsys, shard / key, "--out", tmp_path / "3")
        assert code == 2
        assert len(err) == 1
        assert why in err[0]
    assert not list(tmp_path.glob("*.index*"))
    with tarfile.open(shard) as tar:
        assert len(tar.getnames()) == 6


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--hybrid", "hi=1"], "data.hybrid"),
        (["--frames", "0"], "data.frames"),
        (["--max-pixels", "0"], "data.max_pixels"),
        (["--sampling", "rate"], "data.rate"),
        (["--sampling", "timestamps"], "--timestamps"),
    ],
)
def test_options_that_make_no_sense(clip, tmp_path, capsys, words, said):
    code, out, err = look(capsys, clip, *words, "--out", tmp_path / "none")
    assert (code, out, len(err)) == (2, [], 1)
    assert said in err[0]
    assert not (tmp_path / "none").exists()


def test_dali_sees_the_same(tmp_path, capsys):
    pytest.importorskip("nvidia.dali")
    from dali_pipelines.codecs import native

    file = tmp_path / "clip.webm"
    file.write_bytes(encode(textured_frames(30, 90, 150), "webm"))
    other = tmp_path / "other.mp4"
    other.write_bytes(encode(textured_frames(30, 90, 150), "mp4", "libsvtav1"))
    words = ("--frames", 5, "--hybrid", "hi=112,lo=56,k=2", "--device", "cpu")
    seen = {}
    for decoder in ("pyav", "dali"):
        assert look(capsys, file, other, *words, "--decoder", decoder, "--out", tmp_path / decoder)[0] == 0
        seen[decoder] = [stored(tmp_path / decoder / name) for name in ("clip", "other")]
    for (ours, _), (theirs, _) in zip(*seen.values(), strict=True):
        for key in ours:
            np.testing.assert_array_equal(ours[key], theirs[key])
    routes = [report["route"] for _, report in seen["dali"]]
    assert "vp9" in native("cpu").describe().lower()
    assert routes[0].startswith("dali on cpu: ")
    assert routes[1].startswith("pyav: ")
    assert "av1" in routes[1].lower()


def test_patches_become_frames_again():
    frames = textured_frames(5, 84, 112)
    from dali_pipelines.geometry import plan

    geometry = plan((84, 112), 0, 5, options(5, Hybrid(112, 40, 1)))
    video = geometry.video
    assert len(video.grids) == 2
    got = frames_of_patches(to_patches(frames, geometry, 14, 2), video, 14, 2)
    assert [f.shape[:2] for f in got] == [(28 * h, 28 * w) for h, w in video.frame_grids]
    np.testing.assert_array_equal(got[2], frames[2])  # the large ones were not scaled


def test_the_sheet_shows_frames_whole_and_lines_between_patches():
    frames = [np.full((56, 84, 3), level, np.uint8) for level in (60, 200)]
    sheet = np.asarray(draw(frames, [Label(7, 0.25), Label(9, 1.0)], 14, 2, "a", ["b"])).astype(int)
    for level, ink in ((60, 1), (200, -1)):
        here = (sheet == level).all(-1)
        rows, columns = (np.nonzero(here.sum(axis) > 50)[0] for axis in (1, 0))  # letters have a few such pixels too
        found = sheet[rows.min() - 1 : rows.max() + 2, columns.min() - 1 : columns.max() + 2, 0]
        # eight times as large; the borders of the last patches lie inside
        assert found.shape == (56 * 8, 84 * 8)
        assert (found[5, 112] * ink < found[5, 224:-1:224] * ink).all()  # patches faint, cells clear
        assert (found[5, 112::224] * ink > level * ink).all()
        inside = np.ones(found.shape, bool)
        inside[::112] = inside[:, ::112] = inside[-1] = inside[:, -1] = False
        assert (found[inside] == level).all()


def test_resolution_classes_keep_their_relative_size():
    frames = [np.full((112, 168, 3), 50, np.uint8), *(np.full((56, 84, 3), 90, np.uint8) for _ in range(2))] * 2
    sheet = np.asarray(draw(frames, [Label(i, i) for i in range(6)], 14, 2, "a", []))

    def runs(level):
        """Widths of the stretches of one line that have this level, lines of the grid apart."""
        rows = np.nonzero((sheet == level).all(-1).sum(1) > 20)[0]
        line = (sheet[rows[1]] == level).all(-1)
        return int(line.sum())

    assert runs(50) == pytest.approx(runs(90), rel=0.02)  # one large one beside two small ones in each row


def test_many_frames_stay_on_one_sheet():
    frames = [np.full((28, 28, 3), 9, np.uint8)] * 300
    sheet = draw(frames, [Label(i, i / 3) for i in range(300)], 14, 2, "a", [])
    assert sheet.width <= 1700
    spec = VideoSpec.uniform(300, 1, 1)
    assert spec.frames == 300


def test_as_a_command(clip, tmp_path):
    words = [sys.executable, "-m", "dali_pipelines.inspect", str(clip), "--frames", "3", "--out", str(tmp_path / "x")]
    done = subprocess.run(words, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    with Image.open(tmp_path / "x" / "sheet.png") as sheet:
        assert min(sheet.size) > 200
