"""What is sent, from which line, once: on a real local store in this process."""

from __future__ import annotations

import json
import shutil
import time
from dataclasses import replace
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from megatron_elva.config.build import load, save
from megatron_elva.training import attempts
from megatron_elva.training.tracking import about
from megatron_elva.training.tracking.sending import Sending
from megatron_elva.training.tracking.state import RunDeletedError
from tests.training.tracking.steps import lines_of, write_config, write_lines
from tests.training.tracking.test_tracker import check_curves, state


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder whose store is made once, which takes seconds."""
    return tmp_path_factory.mktemp("runs")


@pytest.fixture
def client(runs):
    return MlflowClient(f"sqlite:///{runs}/mlflow.db")


@pytest.fixture(autouse=True)
def no_server(monkeypatch):
    for name in ("MLFLOW_TRACKING_URI", "MLFLOW_EXPERIMENT_NAME"):
        monkeypatch.delenv(name, raising=False)


def sending(run):
    return Sending(run, load(run / "config.yaml"), 1)


def test_lines_that_are_sent_again_after_a_crash_show_once(runs, client):
    run = runs / "crash"
    write_config(run)
    write_lines(run, range(1, 90))  # more points than one request takes
    sending(run).send()
    before = json.loads((run / "mlflow" / "sent.json").read_text())
    assert before["offsets"]["metrics.jsonl"] == (run / "metrics.jsonl").stat().st_size
    check_curves(client, run)
    write_lines(run, range(90, 95))
    sending(run).send()
    (run / "mlflow" / "sent.json").write_text(json.dumps({**before, "offsets": {"metrics.jsonl": 0}}))
    sending(run).send()  # as if the last note had never been written
    check_curves(client, run)


def test_a_line_half_written_is_sent_when_it_is_whole(runs, client):
    run = runs / "torn"
    write_config(run)
    write_lines(run, range(1, 3))
    whole = (run / "metrics.jsonl").read_bytes()
    (run / "metrics.jsonl").write_bytes(whole[:-20])
    one = sending(run)
    one.send()
    assert [m.step for m in client.get_metric_history(state(run)["run_id"], "loss")] == [1]
    (run / "metrics.jsonl").write_bytes(whole)
    one.send()
    check_curves(client, run)


def test_of_a_step_done_twice_both_are_kept_and_the_last_counts(runs, client):
    run = runs / "twice"
    write_config(run)
    write_lines(run, range(1, 5))
    time.sleep(0.01)
    write_lines(run, range(3, 5))
    sending(run).send()
    check_curves(client, run)
    found = client.get_run(state(run)["run_id"])
    assert len(client.get_metric_history(found.info.run_id, "grad_norm")) == 6
    assert client.get_metric_history(found.info.run_id, "grad_norm")[-1].timestamp == int(
        1000 * lines_of(run)[-1]["time"]
    )


def test_metrics_that_were_deleted_or_replaced_by_shorter_ones_are_read_anew(runs, client):
    run = runs / "shorter"
    write_config(run)
    write_lines(run, range(1, 9))
    one = sending(run)
    one.send()
    (run / "metrics.jsonl").unlink()
    one.send()
    write_lines(run, range(5, 6))
    one.send()
    assert [m.step for m in client.get_metric_history(state(run)["run_id"], "grad_norm")] == [*range(1, 9), 5]


def test_a_copied_run_directory_becomes_its_own_run_and_a_moved_one_stays(runs, client):
    run = runs / "original"
    write_config(run)
    write_lines(run, range(1, 4))
    sending(run).send()
    copy = runs / "copy"
    shutil.copytree(run, copy)
    save(replace(load(copy / "config.yaml"), run_dir=str(copy)), copy / "config.yaml")
    sending(copy).send()
    assert state(copy)["run_id"] != state(run)["run_id"]
    check_curves(client, copy)
    moved = run.rename(runs / "moved")
    write_lines(moved, range(4, 6))
    sending(moved).send()
    check_curves(client, moved)
    assert len(client.get_metric_history(state(moved)["run_id"], "lr")) == 5


def test_a_run_that_the_server_lost_is_made_anew_and_a_deleted_one_is_left(runs, client):
    run = runs / "lost"
    write_config(run)
    write_lines(run, range(1, 4))
    sending(run).send()
    notes, sent = state(run), json.loads((run / "mlflow" / "sent.json").read_text())
    gone = "0" * 32
    (run / "mlflow" / "run.json").write_text(json.dumps({**notes, "run_id": gone}))
    (run / "mlflow" / "sent.json").write_text(json.dumps({**sent, "run_id": gone}))
    sending(run).send()
    assert state(run)["run_id"] not in (gone, notes["run_id"])
    check_curves(client, run)
    client.delete_run(state(run)["run_id"])
    with pytest.raises(RunDeletedError):
        sending(run).send()


def test_a_request_whose_answer_was_lost_makes_no_second_run(runs, client):
    run = runs / "unheard"
    write_config(run)
    write_lines(run, range(1, 3))
    sending(run).send()
    notes = state(run)
    (run / "mlflow" / "run.json").write_text(json.dumps({**notes, "run_id": None}))
    sending(run).send()
    assert state(run)["run_id"] == notes["run_id"]
    twin = client.create_run(client.get_run(notes["run_id"]).info.experiment_id, tags={"elva.key": notes["key"]})
    sending(run).send_end("done")
    assert client.get_run(twin.info.run_id).info.lifecycle_stage == "deleted"
    assert client.get_run(notes["run_id"]).info.lifecycle_stage == "active"


def test_files_are_uploaded_when_they_are_new_or_have_changed(runs, client, tmp_path):
    run = runs / "files"
    write_config(run)
    write_lines(run, range(1, 5))
    one = sending(run)
    one.send()
    run_id = state(run)["run_id"]
    assert "loss.png" not in {file.path for file in client.list_artifacts(run_id)}
    (run / "evaluation.json").write_text("{}")
    (run / "hf" / "part").mkdir(parents=True)
    (run / "hf" / "part" / "weights.safetensors").write_bytes(b"w")
    one.send_files(at_work=True)
    assert "hf" not in {file.path for file in client.list_artifacts(run_id)}  # no config.json: not whole yet
    (run / "hf" / "config.json").write_text("{}")
    one.send_files(at_work=True)
    assert "hf" not in {file.path for file in client.list_artifacts(run_id)}  # written just now
    (run / "evaluation.json").write_text('{"all": 1}')
    one.send_end("done")
    names = {file.path for file in client.list_artifacts(run_id)}
    assert {"config.yaml", "evaluation.json", "hf", "loss.png"} <= names
    assert {file.path for file in client.list_artifacts(run_id, "hf")} == {"hf/config.json", "hf/part"}
    assert Path(client.download_artifacts(run_id, "evaluation.json", str(tmp_path))).read_text() == '{"all": 1}'


def test_parameters_are_the_config_and_a_changed_one_stands_beside_the_old(tmp_path):
    config = write_config(tmp_path)
    wanted = about.params(config)
    assert wanted["train.steps"] == "4" and wanted["parallel.virtual_pipeline"] == "null"
    assert wanted["data.caption_prompt"] == "Describe the video." and wanted["stage.blend.videos"] == "1.0"
    long = replace(config, data=replace(config.data, caption_prompt="x" * 900))
    assert len(about.params(long)["data.caption_prompt"]) == 500
    assert about.new_params(wanted, {}, 1) == wanted
    secret = replace(config, tracking=replace(config.tracking, uri="https://me:secret@host"))
    assert about.params(secret)["tracking.uri"] == "https://host"
    assert about.new_params(wanted, wanted, 2) == {}
    longer = {**wanted, "train.steps": "8"}
    assert about.new_params(longer, wanted, 2) == {"train.steps.attempt_2": "8"}
    known = {**wanted, "train.steps.attempt_2": "8"}
    assert about.new_params(longer, known, 3) == {}
    assert about.new_params(wanted, known, 3) == {"train.steps.attempt_3": "4"}
    assert about.new_params({**wanted, "train.steps": "9"}, known, 2) == {"train.steps.attempt_3": "9"}


def test_status_follows_from_how_the_last_attempt_ended(tmp_path):
    assert set(about.STATUS) == set(attempts.OUTCOMES)
    assert about.outcome_of(tmp_path, 4) == "lost"
    write_lines(tmp_path, range(1, 5))
    assert about.outcome_of(tmp_path, 4) == "done" and about.outcome_of(tmp_path, 5) == "lost"
    attempts.begin(tmp_path, 0)
    assert about.outcome_of(tmp_path, 4) == "lost"
    attempts.end(tmp_path, "hang", "rank 3 did not arrive", 2)
    assert about.outcome_of(tmp_path, 4) == "hang"
