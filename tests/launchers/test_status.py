"""What status.py says of a run directory, from its files and from what Slurm is made to say."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import record, slurm_queue, status
from launchers.record import Record
from launchers.slurm_queue import Queued
from launchers.status import main
from megatron_elva.config.build import save
from megatron_elva.config.compose import compose
from megatron_elva.training import attempts

SCRIPT = Path(status.__file__)


class Slurm:
    """What Slurm says: the job's place in the queue, and its end."""

    def __init__(self) -> None:
        self.queue: dict[str, Queued] | None = {}
        self.final: str | None = None

    def queued(self, jobs):
        return None if self.queue is None else {job: found for job, found in self.queue.items() if job in jobs}

    def final_state(self, job):
        return self.final


@pytest.fixture
def slurm(monkeypatch):
    said = Slurm()
    monkeypatch.setattr(slurm_queue, "queued", said.queued)
    monkeypatch.setattr(slurm_queue, "final_state", said.final_state)
    monkeypatch.delenv("SUBMITIT_LOCAL_JOB_ID", raising=False)
    monkeypatch.setenv("SLURM_JOB_ID", "12")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    return said


@pytest.fixture
def run(tmp_path):
    """A run directory for which job 12 was submitted."""
    folder = tmp_path / "run"
    save(compose(["cluster=local", f"run_dir={folder}", "train.steps=100"]), folder / "config.yaml")
    Record("slurm", "12", ["12"], ["submit.py"], {}).write(folder)
    return folder


def train(run: Path, last: int, saved: int | None = None) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        for step in range(1, last + 1):
            line = {"step": step, "loss": 2.5, "tokens_per_s": 35120.4, "step_s": 0.5}
            file.write(json.dumps(line) + "\n")
    if saved is not None:
        folder = run / "checkpoints" / f"step_{saved}"
        folder.mkdir(parents=True)
        (folder / "complete.json").write_text(json.dumps({"step": saved}))


def shown(run: Path, capsys, code: int = 0) -> tuple[str, dict]:
    """The text and the object of the first stage."""
    assert main([str(run)]) == code
    out = capsys.readouterr().out
    assert main([str(run), "--json"]) == code
    return out, json.loads(capsys.readouterr().out)[0]


def test_queued_running_requeued_done(run, slurm, capsys, monkeypatch):
    slurm.queue = {"12": Queued("PENDING", "Priority")}
    out, said = shown(run, capsys)
    assert "stage 2: queued (Priority)" in out
    assert "12 (slurm); end it with: scancel 12" in out
    slurm.queue = {"12": Queued("RUNNING", "None")}
    assert shown(run, capsys)[1]["state"] == "starting"
    attempts.begin(run, 0)
    train(run, 40, saved=30)
    out, said = shown(run, capsys)
    assert said["state"] == "running"
    assert (said["step"], said["steps"], said["loss"], said["left_s"]) == (40, 100, 2.5, 30)
    assert "40/100  loss 2.5  35,120 tokens/s  30 s left  (last step " in out
    assert f"{run}/checkpoints/step_30, " in out
    assert "1: from step 0 on " in out
    attempts.end(run, "requeue", "time limit; saved at step 40", 40)
    slurm.queue = {"12": Queued("PENDING", "BeginTime")}
    out, said = shown(run, capsys)
    assert "requeued (held back for a moment after a requeue)" in out
    assert "requeue at step 40 after 0 s: time limit; saved at step 40" in out
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    attempts.begin(run, 40)
    train(run, 100, saved=100)
    attempts.end(run, "done", "", 100)
    slurm.queue = {}
    assert shown(run, capsys)[1]["state"] == "done"


def test_errors_name_the_log_of_the_rank(run, slurm, capsys):
    attempts.begin(run, 0)
    train(run, 4)
    attempts.end(run, "failed", "rank 3: ValueError: a banana", 4)
    (run / "logs" / "12_3_log.err").write_text("Traceback\n")
    out, said = shown(run, capsys, 1)
    assert said["state"] == "failed"
    assert "error      attempt 1: rank 3: ValueError: a banana" in out
    assert f"log        {run}/logs/12_3_log.err" in out


@pytest.mark.parametrize(
    ("outcome", "state", "code", "words"),
    [
        ("stopped", "stopped", 0, "saved"),
        ("requeue", "stopped", 0, "was not started again; submit it again to go on"),
        ("refused", "failed", 1, "saved"),
        ("hang", "failed", 1, "saved"),
    ],
)
def test_ends(run, slurm, capsys, outcome, state, code, words):
    attempts.begin(run, 0)
    attempts.end(run, outcome, "saved", 4)
    out, said = shown(run, capsys, code)
    assert said["state"] == state
    assert words in out


def test_jobs_that_never_began(run, slurm, capsys):
    slurm.final = "CANCELLED 0:0"
    assert (
        "stopped (cancelled before it began, or the stage before has failed (Slurm: CANCELLED 0:0))"
        in (shown(run, capsys)[0])
    )
    slurm.final = "FAILED 1:0"
    (run / "logs" / "12_0_log.err").write_text("first\npython: no such file\n\n")
    out, _ = shown(run, capsys, 1)
    assert "failed (ended before training began (Slurm: FAILED 1:0))" in out
    assert "error      python: no such file" in out


def test_without_slurm_the_files_say_what_they_can(run, slurm, capsys):
    slurm.queue = None
    assert shown(run, capsys)[1]["state"] == "queued"
    attempts.begin(run, 0)
    train(run, 4)
    out, said = shown(run, capsys)
    assert said["state"] == "running"
    assert "as far as its files say" in out
    slurm.queue = {}
    out, said = shown(run, capsys, 1)
    assert "failed (ended without a word)" in out


def test_an_earlier_jobs_end_is_not_that_of_the_new_one(run, slurm, capsys):
    attempts.begin(run, 0)
    attempts.end(run, "failed", "rank 0: x", 4)
    Record("slurm", "13", ["13"], [], {}).write(run)
    slurm.queue = {"13": Queued("PENDING", "Resources")}
    assert shown(run, capsys)[1]["state"] == "queued"


def test_findings(run, slurm, capsys):
    logs = run / "logs"
    (logs / "hang_step_7").mkdir()
    (logs / "hang_step_7" / "summary.json").write_text(json.dumps({"reason": "hang in step 7: did not arrive: rank 2"}))
    (logs / "recoveries.jsonl").write_text(
        json.dumps({"step": 31, "last_step": 40, "done_again": 10, "seconds": 13.21}) + "\n"
    )
    ranks = [{"rank": i, "host": f"node{i // 2}", "own_s": 0.4 if i == 2 else 0.1, "wall_s": 0.5} for i in range(4)]
    (logs / "ranks.jsonl").write_text(json.dumps({"step": 100, "ranks": ranks}) + '\n{"step": 200, "ra')
    (logs / "nonfinite.jsonl").write_text(json.dumps({"step": 9}) + "\n")
    out, _ = shown(run, capsys, 1)
    assert f"hang       hang in step 7: did not arrive: rank 2 ({logs}/hang_step_7)" in out
    assert "recovery   13.2 s from step 40 to step 31, 10 steps done again" in out
    assert "slowest    rank 2 on node1, 4.0 times the usual time of its own (step 100)" in out
    assert f"not finite step 9 ({logs}/nonfinite.jsonl)" in out


@pytest.mark.parametrize(
    ("name", "field", "values"),
    [
        ("metrics.jsonl", "step", [None, "x", [], float("inf")]),
        ("metrics.jsonl", "step_s", [None, "x", float("inf")]),
        ("logs/submission.json", "kind", [None, [], "x"]),
        ("logs/submission.json", "job", [None, 12]),
        ("logs/submission.json", "submitted", [None, "x"]),
    ],
)
def test_damaged_files(run, slurm, capsys, name, field, values):
    train(run, 30, saved=20)
    whole = (run / name).read_text()
    for value in values:
        line = json.loads(whole.splitlines()[-1] if name.endswith("l") else whole)
        (run / name).write_text(json.dumps({**line, field: value}) + "\n")
        assert main([str(run)]) in (0, 1)
        assert "stage 2: " in capsys.readouterr().out
        (run / name).write_text(whole)
    for text in ("", "{", "[]", "3"):
        (run / name).write_text(text + "\n")
        assert main([str(run)]) in (0, 1)


def test_all_stages_and_a_local_job(tmp_path, capsys, monkeypatch):
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv("SUBMITIT_LOCAL_JOB_ID", str(process.pid))
    job = str(process.pid)
    for stage in (1, 2):
        folder = tmp_path / f"stage_{stage}"
        save(compose([f"stage={stage}", "cluster=local", f"run_dir={folder}", "train.steps=4"]), folder / "config.yaml")
        Record("local", job, [job], [], {}, process_started=record.process_started(process.pid)).write(folder)
    try:
        attempts.begin(tmp_path / "stage_1", 0)
        assert main([str(tmp_path)]) == 0
        out = capsys.readouterr().out
        assert "stage 1: running" in out
        assert f"kill -TERM -- -{job}" in out
        assert "stage 2: starting" in out
    finally:
        process.communicate(b"\n")
    assert main([str(tmp_path)]) == 1
    assert "stage 1: failed (ended without a word)" in capsys.readouterr().out


def test_bad_input_is_one_line_and_exit_2(tmp_path):
    for folder, why in ((tmp_path / "nowhere", "no such run directory"), (tmp_path, "is no run directory")):
        call = [sys.executable, str(SCRIPT), str(folder)]
        done = subprocess.run(call, capture_output=True, text=True, timeout=60, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert why in done.stderr
        assert done.stderr.count("\n") == 1


def test_it_is_quick(run, slurm, capsys):
    train(run, 20_000)
    began = time.perf_counter()
    main([str(run)])
    assert time.perf_counter() - began < 5
