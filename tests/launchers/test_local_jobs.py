"""Real local jobs with stub functions: following, failures, survival, one process. No training."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import cloudpickle
import psutil
import pytest

from launchers import follow as follow_module
from launchers import record
from launchers.executors import submit
from launchers.follow import follow, how_to_stop
from launchers.job import TrainJob
from launchers.progress import Display, duration, progress_line
from launchers.slurm_queue import Queued
from megatron_elva.config.build import load
from megatron_elva.config.compose import compose, compose_all
from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config
from megatron_elva.training import attempts

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # the tasks cannot import this file


@dataclass
class StubJob(TrainJob):
    """Writes metrics as training would, from rank 0; ``fails`` says what the last rank does in the end."""

    fails: str = ""

    def work(self):
        rank, last = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"]) - 1
        names = ("MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "OMP_NUM_THREADS")
        for path in self.config_paths:
            config = load(path)
            seen = {name: os.environ.get(name) for name in names}
            (Path(config.run_dir) / f"rank_{rank}.json").write_text(json.dumps(seen))
            if rank == 0:
                write_metrics(config, 3)
        if rank == last and self.fails == "raises":
            raise ValueError("the loss is a banana")
        if self.fails == "echoes":
            if rank == last:
                raise RuntimeError("gloo: Connection closed by peer")
            time.sleep(0.5)
            raise ValueError("the cause")
        if rank == last and self.fails == "refuses":
            raise InputError("data.tokenizer=t: holds no tokenizer")
        if self.fails == "saves":
            flags: list[int] = []
            signal.signal(signal.SIGTERM, lambda number, frame: flags.append(number))
            folder = Path(load(self.config_paths[0]).run_dir)
            (folder / f"ready_{rank}").touch()
            while not flags:
                time.sleep(0.02)
            time.sleep(1.5 if rank else 0.2)  # one rank takes longer
            (folder / f"saved_{rank}").touch()
            if rank == 0:
                attempts.end(folder, "stopped", "told to end; saved at step 3", 3)
            sys.exit(143)
        if rank == last and self.fails == "killed":
            print("about to go", file=sys.stderr, flush=True)
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fails:
            time.sleep(60)


def write_metrics(config: Config, steps: int) -> None:
    with (Path(config.run_dir) / "metrics.jsonl").open("a") as file:
        for step in range(1, steps + 1):
            line = {"step": step, "stage": config.stage.id, "loss": 2.5, "tokens_per_s": 35120.4, "step_s": 0.5}
            file.write(json.dumps(line) + "\n")


def running_in_session(leader: int) -> list[int]:
    """Processes of a session, without those that are dead and only not yet buried."""
    found = []
    for process in psutil.process_iter(["pid", "status"]):
        try:
            if os.getsid(process.pid) == leader and process.info["status"] != psutil.STATUS_ZOMBIE:
                found.append(process.pid)
        except ProcessLookupError:
            continue
    return found


def raising(paths, port):
    return StubJob(paths, port, "raises")


def refusing(paths, port):
    return StubJob(paths, port, "refuses")


def echoing(paths, port):
    return StubJob(paths, port, "echoes")


def saving(paths, port):
    return StubJob(paths, port, "saves")


def killed(paths, port):
    return StubJob(paths, port, "killed")


@pytest.fixture(autouse=True)
def short_grace(monkeypatch):
    monkeypatch.setattr(follow_module, "_GRACE_S", 1.0)


def two_ranks(run: Path, *more: str) -> list[str]:
    return ["cluster=local", "parallel.pipeline=1", f"run_dir={run}", "train.steps=10", "train.warmup_steps=1", *more]


def test_all_stages_run_in_one_job(tmp_path, monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "99")  # left by a torchrun around the launcher
    configs = compose_all(["stage=all", *two_ranks(tmp_path / "run")])
    submission = submit(configs, StubJob)
    out = io.StringIO()
    assert follow(submission, out, 0.1) == 0
    assert out.getvalue().endswith(f"done: {tmp_path / 'run'}\n")
    assert "stage 3  3/10  loss 2.5  35,120 tokens/s  4 s left in this stage" in out.getvalue()
    for stage in (1, 2, 3):
        ranks = [json.loads((tmp_path / f"run/stage_{stage}/rank_{r}.json").read_text()) for r in (0, 1)]
        assert [r["RANK"] for r in ranks] == [r["LOCAL_RANK"] for r in ranks] == ["0", "1"]
        assert {r["WORLD_SIZE"] for r in ranks} == {"2"}
        assert {r["MASTER_ADDR"] for r in ranks} == {"127.0.0.1"}
        assert {r["OMP_NUM_THREADS"] for r in ranks} == {"1"}
        assert len({r["MASTER_PORT"] for r in ranks}) == 1
        assert load(tmp_path / f"run/stage_{stage}/config.yaml") == configs[stage - 1]
    assert os.environ["WORLD_SIZE"] == "99"


@pytest.mark.parametrize(
    ("make", "said"), [(raising, "rank 1 failed"), (killed, "rank 1 ended without a result (killed?)")]
)
def test_a_failing_rank_ends_the_job(tmp_path, capfd, make, said):
    submission = submit([compose(two_ranks(tmp_path / "run"))], make)
    out = io.StringIO()
    assert follow(submission, out, 0.1) == 1
    err = capfd.readouterr().err
    log = tmp_path / "run" / "logs" / f"{submission.jobs[0].job_id}_1_log.err"
    assert f"{said}; last lines of {log}:" in err
    assert ("the loss is a banana" in err) == (make is raising)
    assert ("about to go" in err) == (make is killed)
    assert "3/10" in out.getvalue()
    submission.jobs[0]._process.wait(10)
    until = time.monotonic() + 20  # the rank that would sleep for a minute is gone too, or about to be
    while left := running_in_session(int(submission.jobs[0].job_id)):
        assert time.monotonic() < until, left
        time.sleep(0.1)


def test_what_only_a_rank_can_refuse_is_one_line_and_exit_2(tmp_path, capfd):
    submission = submit([compose(two_ranks(tmp_path / "run"))], refusing)
    assert follow(submission, io.StringIO(), 0.1) == 2
    assert capfd.readouterr().err == "error: data.tokenizer=t: holds no tokenizer\n"


def test_a_rank_that_only_lost_its_peer_is_not_blamed(tmp_path, capfd):
    submission = submit([compose(two_ranks(tmp_path / "run"))], echoing)
    assert follow(submission, io.StringIO(), 0.1) == 1
    err = capfd.readouterr().err
    assert "rank 0 failed" in err
    assert "the cause" in err


def test_the_command_to_stop_a_job_lets_its_ranks_save(tmp_path, capfd):
    run = tmp_path / "run"
    submission = submit([compose(two_ranks(run))], saving)
    until = time.monotonic() + 60
    while not all((run / f"ready_{rank}").exists() for rank in (0, 1)) and time.monotonic() < until:
        time.sleep(0.05)
    subprocess.run(["bash", "-c", how_to_stop(submission)], check=True)
    assert follow(submission, io.StringIO(), 0.1) == 1
    assert capfd.readouterr().err == "stopped: told to end; saved at step 3\n"
    assert (run / "saved_0").exists()
    assert (run / "saved_1").exists()  # neither the controller nor the follower was faster
    submission.jobs[0]._process.wait(10)
    assert running_in_session(int(submission.jobs[0].job_id)) == []


def test_a_submission_leaves_its_record(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["submit.py", "stage=2"])
    submission = submit([compose(two_ranks(tmp_path / "run"))], StubJob)
    job = submission.jobs[0]
    found = record.read(tmp_path / "run")
    assert (found.kind, found.job, found.command) == ("local", str(job.job_id), ["submit.py", "stage=2"])
    assert found.code == submission.code.about == json.loads((tmp_path / "run" / "code" / "git.json").read_text())
    assert isinstance(record.queued(found), Queued)
    with pytest.raises(InputError, match=f"job {job.job_id} of .* is still there"):
        submit([compose(two_ranks(tmp_path / "run"))], StubJob)
    assert job._process.wait(60) == 0
    assert record.queued(found) is False


def test_ctrl_c_leaves_the_job(tmp_path, monkeypatch):
    submission = submit([compose(two_ranks(tmp_path / "run"))], StubJob)

    def press(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(follow_module, "progress_line", press)
    out = io.StringIO()
    assert follow(submission, out) == 0
    job = submission.jobs[0]
    assert f"the job goes on; stop it with: kill -TERM -- -{job.job_id}" in out.getvalue()
    assert os.getsid(int(job.job_id)) == int(job.job_id) != os.getsid(0)
    assert job._process.wait(30) == 0
    assert (tmp_path / "run" / "metrics.jsonl").is_file()


def test_the_job_outlives_the_launcher(tmp_path):
    run = tmp_path / "run"
    code = (
        "import sys, time; from launchers.submit import main; from launchers.job import TrainJob\n"
        "import cloudpickle; cloudpickle.register_pickle_by_value(sys.modules['__main__'])\n"
        "class Slow(TrainJob):\n"
        "    def __call__(self):\n"
        f"        time.sleep(3); open({str(run)!r} + '/done', 'w').close()\n"
        f"sys.exit(main({[*two_ranks(run, f'data.root={tmp_path}')]!r}, Slow))\n"
    )
    for kind in ("images", "videos"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "train-0.tar").touch()
    (tmp_path / "tokenizer").mkdir()
    script = tmp_path / "launch.py"
    script.write_text(code)
    # captured output: a job that kept the launcher's pipes would hold this call
    root = Path(follow_module.__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=30, env=environment)
    assert done.returncode == 0, done.stderr
    assert not (run / "done").exists()
    for word in ("job:", "run_dir:", "code:", "tail -F", "status.py", "kill -TERM"):
        assert word in done.stdout
    until = time.monotonic() + 30
    while not (run / "done").exists() and time.monotonic() < until:
        time.sleep(0.1)
    assert (run / "done").exists()


def test_an_interface_that_is_not_there_is_refused_before_the_ranks_meet(tmp_path, capfd):
    submission = submit([compose(two_ranks(tmp_path / "run", "cluster.interface=ib9"))], StubJob)
    assert follow(submission, io.StringIO(), 0.1) == 2
    assert "error: cluster.interface=ib9: no such network interface" in capfd.readouterr().err


def test_debug_runs_here(tmp_path):
    submission = submit([compose(["cluster=debug", f"run_dir={tmp_path}"])], StubJob)
    assert submission.jobs == []
    seen = json.loads((tmp_path / "rank_0.json").read_text())
    assert (seen["WORLD_SIZE"], seen["MASTER_ADDR"]) == ("1", "127.0.0.1")
    assert "RANK" not in os.environ


def test_checkpoint_starts_the_same_job_again():
    job = TrainJob(["a.yaml"], 1234)
    delayed = job.checkpoint()
    assert (delayed.function, delayed.args, delayed.kwargs) == (job, (), {})
    assert cloudpickle.loads(cloudpickle.dumps(job)) == job


def test_progress_line(tmp_path):
    config = compose(["cluster=local", f"run_dir={tmp_path}", "train.steps=500"])
    assert progress_line([config], 0) is None
    write_metrics(config, 120)
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 121, "lo')  # being written
    assert progress_line([config], 0) == "stage 2  120/500  loss 2.5  35,120 tokens/s  3 min 10 s left"
    assert progress_line([config], time.time() + 60) is None  # of an earlier submission


def test_progress_without_numbers(tmp_path):
    config = compose(["cluster=local", f"run_dir={tmp_path}", "train.steps=500"])
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": null}\n')
    assert progress_line([config], 0) == "stage 2  1/500"


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (40, "40 s"), (155, "2 min 35 s"), (120, "2 min"), (11_520, "3 h 12 min"), (270_000, "3 d 3 h")],
)
def test_duration(seconds, text):
    assert duration(seconds) == text


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self):
        return True


def test_display():
    terminal, pipe = Terminal(), io.StringIO()
    for out in (terminal, pipe):
        display = Display(out)
        for line in ("a", "b", "b", "c"):
            display.show(line)
        display.end("d")
    assert terminal.getvalue() == "\ra\x1b[K\rb\x1b[K\rc\x1b[K\rd\x1b[K\n"
    assert pipe.getvalue() == "a\nd\n"  # b and c came too soon
