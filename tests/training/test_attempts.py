"""The log of attempts: what is recorded, who may end what, and when a job is not started again."""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_elva.training import attempts
from megatron_elva.training.attempts import DONE, LEAVE, REQUEUE, begin, close, end, read, verdict


@pytest.fixture(autouse=True)
def in_a_job(monkeypatch):
    """The environment of Slurm job 7, started for the first time."""
    monkeypatch.delenv("SUBMITIT_LOCAL_JOB_ID", raising=False)
    job(monkeypatch, "7", 0)


def job(monkeypatch, number: str, restart: int) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", number)
    monkeypatch.setenv("SLURM_RESTART_COUNT", str(restart))


def steps(run: Path, last: int) -> None:
    run.mkdir(exist_ok=True)
    (run / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(1, last + 1)))


def history(run: Path, monkeypatch, *ends: tuple[str, int], number: str = "7") -> None:
    """One attempt for each outcome and last step, each begun where the one before ended."""
    step = 0
    for restart, (outcome, last) in enumerate(ends):
        job(monkeypatch, number, restart)
        begin(run, step)
        end(run, outcome, "because", last)
        step = last


def test_begin_and_end(tmp_path):
    begin(tmp_path, 10)
    begin(tmp_path, 10)  # the same process again
    (attempt,) = read(tmp_path)
    assert (attempt.number, attempt.job, attempt.restart, attempt.first_step) == (1, "7", 0, 10)
    assert (attempt.pid, attempt.ended, attempt.outcome, attempt.last_step) == (os.getpid(), None, None, None)
    end(tmp_path, "failed", "rank 3: ValueError:\n a banana", 12)
    end(tmp_path, "hang", "too late", 13)
    (attempt,) = read(tmp_path)
    assert (attempt.outcome, attempt.reason, attempt.last_step) == ("failed", "rank 3: ValueError: a banana", 12)
    assert attempt.ended is not None and attempt.ended >= attempt.started
    with pytest.raises(ValueError, match="outcome=dead: allowed: done, requeue"):
        end(tmp_path, "dead", "", 1)


def test_an_attempt_that_nobody_ended_is_lost_at_the_last_step_that_was_written(tmp_path, monkeypatch):
    begin(tmp_path, 0)
    steps(tmp_path, 17)
    job(monkeypatch, "7", 1)
    begin(tmp_path, 10)
    first, second = read(tmp_path)
    assert (first.outcome, first.last_step) == ("lost", 17)
    assert (second.number, second.restart, second.outcome) == (2, 1, None)


def test_a_process_left_over_from_an_earlier_start_ends_nothing(tmp_path, monkeypatch):
    begin(tmp_path, 0)
    job(monkeypatch, "7", 1)
    begin(tmp_path, 0)
    job(monkeypatch, "7", 0)
    end(tmp_path, "hang", "an old rank on a node that came back", 3)
    assert [attempt.outcome for attempt in read(tmp_path)] == ["lost", None]
    job(monkeypatch, "8", 0)
    end(tmp_path, "failed", "another job", 3)
    assert read(tmp_path)[1].outcome is None


def test_torn_and_foreign_lines_are_passed_over(tmp_path):
    begin(tmp_path, 0)
    log = tmp_path / "logs" / "attempts.jsonl"
    with log.open("ab") as file:
        file.write(b'[]\n{"event": "end"}\n\xff\xfe\n{"event": "end", "number": 1, "outc')
    assert read(tmp_path)[0].outcome is None
    end(tmp_path, "done", "", 5)  # begins a line of its own
    assert read(tmp_path)[0].outcome == "done"
    assert read(tmp_path / "nothing") == []


def test_times_of_several_clocks(tmp_path, monkeypatch):
    begin(tmp_path, 0)
    started = read(tmp_path)[0].started
    monkeypatch.setattr(attempts.time, "time", lambda: started - 100)
    end(tmp_path, "failed", "on a host whose clock is late", 1)
    job(monkeypatch, "7", 1)
    begin(tmp_path, 1)
    first, second = read(tmp_path)
    assert first.ended == started
    assert (second.number, second.started) == (2, started - 100)


def _writer(run: Path, rank: int) -> None:
    for _ in range(50):
        end(run, "failed", f"rank {rank}", rank)
        read(run)


def test_many_processes_at_once(tmp_path):
    begin(tmp_path, 0)
    context = multiprocessing.get_context("fork")
    processes = [context.Process(target=_writer, args=(tmp_path, rank)) for rank in range(4)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(30)
    (attempt,) = read(tmp_path)
    lines = (tmp_path / "logs" / "attempts.jsonl").read_text().splitlines()
    assert attempt.reason == json.loads(lines[1])["reason"]  # the first one counts
    assert len(lines) <= 5  # and who finds an end writes none


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_a_full_disk_is_a_warning(tmp_path, capsys, monkeypatch):
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "attempts.jsonl").symlink_to("/dev/full")
    monkeypatch.setattr(attempts, "read", lambda run: [])  # /dev/full reads as zeros without end
    begin(tmp_path, 0)
    assert "cannot record the begin of an attempt" in capsys.readouterr().err
    # what cannot be counted in the log is counted by Slurm
    assert close(tmp_path, 1, limit=3) == REQUEUE
    job(monkeypatch, "7", 3)
    assert close(tmp_path, 1, limit=3) == LEAVE
    assert close(tmp_path, 0, limit=3) == DONE


@pytest.mark.parametrize(
    ("ends", "text"),
    [
        ([], None),
        ([("failed", 5), ("failed", 5)], None),
        ([("failed", 5), ("hang", 5), ("lost", 5)], "3 attempts in a row ended at step 5"),
        ([("failed", 5), ("failed", 6), ("failed", 5)], None),
        ([("failed", 5), ("stopped", 5), ("failed", 5), ("failed", 5)], None),
        ([("requeue", 5), ("failed", 5), ("failed", 5)], None),  # the first one made its five steps
        ([("failed", 5), ("requeue", 5), ("requeue", 5)], "3 attempts in a row"),  # these made none
        ([("requeue", 5), ("requeue", 10), ("requeue", 15)], None),
        ([("done", 5)], "all steps are done"),
        ([("refused", 0)], "what was refused will be refused again"),
        ([("stopped", 5)], "somebody stopped it"),
    ],
)
def test_verdict(tmp_path, monkeypatch, ends, text):
    history(tmp_path, monkeypatch, *ends)
    said = verdict(tmp_path, 3)
    assert said is None if text is None else said is not None and text in said


def test_a_job_that_never_comes_to_a_checkpoint_is_left_alone_in_the_end(tmp_path, monkeypatch):
    for restart in range(attempts.FRUITLESS):
        assert verdict(tmp_path, 3) is None
        job(monkeypatch, "7", restart)
        begin(tmp_path, 4)
        end(tmp_path, "failed", "bad luck", 5 + restart % 3)
    assert "10 attempts in a row came to no checkpoint behind step 4; last: failed: bad luck" in verdict(tmp_path, 3)
    job(monkeypatch, "7", 10)
    begin(tmp_path, 8)
    end(tmp_path, "failed", "bad luck", 9)
    assert verdict(tmp_path, 3) is None


def test_who_starts_a_job_again_may(tmp_path, monkeypatch):
    for outcome in ("stopped", "refused", "done"):
        history(tmp_path / outcome, monkeypatch, (outcome, 5))
        assert verdict(tmp_path / outcome, 3, starting=True) is None
    history(tmp_path, monkeypatch, ("lost", 5), ("lost", 5), ("refused", 5))
    assert "3 attempts in a row" in (verdict(tmp_path, 3, starting=True) or "")


def test_a_new_submission_counts_anew(tmp_path, monkeypatch):
    history(tmp_path, monkeypatch, ("failed", 5), ("failed", 5), ("failed", 5))
    assert verdict(tmp_path, 3) is not None
    job(monkeypatch, "8", 0)
    assert verdict(tmp_path, 3) is None
    monkeypatch.delenv("SLURM_JOB_ID")  # a look from outside: the last job's
    assert verdict(tmp_path, 3) is not None


@pytest.mark.parametrize(
    ("code", "outcome", "reason", "status"),
    [
        (0, "done", "", DONE),
        (75, "requeue", "asked to make room", REQUEUE),
        (140, "requeue", "asked to make room", REQUEUE),  # USR2 before anybody listened
        (2, "refused", "cannot be used", LEAVE),
        (1, "failed", "ended with code 1", REQUEUE),
        (137, "lost", "a rank ended by SIGKILL", REQUEUE),
        (255, "lost", "a rank ended by code 255", REQUEUE),
    ],
)
def test_the_batch_script_closes_what_nobody_ended(tmp_path, capsys, code, outcome, reason, status):
    begin(tmp_path, 0)
    steps(tmp_path, 4)
    assert close(tmp_path, code, limit=3) == status
    (attempt,) = read(tmp_path)
    assert (attempt.outcome, attempt.last_step) == (outcome, 4)
    assert reason in attempt.reason
    assert capsys.readouterr().out.count("\n") == 1


def test_what_ranks_said_outweighs_the_code(tmp_path, monkeypatch):
    """Srun gives the highest code, which is that of ranks it has killed."""
    for outcome, code, status in (("requeue", 137, REQUEUE), ("done", 1, DONE), ("refused", 143, LEAVE)):
        run = tmp_path / outcome
        begin(run, 0)
        end(run, outcome, "", 4)
        assert close(run, code, limit=3) == status
        assert read(run)[0].outcome == outcome


def test_starts_that_never_reach_training_are_counted(tmp_path, monkeypatch, capsys):
    for restart, status in enumerate((REQUEUE, REQUEUE, LEAVE)):
        job(monkeypatch, "7", restart)
        assert close(tmp_path, 1, limit=3) == status
    assert [attempt.outcome for attempt in read(tmp_path)] == ["failed"] * 3
    assert "before training began" in read(tmp_path)[0].reason
    assert "3 attempts in a row ended at step 0 (fault.same_step=3)" in capsys.readouterr().out


def pythons() -> list[str]:
    """This Python, and an old one where there is one."""
    old = shutil.which("python3.8")
    works = old is not None and subprocess.run([old, "-c", ""], capture_output=True, check=False).returncode == 0
    return [sys.executable, *([old] if old and works else [])]


@pytest.mark.parametrize("python", pythons())
def test_it_runs_by_its_path_with_nothing_installed(tmp_path, python):
    command = [python, "-I", "-S", attempts.__file__, str(tmp_path), "--limit", "2", "--code", "1"]
    for restart, (status, text) in enumerate([(0, "starts again"), (1, "not started again: 2 attempts in a row")]):
        environment = {"SLURM_JOB_ID": "7", "SLURM_RESTART_COUNT": str(restart)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        assert (done.returncode, done.stderr) == (status, "")
        assert text in done.stdout


def test_what_slurm_ended_is_slurms_to_start_again(tmp_path, capsys):
    """A job that was cancelled must not come back; one that an operator requeues comes back by itself."""
    begin(tmp_path, 0)
    assert close(tmp_path, 143, limit=3, ended_by_slurm=True) == LEAVE
    assert read(tmp_path)[0].outcome == "stopped"
    assert "Slurm says what comes next" in capsys.readouterr().out
    end(tmp_path, "done", "", 4)
    done = tmp_path / "done"
    begin(done, 0)
    end(done, "done", "", 4)
    assert close(done, 143, limit=3, ended_by_slurm=True) == DONE


def test_a_preempted_job_that_left_in_its_grace_starts_again(tmp_path, monkeypatch):
    """To Slurm it has ended by itself: with an exit code, while it was running."""
    for restart in range(4):  # the fault is not the job's, so nothing is counted
        job(monkeypatch, "7", restart)
        begin(tmp_path, 0)
        if restart % 2:
            end(tmp_path, "stopped", "told to end (TERM)", 0)
        assert close(tmp_path, 143, limit=3, preempted=True) == REQUEUE
    assert [attempt.outcome for attempt in read(tmp_path)] == ["stopped"] * 4
    job(monkeypatch, "7", 4)
    for outcome, status in (("done", DONE), ("refused", LEAVE)):
        run = tmp_path / outcome
        begin(run, 0)
        end(run, outcome, "", 4)
        assert close(run, 143, limit=3, preempted=True) == status


def test_a_job_that_was_kept_out_leaves_the_record_of_the_one_at_work_alone(tmp_path, monkeypatch):
    begin(tmp_path, 0)
    job(monkeypatch, "8", 0)
    close(tmp_path, 2, limit=3)
    job(monkeypatch, "7", 0)
    end(tmp_path, "done", "", 4)
    assert [(attempt.job, attempt.outcome) for attempt in read(tmp_path)] == [("7", "done"), ("8", "failed")]
    assert close(tmp_path, 0, limit=3) == DONE
    # one that is really lost is closed when the next one gets in, whatever came between
    job(monkeypatch, "9", 0)
    begin(tmp_path, 4)
    job(monkeypatch, "8", 1)
    close(tmp_path, 2, limit=3)
    job(monkeypatch, "9", 1)
    begin(tmp_path, 4)
    assert [attempt.outcome for attempt in read(tmp_path)] == ["done", "failed", "lost", "failed", None]


def test_a_log_that_cannot_be_read_keeps_no_job_from_starting_again(tmp_path, monkeypatch, capsys):
    def broken(run):
        raise RuntimeError("a fault of its own")

    monkeypatch.setattr(attempts, "read", broken)
    assert attempts.main([str(tmp_path), "--code", "1", "--limit", "3"]) == REQUEUE
    job(monkeypatch, "7", 3)
    assert attempts.main([str(tmp_path), "--code", "1", "--limit", "3"]) == LEAVE
    assert "a fault of its own" in capsys.readouterr().out


def test_the_tail_of_a_file_passes_over_what_is_torn(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a": 2}\nnot json\n[3]\n{"step": "4"}\n{"a": 5')
    assert attempts.tail(path) == [{"a": 1}, {"a": 2}]
    path.write_text('{"a": 1')
    assert attempts.tail(path) == attempts.tail(tmp_path / "missing") == []


def test_of_a_long_file_only_the_end_is_read(tmp_path):
    path = tmp_path / "lines"
    path.write_text("".join(json.dumps({"step": i, "text": "x" * 100}) + "\n" for i in range(2000)))
    steps = [line["step"] for line in attempts.tail(path)]
    assert steps == list(range(2000 - len(steps), 2000)) and 100 < len(steps) < 1000
