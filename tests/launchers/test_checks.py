"""Refusals before a submission."""

from __future__ import annotations

import os
import re
import subprocess
import sys

import pytest

from launchers import checks, executors, record, slurm_queue
from launchers.record import Record
from launchers.slurm_queue import Partition, Queued
from launchers.submit import main
from megatron_elva.config.compose import compose
from megatron_elva.config.errors import InputError


@pytest.fixture(autouse=True)
def no_slurm(monkeypatch):
    """Nobody answers, whatever this machine has."""
    monkeypatch.setattr(slurm_queue, "_ask", lambda command, fine="": None)


def lines(*overrides: str) -> list[str]:
    return checks.problems([compose(list(overrides))])[0]


def test_memory(tmp_path, capsys):
    (text,) = lines("stage=3", f"run_dir={tmp_path}")
    assert text.startswith("cluster.gpu_memory_gb=80: a GPU would need about 147 GB (1e9 bytes; a rough estimate); set")
    assert "train.recompute=true" in text
    assert text.endswith("or overrule this with cluster.gpu_memory_gb=148")
    assert lines("stage=3", f"run_dir={tmp_path}", "cluster.gpu_memory_gb=148") == []
    assert lines("stage=3", f"run_dir={tmp_path}", "nodes=16") == []
    assert lines("cluster=local", f"run_dir={tmp_path}", "model=elva_7b", "cluster.gpu_memory_gb=1") == []  # no GPU
    with pytest.raises(InputError, match="a rough estimate"):
        checks.refuse([compose(["stage=3", f"run_dir={tmp_path}"])])
    assert main(["stage=3", "dry_run=true"]) == 0
    assert "note       cluster.gpu_memory_gb=80: a GPU would need" in capsys.readouterr().out


def test_run_dir(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    (text,) = lines("cluster=local", f"run_dir={tmp_path}/file/run")
    assert f"run_dir={tmp_path}/file/run: {tmp_path}/file is a file" in text
    assert lines("cluster=local", f"run_dir={tmp_path}/a/b/c") == []
    assert "Slurm reads % as the beginning" in lines("nodes=16", f"run_dir={tmp_path}/top_5%")[0]
    assert lines("cluster=local", f"run_dir={tmp_path}/top_5%") == []
    monkeypatch.setattr(checks.os, "access", lambda path, mode: False)  # root may write anywhere
    (text,) = lines("cluster=local", f"run_dir={tmp_path}/a/b/c")
    assert f"you may not write to {tmp_path}" in text


@pytest.mark.parametrize(
    ("image", "said"),
    [
        ("nvcr.io#nvidia/pytorch:25.09-py3", None),
        ("/images/elva.sqsh", None),
        ("./elva.sqsh", None),
        ("docker://nvcr.io#nvidia/pytorch", "without docker://"),
        ("elva.sqsh", "with / or ./ in front: ./elva.sqsh"),
    ],
)
def test_container_image(tmp_path, image, said):
    found = lines(f"run_dir={tmp_path}", "nodes=16", f"cluster.container_image='{image}'")
    assert found == [] if said is None else said in found[0]


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["nodes=16"], None),
        (["nodes=17"], "nodes=17: partition main has 16"),
        (["nodes=16", "cluster.partition=man"], "cluster.partition=man: no such partition (did you mean 'main'?)"),
        (["nodes=16", "cluster.partition=zzz"], "no such partition (there are main, low)"),
        (["nodes=20", "cluster.partition='main,low'"], None),
        (["nodes=2", "cluster.time_min=3000"], "cluster.time_min=3000: partition main allows 2880 minutes"),
        (["nodes=2", "cluster.time_min=3000", "cluster.partition=low"], None),
    ],
)
def test_partition(tmp_path, monkeypatch, overrides, said):
    known = [Partition("main", True, 16, 2880), Partition("low", False, 20, None)]
    monkeypatch.setattr(slurm_queue, "partitions", lambda: known)
    found = lines(f"run_dir={tmp_path}", "model=tiny", "precision=fp32", *overrides)
    assert found == [] if said is None else said in found[0]


def test_another_job_in_the_run_directory(tmp_path, monkeypatch):
    run = tmp_path / "run"
    Record("slurm", "12", ["12", "13"], [], {}).write(run)
    given = [f"run_dir={run}", "nodes=16"]
    assert lines(*given) == []  # nobody answers
    monkeypatch.setattr(slurm_queue, "queued", lambda jobs: {"12": Queued("PENDING", "Priority")})
    (text,) = lines(*given)
    assert re.search(r"job 12 of \d s ago is still there \(queued \(Priority\)\); end it with scancel 12 13", text)
    monkeypatch.setattr(slurm_queue, "queued", lambda jobs: {})
    assert lines(*given) == []


def test_two_submissions_at_once(tmp_path, monkeypatch):
    run = tmp_path / "run"
    config = compose(["cluster=local", f"run_dir={run}"])
    seen = []

    def second(path, copy):  # while the first one copies the code
        with pytest.raises(InputError, match="is being submitted by another process"):
            executors.submit([config])
        seen.append(path)
        raise InputError("far enough")

    monkeypatch.setattr(executors.snapshot, "take", second)
    for _ in range(2):  # the first one's end lets others in
        with pytest.raises(InputError, match="far enough"):
            executors.submit([config])
    assert seen == [run, run]
    # a job that came into the queue after the first look
    monkeypatch.setattr(checks, "refuse", lambda configs: None)
    Record("slurm", "12", ["12"], [], {}).write(run)
    monkeypatch.setattr(slurm_queue, "queued", lambda jobs: {"12": Queued("PENDING", "Priority")})
    with pytest.raises(InputError, match=r"job 12 of .* is still there"):
        executors.submit([config])


def test_a_local_job_that_has_no_lock_yet(tmp_path):
    run = tmp_path / "run"
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    try:
        started = record.process_started(process.pid)
        Record("local", str(process.pid), [str(process.pid)], [], {}, process_started=started).write(run)
        (text,) = lines("cluster=local", f"run_dir={run}")
        assert f"end it with kill -TERM -- -{process.pid}" in text
        # another process with the same number is not that job
        Record("local", str(process.pid), [str(process.pid)], [], {}, process_started=1.0).write(run)
        assert lines("cluster=local", f"run_dir={run}") == []
    finally:
        process.communicate(b"\n")
    Record("local", str(process.pid), [str(process.pid)], [], {}, process_started=started).write(run)
    assert lines("cluster=local", f"run_dir={run}") == []
    assert record.process_started(process.pid) is None


def test_several_problems_are_counted(tmp_path, capsys):
    image = "cluster.container_image=a.sqsh"
    with pytest.raises(InputError, match=r"and 1 more; dry_run=true lists them"):
        checks.refuse([compose(["stage=3", image, f"run_dir={tmp_path}"])])


def test_what_slurm_says_is_understood(monkeypatch):
    said = {
        "squeue": "PENDING|Dependency\n",
        "sinfo": "main*|16|2-00:00:00\nlow|4|infinite\nshort|2|30:00\nodd line\n",
        "sacct": "CANCELLED by 0|0:0\n",
    }
    monkeypatch.setattr(slurm_queue, "_ask", lambda command, fine="": said.get(command[0]))
    assert slurm_queue.queued(["3"]) == {"3": Queued("PENDING", "Dependency")}
    assert slurm_queue.queued(["3"])["3"].text == "queued (waits for the stage before)"
    assert slurm_queue.partitions() == [
        Partition("main", True, 16, 2880), Partition("low", False, 4, None), Partition("short", False, 2, 30)
    ]  # fmt: skip
    assert slurm_queue.final_state("3") == "CANCELLED by 0 0:0"
    said["sacct"], said["scontrol"] = None, "JobId=3 JobState=FAILED ExitCode=1:0 X=y"
    assert slurm_queue.final_state("3") == "FAILED 1:0"
    said["scontrol"] = None
    assert slurm_queue.final_state("3") is None


def test_commands_that_are_missing_or_fail_say_nothing(monkeypatch, tmp_path):
    monkeypatch.undo()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert slurm_queue.queued(["3"]) is None
    assert slurm_queue.partitions() is None
    tool = tmp_path / "squeue"
    tool.write_text("#!/bin/sh\necho 'slurm_load_jobs error: Invalid job id specified' >&2\nexit 1\n")
    tool.chmod(0o755)
    assert slurm_queue.queued(["3"]) == {}
    tool.write_text("#!/bin/sh\necho 'Unable to contact slurm controller' >&2\nexit 1\n")
    assert slurm_queue.queued(["3"]) is None
    assert os.environ["PATH"] == str(tmp_path)
