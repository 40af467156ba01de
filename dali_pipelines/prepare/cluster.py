"""The same work as tasks of a job that the launcher's machinery submits: on Slurm, or several on this machine."""

from __future__ import annotations

import dataclasses
import signal
from dataclasses import dataclass
from pathlib import Path

from submitit import JobEnvironment
from submitit.core.utils import DelayedSubmission, FailedJobError, FailedSubmissionError

from dali_pipelines.prepare.run import cores, finish, work
from dali_pipelines.prepare.settings import Room, one_line
from dali_pipelines.prepare.stats import View
from launchers.executors import Submission, sbatch_script, submit
from launchers.follow import how_to_stop
from megatron_elva.config.compose import compose
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import ClusterConfig, Config

_OWN = {field.name for field in dataclasses.fields(ClusterConfig)} - {"kind"}


@dataclass
class PrepareJob:
    """What each task of the job does. It holds no state: a requeued job finds on disk what is done.

    Attributes:
        out: folder of the preparation, which `run.start` has marked.
        view: for the statistics.
        workers: processes of each task; None: as many as it has cores.
    """

    out: str
    view: View
    workers: int | None = None

    def __call__(self) -> None:
        """Run in each task; the first one adds the statistics."""
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit would pass by it; what is on disk is whole at any time
        here = JobEnvironment()
        room = Room(Path(self.out))
        work(room, self.workers or cores(), here.global_rank, here.num_tasks)
        if here.global_rank == 0:
            finish(room, self.view)

    def checkpoint(self) -> DelayedSubmission:
        """Called by submitit before the time limit: start again as it is."""
        return DelayedSubmission(self)


def job_config(room: Room, words: list[str]) -> tuple[Config, bool]:
    """The launcher's config of the job.

    Args:
        room: the preparation; logs go below its state.
        words: ``nodes=4 partition=cpu`` and whatever the launcher takes; ``kind=local`` runs the tasks here, and
            ``dry_run=true`` submits nothing.

    Returns:
        The config, and whether nothing is to be submitted.

    Raises:
        ConfigError: an unknown key, or a value that cannot be used.
    """
    base = ["stage=1", "model=tiny", "data=demo", "precision=fp32", "device=cpu", "tasks_per_node=1", "cluster=slurm"]
    for word in words:
        key, equals, value = word.partition("=")
        if not equals:
            raise ConfigError(f"--slurm {word}: give KEY=VALUE, such as nodes=4 or partition=cpu")
        if key == "kind":
            base[-1] = f"cluster={value}"
        else:
            base.insert(-1, f"cluster.{word}" if key in _OWN else word)
    config = compose([*base, f"run_dir='{(room.state / 'job').absolute()}'"])
    named = dataclasses.replace(config.model, name="prepare")  # what the job is called in the queue
    return dataclasses.replace(config, model=named), config.dry_run


def submit_job(room: Room, view: View, workers: int | None, words: list[str]) -> int:
    """Submit the job and say how to follow it.

    Returns:
        The exit code.

    Raises:
        ConfigError: a word of the user's cannot be used.
        InputError: there is no Slurm.
    """
    config, dry = job_config(room, words)
    if dry:
        print(sbatch_script(config) if config.cluster.kind == "slurm" else "a local job has no script")
        print("dry run: nothing was submitted")
        return 0
    job = PrepareJob(str(room.out.absolute()), view, workers)
    try:
        submission = submit([config], lambda paths, port: job)
    except (FailedJobError, FailedSubmissionError) as error:
        raise InputError(f"sbatch refused the job: {one_line(error)}") from error
    _announce(room, submission)
    return 0


def _announce(room: Room, submission: Submission) -> None:
    if not submission.jobs:
        print(f"done: {room.out}")
        return
    job = submission.jobs[0]
    tasks = submission.configs[0].world_size
    print(f"job:     {job.job_id} ({submission.kind}, {tasks} task{'s' * (tasks > 1)})")
    print(f"follow:  tail -F {submission.paths(job, 0).stderr}")
    print(f"stop:    {how_to_stop(submission)}; the same command goes on")
    print(f"done:    when {room.out / 'manifest.json'} is there", flush=True)
