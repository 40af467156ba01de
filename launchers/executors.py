"""Hand a job to submitit: on this machine, on Slurm, or in this process."""

from __future__ import annotations

import functools
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import JobPaths, environment_variables
from submitit.helpers import clean_env
from submitit.local import local as submitit_local

from launchers.job import LOOPBACK, TrainJob
from megatron_elva.config.build import save
from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config
from megatron_elva.training import runs

MakeJob = Callable[[list[str], int | None], Callable[[], Any]]
"""Makes what each task calls, from the paths of the configs and the port of a local job."""

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Submission:
    """What was submitted.

    Attributes:
        kind: ``local``, ``slurm`` or ``debug``.
        configs: the stages.
        jobs: submitit's jobs, one for each Slurm job; empty with ``debug``, where all is done.
        started: time of submission.
    """

    kind: str
    configs: list[Config]
    jobs: list[Any]
    started: float = field(default_factory=time.time)

    @property
    def run_dir(self) -> Path:
        """The run directory, or the folder of those of all stages."""
        return common_dir(self.configs)

    def paths(self, job: Any, rank: int) -> JobPaths:
        """Where submitit puts the log and the result of one rank."""
        return JobPaths(job.paths.folder, job_id=job.job_id, task_id=rank)

    def ranks(self, job: Any) -> int:
        """Ranks of a job."""
        return self.configs[self.jobs.index(job)].world_size


def submit(configs: Sequence[Config], make_job: MakeJob = TrainJob) -> Submission:
    """Write the configs to their run directories and start the job.

    Args:
        configs: the stages, valid and with their files in place.
        make_job: what the tasks run; training by default.

    Raises:
        InputError: the cluster or the GPUs asked for are not there.
    """
    kind = configs[0].cluster.kind
    start = {"local": _submit_local, "slurm": _submit_slurm, "debug": _run_here}[kind]
    if kind == "slurm" and shutil.which("sbatch") is None:
        raise InputError("cluster=slurm: no sbatch on this machine; submit from a login node, or use cluster=local")
    for config in configs:
        runs.check_resumable(config)
        runs.check_unlocked(Path(config.run_dir))
    paths = []
    for config in configs:
        path = (Path(config.run_dir) / "config.yaml").absolute()
        save(config, path)
        paths.append(str(path))
    return Submission(kind, list(configs), start(configs, paths, make_job))


def common_dir(configs: Sequence[Config]) -> Path:
    """The run directory of one stage, or what those of several lie in."""
    first = Path(configs[0].run_dir)
    return first if len(configs) == 1 else first.parent


def sbatch_script(config: Config) -> str:
    """The script that Slurm would get."""
    executor = _slurm_executor(config, None)
    return str(executor._make_submission_file_text(executor._submitit_command_str, ""))


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


class _SlurmExecutor(submitit.SlurmExecutor):
    """Renders the script on machines without Slurm too; `submit` looks for sbatch itself."""

    @classmethod
    def affinity(cls) -> int:
        return 2


def _submit_local(configs: Sequence[Config], paths: list[str], make_job: MakeJob) -> list[Any]:
    config, ranks = configs[0], configs[0].tasks_per_node
    folder = (common_dir(configs) / "logs").absolute()
    folder.mkdir(parents=True, exist_ok=True)
    for old in folder.glob("*.pkl"):
        old.unlink()  # a local job's number is a process number, which may come again
    executor = DetachedLocalExecutor(folder)
    executor.update_parameters(tasks_per_node=ranks, timeout_min=config.cluster.time_min, **_local_gpus(config))
    extra = {"PYTHONPATH": _python_path()}
    if config.device == "cpu" and ranks > 1:
        extra["OMP_NUM_THREADS"] = os.environ.get("OMP_NUM_THREADS", "1")  # or every rank starts a thread for each core
    if sys.platform == "linux":
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


def _submit_slurm(configs: Sequence[Config], paths: list[str], make_job: MakeJob) -> list[Any]:
    jobs: list[Any] = []
    with _own_environment({}):
        for config, path in zip(configs, paths, strict=True):
            after = f"afterok:{jobs[-1].job_id}" if jobs else None
            jobs.append(_slurm_executor(config, after).submit(make_job([path], None)))
    return jobs


def _slurm_executor(config: Config, dependency: str | None) -> _SlurmExecutor:
    cluster = config.cluster
    executor = _SlurmExecutor(
        (Path(config.run_dir) / "logs").absolute(), python="python3" if cluster.container_image else None
    )
    wanted = {
        "job_name": f"{config.model.name}_stage{config.stage.id}",
        "partition": cluster.partition,
        "account": cluster.account,
        "qos": cluster.qos,
        "time": cluster.time_min,
        "nodes": config.nodes,
        "ntasks_per_node": config.tasks_per_node,
        "cpus_per_task": cluster.cpus_per_task,
        "gpus_per_node": config.tasks_per_node if config.device == "cuda" else None,
        "exclusive": cluster.exclusive or None,
        "dependency": dependency,
        "setup": _slurm_setup(config),
        "srun_args": _srun_args(config),
        # without it a stage whose predecessor failed would wait for ever
        "additional_parameters": {**({"kill-on-invalid-dep": "yes"} if dependency else {}), **cluster.sbatch_args},
    }
    executor.update_parameters(**{key: value for key, value in wanted.items() if value is not None})
    return executor


def _slurm_setup(config: Config) -> list[str]:
    lines = [f'export PYTHONPATH="{ROOT}${{PYTHONPATH:+:$PYTHONPATH}}"']
    if config.device == "cpu" and config.tasks_per_node > 1:
        lines.append("export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
    return [*lines, *config.cluster.setup]


def _srun_args(config: Config) -> list[str]:
    cluster = config.cluster
    # by default srun lets the other ranks wait when one dies
    args = ["--kill-on-bad-exit=1", "--wait=60"]
    if cluster.cpus_per_task is not None:
        args.append(
            f"--cpus-per-task={cluster.cpus_per_task}"
        )  # from Slurm 22.05 on, srun does not take it from sbatch
    if cluster.container_image is not None:
        args += [f"--container-image={cluster.container_image}", f"--container-workdir={Path.cwd()}"]
    if cluster.container_mounts is not None:
        args.append(f"--container-mounts={cluster.container_mounts}")
    return [*args, *cluster.srun_args]


def _run_here(configs: Sequence[Config], paths: list[str], make_job: MakeJob) -> list[Any]:
    rendezvous = {"MASTER_ADDR": LOOPBACK, "MASTER_PORT": str(_free_port())}
    # the job sets these itself; they stand here so that they are taken back afterwards
    alone = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}
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


def _python_path() -> str:
    old = os.environ.get("PYTHONPATH")
    return f"{ROOT}{os.pathsep}{old}" if old else str(ROOT)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((LOOPBACK, 0))
        return int(probe.getsockname()[1])
