"""The picture of merged cells: which cells are shaded and outlined, the lines beside it, and the command."""

from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from dali_pipelines.geometry import Fit, Geometry
from dali_pipelines.patches import to_patches
from megatron_elva.config.schema import MergePoint, MergingConfig
from megatron_elva.inference import show_merging
from megatron_elva.inference.merge_picture import Block, Sheet, destinations, draw_sheet, frame_colour, frames_of
from megatron_elva.inference.merging_option import read_merging
from megatron_elva.inference.model import Assistant
from megatron_elva.layout import PackSpec, SampleSpec, VideoSpec, initial_state
from tests.dali_pipelines.make_samples import image, textured_frames

HYBRID = VideoSpec(((2, 3), (1, 2)), (0, 1, 1, 0, 1, 1, 0))


def noise(video: VideoSpec, side: int = 28) -> list[np.ndarray]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (r * side, c * side, 3), dtype=np.uint8) for r, c in video.frame_grids]


def cells(picture: Image.Image, sheet: Sheet, block: int, video: VideoSpec) -> list[list[np.ndarray]]:
    """The pixels of each cell of each frame in one block."""
    pixels = np.asarray(picture)
    out = []
    for frame, (rows, columns) in enumerate(video.frame_grids):
        boxes = [sheet.cell_box(block, frame, cell) for cell in range(rows * columns)]
        out.append([pixels[top:bottom, left:right] for left, top, right, bottom in boxes])
    return out


def state_with(video: VideoSpec, index: list[list[list[int]]]):
    """The state of a video with the given merge index, class by class."""
    state = initial_state(PackSpec((SampleSpec((2, video, 3)),)))
    flat = torch.tensor([v for matrix in index for row in matrix for v in row], dtype=torch.bool)
    alive = torch.zeros_like(state.alive).index_copy_(0, state.tubes.matrix, flat)
    state = replace(state, alive=alive)
    assert [m.tolist() for m in state.merge_index()] == index
    return state


@pytest.mark.parametrize(
    ("survivor", "index", "expected"),
    [
        ("first", [[[1, 1], [0, 1], [0, 0], [1, 0]]], [[0, 0], [0, 1], [0, 1], [3, 1]]),
        ("last", [[[1, 0], [0, 0], [0, 1], [1, 1]]], [[0, 2], [3, 2], [3, 2], [3, 3]]),
    ],
)
def test_destinations(survivor, index, expected):
    video = VideoSpec.uniform(4, 1, 2)
    assert [row.tolist() for row in destinations(state_with(video, index), survivor)] == expected


def test_destinations_stay_within_their_resolution_class():
    index = [[[1] * 6, [0] * 5 + [1], [0] * 6], [[1, 1], [0, 1], [0, 0], [1, 0]]]
    now = destinations(state_with(HYBRID, index), "first")
    assert [row.tolist() for row in now] == [
        [0] * 6, [1, 1], [1, 2], [0, 0, 0, 0, 0, 3], [1, 2], [5, 2], [0, 0, 0, 0, 0, 3],
    ]  # fmt: skip


@pytest.mark.parametrize("video", [VideoSpec.uniform(7, 2, 3), HYBRID, VideoSpec.uniform(40, 9, 16)])
def test_only_merged_cells_are_shaded_and_only_their_survivors_outlined(video):
    rng = np.random.default_rng(0)
    index = [
        [[1] * (h * w), *(rng.random((n - 1, h * w)) < 0.6).astype(int).tolist()]
        for n, (h, w) in zip(video.class_frames, video.grids, strict=True)
    ]
    now = destinations(state_with(video, index), "first")
    picture = draw_sheet(video, noise(video), ["a head"], [Block("before"), Block("after", now)])
    sheet = Sheet(video, 1, 2)
    assert picture.size == sheet.size
    before, after = (cells(picture, sheet, block, video) for block in (0, 1))
    gone = {(f, c): int(to) for f, row in enumerate(now) for c, to in enumerate(row) if to != f}
    outlined = {(to, c) for (_, c), to in gone.items()}
    assert len(gone) == sum(row.count(0) for matrix in index for row in matrix)
    for f, row in enumerate(after):
        for c, cell in enumerate(row):
            was = before[f][c]
            if (f, c) in gone:
                grey = np.asarray(Image.fromarray(was).convert("L").convert("RGB")).astype(float)
                tinted = 0.28 * grey + 0.72 * np.array(frame_colour(gone[f, c]))
                assert np.abs(cell[1:3, 1:3] - tinted[1:3, 1:3]).max() < 1.01
            elif (f, c) in outlined:
                width = max(2, sheet.sides[f] // 12)
                assert (cell[0] == frame_colour(f)).all() and (cell[:, -1] == frame_colour(f)).all()
                inner = slice(width, -width)
                assert np.array_equal(cell[inner, inner], was[inner, inner])
            else:
                assert np.array_equal(cell, was)


def test_frames_come_back_from_their_patches():
    frames = textured_frames(3, 56, 84)
    geometry = Geometry(0, (56, 84), 28, (Fit((56, 84), 0, 0, 56, 84),), (0, 0, 0))
    patches = torch.from_numpy(to_patches(frames, geometry, 14, 2))
    assert np.array_equal(np.stack(frames_of(patches, geometry.video, 14, 2)), frames)


def shown_by(picture: Image.Image, video: VideoSpec, blocks: int, heads: int = 2) -> list[np.ndarray]:
    """For each merge point ``[T, N]``, 1 where a cell of the picture is not shaded."""
    sheet = Sheet(video, heads, blocks)
    before = cells(picture, sheet, 0, video)
    out = []
    for block in range(1, blocks):
        after = cells(picture, sheet, block, video)
        inner = [[(slice(5, -5), slice(5, -5))] * len(row) for row in after]
        same = [
            [np.array_equal(a[i], b[i]) for a, b, i in zip(*rows, strict=True)]
            for rows in zip(before, after, inner, strict=True)
        ]
        out.append(np.array(same).astype(int))
    return out


def test_the_command_shows_the_merge_index(merging_run, video, tmp_path, capsys):
    out = tmp_path / "picture.png"
    command = ["--run", str(merging_run), "--video", str(video), "--question", "What is this?", "--out", str(out)]
    assert show_merging.main(command) == 0
    lines = capsys.readouterr().out.splitlines()
    assistant = Assistant(merging_run)
    watched = assistant.watch(video.read_bytes())
    read = show_merging.look(assistant, watched, "What is this?")
    total = watched.spec.cells
    frames, (rows, columns) = watched.spec.frames, watched.spec.grids[0]
    assert lines[0] == f"input: {frames} frames of {rows} x {columns} cells: {total} cells"
    kept = [int(m.state.merge_index()[0].sum()) for m in read.merges]
    ruled = [("after layer 1 of 4: threshold 0.6", kept[0]), ("after layer 2 of 4: keep 50%", kept[1])]
    assert lines[1:3] == [f"{said}: kept {n} of {total} cells ({n / total:.1%})" for said, n in ruled]
    assert lines[3:] == [f"wrote {out}"]
    assert kept[1] < total
    picture = Image.open(out).convert("RGB")
    for shown, merged in zip(shown_by(picture, watched.spec, 3), read.merges, strict=True):
        assert np.array_equal(shown, merged.state.merge_index()[0].numpy())


def test_another_merging_by_name_or_file(run_dir, video, tmp_path, capsys):
    out = str(tmp_path / "picture.png")
    command = ["--run", str(run_dir), "--video", str(video), "--out", out, "--merging"]
    assert show_merging.main([*command, "fast"]) == 0
    assert len(re.findall(r"keep (40|20)%: kept", capsys.readouterr().out)) == 2
    own = tmp_path / "own.yaml"
    own.write_text("kind: hierarchical\nsurvivor: last\npoints: [{after: 3, rule: budget, keep: 0.7}]\n")
    assert show_merging.main([*command, str(own)]) == 0
    assert "after layer 3 of 4: keep 70%: kept" in capsys.readouterr().out
    point = MergePoint(after=3.0, rule="budget", keep=0.7)
    assert read_merging(str(own)) == MergingConfig(kind="hierarchical", survivor="last", points=[point])


def test_an_image_is_shown_and_nothing_of_it_merges(merging_run, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "still.png").write_bytes(image(textured_frames(1)[0]))
    assert show_merging.main(["--run", str(merging_run), "--video", "still.png"]) == 0
    assert capsys.readouterr().out.count("(100.0%)") == 2
    assert Image.open("still_merging.png").format == "PNG"


BAD = {
    "no such file": ["--video", "none.mp4"],
    "none.yaml": ["--merging", "none.yaml"],
    "did you mean 'paper'": ["--merging", "papr"],
    "merging.kind=pooling": ["--merging", "pooling"],
    "merging.points[0].after=9": ["--merging", "deep.yaml"],
    "unknown key 'kinds'": ["--merging", "kinds.yaml"],
    "no such folder": ["--out", "none/picture.png"],
    "directory": ["--out", "folder"],
    "empty": ["--question", " "],
    "bad.mp4": ["--video", "bad.mp4"],
}


@pytest.mark.parametrize("said", BAD)
def test_what_cannot_be_shown_is_refused_in_one_line(said, merging_run, video, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "bad.mp4").write_bytes(b"no video")
    (tmp_path / "deep.yaml").write_text("{kind: hierarchical, points: [{after: 9, rule: budget, keep: 0.5}]}")
    (tmp_path / "kinds.yaml").write_text("kinds: none")
    command = ["--run", str(merging_run), "--video", str(video), *BAD[said]]
    assert show_merging.main(command) == 2
    printed = capsys.readouterr()
    assert printed.out == "" and printed.err.count("\n") == 1
    assert said.lower() in printed.err.lower()


def test_a_run_that_merges_nothing_says_so(run_dir, video, capsys):
    assert show_merging.main(["--run", str(run_dir), "--video", str(video)]) == 2
    error = capsys.readouterr().err
    assert "merging.kind=none" in error and error.count("\n") == 1
