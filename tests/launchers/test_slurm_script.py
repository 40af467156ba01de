"""The batch script: what it asks Slurm for, and what its lines do when bash runs them."""

from __future__ import annotations

import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from launchers import network, slurm_script
from megatron_elva.config.compose import compose
from megatron_elva.training import attempts

ROOT = Path(__file__).resolve().parents[2]
CODE = Path("/code")


def script(*overrides: str, code: Path = CODE) -> str:
    return slurm_script.text(compose(["nodes=2", "run_dir=/runs/r", *overrides]), code)


def srun(text: str) -> str:
    return next(line for line in text.splitlines() if line.startswith("srun"))


def test_parameters():
    text = script(
        "cluster.partition=big", "cluster.account=me", "cluster.qos=high", "cluster.cpus_per_task=12",
        "cluster.signal_s=240", "cluster.sbatch_args.constraint=h100",
    )  # fmt: skip
    for key in (
        "nodes=2", "ntasks-per-node=8", "gpus-per-node=8", "cpus-per-task=12", "time=1440", "partition=big",
        "account=me", "qos=high", "exclusive", "constraint=h100", "mem=0", "requeue", "signal=USR2@240",
        "open-mode=append",
    ):  # fmt: skip
        assert f"#SBATCH --{key}\n" in text
    assert "kill-on-invalid-dep" not in text
    assert "#SBATCH --kill-on-invalid-dep=yes\n" in slurm_script.text(compose(["run_dir=r"]), CODE, "afterok:3")


def test_srun_arguments():
    line = srun(script("cluster.cpus_per_task=12", "cluster.srun_args=['--cpu-bind=cores']", "tracking.flush_s=30.5"))
    # without --cpus-per-task a rank and its data workers get one core from Slurm 22.05 on
    for argument in ("--kill-on-bad-exit=1", "--wait=151", "--cpus-per-task=12", "--cpu-bind=cores"):
        assert argument in line
    assert f" {shlex.quote(sys.executable)} -u -m submitit.core._submit" in line
    assert "container" not in line


def test_a_container_is_for_srun_alone_and_sees_runs_and_code(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = ["cluster.container_image=/i.sqsh", "cluster.container_mounts='/data,/scratch:/s:ro'"]
    text = script(*given, code=Path("/elsewhere"))
    line = srun(text)
    mounts = f"/data,/scratch:/s:ro,/runs:/runs,/elsewhere:/elsewhere,{tmp_path}:{tmp_path}"
    assert f"--container-image=/i.sqsh --container-mounts={mounts} --container-workdir={tmp_path}" in line
    assert "#SBATCH --container" not in text
    assert " python3 -u -m submitit.core._submit" in line
    # a folder that is mounted already is not mounted again
    inside = ["cluster.container_image=i", f"cluster.container_mounts='/runs,{tmp_path}'"]
    assert f"--container-mounts=/runs,{tmp_path} " in srun(script(*inside, code=Path("/runs/r/code/x")))
    # what follows srun runs on the host, which may have a plain python3 only
    assert "\nif python3 -I -c " in text
    assert "  python3 -I /elsewhere/megatron_elva/training/attempts.py /runs/r --code $rc --limit 3" in text


def test_order_of_the_lines():
    text = script("cluster.modules=[cuda/13.0,nccl]", "cluster.setup=['echo mine']")
    places = [text.index(part) for part in ("trap : TERM", "module load cuda/13.0 nccl ||", "echo mine", "\nsrun ")]
    assert places == sorted(places)
    assert "module purge" not in text
    assert text.index("\nsrun ") < text.index("rc=$?") < text.rindex("if start_again; then")


def test_without_requeue():
    text = script("cluster.requeue=false")
    assert "#SBATCH --no-requeue\n" in text
    assert "scontrol requeue" not in text
    assert "attempts.py /runs/r --code" in text  # how it ended is recorded all the same


def test_cpu_ranks_get_no_gpus_and_one_thread():
    text = script("model=tiny", "device=cpu", "precision=fp32", "data=demo")
    assert "gpus" not in text
    assert "OMP_NUM_THREADS" in text


SHORT_SLEEP = 'case $1 in 120) exit ;; 60|*.*) exec /bin/sleep "$1" ;; *) exec /bin/sleep 0.01 ;; esac'
"""The script waits in whole seconds; its guard sleeps for 60 at a time."""


def bash(lines: list[str], tmp_path: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run lines of the script with tools of ``tmp_path/bin`` first."""
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    given = {"PATH": path, "SLURM_JOB_ID": "7", **environment}
    return subprocess.run(
        ["bash"], input="\n".join(lines), env=given, capture_output=True, text=True, timeout=60, check=False
    )


def tool(folder: Path, name: str, text: str) -> None:
    (folder / "bin").mkdir(exist_ok=True)
    path = folder / "bin" / name
    path.write_text(f"#!/bin/bash\n{text}\n")
    path.chmod(0o755)


@pytest.mark.parametrize(("job", "restart"), [(7, 0), (8, 0), (7, 1), (1_234_567, 3)])
def test_bash_and_python_choose_the_same_port(tmp_path, job, restart):
    lines = [*slurm_script._port_lines(), f"echo ${network.PORT_VARIABLE}"]
    variables = {"SLURM_JOB_ID": str(job), "SLURM_RESTART_COUNT": str(restart)}
    first, second = network.port_candidates(job, restart)[:2]
    with socket.socket() as taken:
        try:
            taken.bind(("127.0.0.1", first))
        except OSError:
            pytest.skip(f"port {first} is in use")
        assert bash(lines, tmp_path, **variables).stdout.strip() == str(first)  # nobody listens yet
        taken.listen()
        assert bash(lines, tmp_path, **variables).stdout.strip() == str(second)
    assert network.master_port(variables) == first
    assert network.master_port({**variables, network.PORT_VARIABLE: "12345"}) == 12345


def test_the_ranks_of_each_start_are_another_step(tmp_path):
    """Empty steps come first, at most three of them; where Slurm has no room for one, the ranks start all the same."""
    tool(tmp_path, "srun", f'echo "$@" >> {tmp_path}/steps; exit 1')
    steps = []
    for restart in range(6):
        (tmp_path / "steps").write_text("")
        lines = [f". {ROOT}/launchers/slurm_functions.sh", "take_another_step_number"]
        done = bash(lines, tmp_path, SLURM_RESTART_COUNT=str(restart))
        assert done.stderr == ""
        steps.append(len((tmp_path / "steps").read_text().splitlines()))
    assert steps == [0, 1, 2, 3, 0, 1]
    text = script("cluster.setup=['echo mine']")
    assert text.index("echo mine") < text.index("take_another_step_number") < text.index("\nsrun ")


def end_of_job(tmp_path: Path, code: int, *overrides: str, job: str = "JobState=RUNNING Reason=None", **more: str):
    """Run the teardown after an srun that ended with ``code``. Returns bash's result and whether it was requeued."""
    asked = tmp_path / "requeued"
    asked.unlink(missing_ok=True)
    tool(
        tmp_path, "scontrol", f'[ "$1" = requeue ] && touch {asked} && exit 0\n[ -n "{job}" ] && echo "JobId=7 {job} "'
    )
    tool(tmp_path, "sleep", SHORT_SLEEP)
    config = compose([f"run_dir={tmp_path}/run", *overrides])
    ranks = [*(["sleep 0.3"] if "TimeLimit" in job else []), f"(exit {code})"]  # as long as the guard needs to listen
    done = bash([*slurm_script.functions(config, ROOT), *ranks, *slurm_script.teardown(config, ROOT)], tmp_path, **more)
    return done, asked.exists()


@pytest.mark.parametrize(
    ("code", "job", "leaves", "again"),
    [
        (0, "JobState=RUNNING Reason=None", 0, False),
        (75, "JobState=RUNNING Reason=None", 75, True),
        (1, "JobState=RUNNING Reason=None", 1, True),
        (137, "JobState=RUNNING Reason=None", 137, True),
        (143, "JobState=COMPLETING Reason=TimeLimit", 143, True),  # saving took longer than signal_s
        (143, "JobState=COMPLETING Reason=None", 143, False),  # scancel: the job must not come back
        (143, "JobState=PREEMPTED Reason=None", 143, False),  # Slurm requeues it itself
        (1, "", 1, True),  # nobody answers
    ],
)
def test_teardown(tmp_path, code, job, leaves, again):
    done, requeued = end_of_job(tmp_path, code, job=job)
    assert (done.returncode, requeued) == (leaves, again), done.stdout + done.stderr
    assert len(attempts.read(tmp_path / "run")) == 1
    assert done.stdout.startswith("attempt 1 at step 0: ")


def test_teardown_believes_the_ranks_more_than_srun(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = tmp_path / "run"
    attempts.begin(run, 0)
    attempts.end(run, "done", "", 8)
    done, requeued = end_of_job(tmp_path, 143)
    assert (done.returncode, requeued) == (0, False)  # the next stage starts


@pytest.mark.parametrize(("told", "again"), [("None", False), ("2026-01-02T03:04:05", True)])
def test_teardown_of_ranks_that_saved_because_of_term(tmp_path, monkeypatch, told, again):
    """Somebody's, or that of a preemption with a grace, in which Slurm still calls the job running."""
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    run = tmp_path / "run"
    attempts.begin(run, 0)
    attempts.end(run, "stopped", "told to end (TERM)", 8)
    state = f"JobState=RUNNING Reason=None PreemptEligibleTime=2026-01-02T03:00:00 PreemptTime={told}"
    done, requeued = end_of_job(tmp_path, 143, job=state)
    assert (done.returncode, requeued) == (143, again), done.stdout


def test_teardown_gives_up_at_the_same_step(tmp_path):
    for restart, again in enumerate((True, True, False)):
        done, requeued = end_of_job(tmp_path, 1, SLURM_RESTART_COUNT=str(restart))
        assert (done.returncode, requeued) == (1, again)
    assert "not started again: 3 attempts in a row ended at step 0" in done.stdout


@pytest.mark.parametrize(("reason", "again"), [("TimeLimit", True), ("None", False)])
def test_ranks_that_save_longer_than_the_time_limit_lets_them(tmp_path, reason, again):
    """Slurm sends TERM to all, then kills all: what stands behind srun is not reached."""
    asked = tmp_path / "requeued"
    tool(tmp_path, "scontrol", f'[ "$1" = requeue ] && touch {asked} || echo "JobState=COMPLETING Reason={reason} "')
    lines = [
        "trap : TERM",
        *slurm_script.functions(compose([f"run_dir={tmp_path}"]), ROOT),
        "echo in",
        "(trap '' TERM; exec sleep 60)",
        "echo reached",
    ]
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    script = tmp_path / "script"
    script.write_text("\n".join(lines))
    job = subprocess.Popen(
        ["bash", script], env={"PATH": path, "SLURM_JOB_ID": "7"}, stdout=subprocess.PIPE, start_new_session=True
    )
    assert job.stdout is not None
    try:
        assert job.stdout.readline() == b"in\n"
        time.sleep(0.3)  # the guard has set its trap
        os.killpg(job.pid, signal.SIGTERM)
        until = time.monotonic() + (10 if again else 1)
        while not asked.exists() and time.monotonic() < until:
            time.sleep(0.05)
        assert asked.exists() is again
    finally:
        os.killpg(job.pid, signal.SIGKILL)
        assert b"reached" not in job.communicate()[0]


@pytest.mark.parametrize(("code", "leaves"), [(75, 75), (1, 1), (0, 0)])
def test_teardown_without_a_requeue(tmp_path, code, leaves):
    done, requeued = end_of_job(tmp_path, code, "cluster.requeue=false")
    assert (done.returncode, requeued) == (leaves, False)


@pytest.mark.parametrize(
    ("code", "restart", "leaves", "again"),
    [(75, 40, 75, True), (1, 2, 1, True), (1, 3, 1, False), (0, 0, 0, False)],
)
def test_teardown_on_a_host_without_python(tmp_path, code, restart, leaves, again):
    tool(tmp_path, "python3", "exit 127")
    image = "cluster.container_image=i"
    done, requeued = end_of_job(tmp_path, code, image, SLURM_RESTART_COUNT=str(restart))
    assert (done.returncode, requeued) == (leaves, again)
    assert attempts.read(tmp_path / "run") == []


def asked_again(tmp_path: Path, requeue: str, state: str) -> tuple[subprocess.CompletedProcess[str], int]:
    """The end of ranks that have saved, with a controller that answers as told. Returns how often it was asked."""
    asked = tmp_path / "asked"
    count = f'[ "$1" = requeue ] && echo x >> {asked}; n=$(wc -l < {asked} 2>/dev/null || echo 0)'
    tool(tmp_path, "scontrol", f'{count}\n[ "$1" = requeue ] && {{ {requeue}; }}\n{state}')
    tool(tmp_path, "sleep", SHORT_SLEEP)
    config = compose([f"run_dir={tmp_path}/run"])
    done = bash([*slurm_script.functions(config, ROOT), "(exit 75)", *slurm_script.teardown(config, ROOT)], tmp_path)
    assert done.returncode == 75
    return done, len(asked.read_text().splitlines())


RUNNING = 'echo "JobId=7 JobState=RUNNING Reason=None "'


@pytest.mark.parametrize("state", ["exit 1", RUNNING])
def test_a_controller_that_is_silent_for_a_while_is_asked_again(tmp_path, state):
    """A busy one, or one that is being replaced: `scontrol` says that it cannot contact it, and ends with 1."""
    answers_at = 9 if state == "exit 1" else 3
    done, times = asked_again(tmp_path, f"[ $n -ge {answers_at} ] && exit 0; exit 1", state)
    assert times == answers_at, done.stderr
    assert "submit it again" not in done.stderr


def test_a_requeue_that_slurm_refuses_is_said(tmp_path):
    done, times = asked_again(tmp_path, "exit 1", RUNNING)
    assert times == 3
    assert "scontrol cannot requeue job 7; submit it again" in done.stderr


def test_a_job_that_is_cancelled_while_the_controller_is_silent_stays_so(tmp_path):
    state = 'echo "JobId=7 JobState=$([ $n = 0 ] && echo RUNNING || echo CANCELLED) "'
    done, times = asked_again(tmp_path, "exit 1", state)
    assert times == 1, done.stderr


def test_a_module_that_does_not_load_ends_the_job(tmp_path):
    loaded = tmp_path / "loaded"
    define = f'module() {{ [ "$2" = good ] && echo "$@" >> {loaded}; }}'
    lines = [define, *slurm_script._module_lines(["good", "bad"]), "echo on"]
    assert bash(lines, tmp_path).stdout == "on\n"
    assert loaded.read_text() == "load good bad\n"
    refused = bash([define, *slurm_script._module_lines(["bad"]), "echo on"], tmp_path)
    assert (refused.returncode, refused.stdout) == (2, "")
    assert "cluster.modules: module load bad failed" in refused.stderr


def test_the_script_is_valid_bash():
    text = script("cluster.modules=[a]", "cluster.container_image=i")
    assert subprocess.run(["bash", "-n"], input=text, text=True, check=False).returncode == 0
    assert re.search(r"\nexport PYTHONPATH=/code\$\{PYTHONPATH:\+:\$PYTHONPATH\}\nexport PYTHONSAFEPATH=1", text)
