"""The same preparation as a job of several tasks."""

import json
import os
import stat
import time

from dali_pipelines.prepare.cluster import PrepareJob
from dali_pipelines.prepare.stats import View
from tests.dali_pipelines.prepare.conftest import shard_bytes

MORE = ["--shard-samples=4", "--split=val=0.2"]


def test_the_batch_script(prepare, capsys):
    words = ["nodes=3", "partition=cpu", "cpus_per_task=16", "account=video", "cluster.sbatch_args.constraint=big"]
    prepare("--slurm", *words, "dry_run=true")
    script = capsys.readouterr().out
    for line in (
        "nodes=3",
        "ntasks-per-node=1",
        "partition=cpu",
        "account=video",
        "constraint=big",
        "job-name=prepare",
    ):
        assert f"#SBATCH --{line}" in script
    assert "--cpus-per-task=16" in script and "gpus" not in script and "nothing was submitted" in script


def test_tasks_of_a_local_job_give_the_shards_of_one_process(prepare, tmp_path, capsys):
    alone = prepare(*MORE, out="alone")
    run = prepare(*MORE, "--workers=1", "--slurm", "kind=local", "tasks_per_node=3", out="job")
    assert "3 tasks" in capsys.readouterr().out
    end = time.monotonic() + 120
    while not (run.out / "manifest.json").exists():
        logs = "".join(path.read_text() for path in (run.out / ".prepare/job/logs").glob("*_log.err"))
        assert time.monotonic() < end and "Traceback" not in logs, logs
        time.sleep(0.2)
    assert shard_bytes(run.out) == alone.shards
    journals = sorted((run.out / ".prepare/journal").glob("*.jsonl"))
    assert [path.name for path in journals] == ["00000.jsonl", "00001.jsonl", "00002.jsonl"]
    assert all(path.stat().st_size for path in journals)
    made = [json.loads((folder / "manifest.json").read_text()) for folder in (alone.out, run.out)]
    assert made[0]["statistics"] == made[1]["statistics"]


def test_a_job_in_this_process(prepare):
    alone = prepare(*MORE, out="alone")
    run = prepare(*MORE, "--workers=1", "--slurm", "kind=debug", out="debug")
    assert run.shards == alone.shards


def test_a_slurm_job_is_submitted_with_a_job_that_can_start_again(prepare, tmp_path, monkeypatch, capsys):
    tools = tmp_path / "bin"
    tools.mkdir()
    sbatch = tools / "sbatch"
    sbatch.write_text(f'#!/bin/bash\ncp "$1" {tmp_path}/kept\necho Submitted batch job 100\n')
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    run = prepare("--slurm", "nodes=2", "partition=cpu")
    assert "#SBATCH --nodes=2" in (tmp_path / "kept").read_text()
    out = capsys.readouterr().out
    assert "100 (slurm, 2 tasks)" in out and "scancel 100" in out
    assert (run.out / ".prepare/job/logs/100_submitted.pkl").is_file()
    job = PrepareJob(str(run.out), View(), 1)
    assert job.checkpoint().function is job


def test_without_slurm_it_is_one_line(prepare, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    prepare("--slurm", "nodes=2", expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert "no sbatch" in line
