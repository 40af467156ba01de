"""What the ranks of a job on several real nodes find: each other, their GPUs, their code; and chains of jobs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests.slurm.cluster import can_build_pyxis
from tests.slurm.jobs import LookingJob
from tests.slurm.runs import Run, overrides, submit

pytestmark = pytest.mark.alone

ROOT = Path(__file__).resolve().parents[2]
LAUNCH = """\
import json, sys
from functools import partial
from launchers.submit import main
sys.path.append({tests!r})
from tests.slurm.jobs import LookingJob
sys.exit(main({command!r}, partial(LookingJob, stays={stays})))
"""
"""Submits from another tree, or from another process."""


def launcher(path: Path, command: list[str], stays: tuple[int, ...] = ()) -> list[str]:
    path.write_text(LAUNCH.format(tests=str(ROOT), command=command, stays=stays))
    return [sys.executable, str(path)]


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Files that are there, which is all that a submission looks at."""
    folder = tmp_path_factory.mktemp("corpus")
    for kind in ("images", "videos"):
        (folder / kind).mkdir()
        (folder / kind / "train-0.tar").touch()
    (folder / "tokenizer").mkdir()
    return folder


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A git checkout of this project of one commit, with an edit that is not committed."""
    folder = tmp_path_factory.mktemp("tree")
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for package in ("megatron_elva", "dali_pipelines", "launchers", "configs", "checkpoints_tools"):
        shutil.copytree(ROOT / package, folder / package, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", folder)
    git = ["git", "-c", "user.name=n", "-c", "user.email=e@e"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "first"]):
        subprocess.run([*git, *command], cwd=folder, check=True)
    say(folder, "edited")
    return folder


def say(tree: Path, word: str) -> None:
    """Put a word into the tree's code."""
    (tree / "megatron_elva" / "__init__.py").write_text(f'"""A tree."""\nWORD = "{word}"\n')


@pytest.fixture(scope="module")
def jobs(slurm, corpus, tree, tmp_path_factory):
    """Everything that the tests below look at, started at once."""
    folder = tmp_path_factory.mktemp("runs")

    def command(name: str, *more: str) -> list[str]:
        return overrides(corpus, folder / name, "data=demo", *more)

    def looking(name: str, *more: str, **named: float) -> Run:
        return Run(slurm, command(name, *more), partial(LookingJob, **named)).submit()

    found = SimpleNamespace()
    found.gpus = looking("gpus", "device=cuda", "precision=bf16", "cluster.cpus_per_task=3", "parallel.pipeline=1")

    image = folder / "image"  # the container's python3
    image.mkdir()
    (image / "python3").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    (image / "python3").chmod(0o755)
    environment = {**os.environ, **slurm.environment}
    if slurm.pyxis:
        found.container = looking(
            "container", "nodes=1", "parallel.pipeline=1", "cluster.container_image=/images/elva.sqsh",
            "cluster.container_mounts=/data:/data:ro", f"cluster.setup=['export PATH={image}:\\${{PATH}}']",
        )  # fmt: skip

    one = ["nodes=1", "tasks_per_node=1", "parallel.tensor=1", "parallel.pipeline=1"]
    found.snapshot = Run(slurm, command("snapshot", *one))
    done = subprocess.run(
        launcher(folder / "from_tree.py", list(found.snapshot.command), stays=(2,)), cwd=folder,
        env={**environment, "PYTHONPATH": str(tree)}, capture_output=True, text=True, check=False, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found.snapshot.job = done.stdout.split("job:")[1].split()[0].rstrip(",")
    say(tree, "edited again")

    nested = command("nested", "parallel.pipeline=1")
    inside = " ".join(launcher(folder / "nested.py", nested))
    wrap = f"export SLURM_CPU_BIND=quiet,mask_cpu:0x1 SLURM_GPUS_PER_NODE=7; cd {ROOT}; PYTHONPATH={ROOT} {inside}"
    options = ["-N1", "-n1", "--gpus-per-node=4", f"--output={folder}/nested.out", "--parsable"]
    found.outer = slurm.run("sbatch", *options, "--wrap", wrap).strip()
    found.nested = Run(slurm, nested)

    stages = ["stage=all", "nodes=2", "tasks_per_node=1", "parallel.pipeline=1", "parallel.tensor=1"]
    found.chain, _ = submit(slurm, command("chain", *stages), partial(LookingJob, stays=(1,)))
    found.broken, _ = submit(
        slurm, command("broken", *stages, "cluster.requeue=false"), partial(LookingJob, fails=(1,))
    )  # fmt: skip
    found.folder = folder
    first = Run(slurm, [f"run_dir={folder}/chain/stage_1"], job=found.chain[0])
    for run in (found.snapshot, first):
        run.until("the first look", lambda run=run: seen(run.folder))
        slurm.run("scontrol", "requeue", run.job)
    return found


def seen(run: Path, restart: int = 0) -> list[dict]:
    """What each rank saw, in order of ranks."""
    files = sorted((run / "seen").glob(f"*_{restart}.json"), key=lambda path: int(path.stem.split("_")[0]))
    return [json.loads(path.read_text()) for path in files]


def test_ranks_meet_over_the_network_and_keep_their_gpus(slurm, jobs):
    assert jobs.gpus.until_ended() == "COMPLETED", jobs.gpus.logs()
    ranks = seen(jobs.gpus.folder)
    assert [rank["sum"] for rank in ranks] == [6.0] * 4
    env = [rank["env"] for rank in ranks]
    nodes = slurm.nodes_of(jobs.gpus.job)
    assert {e["MASTER_ADDR"] for e in env} == {nodes[0]} and len({e["MASTER_PORT"] for e in env}) == 1
    assert [(e["RANK"], e["WORLD_SIZE"], e["LOCAL_RANK"], e["LOCAL_WORLD_SIZE"]) for e in env] == [
        ("0", "4", "0", "2"), ("1", "4", "1", "2"), ("2", "4", "0", "2"), ("3", "4", "1", "2")
    ]  # fmt: skip
    assert [e["SLURMD_NODENAME"] for e in env] == [nodes[0], nodes[0], nodes[1], nodes[1]]
    assert {e["GLOO_SOCKET_IFNAME"] for e in env} == {"eth0" if slurm.mode == "netns" else "lo"}
    assert {e["CUDA_VISIBLE_DEVICES"] for e in env} == {"0,1"}
    assert {e["SLURM_CPUS_PER_TASK"] for e in env} == {"3"}
    if slurm.mode == "netns":
        assert [rank["host"] for rank in ranks] == [e["SLURMD_NODENAME"] for e in env]


@pytest.mark.skipif(not can_build_pyxis(), reason="needs gcc and libslurm-dev")
def test_srun_gets_the_container(slurm, jobs):
    assert jobs.container.until_ended() == "COMPLETED", jobs.container.logs()
    for rank in seen(jobs.container.folder):
        env, run = rank["env"], str(jobs.container.folder)
        assert env["PYXIS_STAND_IN_CONTAINER_IMAGE"] == "/images/elva.sqsh"
        mounts = env["PYXIS_STAND_IN_CONTAINER_MOUNTS"].split(",")
        assert "/data:/data:ro" in mounts
        assert any(run.startswith(mount.split(":")[0]) for mount in mounts if mount != "/data:/data:ro")
        assert "PYXIS_STAND_IN_CONTAINER_WORKDIR" in env


def test_a_requeued_job_runs_the_code_that_was_submitted(slurm, jobs, tree):
    run = jobs.snapshot
    assert run.until_ended() == "COMPLETED", run.logs()
    first, second = seen(run.folder, 0), seen(run.folder, 1)
    assert {rank["word"] for rank in (*first, *second)} == {"edited"}  # neither the commit nor the tree of now
    code = run.folder / "code"
    assert all(rank["package"].startswith(str(code)) for rank in (*first, *second))
    text = "\n".join(path.read_text() for path in code.glob("*") if path.is_file())
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tree, capture_output=True, text=True, check=True).stdout
    assert commit.strip() in text and '+WORD = "edited"' in text


def test_a_job_may_submit_another(slurm, jobs):
    outer = Run(slurm, [f"run_dir={jobs.folder}/none"], job=jobs.outer)
    output = jobs.folder / "nested.out"
    assert outer.until_ended() == "COMPLETED", output.read_text()
    jobs.nested.job = output.read_text().split("job:")[1].split()[0].rstrip(",")
    assert jobs.nested.until_ended() == "COMPLETED", jobs.nested.logs()
    ranks = seen(jobs.nested.folder)
    assert [rank["sum"] for rank in ranks] == [6.0] * 4
    assert {rank["env"]["SLURM_JOB_ID"] for rank in ranks} == {jobs.nested.job} != {jobs.outer}
    assert not any("SLURM_CPU_BIND" in rank["env"] and "0x1" in rank["env"]["SLURM_CPU_BIND"] for rank in ranks)
    assert not any("SLURM_GPUS_PER_NODE" in rank["env"] for rank in ranks)


def test_stages_follow_each_other_even_when_one_is_requeued(slurm, jobs):
    first, *rest = (
        Run(slurm, [f"run_dir={jobs.folder}/chain/stage_{i}"], job=job) for i, job in enumerate(jobs.chain, 1)
    )
    assert first.until_ended() == "COMPLETED", first.logs()
    assert len(seen(first.folder, 0)) == len(seen(first.folder, 1)) == 2
    before = first
    for run in rest:
        assert run.until_ended() == "COMPLETED", run.logs()
        assert len(seen(run.folder)) == 2
        assert slurm.job(run.job)["StartTime"] >= slurm.job(before.job)["EndTime"]
        before = run


def test_stages_behind_one_that_failed_are_cancelled(slurm, jobs):
    runs = [Run(slurm, [f"run_dir={jobs.folder}/broken/stage_{i}"], job=job) for i, job in enumerate(jobs.broken, 1)]
    assert [run.until_ended() for run in runs] == ["FAILED", "CANCELLED", "CANCELLED"]
    assert "this stage fails" in runs[0].logs()
    assert not (runs[1].folder / "seen").exists()
