"""The batch script of a Slurm job: parameters, what comes before srun, its arguments, and what comes after it."""

from __future__ import annotations

import math
import shlex
import sys
from pathlib import Path
from typing import Any

import submitit

from launchers.network import FIRST_PORT, JOB_STRIDE, PORT_VARIABLE, PORTS, TRIES, TRY_STRIDE
from megatron_elva.config.schema import Config
from megatron_elva.training.attempts import DONE, REQUEUE, REQUEUE_CODE

_END_S = 120
"""Seconds that the last rank may need longer than the first to end, besides the flush of the tracking."""


class ScriptExecutor(submitit.SlurmExecutor):
    """Renders the script on machines without Slurm too; `submit` looks for sbatch itself."""

    @classmethod
    def affinity(cls) -> int:
        """How well this fits the machine, in submitit's measure: as if Slurm were here."""
        return 2


def executor(config: Config, code: Path, dependency: str | None = None) -> ScriptExecutor:
    """Submitit's executor for one stage.

    Args:
        config: the stage.
        code: folder that the job imports from.
        dependency: value of ``sbatch --dependency``.
    """
    cluster = config.cluster
    made = ScriptExecutor(
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
        "setup": setup(config, code),
        "teardown": teardown(config, code),
        "srun_args": srun_args(config, code),
        "additional_parameters": _more_parameters(config, dependency),
    }
    made.update_parameters(**{key: value for key, value in wanted.items() if value is not None})
    return made


def text(config: Config, code: Path, dependency: str | None = None) -> str:
    """The script that Slurm gets."""
    made = executor(config, code, dependency)
    return str(made._make_submission_file_text(made._submitit_command_str, ""))


def _more_parameters(config: Config, dependency: str | None) -> dict[str, Any]:
    cluster = config.cluster
    return {
        ("requeue" if cluster.requeue else "no-requeue"): True,  # after a lost node or a preemption, by Slurm itself
        # to the ranks, not to this script ("B:"); USR1 would be taken by NCCL
        "signal": f"USR2@{cluster.signal_s}",
        # without it a stage whose predecessor failed would wait for ever
        **({"kill-on-invalid-dep": "yes"} if dependency else {}),
        **cluster.sbatch_args,
    }


def setup(config: Config, code: Path) -> list[str]:
    """What the first node does before srun."""
    lines = [
        # the script has to outlive a signal to the whole job, or nobody records how the job ended
        "trap : TERM",
        'echo "== job $SLURM_JOB_ID start ${SLURM_RESTART_COUNT:-0} on $SLURM_JOB_NODELIST, $(date -Is)"',
        *_port_lines(),
        f"export PYTHONPATH={shlex.quote(str(code))}${{PYTHONPATH:+:$PYTHONPATH}}",
        "export PYTHONSAFEPATH=1  # or python -m would import from the folder of the submission",
        *functions(config, code),
    ]
    if config.device == "cpu" and config.tasks_per_node > 1:
        lines.append("export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}")
    return [*lines, *_module_lines(config.cluster.modules), *config.cluster.setup, "take_another_step_number"]


def functions(config: Config, code: Path) -> list[str]:
    """Read the functions that ask Slurm, and keep watch for the time limit where the job may start again."""
    lines = [f". {shlex.quote(str(code / 'launchers/slurm_functions.sh'))}"]
    return [*lines, "guard_time_limit & guard=$!"] if config.cluster.requeue else lines


def _port_lines() -> list[str]:
    """Choose a port for the ranks to meet that nobody listens on here, on the node of rank 0."""
    return [
        f"for i in $(seq 0 {TRIES - 1}); do",
        f"  port=$(( {FIRST_PORT} + (SLURM_JOB_ID * {JOB_STRIDE} + ${{SLURM_RESTART_COUNT:-0}} + i * {TRY_STRIDE}) "
        f"% {PORTS} ))",
        "  (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null || break",
        "done",
        f"export {PORT_VARIABLE}=$port",
    ]


def _module_lines(modules: list[str]) -> list[str]:
    """Load environment modules; what the site loads by itself stays loaded."""
    if not modules:
        return []
    names = " ".join(map(shlex.quote, modules))
    return [
        "type module >/dev/null 2>&1 || for f in /etc/profile.d/lmod.sh /etc/profile.d/modules.sh; do",
        '  [ -r "$f" ] && . "$f"',
        "done",
        f'module load {names} || {{ echo "error: cluster.modules: module load {names} failed" >&2; exit 2; }}',
    ]


def srun_args(config: Config, code: Path) -> list[str]:
    """Arguments of srun besides submitit's own."""
    cluster = config.cluster
    # by default srun lets the other ranks wait when one dies
    args = ["--kill-on-bad-exit=1", f"--wait={_END_S + math.ceil(config.tracking.flush_s)}"]
    if cluster.cpus_per_task is not None:
        # from Slurm 22.05 on, srun does not take it from sbatch
        args.append(f"--cpus-per-task={cluster.cpus_per_task}")
    if cluster.container_image is not None:
        args += [
            f"--container-image={cluster.container_image}",
            f"--container-mounts={','.join(mounts(config, code))}",
            f"--container-workdir={Path.cwd()}",
        ]
    return [*args, *cluster.srun_args]


def mounts(config: Config, code: Path) -> list[str]:
    """What a container sees of the cluster: the user's mounts, the folder of the runs, the code, this folder.

    The folder of the runs holds the stages before and the tracking's database.
    """
    given = [part for part in (config.cluster.container_mounts or "").split(",") if part]
    run = Path(config.run_dir).absolute()
    folders = [run if run.parent == Path("/") else run.parent, code, Path.cwd()]
    out = list(given)
    for folder in folders:
        if folder != Path("/") and not any(folder.is_relative_to(other) for other in _targets(out)):
            out.append(f"{folder}:{folder}")
    return out


def seen_in_container(config: Config, code: Path) -> list[Path]:
    """Folders of the cluster that a container has under their own name."""
    return _targets(mounts(config, code))


def _targets(mounted: list[str]) -> list[Path]:
    pairs = [mount.split(":")[:2] for mount in mounted]  # SOURCE[:TARGET[:FLAGS]]
    return [Path(pair[0]) for pair in pairs if pair[0] == pair[-1]]


def teardown(config: Config, code: Path) -> list[str]:
    """What the first node does after srun, outside any container: record the end, and start the job again.

    A job that was cancelled would come back by ``scontrol requeue``, so Slurm is asked first who ended it.
    """
    python = "python3" if config.cluster.container_image else shlex.quote(sys.executable)
    close = f"{python} -I {shlex.quote(str(code / 'megatron_elva/training/attempts.py'))}"
    run, limit = shlex.quote(str(Path(config.run_dir).absolute())), config.fault.same_step
    lines = [
        "rc=$?",
        *(["kill -TERM $guard 2>/dev/null; wait $guard"] if config.cluster.requeue else []),
        "who_ended",
        f"if {python} -I -c 'import sys; sys.exit(sys.version_info < (3, 8))' 2>/dev/null; then",
        f"  {close} {run} --code $rc --limit {limit} $by_slurm; next=$?",
        f"elif [ $rc -eq {REQUEUE_CODE} ] || {{ [ $rc -ne 0 ] && [ ${{SLURM_RESTART_COUNT:-0}} -lt {limit} ]; }}; then",
        f"  next={REQUEUE}",
        "else",
        f"  next=$(( rc == 0 ? {DONE} : 1 ))",
        "fi",
        f"[ $next -eq {DONE} ] && exit 0",
    ]
    if config.cluster.requeue:
        lines += [
            f'if [ $next -eq {REQUEUE} ] && [ -n "$again" ]; then',
            "  if start_again; then",
            "    sleep 120  # Slurm ends this script",
            "  else",
            '    echo "error: scontrol cannot requeue job $SLURM_JOB_ID; submit it again to go on" >&2',
            "  fi",
            "fi",
        ]
    if config.tracking.mlflow and config.cluster.container_image is None:
        # the process that tracks the run ended with the ranks, and nobody will start the next one
        send = f"{python} -P -m megatron_elva.training.tracking.sender {run} --once"
        lines.append(f"[ $next -eq {REQUEUE} ] || timeout 60 {send} >/dev/null 2>&1")
    # 0 would let the next stage start
    return [*lines, f"exit $(( rc == 0 ? {REQUEUE_CODE} : rc ))"]
