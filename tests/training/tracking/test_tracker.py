"""Real senders beside a process that takes steps: servers that fail, a trainer that dies, several at once."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from mlflow.entities import Metric
from mlflow.tracking import MlflowClient

from megatron_elva.training.tracking import Tracker
from megatron_elva.training.tracking.tracker import SENDER
from tests.training.tracking.mlflow_server import Failing, Server
from tests.training.tracking.steps import lines_of, write_config, write_lines

ROOT = Path(__file__).resolve().parents[3]
pytestmark = [pytest.mark.slow, pytest.mark.alone]

QUICK = {"system_every_s": 0.0, "flush_s": 30.0}


def start(run: Path, first: int, last: int, seconds: float, end: str, **environment: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "tests.training.tracking.steps", str(run), str(first), str(last)]
    return subprocess.Popen(
        [*command, str(seconds), end], cwd=ROOT, env=clean(**environment), stdout=subprocess.PIPE, text=True
    )


def clean(**environment: str) -> dict[str, str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith("MLFLOW_")}
    return {**kept, "OMP_NUM_THREADS": "1", **environment}


def state(run: Path) -> dict:
    return json.loads((run / "mlflow" / "run.json").read_text())


def log(run: Path) -> str:
    return (run / "logs" / "tracking_0.log").read_text()


def local(run: Path) -> MlflowClient:
    return MlflowClient(f"sqlite:///{run.parent}/mlflow.db")


def check_curves(client: MlflowClient, run: Path) -> None:
    """Every number of every line is on the server once, and nothing else."""
    run_id = state(run)["run_id"]
    for key, by_samples in (("loss", True), ("grad_norm", True), ("tokens_per_s", True), ("visual_tokens_out", False)):
        lines = [line for line in lines_of(run) if line[key] is not None]
        expected = [Metric(key, float(line[key]), int(1000 * line["time"]), line["step"]) for line in lines]
        assert sorted(map(tuple_of, client.get_metric_history(run_id, key))) == sorted(map(tuple_of, expected)), key
        if by_samples:
            shown = {(m.step, m.value) for m in client.get_metric_history(run_id, f"by_samples/{key}")}
            assert shown == {(line["samples"], line[key]) for line in lines}
    assert not client.get_metric_history(run_id, "mfu") and not client.get_metric_history(run_id, "time")


def tuple_of(metric: Metric) -> tuple:
    return metric.step, metric.value, metric.timestamp


def finishing(trainer: subprocess.Popen) -> float:
    """Seconds for which the tracker held up the end of training."""
    assert trainer.stdout is not None
    return float(trainer.stdout.read().split()[-1])


def wait_for(what, seconds: float = 120.0):
    until = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < until, "it never came"
        time.sleep(0.1)
    return found


def test_a_server_that_is_paused_killed_and_answers_500_delays_no_step_and_loses_nothing(tmp_path):
    run = tmp_path / "runs" / "mine"
    alone = tmp_path / "runs" / "alone"
    write_config(run, **QUICK)
    write_config(alone, **{**QUICK, "mlflow": False})
    server = Server(tmp_path / "server")
    try:
        server.start()
        environment = {"MLFLOW_TRACKING_URI": server.uri, "MLFLOW_HTTP_REQUEST_TIMEOUT": "6"}
        trainer = start(run, 1, 9000, 0.1, "done", **environment)
        wait_for(lambda: (run / "mlflow" / "sent.json").is_file())
        untracked = start(alone, 1, 9000, 0.1, "done", **environment)  # what the machine itself makes of such steps
        complaints = log(run).count("not sent")  # a busy machine may have had the server answer too late before
        server.signal(signal.SIGSTOP)
        wait_for(lambda: log(run).count("not sent") == complaints + 1)
        server.signal(signal.SIGCONT)
        wait_for(lambda: log(run).count("sends again") == complaints + 1)
        server.kill()
        wait_for(lambda: log(run).count("not sent") == complaints + 2)
        failing = Failing(server.port)
        wait_for(lambda: failing.asked)
        failing.close()
        server.start()
        wait_for(lambda: log(run).count("sends again") == complaints + 2)
        for folder in (run, alone):
            (folder / "enough").touch()
        longest, mean, _ = map(float, trainer.communicate(timeout=240)[0].split())
        machine = float(untracked.communicate(timeout=60)[0].split()[1])
        assert trainer.returncode == 0 and untracked.returncode == 0
        # a step that waited for the server would take the 6 s of its timeout; a busy machine holds a few up for some
        assert longest < 5 and mean < machine + 0.02, (longest, mean, machine)
        check_curves(server.client, run)
        info = server.client.get_run(state(run)["run_id"]).info
        assert info.status == "FINISHED" and info.run_name == "mine"
        assert len(server.client.search_runs([info.experiment_id])) == 1
        assert not (tmp_path / "runs" / "mlflow.db").exists()
    finally:
        for folder in (run, alone):
            (folder / "enough").touch()  # nobody takes steps when this has failed
        server.kill()


def test_a_run_that_could_not_be_sent_is_sent_by_hand_with_its_own_times(tmp_path):
    run = tmp_path / "runs" / "mine"
    write_config(run, system_every_s=0.0, flush_s=1.0, uri="http://127.0.0.1:9")  # the port that discards
    trainer = start(run, 1, 3, 0.01, "done")
    assert trainer.wait(60) == 0
    assert finishing(trainer) < 10  # it waited for the second that flush_s says, not for the server
    assert state(run)["run_id"] is None and state(run)["uri"] == "http://127.0.0.1:9"
    write_config(run, system_every_s=0.0, flush_s=30.0, uri=f"sqlite:///{tmp_path}/other/own.db")
    command = [sys.executable, "-m", SENDER, str(run), "--once"]
    done = subprocess.run(command, cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    client = MlflowClient(f"sqlite:///{tmp_path}/other/own.db")
    check_curves(client, run)
    info = client.get_run(state(run)["run_id"]).info
    last = lines_of(run)[-1]["time"]
    assert info.status == "FINISHED" and abs(info.end_time / 1000 - last) < 5
    assert info.artifact_uri.startswith((tmp_path / "other" / "mlflow_artifacts").as_uri())


def test_a_killed_trainer_leaves_no_process_and_its_run_goes_on_when_it_resumes(tmp_path):
    run = tmp_path / "runs" / "mine"
    write_config(run, **QUICK)
    trainer = start(run, 1, 12, 0.01, "kill")
    sender = wait_for(lambda: psutil.Process(trainer.pid).children())[0]
    trainer.communicate(timeout=60)
    assert trainer.returncode == -signal.SIGKILL
    sender.wait(30)
    client = local(run)
    check_curves(client, run)
    first = client.get_run(state(run)["run_id"])
    assert first.info.status == "FAILED" and first.data.tags["outcome"] == "lost"

    config = write_config(run, **QUICK, answers=3)  # a parameter that has changed
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"step": 13, "lo')  # torn by the kill
    with (run / "metrics.jsonl").open("a") as file:
        file.write("\n")
    assert config.tracking.answers == 3
    trainer = start(run, 9, 20, 0.01, "stopped")
    trainer.communicate(timeout=60)
    (run / "metrics.jsonl").write_text("".join(x + "\n" for x in (run / "metrics.jsonl").read_text().splitlines()
                                                if x.endswith("}")))  # fmt: skip
    check_curves(client, run)
    again = client.get_run(state(run)["run_id"])
    assert again.info.run_id == first.info.run_id and again.info.start_time == first.info.start_time
    assert again.info.status == "KILLED" and again.data.tags["outcome"] == "stopped"
    assert again.data.tags["attempts"] == "1: lost at step 12; 2: stopped at step 20"
    assert again.data.params["tracking.answers"] == "4" and again.data.params["tracking.answers.attempt_2"] == "3"
    assert again.data.metrics["loss"] == lines_of(run)[-1]["loss"]


def test_stages_that_start_at_once_share_a_new_store_and_one_parent(tmp_path):
    stages = [tmp_path / "runs" / "mine" / f"stage_{n}" for n in (1, 2, 3)]
    for run in stages:
        write_config(run, nested=True, system_every_s=0.2, flush_s=30.0)
    trainers = [start(run, 1, 40, 0.1, end) for run, end in zip(stages, ("done", "requeue", "hang"), strict=True)]
    for trainer in trainers:
        trainer.communicate(timeout=90)
    client = MlflowClient(f"sqlite:///{tmp_path}/runs/mlflow.db")
    parent = state(tmp_path / "runs" / "mine")["run_id"]
    runs = {run.info.run_name: run for run in client.search_runs([client.get_experiment_by_name("elva").experiment_id])}
    assert sorted(runs) == ["mine", "stage_1", "stage_2", "stage_3"]
    assert runs["mine"].info.run_id == parent
    assert {run.data.tags.get("mlflow.parentRunId") for name, run in runs.items() if name != "mine"} == {parent}
    assert [runs[f"stage_{n}"].info.status for n in (1, 2, 3)] == ["FINISHED", "SCHEDULED", "FAILED"]
    for run in stages:
        check_curves(client, run)
        history = client.get_metric_history(state(run)["run_id"], "system/node_0/cpu_utilization_percentage")
        assert len(history) > 3 and [m.step for m in history] == list(range(len(history)))


def test_signals_to_the_whole_step_do_not_end_the_sender(tmp_path):
    run = tmp_path / "runs" / "mine"
    write_config(run, **QUICK)
    trainer = start(run, 1, 20, 0.1, "requeue")
    sender = wait_for(lambda: psutil.Process(trainer.pid).children())[0]
    for _ in range(20):  # from its first instant on
        for number in (signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            sender.send_signal(number)
        time.sleep(0.02)
    wait_for(lambda: sender.nice() == min(19, os.nice(0) + 10))
    assert os.getsid(sender.pid) == sender.pid
    trainer.communicate(timeout=60)
    assert local(run).get_run(state(run)["run_id"]).info.status == "SCHEDULED"
    check_curves(local(run), run)


def test_a_tracker_that_cannot_start_says_so_and_training_goes_on(tmp_path, capsys, monkeypatch):
    run = tmp_path / "runs" / "mine"
    config = write_config(run, **QUICK)
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    tracker = Tracker(config, 0, 0, 0, 1)
    tracker.start()
    tracker.finish("done")
    assert "tracking: did not start: " in capsys.readouterr().err
    others = [Tracker(config, 1, 1, 0, 4), Tracker(config, 2, 0, 1, 4)]  # another local rank; a node without samples
    for other in others:
        other.start()
        other.finish("done")
    assert capsys.readouterr().err == ""


def test_by_hand_beside_a_sender_at_work_is_refused(tmp_path):
    run = tmp_path / "runs" / "mine"
    config = write_config(run, **QUICK)
    write_lines(run, range(1, 3))
    tracker = Tracker(config, 0, 0, 0, 1)
    tracker.start()
    try:
        wait_for(lambda: (run / "mlflow" / "lock").is_file())
        time.sleep(0.2)
        command = [sys.executable, "-m", SENDER, str(run), "--once"]
        done = subprocess.run(command, cwd=ROOT, env=clean(), capture_output=True, text=True, timeout=60)
        assert done.returncode == 2 and "is being sent by another process" in done.stderr
    finally:
        tracker.finish("done")
    check_curves(local(run), run)
