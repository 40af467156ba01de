"""What a run is and how it stands, for MLflow: parameters, tags, status. No import of mlflow."""

from __future__ import annotations

import getpass
import json
import os
import subprocess
from collections import Counter
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from megatron_elva.config.build import to_dict
from megatron_elva.config.schema import Config
from megatron_elva.training import attempts
from megatron_elva.training.tracking.lines import valid_key
from megatron_elva.training.tracking.state import FOLDER, without_password

LONGEST = 500
"""Characters of a parameter; servers from before MLflow 2.8 take no more. The whole is in `config.yaml`."""

STATUS = {
    "done": "FINISHED",
    "requeue": "SCHEDULED",
    "stopped": "KILLED",
    "refused": "FAILED",
    "failed": "FAILED",
    "hang": "FAILED",
    "lost": "FAILED",
}
"""MLflow's word for each outcome of an attempt."""

_PACKAGES = ("torch", "megatron-core", "transformers", "transformer-engine", "nvidia-dali-cuda130", "av", "mlflow")
_ROOT = Path(__file__).resolve().parents[3]


def params(config: Config) -> dict[str, str]:
    """The resolved config by dotted key, cut to what MLflow takes."""
    flat: dict[str, str] = {}
    _flatten(to_dict(config), "", flat)
    return flat


def _flatten(value: Any, key: str, into: dict[str, str]) -> None:
    if isinstance(value, dict) and value:
        for name, inner in value.items():
            _flatten(inner, f"{key}.{name}" if key else str(name), into)
        return
    text = without_password(value if isinstance(value, str) else json.dumps(value))
    into[valid_key(key)] = text if len(text) <= LONGEST else text[: LONGEST - 1] + "…"


def new_params(wanted: Mapping[str, str], known: Mapping[str, str], attempt: int) -> dict[str, str]:
    """The parameters to write, where MLflow lets none be changed.

    Args:
        wanted: the config as it is now.
        known: what the server has.
        attempt: number of this attempt.

    Returns:
        Those that the server lacks; one that has changed since is written beside the old one as ``KEY.attempt_N``.
    """
    out = {}
    for key, value in wanted.items():
        if key not in known:
            out[key] = value
            continue
        number, now = 2, known[key]
        while f"{key}.attempt_{number}" in known or number < attempt:
            now = known.get(f"{key}.attempt_{number}", now)
            number += 1
        if now != value:
            out[f"{key}.attempt_{number}"] = value
    return out


def outcome_of(run: Path, steps: int) -> str:
    """How the last attempt ended that a run has noted; one without an end counts as ``lost``.

    Args:
        run: the run directory.
        steps: of the whole stage; for a run that notes no attempts.
    """
    noted = attempts.read(run)
    if noted:
        return noted[-1].outcome or "lost"
    return "done" if (attempts.last_step(run) or 0) >= steps else "lost"


def tags(run: Path, config: Config, world: int | None) -> dict[str, str]:
    """Where the run comes from and where it runs.

    Args:
        run: the run directory.
        config: its config.
        world: ranks of the job; None outside one.
    """
    found = {
        "run_dir": str(run),
        "stage": str(config.stage.id),
        "model": config.model.name,
        "nodes": str(config.nodes),
        "mlflow.user": _user(),
        "mlflow.source.name": "megatron_elva.training.train",
        "mlflow.source.type": "LOCAL",
        **{f"version.{name}": version for name in _PACKAGES if (version := _version(name))},
        **_machines(run, config.nodes),
        **_slurm(run),
        **_git(run),
    }
    if world is not None:
        found["ranks"] = str(world)
    noted = attempts.read(run)
    if noted:
        found["attempt"] = str(noted[-1].number)
        found["attempts"] = "; ".join(f"{a.number}: {a.outcome or 'running'} at step {_at(a)}" for a in noted[-20:])
        found["reason"] = noted[-1].reason
    return {key: value[:5000] for key, value in found.items() if value}


def _at(attempt: attempts.Attempt) -> int:
    return attempt.first_step if attempt.last_step is None else attempt.last_step


def _user() -> str:
    try:
        return getpass.getuser()
    except (OSError, KeyError):  # a container without this user in its passwd
        return str(os.getuid())


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _machines(run: Path, nodes: int) -> dict[str, str]:
    """Hosts and GPUs, from what each node has written of itself."""
    hosts, gpus = [], Counter[str]()
    for node in range(nodes):
        try:
            about = json.loads((run / FOLDER / f"node_{node}.json").read_text())
            hosts.append(str(about["host"]))
            gpus.update(about["gpus"])
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return {"hosts": ", ".join(hosts), "gpus": ", ".join(f"{n} x {name}" for name, n in gpus.items()) or "none"}


def _slurm(run: Path) -> dict[str, str]:
    names = {"slurm.nodelist": "SLURM_JOB_NODELIST", "slurm.partition": "SLURM_JOB_PARTITION",
             "slurm.restarts": "SLURM_RESTART_COUNT", "slurm.cluster": "SLURM_CLUSTER_NAME"}  # fmt: skip
    job = os.environ.get("SLURM_JOB_ID")
    jobs = list(dict.fromkeys([*(a.job for a in attempts.read(run) if a.job.isdigit()), *([job] if job else [])]))
    found = {key: os.environ.get(name, "") for key, name in names.items()} if job else {}
    return {"slurm.jobs": ", ".join(jobs), **found}


def _git(run: Path) -> dict[str, str]:
    """Commit, and whether the code differs from it: of the snapshot that the run uses, else of this checkout."""
    noted = _snapshot(run)
    if noted is not None:
        commit, dirty = noted
    else:
        commit = _ask_git("rev-parse", "HEAD").strip()
        dirty = bool(commit and _ask_git("status", "--porcelain").strip())
    if not commit:
        return {}
    return {"git.commit": commit, "git.dirty": str(dirty).lower(), "mlflow.source.git.commit": commit}


def _recorded(run: Path, name: str) -> Path | None:
    """A file that the launcher recorded of the code at submission, for this stage or for all of them."""
    return next((path for folder in (run, run.parent) if (path := folder / "code" / name).is_file()), None)


def _snapshot(run: Path) -> tuple[str, bool] | None:
    path = _recorded(run, "git.json")
    if path is None:
        return None
    try:
        noted = json.loads(path.read_text())
        return str(noted.get("commit") or ""), bool(noted.get("dirty"))
    except (OSError, ValueError, AttributeError):
        return None


def diff_file(run: Path) -> Path | None:
    """What the code has besides its commit, as a file; None where it has nothing."""
    path = _recorded(run, "git.diff")
    if path is None:
        path = run / FOLDER / "git.diff"
        if not path.is_file():
            path.write_text(_ask_git("diff", "HEAD"))
    return path if path.stat().st_size else None


def _ask_git(*arguments: str) -> str:
    """What git says of the code that runs here; nothing where it is no checkout."""
    command = ["git", "-C", str(_ROOT), *arguments]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False, errors="replace")
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""
