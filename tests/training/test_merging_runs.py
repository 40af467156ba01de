"""Runs with merging through the launcher, on real files: what they write, and that the layout changes none of it."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from megatron_elva.config.merge_schedule import budget
from megatron_elva.training.merge_dump import _names
from tests.training.test_train import corpus, metrics, overrides, submit  # noqa: F401 - corpus is a fixture

pytestmark = pytest.mark.slow

POINTS = "merging.points=[{after: 1, rule: threshold, tau: 0.4}, {after: 2, rule: budget, keep: 0.5}]"
MERGING = ("merging=paper", POINTS, "debug.dump_merge_index=true", "data.frames=6", "train.steps=4")
LAYOUTS = {
    "tp2pp2sp": ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true"),
    "pp4-fixed": ("parallel.tensor=1", "parallel.pipeline=4", "parallel.carrier=fixed"),
    "pp2dp2": ("parallel.tensor=1", "parallel.pipeline=2", "tasks_per_node=4"),
}


@pytest.fixture(scope="module")
def alone(corpus, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("merging") / "alone"
    submit(*overrides(corpus, folder, *MERGING, "parallel.tensor=1", "parallel.pipeline=1"))
    return folder


def dump(run: Path, step: int) -> dict[str, np.ndarray]:
    with np.load(run / "merge_index" / f"step_{step}.npz") as arrays:
        return dict(arrays)


def test_a_dump_has_every_video_and_point(alone):
    arrays = dump(alone, 1)
    videos = {key.rsplit("/", 1)[0] for key in arrays}
    assert all("/0" in video and video.startswith("videos-0") for video in videos) and len(videos) >= 4
    merged = 0
    for video in videos:
        first, second, kept = (arrays[f"{video}/{name}"] for name in ("point_0", "point_1", "kept"))
        assert first.dtype == second.dtype == np.uint8 and first.shape == second.shape
        assert kept.dtype == np.float64 and kept.tolist() == [first.mean(), second.mean()]
        assert (second <= first).all() and first[0].all() and second[0].all()  # the first of a run survives
        assert second.sum() == min(first.sum(), budget(0.5, *first.shape))
        merged += int((1 - first).sum())
    assert merged > 0
    assert {p.name for p in (alone / "merge_index").iterdir()} == {f"step_{i}.npz" for i in range(1, 5)}


def test_metrics_count_what_is_left(alone):
    for step, line in metrics(alone).items():
        kept = [a for key, a in dump(alone, step).items() if key.endswith("point_1")]
        gone = sum(int((1 - a.astype(int)).sum()) for a in kept)
        assert line["visual_tokens_out"] == line["visual_tokens_in"] - gone < line["visual_tokens_in"]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_layout_changes_neither_merge_index_nor_losses(layout, corpus, alone, tmp_path):  # noqa: F811
    submit(*overrides(corpus, tmp_path / "run", *MERGING, *LAYOUTS[layout]))
    ours, theirs = metrics(tmp_path / "run"), metrics(alone)
    for step in range(1, 5):
        a, b = dump(tmp_path / "run", step), dump(alone, step)
        assert a.keys() == b.keys()
        assert all(np.array_equal(a[key], b[key]) for key in a), f"step {step}"
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=1e-4)
        assert ours[step]["visual_tokens_out"] == theirs[step]["visual_tokens_out"]
        assert ours[step]["tflops_per_gpu"] > 0


def test_a_resumed_run_with_merging_repeats_an_unbroken_one(corpus, tmp_path):  # noqa: F811
    command = overrides(corpus, tmp_path / "run", *MERGING, *LAYOUTS["tp2pp2sp"], "train.checkpoint_every=2")
    submit(*command)
    whole = {step: (metrics(tmp_path / "run")[step], dump(tmp_path / "run", step)) for step in (3, 4)}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step_4")
    shutil.rmtree(tmp_path / "run" / "merge_index")
    submit(*command)
    for step, (line, index) in whole.items():
        again = metrics(tmp_path / "run")[step]
        assert all(again[key] == line[key] for key in ("loss", "grad_norm", "visual_tokens_out"))
        repeated = dump(tmp_path / "run", step)
        assert repeated.keys() == index.keys() and all(np.array_equal(repeated[key], index[key]) for key in index)


def test_pooling_gives_one_process_and_four_the_same(corpus, tmp_path):  # noqa: F811
    pooling = ("merging=pooling", "data.frames=6", "train.steps=3")
    submit(*overrides(corpus, tmp_path / "one", *pooling, "parallel.tensor=1", "parallel.pipeline=1"))
    submit(*overrides(corpus, tmp_path / "four", *pooling, *LAYOUTS["tp2pp2sp"]))
    alone = ("parallel.tensor=1", "parallel.pipeline=1", "train.steps=2")
    submit(*overrides(corpus, tmp_path / "none", *pooling, "merging=none", *alone))
    one, four, none = (metrics(tmp_path / name) for name in ("one", "four", "none"))
    for step in (1, 2, 3):
        assert four[step]["loss"] == pytest.approx(one[step]["loss"], rel=1e-4)
        for key in ("visual_tokens_in", "visual_tokens_out", "samples"):
            assert four[step][key] == one[step][key], key
        operations = [m[step]["tflops_per_gpu"] * m[step]["step_s"] * n for m, n in ((one, 1), (four, 4))]
        assert operations[1] == pytest.approx(operations[0], rel=1e-6)
    assert one[1]["visual_tokens_in"] == none[1]["visual_tokens_in"]
    assert 0.4 < one[1]["visual_tokens_out"] / one[1]["visual_tokens_in"] < 0.8
    pooled, whole = one[1], none[1]
    assert pooled["tflops_per_gpu"] * pooled["step_s"] < 0.8 * whole["tflops_per_gpu"] * whole["step_s"]


def test_names_in_a_dump_follow_the_samples_and_not_the_replicas():
    """Samples X Y | X Z of two micro-steps, on one replica and on two."""
    alone = _names({0: [["X", "Y"], ["X", "Z"]]})
    split = _names({0: [["X"], ["X"]], 1: [["Y"], ["Z"]]})
    assert [alone[0, 0, 0], alone[0, 0, 1], alone[0, 1, 0], alone[0, 1, 1]] == ["X", "Y", "X#2", "Z"]
    assert [split[0, 0, 0], split[1, 0, 0], split[0, 1, 0], split[1, 1, 0]] == ["X", "Y", "X#2", "Z"]
    crossed = _names({0: [["Y"], ["X"]], 1: [["X"], ["Z"]]})  # X is second in the first step, first in the second
    assert (crossed[1, 0, 0], crossed[0, 1, 0]) == ("X", "X#2")
