"""The parts of the demo that decide something."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from launchers import demo
from megatron_elva.evaluation.questions import Answered
from megatron_elva.training.runs import RunLock


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    monkeypatch.setattr(demo, "RUN", tmp_path)
    return tmp_path


FOLDER = Path("runs/demo/stage_3")
ASSISTANT = SimpleNamespace(checkpoint=SimpleNamespace(path=FOLDER / "checkpoints" / "step_1", run=FOLDER))


@pytest.mark.parametrize(("right", "learned"), [(100, True), (45, False)])
def test_the_summary_says_whether_the_model_learned(run_folder, capsys, right, learned):
    answers = [Answered("k", "digit", "q", str(i % 10), str(i % 10) if i < right else "x") for i in range(100)]
    assert demo.summarise(ASSISTANT, answers, 0.0, margin=0.35) is learned
    assert (
        capsys.readouterr().out.splitlines()[-1] == f"held-out accuracy {right / 100:.3f} (chance 0.100, 100 questions)"
    )
    summary = json.loads((run_folder / "summary.json").read_text())
    assert {"accuracy", "chance", "questions", "wall_s", "checkpoint", "metrics"} <= set(summary)


@pytest.mark.parametrize(
    ("finished", "before", "now", "kept"),
    [(False, "full", "full", True), (True, "full", "full", False), (False, "quick", "full", False)],
)
def test_an_interrupted_demo_is_kept_and_a_finished_one_cleared(run_folder, finished, before, now, kept):
    (run_folder / "stage_1").mkdir()
    (run_folder / "size").write_text(before)
    if finished:
        (run_folder / "summary.json").touch()
    demo.start_anew_if_finished(now)
    assert (run_folder / "stage_1").exists() is kept
    assert not (run_folder / "summary.json").exists()
    assert (run_folder / "size").read_text() == now


def test_a_job_is_stopped_gently_and_one_that_does_not_end_is_killed(tmp_path, monkeypatch):
    gentle = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: (open(sys.argv[1], 'w'), sys.exit(143)))"
    deaf = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"
    monkeypatch.setattr(demo, "_SAVE_S", 1.0)
    for name, code, ends in (("gentle", gentle, 143), ("deaf", deaf, -signal.SIGKILL)):
        call = [sys.executable, "-c", f"{code}; print('in', flush=True); import time; time.sleep(60)", tmp_path / name]
        process = subprocess.Popen(call, start_new_session=True, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        buried = threading.Thread(target=process.wait)  # its group is there until somebody has taken its exit code
        buried.start()
        demo._end_group(process.pid)
        buried.join(10)
        assert process.returncode == ends
        process.stdout.close()
    assert (tmp_path / "gentle").exists()


def test_nothing_is_cleared_under_a_job_that_trains(run_folder):
    lock = RunLock(run_folder / "stage_1")
    (run_folder / "size").write_text("quick")
    with pytest.raises(SystemExit, match="a job is training there"):
        demo.start_anew_if_finished("full")
    lock.release()
    assert (run_folder / "stage_1" / "logs" / "lock").is_file()
    demo.start_anew_if_finished("full")
    assert not (run_folder / "stage_1").exists()
