"""Run directories: which checkpoint counts, and what is never taken for one."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.training.runs import (
    MARKER,
    RunLock,
    check_resumable,
    check_unlocked,
    checkpoints,
    latest,
    prune,
    stage_runs,
    tokenizer_folder,
    write_marker,
)
from tests.builders import small_config


def make(run: Path, step: int, marker: str | None = "good") -> Path:
    """A checkpoint folder with a file in it; `marker` None leaves it half-written, other text stands in the marker."""
    path = run / "checkpoints" / f"step_{step}"
    path.mkdir(parents=True)
    (path / "__0_0.distcp").write_bytes(b"weights")
    if marker == "good":
        write_marker(path, {"step": step, "samples": 10 * step, "stage": 2})
    elif marker is not None:
        (path / MARKER).write_text(marker)
    return path


def names(run: Path) -> set[str]:
    return {p.name for p in (run / "checkpoints").iterdir()}


def test_checkpoints_are_sorted_by_number_not_by_text(tmp_path):
    for step in (10, 9, 100, 2):
        make(tmp_path, step)
    found = checkpoints(tmp_path)
    assert [c.step for c in found] == [2, 9, 10, 100]
    assert found[-1].path == tmp_path / "checkpoints" / "step_100"
    assert found[-1].meta == {"step": 100, "samples": 1000, "stage": 2}
    assert found[-1].run == tmp_path
    assert latest(tmp_path).step == 100


TORN = ["", "{", '{"step": 9, "sam', "{}", '{"step": "nine"}', "\x00\x00\x00"]


@pytest.mark.parametrize("marker", [None, *TORN, "null", "[9]"])
def test_a_half_written_checkpoint_or_a_torn_marker_is_none(tmp_path, marker):
    make(tmp_path, 8)
    make(tmp_path, 9, marker)
    assert [c.step for c in checkpoints(tmp_path)] == [8]
    assert latest(tmp_path).step == 8


@pytest.mark.parametrize("marker", TORN)
def test_a_checkpoint_folder_with_a_torn_marker_is_an_input_error(tmp_path, marker):
    path = make(tmp_path, 9, marker)
    with pytest.raises(InputError) as error:
        latest(path)
    assert str(path) in str(error.value) and "\n" not in str(error.value)


def test_the_marker_is_whole_and_leaves_no_other_file(tmp_path):
    path = make(tmp_path, 3)
    assert json.loads((path / MARKER).read_text())["step"] == 3
    assert {p.name for p in path.iterdir()} == {MARKER, "__0_0.distcp"}
    write_marker(path, {"step": 3, "samples": 0})
    assert json.loads((path / MARKER).read_text()) == {"step": 3, "samples": 0}


def test_latest_takes_a_run_a_checkpoint_folder_or_a_run_of_all_stages(tmp_path):
    run = tmp_path / "run"
    first, second = make(run, 4), make(run, 8)
    assert latest(str(run)).path == second
    assert latest(first).path == first and latest(first).step == 4
    everything = tmp_path / "all"
    for stage, step in ((1, 50), (2, 20), (3, 10)):
        make(everything / f"stage_{stage}", step)
    assert latest(everything).path == everything / "stage_3" / "checkpoints" / "step_10"


def test_a_checkpoint_folder_is_found_from_inside_and_after_a_move(tmp_path, monkeypatch):
    path = make(tmp_path / "run", 4)
    monkeypatch.chdir(path.parent)
    assert latest("step_4").step == 4
    moved = path.rename(tmp_path / "kept")
    assert latest(moved).step == 4 and latest(moved).path == moved


def test_a_run_of_all_stages_falls_back_to_the_last_stage_that_has_one(tmp_path):
    make(tmp_path / "stage_1", 50)
    make(tmp_path / "stage_2", 5, None)
    (tmp_path / "stage_3").mkdir()
    assert [p.name for p in stage_runs(tmp_path)] == ["stage_1", "stage_2", "stage_3"]
    assert latest(tmp_path).path == tmp_path / "stage_1" / "checkpoints" / "step_50"


def test_a_plain_run_has_one_stage_directory_itself(tmp_path):
    assert stage_runs(tmp_path) == [tmp_path]


@pytest.mark.parametrize("inside", [[], ["stage_1", "stage_2"]])
def test_a_run_without_a_complete_checkpoint_is_an_input_error(tmp_path, inside):
    for name in inside:
        make(tmp_path / name, 5, None)
    with pytest.raises(InputError) as error:
        latest(tmp_path)
    assert str(error.value) == f"{tmp_path}: holds no complete checkpoint (looked for checkpoints/step_*/{MARKER})"


def test_a_missing_folder_and_a_file_are_input_errors(tmp_path):
    (tmp_path / "file").touch()
    for name in ("nothing", "file"):
        with pytest.raises(InputError, match=f"{name}: no such run directory"):
            latest(tmp_path / name)


@pytest.mark.parametrize(("keep", "left"), [(0, {1, 2, 30, 4}), (1, {30}), (2, {30, 4}), (9, {1, 2, 30, 4})])
def test_prune_keeps_the_newest_and_never_touches_what_is_being_written(tmp_path, keep, left):
    for step in (1, 2, 30, 4):
        make(tmp_path, step)
    make(tmp_path, 31, None)
    prune(tmp_path, keep)
    assert names(tmp_path) == {f"step_{s}" for s in left} | {"step_31"}
    assert {c.step for c in checkpoints(tmp_path)} == left


def test_prune_keeps_every_mth_for_ever_and_clears_what_was_left_half_written(tmp_path):
    for step in (5, 10, 15, 20, 25):
        make(tmp_path, step)
    make(tmp_path, 12, None)
    make(tmp_path, 13, "{")
    make(tmp_path, 30, None)
    prune(tmp_path, 1, 10)
    assert names(tmp_path) == {"step_10", "step_20", "step_25", "step_30"}
    assert {c.step for c in checkpoints(tmp_path)} == {10, 20, 25}
    prune(tmp_path, 0, 10)
    assert {c.step for c in checkpoints(tmp_path)} == {10, 20, 25}


def test_prune_removes_nothing_where_nothing_is_complete(tmp_path):
    make(tmp_path, 1, None)
    prune(tmp_path, 1)
    assert names(tmp_path) == {"step_1"}


def test_prune_takes_the_marker_first(tmp_path, monkeypatch):
    make(tmp_path, 1)
    make(tmp_path, 2)
    monkeypatch.setattr("megatron_elva.training.runs.shutil.rmtree", lambda *args, **kwargs: None)  # killed in between
    prune(tmp_path, 1)
    assert names(tmp_path) == {"step_1", "step_2"}
    assert [c.step for c in checkpoints(tmp_path)] == [2]


def test_the_tokenizer_of_a_run_is_found_from_wherever_weights_are_taken(tmp_path):
    for stage in ("stage_1", "stage_2"):
        (tmp_path / "D" / stage / "tokenizer").mkdir(parents=True)
        (tmp_path / "D" / stage / "checkpoints" / "step_3").mkdir(parents=True)
        (tmp_path / "D" / stage / "tokenizer" / "tokenizer.json").touch()
    last = tmp_path / "D" / "stage_2"
    for source in (tmp_path / "D", last, last / "checkpoints" / "step_3", last / "tokenizer"):
        assert tokenizer_folder(source) == last / "tokenizer"
    assert tokenizer_folder(tmp_path / "D" / "stage_1") == tmp_path / "D" / "stage_1" / "tokenizer"
    assert tokenizer_folder(tmp_path) is None


def test_a_run_directory_takes_one_job_at_a_time(tmp_path):
    lock = RunLock(tmp_path)
    with pytest.raises(InputError, match=f"a job is training there .*-{os.getpgrp()}"):
        check_unlocked(tmp_path)
    lock.release()
    check_unlocked(tmp_path)
    check_unlocked(tmp_path / "new")


def test_what_cannot_go_on_is_refused_before_anything_is_touched(tmp_path):
    config = small_config(run_dir=str(tmp_path / "run"))
    check_resumable(config)
    folder = tmp_path / "run" / "checkpoints" / "step_4"
    folder.mkdir(parents=True)
    write_marker(folder, {"step": 4, "samples": 16, "model": asdict(config.model), "global_batch": 4})
    check_resumable(replace(config, train=replace(config.train, accumulate=4)))
    with pytest.raises(ConfigError, match=r"^train.global_batch=8: .* set train.global_batch=4"):
        check_resumable(replace(config, train=replace(config.train, global_batch=8)))
    with pytest.raises(ConfigError, match=r"^model.hidden=64: .*hidden=32"):
        check_resumable(replace(config, model=replace(config.model, hidden=64)))
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match="is a file"):
        check_resumable(replace(config, run_dir=str(tmp_path / "file")))
