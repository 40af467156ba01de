"""The test cluster itself: what the other tests here rely on."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

from tests.slurm.cluster import Slurm, has_namespaces, missing

pytestmark = pytest.mark.skipif(bool(missing()), reason=f"no Slurm on this machine (missing: {', '.join(missing())})")
ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def folder():
    path = Path(tempfile.mkdtemp(prefix="slt", dir="/tmp"))  # short, for sockets
    yield path
    shutil.rmtree(path)


def running(folder: Path) -> list[str]:
    """Programs that have something of a cluster's folder in their command."""
    found = []
    for process in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = process.read_bytes().replace(b"\0", b" ").decode()
        except OSError:
            continue
        if str(folder) in command:
            found.append(command)
    return found


def wait_until(reached, seconds=10):
    until = time.monotonic() + seconds
    while not reached() and time.monotonic() < until:
        time.sleep(0.05)
    return reached()


NETNS = pytest.mark.skipif(not has_namespaces(), reason="needs root, iproute2 and the right to make namespaces")
SCRIPT = """#!/bin/bash
srun --ntasks=4 bash -c 'echo $SLURMD_NODENAME $(hostname) $CUDA_VISIBLE_DEVICES'
sleep 60
"""


@pytest.mark.parametrize("mode", ["loop", pytest.param("netns", marks=NETNS)])
def test_it_runs_jobs_on_nodes_that_can_be_lost(folder, mode):
    with Slurm(folder, 3, mode) as slurm:
        script, out = folder / "job.sh", folder / "out"
        script.write_text(SCRIPT)
        options = ["--parsable", "-N2", "--ntasks-per-node=2", "--gpus-per-node=4", f"--output={out}"]
        job = slurm.run("sbatch", *options, str(script)).strip()
        assert wait_until(lambda: out.is_file() and len(out.read_text().splitlines()) == 4)
        hosts = slurm.nodes if mode == "netns" else [os.uname().nodename] * 3
        lines = [f"{slurm.nodes[i]} {hosts[i]} 0,1,2,3" for i in (0, 0, 1, 1)]
        assert sorted(out.read_text().splitlines()) == sorted(lines)
        assert slurm.nodes_of(job) == slurm.nodes[:2]
        told = slurm.run("sacct", "-o", "JobID,State,NodeList", "--parsable2", "-j", job)
        assert told == f"JobID|State|NodeList\n{job}|RUNNING|{slurm.job(job)['NodeList']}\n"
        last = slurm.nodes[2]
        slurm.kill_node(last)
        assert not any(f"-N {last} " in command for command in running(folder))
        slurm.start_node(last)
        assert slurm.run("srun", "-w", last, "-N1", "-n1", "-t1", "echo", "back") == "back\n"
    assert running(folder) == []


def test_two_at_once_do_not_see_each_other(folder):
    with Slurm(folder / "a", 2) as one, Slurm(folder / "b", 1) as two:
        assert [len(cluster.run("sinfo", "-h", "-N", "-p", "main").splitlines()) for cluster in (one, two)] == [2, 1]
        one.run("sbatch", "--wrap", "sleep 60", "--output=/dev/null")
        assert two.run("squeue", "-h") == ""


def test_nothing_is_left_when_the_test_process_is_killed(folder):
    code = (
        "import sys, time; from pathlib import Path; from tests.slurm.cluster import Slurm\n"
        f"slurm = Slurm(Path({str(folder)!r}), 2, small_disk_mb={4 if has_namespaces() else 0})\n"
        "slurm.up(); slurm.run('sbatch', '--wrap', 'sleep 1000', '--output=/dev/null'); print(slurm.tag, flush=True)\n"
        "time.sleep(60)\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    tag = process.stdout.readline().strip()
    assert tag and len(running(folder)) >= 4
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert wait_until(lambda: not running(folder)), running(folder)
    assert wait_until(lambda: not Path("/sys/class/net", tag).exists())
    assert wait_until(lambda: not (folder / "small").is_mount())
