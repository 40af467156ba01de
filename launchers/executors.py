"""Hand a job to submitit: on this machine, on Slurm, or in this process."""

from __future__ import annotations

import fcntl
import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError, JobPaths, environment_variables
from submitit.helpers import clean_env
from submitit.local import local as submitit_local

from launchers import checks, record, slurm_script, snapshot
from launchers.job import TrainJob
from launchers.network import LOOPBACK
from launchers.snapshot import Code
from megatron_elva.config.build import save
from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config
from megatron_elva.training import runs

MakeJob = Callable[[list[str], int | None], Callable[[], Any]]
"""Makes what each task calls, from the paths of the configs and the port of a local job."""


@dataclass(frozen=True)
class Submission:
    """What was submitted.

    Attributes:
        kind: ``local``, ``slurm`` or ``debug``.
        configs: the stages.
        jobs: submitit's jobs, one for each Slurm job; empty with ``debug``, where all is done.
        code: what the (first) job imports from.
        started: time of submission.
    """

    kind: str
    configs: list[Config]
    jobs: list[Any]
    code: Code
    started: float = field(default_factory=time.time)

    @property
    def run_dir(self) -> Path:
        """The run directory, or the folder of those of all stages."""
        return common_dir(self.configs)

    def paths(self, job: Any, rank: int) -> JobPaths:
        """Where submitit puts the log and the result of one rank."""
        return JobPaths(job.paths.folder, job_id=job.job_id, task_id=rank)

    def folders(self, job: Any) -> list[Path]:
        """The run directories of a job: of one stage on Slurm, else of all."""
        if self.kind == "slurm":
            return [Path(self.configs[self.jobs.index(job)].run_dir)]
        return [Path(config.run_dir) for config in self.configs]

    def ranks(self, job: Any) -> int:
        """Ranks of a job."""
        return self.configs[self.jobs.index(job)].world_size


def submit(configs: Sequence[Config], make_job: MakeJob = TrainJob) -> Submission:
    """Write the configs and the code to their run directories and start the job.

    Args:
        configs: the stages, valid and with their files in place.
        make_job: what the tasks run; training by default.

    Raises:
        InputError: the cluster or the GPUs asked for are not there, another job is, or a run directory takes no files.
    """
    kind = configs[0].cluster.kind
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise InputError("cluster=slurm: no sbatch on this machine; submit from a login node, or use cluster=local")
    for config in configs:
        runs.check_resumable(config)
        runs.check_unlocked(Path(config.run_dir))
    checks.refuse(configs)
    with ExitStack() as alone:
        if kind != "debug":
            alone.enter_context(_alone(configs))
            checks.refuse_other_jobs(configs)  # of somebody who was faster
        return _submit(kind, configs, make_job)


def _submit(kind: str, configs: Sequence[Config], make_job: MakeJob) -> Submission:
    try:
        codes = [snapshot.take(Path(c.run_dir), c.cluster.snapshot and kind != "debug") for c in configs]
        paths = [(Path(config.run_dir) / "config.yaml").absolute() for config in configs]
        for config, path in zip(configs, paths, strict=True):
            save(config, path)
    except OSError as error:
        raise InputError(f"run_dir={common_dir(configs)}: cannot be written: {error}") from error
    start, started = {"local": _submit_local, "slurm": _submit_slurm, "debug": _run_here}[kind], time.time()
    jobs = start(configs, [str(path) for path in paths], make_job, codes)
    if kind != "debug":
        _record(kind, [int(job.job_id) for job in jobs], configs, codes)
    return Submission(kind, list(configs), jobs, codes[0], started)


@contextmanager
def _alone(configs: Sequence[Config]) -> Iterator[None]:
    """Keep others from submitting to the same run directories until this job stands in the queue."""
    with ExitStack() as stack:
        for config in configs:
            path = Path(config.run_dir) / "logs" / "submit.lock"
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                fcntl.flock(stack.enter_context(path.open("a")), fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"run_dir={config.run_dir}: is being submitted by another process") from error
            except OSError:
                continue  # no locks on this disk; one that takes no files is refused next
        yield


def _record(kind: str, jobs: Sequence[int], configs: Sequence[Config], codes: Sequence[Code]) -> None:
    """Leave in each run directory what was submitted for it."""
    ids = [str(job) for job in jobs]
    for i, (config, code) in enumerate(zip(configs, codes, strict=True)):
        job = ids[min(i, len(ids) - 1)]  # a local job trains all stages
        started = record.process_started(int(job)) if kind != "slurm" else None
        about = record.Record(kind, job, list(dict.fromkeys(ids)), sys.argv, code.about, process_started=started)
        about.write(Path(config.run_dir))


def common_dir(configs: Sequence[Config]) -> Path:
    """The run directory of one stage, or what those of several lie in."""
    first = Path(configs[0].run_dir)
    return first if len(configs) == 1 else first.parent


def sbatch_script(config: Config) -> str:
    """The script that Slurm would get."""
    return slurm_script.text(config, snapshot.planned(Path(config.run_dir), config.cluster.snapshot))


class DetachedLocalExecutor(submitit.LocalExecutor):
    """A local executor whose job has its own session: Ctrl-C, a closed terminal and a closed pipe leave it alone."""

    def _submit_command(self, command: str) -> Any:
        # submitit starts the job's controller with subprocess.Popen and offers no argument for how
        popen = subprocess.Popen
        with (self.folder / "controller.log").open("ab") as log:
            submitit_local.subprocess.Popen = functools.partial(
                popen, start_new_session=True, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT
            )
            try:
                return super()._submit_command(command)
            finally:
                submitit_local.subprocess.Popen = popen


def _submit_local(configs: Sequence[Config], paths: list[str], make_job: MakeJob, codes: Sequence[Code]) -> list[Any]:
    config, ranks = configs[0], configs[0].tasks_per_node
    folder = (common_dir(configs) / "logs").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.pkl"):
        old.unlink()  # a local job's number is a process number, which may come again
    executor = DetachedLocalExecutor(folder)
    executor.update_parameters(tasks_per_node=ranks, timeout_min=config.cluster.time_min, **_local_gpus(config))
    executor.update_parameters(signal_delay_s=config.cluster.signal_s)
    # the folder of the submission is none to import from
    extra = {"PYTHONPATH": _python_path(codes[0].path), "PYTHONSAFEPATH": "1"}
    if config.device == "cpu" and ranks > 1:
        extra["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # or every rank starts a thread for each core
    if sys.platform == "linux" and config.cluster.interface is None:
        extra["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo")
    with _own_environment(extra):
        return [executor.submit(make_job(paths, _free_port()))]


def _local_gpus(config: Config) -> dict[str, Any]:
    """GPUs of this machine for submitit: those that CUDA_VISIBLE_DEVICES leaves, else the first ones."""
    if config.device != "cuda":
        return {"gpus_per_node": 0}
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    if not all(name.isdigit() for name in visible) or (visible and len(visible) < config.tasks_per_node):
        raise InputError(
            f"CUDA_VISIBLE_DEVICES={','.join(visible)}: must be numbers of at least tasks_per_node="
            f"{config.tasks_per_node} GPUs"
        )
    return {"gpus_per_node": config.tasks_per_node, "visible_gpus": [int(name) for name in visible] or ()}


def _submit_slurm(configs: Sequence[Config], paths: list[str], make_job: MakeJob, codes: Sequence[Code]) -> list[Any]:
    jobs: list[Any] = []
    with _own_environment({}):
        for config, path, code in zip(configs, paths, codes, strict=True):
            after = f"afterok:{jobs[-1].job_id}" if jobs else None
            try:
                jobs.append(slurm_script.executor(config, code.path, after).submit(make_job([path], None)))
            except (FailedJobError, FailedSubmissionError):
                if jobs:  # a chain without its end is not what was asked for
                    subprocess.run(["scancel", *(str(job.job_id) for job in jobs)], check=False)
                raise
    return jobs


def _run_here(configs: Sequence[Config], paths: list[str], make_job: MakeJob, codes: Sequence[Code]) -> list[Any]:
    rendezvous = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(_free_port())}
    # the job sets these itself; they stand here so that they are taken back afterwards
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
    _record("debug", [os.getpid()] * len(configs), configs, codes)  # before, as all is done afterwards
    with _own_environment({**rendezvous, **alone, "SUBMITIT_DEBUG_JOB_ID": "debug"}):
        make_job(paths, int(rendezvous["MASTER_PORT"]))()
    return []


@contextmanager
def _own_environment(extra: dict[str, str]) -> Iterator[None]:
    """Hide what a surrounding job or torchrun left in the environment, so that a submission may start inside one."""
    inside = "SLURM_JOB_ID" in os.environ
    # clean_env also hides where Slurm's configuration is and a user's own defaults for sbatch
    kept = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or (name.startswith("SBATCH_") and not inside)
    }
    with clean_env(), environment_variables(**kept, **extra):
        yield


def _python_path(code: Path) -> str:
    old = os.environ.get("PYTHONPATH")
    return f"{code}{os.pathsep}{old}" if old else str(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
