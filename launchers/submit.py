"""The one entry point: ``python launchers/submit.py stage=2 nodes=16``; every value is a Hydra override.

Exit codes: 0 done or submitted, 2 bad configuration or input (one line says which key), 1 any other failure.
"""

from __future__ import annotations

import shlex
import sys
from pathlib import Path

if __name__ == "__main__" and __package__ is None:
    # the folder of this script is no place to import from, the repository is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from submitit.core.utils import FailedJobError, FailedSubmissionError

from launchers.dry_run import report
from launchers.executors import MakeJob, Submission, submit
from launchers.follow import follow, how_to_stop
from launchers.job import TrainJob
from megatron_elva.config.compose import compose_all, group_options
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.validate import check_files, validate_all

_USAGE = """\
usage: python launchers/submit.py [GROUP=OPTION] [KEY=VALUE] ...

Trains ELVA. Examples:
  python launchers/submit.py stage=2 nodes=16                   on Slurm, 16 nodes of 8 GPUs
  python launchers/submit.py stage=all cluster=local follow=true   all stages on this machine's CPU, tiny model
  python launchers/submit.py stage=all stage_1.train.steps=100  a value for one stage only
  python launchers/submit.py stage=2 nodes=16 dry_run=true      the layout, memory and batch script; submits nothing

Groups (configs/<group>/<option>.yaml has every key with its meaning):
{groups}

Keys that are set often:
  nodes tasks_per_node device=cuda|cpu seed run_dir init_from dry_run follow layers=auto|local|te
  parallel.tensor parallel.pipeline parallel.virtual_pipeline parallel.sequence
  train.steps train.global_batch train.accumulate train.lr train.checkpoint_every
  data.root data.frames data.max_pixels cluster.partition cluster.account cluster.time_min

cluster=local and cluster=debug choose model=tiny data=demo precision=fp32 device=cpu where nothing else is given.
A run_dir that exists is resumed from its newest complete checkpoint.
"""


def usage() -> str:
    """The text of ``--help``."""
    options = {name: list(found) for name, found in group_options().items()}
    options["stage"].append("all")
    return _USAGE.format(groups="\n".join(f"  {name + '=':<12}{' | '.join(found)}" for name, found in options.items()))


def main(arguments: list[str], make_job: MakeJob = TrainJob) -> int:
    """Run the command line.

    Args:
        arguments: what follows the program's name.
        make_job: what the tasks run; training by default.

    Returns:
        The exit code.
    """
    if {"-h", "--help"} & set(arguments):
        print(usage(), end="")
        return 0
    try:
        configs = compose_all(arguments)
        validate_all(configs)
        if configs[0].dry_run:
            print(report(configs))
            return 0
        coming = [config.run_dir for config in configs]
        for config in configs:
            check_files(config, coming)
        submission = submit(configs, make_job)
    except (ConfigError, InputError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except (FailedJobError, FailedSubmissionError) as error:
        print(f"error: sbatch refused the job: {' '.join(str(error).split())}{_perhaps_taken(error)}", file=sys.stderr)
        return 1
    _announce(submission)
    if configs[0].follow and submission.jobs:
        return follow(submission)
    return 0


def _perhaps_taken(error: Exception) -> str:
    """What to do where Slurm's answer was lost, and not only its consent."""
    if "timed out" not in str(error):
        return ""
    return "; it may stand in the queue all the same: look with `squeue --me`, scancel it there, and submit again"


def _announce(submission: Submission) -> None:
    if not submission.jobs:
        print(f"done: {submission.run_dir}")
        return
    ids = ", ".join(str(job.job_id) for job in submission.jobs)
    logs = submission.paths(submission.jobs[0], 0).stderr
    metrics = Path(submission.configs[0].run_dir) / "metrics.jsonl"
    chained = ", each after the one before" if len(submission.jobs) > 1 else ""
    print(f"job:     {ids} ({submission.kind}, {submission.configs[0].world_size} ranks{chained})")
    print(f"run_dir: {submission.run_dir}")
    print(f"code:    {submission.code.line}")
    print(f"follow:  {shlex.join(['tail', '-F', str(metrics), str(logs)])}")
    print(f"status:  {shlex.join(['python', _status_script(), str(submission.run_dir)])}")
    print(f"stop:    {how_to_stop(submission)}", flush=True)


def _status_script() -> str:
    """`status.py` as it is reached from here."""
    path = Path(__file__).resolve().with_name("status.py")
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
