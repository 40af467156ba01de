"""What a task records before and after its work, and with which code it ends."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import job as job_module
from launchers.job import TrainJob
from megatron_elva.config.build import save
from megatron_elva.config.compose import compose
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.training import attempts, runs

PROLOGUE = """
import os, sys, time
from launchers.job import TrainJob
class Stub(TrainJob):
    def work(self):
        {work}
Stub(sys.argv[1:])()
"""


def make(folder: Path) -> str:
    save(compose(["cluster=local", f"run_dir={folder}", "train.steps=10"]), folder / "config.yaml")
    return str(folder / "config.yaml")


def task(work: str, *paths: str, rank: int = 0, restart: int = 0) -> subprocess.Popen[str]:
    """A task of Slurm job 7 on one node."""
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "SUBMITIT_"))},
        "SUBMITIT_EXECUTOR": "slurm", "SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "node1", "SLURM_NTASKS": "2",
        "SLURM_JOB_NUM_NODES": "1", "SLURM_NODEID": "0", "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank),
        "SLURM_RESTART_COUNT": str(restart), "CUDA_VISIBLE_DEVICES": "4,5",
        "PYTHONPATH": str(Path(job_module.__file__).parents[1]),
    }  # fmt: skip
    call = [sys.executable, "-c", PROLOGUE.format(work=work), *paths]
    return subprocess.Popen(call, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str, str]:
    out, err = process.communicate(timeout=60)
    return process.returncode, out, err


def test_a_task_finds_its_place(tmp_path):
    path = make(tmp_path)
    names = "MASTER_ADDR MASTER_PORT RANK WORLD_SIZE LOCAL_RANK LOCAL_WORLD_SIZE CUDA_VISIBLE_DEVICES"
    work = f"import json; print(json.dumps({{n: os.environ.get(n) for n in {names.split()!r}}}))"
    code, out, _ = ended(task(work, path, rank=1, restart=2))
    assert code == 0
    assert json.loads(out) == {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(20_000 + 7 * 13 + 2), "RANK": "1", "WORLD_SIZE": "2",
        "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "CUDA_VISIBLE_DEVICES": "4,5",
    }  # fmt: skip
    assert attempts.read(tmp_path) == []  # rank 0 records


@pytest.mark.parametrize(
    ("work", "code", "outcome", "reason"),
    [
        ("pass", 0, "done", ""),
        ("raise ValueError('a\\nbanana')", 1, "failed", "rank 0: ValueError: a banana"),
        (
            "raise RuntimeError('[x/pair.cc:553] Connection closed by peer [10.78.0.1]:21394. This is')",
            1,
            "failed",
            "rank 0 lost a rank on 10.78.0.1 that did not say why: killed, or its node is gone",
        ),
        ("sys.exit(75)", 75, None, ""),  # the training loop has recorded why
    ],
)
def test_ends(tmp_path, work, code, outcome, reason):
    path = make(tmp_path)
    assert ended(task(work, path))[0] == code
    (attempt,) = attempts.read(tmp_path)
    assert attempt.outcome == outcome
    assert reason in attempt.reason


def test_a_refusal_is_one_line_and_code_2(tmp_path):
    work = "from megatron_elva.config.errors import InputError; raise InputError('data.root=x: is empty')"
    code, _, err = ended(task(work, make(tmp_path)))
    assert (code, err) == (2, "error: data.root=x: is empty\n")
    assert attempts.read(tmp_path)[0].outcome == "refused"


def test_the_cause_is_told_before_its_echo(tmp_path):
    """Rank 0 only loses its peer; rank 1, which has the cause, reports later but is heard first."""
    path = make(tmp_path)
    first, second = tmp_path / "first", tmp_path / "second"
    wait = "open({!r}, 'w').close()\n        while not os.path.exists({!r}): time.sleep(0.01)\n        "
    ranks = [
        task(wait.format(str(first), str(second)) + "raise RuntimeError('Connection reset by peer')", path),
        task(wait.format(str(second), str(first)) + "time.sleep(0.5); raise ValueError('the cause')", path, rank=1),
    ]
    for rank in ranks:
        ended(rank)
    assert attempts.read(tmp_path)[0].reason == "rank 1: ValueError: the cause"


def test_the_third_failure_at_a_step_is_the_last(tmp_path):
    path = make(tmp_path)
    for restart in range(3):
        assert ended(task("os._exit(9)", path, restart=restart))[0] == 9  # as if its node had gone: nobody records
    code, _, err = ended(task("print('on')", path, restart=3))
    assert code == 2
    assert "not started again: 3 attempts in a row ended at step 0" in err
    assert [attempt.outcome for attempt in attempts.read(tmp_path)] == ["lost", "lost", "lost", "refused"]


def test_a_finished_job_that_slurm_starts_again_ends_well(tmp_path):
    path = make(tmp_path)
    assert ended(task("pass", path))[0] == 0
    assert ended(task("pass", path, restart=1))[0] == 0


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR2])
def test_a_signal_before_the_loop_listens_ends_the_task_at_once(tmp_path, number):
    process = task("print('in', flush=True); time.sleep(60)", make(tmp_path))
    assert process.stdout is not None
    assert process.stdout.readline() == "in\n"
    process.send_signal(number)
    assert process.wait(10) == -number
    process.communicate()
    assert attempts.read(tmp_path)[0].outcome is None  # the batch script closes it


def test_a_job_of_several_stages_begins_the_one_that_is_next(tmp_path):
    paths = [make(tmp_path / f"stage_{k}") for k in (1, 2)]
    (tmp_path / "stage_1" / "checkpoints" / "step_10").mkdir(parents=True)
    runs.write_marker(tmp_path / "stage_1" / "checkpoints" / "step_10", {"step": 10})
    assert ended(task("raise ValueError('x')", *paths))[0] == 1
    assert attempts.read(tmp_path / "stage_1") == []
    assert attempts.read(tmp_path / "stage_2")[0].outcome == "failed"


def test_a_run_in_which_another_job_trains_is_left_alone(tmp_path):
    path = make(tmp_path)
    lock = runs.RunLock(tmp_path)
    code, _, err = ended(task("pass", path))
    lock.release()
    assert code == 2
    assert "a job is training there" in err
    assert attempts.read(tmp_path) == []


def test_in_the_launchers_process_errors_go_to_the_launcher(tmp_path, monkeypatch):
    monkeypatch.setenv("SUBMITIT_DEBUG_JOB_ID", "debug")
    for name in ("SLURM_JOB_ID", "SUBMITIT_LOCAL_JOB_ID", "SUBMITIT_LOCAL_GLOBALID", "SLURM_PROCID"):
        monkeypatch.delenv(name, raising=False)
    before = signal.getsignal(signal.SIGTERM)

    class Stub(TrainJob):
        def meet(self, interface=None):
            pass

        def work(self):
            raise error

    for error, outcome in ((InputError("x"), "refused"), (ConfigError("y"), "refused"), (ValueError("z"), "failed")):
        with pytest.raises(type(error)):
            Stub([make(tmp_path)], 1)()
        assert attempts.read(tmp_path)[-1].outcome == outcome
    assert signal.getsignal(signal.SIGTERM) is before


def test_a_rank_that_fails_before_rank_0_has_begun_is_heard(tmp_path):
    path = make(tmp_path)
    early = task("raise ValueError('early')", path, rank=1)
    with pytest.raises(subprocess.TimeoutExpired):
        early.wait(2)
    late = task("time.sleep(1)", path)
    assert ended(early)[0] == 1
    ended(late)
    assert attempts.read(tmp_path)[0].reason == "rank 1: ValueError: early"
