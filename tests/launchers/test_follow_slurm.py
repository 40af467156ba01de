"""Following a Slurm job: its place in the queue, requeues, its end. Slurm's answers are made up, its files are real."""

from __future__ import annotations

import io
import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers import follow as follow_module
from launchers import slurm_queue
from launchers.executors import Submission
from launchers.follow import follow
from launchers.record import Record
from launchers.slurm_queue import Queued
from launchers.snapshot import Code
from megatron_elva.config.build import save
from megatron_elva.config.compose import compose_all
from megatron_elva.training import attempts, runs


class Cluster:
    """What happens to the jobs, one entry for each time that somebody asks."""

    def __init__(self, monkeypatch) -> None:
        self.story: list[tuple[str, object]] = []
        monkeypatch.setattr(slurm_queue, "queued", self.queued)
        monkeypatch.setattr(slurm_queue, "final_state", lambda job: None)
        monkeypatch.setattr(follow_module, "_SLURM_EVERY_S", 0.0)
        self.monkeypatch = monkeypatch

    def queued(self, jobs):
        state, happens = self.story.pop(0) if self.story else ("", None)
        if callable(happens):
            happens()
        if state == "?":
            return None
        name, _, reason = state.partition(" ")
        return {jobs[0]: Queued(name, reason)} if name else {}

    def start(self, run: Path, job: str, restart: int) -> None:
        self.monkeypatch.setenv("SLURM_JOB_ID", job)
        self.monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))
        attempts.begin(run, 0)


@pytest.fixture
def cluster(monkeypatch):
    return Cluster(monkeypatch)


def submitted(tmp_path: Path, stage: str = "2") -> Submission:
    given = ["model=tiny", "precision=fp32", "data=demo", f"run_dir={tmp_path}/run", "train.steps=10"]
    configs = compose_all([f"stage={stage}", *given, "train.warmup_steps=1"])
    jobs = [SimpleNamespace(job_id=str(12 + i)) for i in range(len(configs))]
    for config, job in zip(configs, jobs, strict=True):
        save(config, Path(config.run_dir) / "config.yaml")
        Record("slurm", job.job_id, [job.job_id], [], {}).write(Path(config.run_dir))
    return Submission("slurm", configs, jobs, Code(tmp_path, {}))


def train(run: Path, first: int, last: int) -> None:
    with (run / "metrics.jsonl").open("a") as file:
        file.writelines(json.dumps({"step": i, "loss": 2.5, "step_s": 0.5}) + "\n" for i in range(first, last + 1))


def finish(run: Path) -> None:
    train(run, 6, 10)
    folder = run / "checkpoints" / "step_10"
    folder.mkdir(parents=True)
    runs.write_marker(folder, {"step": 10})
    attempts.end(run, "done", "", 10)


class Lines(io.StringIO):
    """A terminal, so that every line is shown at once."""

    def isatty(self):
        return True


def test_a_requeued_job_is_followed_to_its_end(tmp_path, cluster):
    submission = submitted(tmp_path)
    run = tmp_path / "run"
    cluster.story = [
        ("PENDING Priority", None),
        ("?", None),
        ("RUNNING", lambda: (cluster.start(run, "12", 0), train(run, 1, 5))),
        ("PENDING BeginTime", lambda: attempts.end(run, "requeue", "time limit", 5)),
        ("RUNNING", lambda: (cluster.start(run, "12", 1), train(run, 6, 7))),
        ("RUNNING", lambda: finish(run)),
    ]
    out = Lines()
    assert follow(submission, out, 0.0) == 0
    shown = [line.strip("\r\x1b[K") for line in out.getvalue().split("\r")]
    told = iter(shown)
    for line in (
        "job 12: queued (Priority)",
        "job 12: unknown",
        "stage 2  5/10  loss 2.5  2 s left",
        "job 12: queued (held back for a moment after a requeue)  (start 2 to come)",
        "stage 2  7/10  loss 2.5  2 s left  (start 2)",
        "stage 2  10/10  loss 2.5",
    ):
        assert any(line in text for text in told), (line, shown)
    assert f"done: {run}" in shown[-1]


@pytest.mark.parametrize(
    ("outcome", "reason", "code"), [("failed", "rank 3: ValueError: a banana", 1), ("refused", "data.root=x: empty", 2)]
)
def test_the_end_of_a_job_is_told(tmp_path, cluster, capsys, outcome, reason, code):
    submission = submitted(tmp_path)
    run = tmp_path / "run"
    cluster.story = [
        ("RUNNING", lambda: cluster.start(run, "12", 0)),
        ("RUNNING", lambda: attempts.end(run, outcome, reason, 4)),
    ]
    assert follow(submission, io.StringIO(), 0.0) == code
    assert f"error      attempt 1: {reason}" in capsys.readouterr().err


def test_stages_are_followed_in_turn_and_a_failed_one_ends_it(tmp_path, cluster, capsys):
    submission = submitted(tmp_path, "all")
    first, second = tmp_path / "run" / "stage_1", tmp_path / "run" / "stage_2"
    cluster.story = [
        ("RUNNING", lambda: (cluster.start(first, "12", 0), train(first, 1, 5), finish(first))),
        *[("", None)] * 3,  # the follower asks, and the status twice
        ("PENDING Dependency", None),
        ("RUNNING", lambda: (cluster.start(second, "13", 0), attempts.end(second, "failed", "rank 0: x", 2))),
    ]
    out = Lines()
    assert follow(submission, out, 0.0) == 1
    assert "job 13: queued (waits for the stage before)" in out.getvalue()
    assert "stage 2: failed" in capsys.readouterr().err
