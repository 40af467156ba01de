"""The comparison of decoders: a tiny run, and the parts that its figures rest on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from benchmarks import decode, decode_memory, decode_report
from benchmarks.decode_clips import BITS, BLOCK, Clip, make, read_number, render, write_number
from benchmarks.decode_routes import ROUTES, Route
from megatron_elva.config.errors import InputError

RESULTS = Path(decode.__file__).parent / "results"
TINY = ["--sizes", "360p", "--gops", "8", "--frames", "2", "4", "--seconds", "3", "--rate", "8", "--rounds", "2"]
TINY += ["--repeats", "1", "--others", "1", "--workers", "1"]


def command(folder, *arguments):
    """A run as a user runs it: its figures and its text."""
    files = {kind: folder / f"out.{kind}" for kind in ("json", "md")}
    words = [sys.executable, "-m", "benchmarks.decode", *arguments]
    words += [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    done = subprocess.run(
        words, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == files["md"].read_text()
    return json.loads(files["json"].read_text()), done.stdout


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    folder = tmp_path_factory.mktemp("decode")
    return command(folder, *TINY, "--clips", str(folder / "clips"))


def test_every_decoder_that_is_installed_is_measured(run):
    result, text = run
    names = ["H.264 360p, GOP 8, 2 frames", "H.264 360p, GOP 8, 4 frames"]
    names += [name.replace("H.264", "VP9").replace("GOP 8", "GOP 30") for name in names]
    assert [cell["name"] for cell in result["cells"]] == names
    installed = {r.name for r in ROUTES.values() if r.installed and not r.patches}
    assert {"ours", "pyav"} <= installed
    for cell in result["cells"]:
        assert installed <= set(cell["rounds"]), cell["faults"]
        for taken in cell["rounds"].values():
            assert len(taken) == 2
            assert all(r["clips_s"] > 0 and r["cpu_s"] > 0 for r in taken)
    assert result["cells"][1]["indices"] == [3, 9, 15, 21]
    absent = [r.name for r in ROUTES.values() if r.installed is None]
    assert result["absent"] == absent
    assert all(name in text for name in absent)


def test_dali_is_measured_on_what_it_takes_and_named_where_it_does_not(run):
    if ROUTES["dali to patches"].installed is None:
        pytest.skip("DALI is not installed")
    cells = run[0]["cells"]
    assert ["dali to patches" in cell["rounds"] for cell in cells] == [False, False, True, True]
    assert "h264" in cells[0]["faults"]["dali to patches"].lower()


@pytest.mark.parametrize("other", ["shifted", "too few"])
def test_a_decoder_that_gives_other_frames_gets_no_figure(tmp_path, monkeypatch, other):
    (file,) = make([Clip("libx264", "mp4", 120, 192, 5, 10, 10, 1)], tmp_path)
    right = ROUTES["pyav"].made()

    def wrong(data, indices):
        return right(data, [i + 1 for i in indices]) if other == "shifted" else right(data, indices[:-1])

    monkeypatch.setitem(ROUTES, "wrong", Route("wrong", "av", lambda: wrong))
    assert decode.timed("pyav", str(file), (1, 4, 8), 1)["wall"] > 0
    with pytest.raises(InputError, match=r"where \[1, 4, 8\] were asked for"):
        decode.timed("wrong", str(file), (1, 4, 8), 1)


def test_numbers_survive_the_codecs(tmp_path):
    for codec, container in (("libx264", "mp4"), ("libvpx-vp9", "webm"), ("mjpeg", "matroska")):
        (file,) = make([Clip(codec, container, 120, 192, 5, 25, 10, 3)], tmp_path)
        stamp = file.stat().st_mtime_ns
        run = ROUTES["pyav"].made()
        assert [read_number(f) for f in run(file.read_bytes(), range(25))] == list(range(25))
        make([Clip(codec, container, 120, 192, 5, 25, 10, 3)], tmp_path)
        assert file.stat().st_mtime_ns == stamp


def test_numbers_are_read_or_refused():
    picture = np.full((2 * BLOCK + 5, BITS * BLOCK + 5, 3), 90, np.uint8)
    assert read_number(picture) is None
    for number in (0, 1, 0b101010101010, 2**BITS - 1):
        write_number(picture, number)
        assert read_number(picture) == number
    picture[:BLOCK, :BLOCK] = 16  # one block of the plain row against its twin
    assert read_number(picture) is None
    assert read_number(picture[:BLOCK]) is None


def test_scenes_are_cut_and_move():
    frames = [f.astype(float) for f in render(90, 200, 20, 2, 5)]  # a cut after 16 frames
    steps = [np.abs(b - a)[32:].mean() for a, b in pairwise(frames)]
    assert len(frames) == 20
    assert int(np.argmax(steps)) == 15
    assert min(steps) > 1


def cell_of(rates, gop=250):
    rounds = {name: [{"clips_s": r, "cpu_s": 1 / r} for r in values] for name, values in rates.items()}
    return decode_report.summarised({"name": f"H.264 360p, GOP {gop}, 8 frames", "rounds": rounds, "faults": {}})


def test_ratios_are_taken_within_a_round_against_the_best():
    # twice as slow in the second round, all of them: the ratio does not see it
    cell = cell_of({"ours": [9.0, 4.5, 9.0], "pyav": [5.0, 2.5, 5.0], "decord": [10.0, 5.0, 10.0]})
    ratio = cell["ratio"]
    assert ratio["best"] == ratio["frugal"] == "decord"
    assert ratio["clips_s"] == pytest.approx({"median": 0.9, "min": 0.9, "max": 0.9})
    assert ratio["cpu_s"]["median"] == pytest.approx(1 / 0.9)
    assert ratio["met"]
    assert not cell_of({"ours": [8.9], "decord": [10.0]})["ratio"]["met"]
    assert not cell_of({"ours": [9.9], "decord": [10.0]}, gop=30)["ratio"]["met"]
    assert cell_of({"ours": [10.1], "decord": [10.0]}, gop=30)["ratio"]["met"]
    assert cell_of({"pyav": [10.0]})["ratio"] is None
    # the target is one for H.264
    other = decode_report.summarised(
        {**cell_of({"ours": [5.0], "decord": [10.0]}), "name": "VP9 360p, GOP 30, 8 frames"}
    )
    assert other["ratio"]["met"] is None
    # what goes on to patches does more, and is no rival
    assert cell_of({"ours": [9.0], "decord": [10.0], "ours to patches": [99.0]})["ratio"]["best"] == "decord"


def test_memory_of_many_clips(tmp_path):
    result, text = command(tmp_path, "--memory", "60", "--every", "20")
    assert [clips for clips, _ in result["resident"]] == [20, 40, 60]
    assert all(held > 10e6 for _, held in result["resident"])
    assert 0 < result["refused"] < 20
    assert result["flat"] is None
    assert "Too few" in text


def test_memory_that_grows_is_seen():
    assert decode_memory.verdict([100, 105, 104, 106, 105, 106, 104, 105])["flat"] is True
    assert decode_memory.verdict([100 + 3 * i for i in range(8)])["flat"] is False
    assert decode_memory.verdict([100, 105, 104])["flat"] is None


@pytest.mark.parametrize("words", [["--frames", "0"], ["--memory", "0"], ["--seconds", "200"]])
def test_numbers_that_make_no_sense(words, capsys):
    with pytest.raises(SystemExit, match="2"):
        decode.main(words)
    assert "at " in capsys.readouterr().err.splitlines()[-1]


def test_the_stored_figures_have_their_origin():
    stored = json.loads((RESULTS / "decode_cpu.json").read_text())
    assert {"command", "date", "device", "cores", "versions", "workers", "absent"} <= set(stored)
    for cell in stored["cells"]:
        again = decode_report.summarised({k: cell[k] for k in ("name", "rounds", "faults")})
        assert again["ratio"] == cell["ratio"]
    assert decode_report.text(stored) + "\n" == (RESULTS / "decode_cpu.md").read_text()
    memory = json.loads((RESULTS / "decode_memory.json").read_text())
    assert {"command", "date", "device", "cores", "versions"} <= set(memory)
    assert memory["clips"] >= 20_000
    again = decode_memory.verdict([held for _, held in memory["resident"]])
    assert again == {key: memory[key] for key in again}
    assert decode_memory.text(memory) + "\n" == (RESULTS / "decode_memory.md").read_text()
