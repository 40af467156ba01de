"""``python launchers/status.py RUN_DIR``: what a run does, how far it is, and what went wrong last.

Reads the files of the run directory, and asks Slurm where there is one. Exit codes: 0 nothing has failed, 1 something
has, 2 RUN_DIR is none.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__" and __package__ is None:
    # the folder of this script is no place to import from, the repository is
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from launchers import record, slurm_queue
from launchers.findings import Findings, find
from launchers.progress import describe, duration, seconds_left
from launchers.record import Record
from megatron_elva.config.build import load
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config
from megatron_elva.training import attempts, runs
from megatron_elva.training.attempts import Attempt

FAILED = "failed"


@dataclass(frozen=True)
class Status:
    """One stage of a run.

    Attributes:
        run: its run directory.
        stage: its number; None where its config cannot be read.
        state: ``not submitted``, ``queued``, ``starting``, ``running``, ``ending``, ``requeued``, ``done``,
            ``stopped`` or ``failed``.
        detail: why it waits, or what is unusual.
        kind: ``slurm``, ``local`` or ``debug``; None where nothing was submitted.
        job: its number.
        step: steps done.
        steps: steps of the stage.
        loss: of the last step.
        tokens_per_s: of the last step.
        left_s: estimate of the time for the steps to come.
        last_step_age_s: seconds since the last step.
        line: step, loss, speed and time left in words.
        checkpoint_step: step of the newest complete checkpoint.
        checkpoint: its folder.
        checkpoint_age_s: seconds since it was complete.
        attempts: all starts.
        stop: the command that ends it, where it waits or runs.
        findings: errors, hangs, breaks, slow ranks.
    """

    run: Path
    stage: int | None
    state: str
    detail: str = ""
    kind: str | None = None
    job: str | None = None
    step: int = 0
    steps: int | None = None
    loss: float | None = None
    tokens_per_s: float | None = None
    left_s: float | None = None
    last_step_age_s: float | None = None
    line: str = ""
    checkpoint_step: int | None = None
    checkpoint: Path | None = None
    checkpoint_age_s: float | None = None
    attempts: list[Attempt] = field(default_factory=list)
    stop: str | None = None
    findings: Findings = field(default_factory=Findings)


def status(run: Path) -> Status:
    """The state of one run directory."""
    config, sent, tried = _config(run), record.read(run), attempts.read(run)
    steps = attempts.tail(run / runs.METRICS)
    saved = runs.checkpoints(run)
    state, detail = _state(run, config, sent, tried)
    last: dict[str, Any] = steps[-1] if steps else {}
    total = config.train.steps if config else None
    waits = state in ("queued", "starting", "running", "ending", "requeued")
    now = time.time()
    return Status(
        run=run,
        stage=config.stage.id if config else None,
        state=state,
        detail=detail,
        kind=sent.kind if sent else None,
        job=sent.job if sent else None,
        step=int(last.get("step", saved[-1].step if saved else 0)),
        steps=total,
        loss=last.get("loss"),
        tokens_per_s=last.get("tokens_per_s"),
        left_s=seconds_left(steps, total) if steps and total and state != "done" else None,
        last_step_age_s=now - (run / runs.METRICS).stat().st_mtime if steps else None,
        line=describe(steps, total) if steps and total else "",
        checkpoint_step=saved[-1].step if saved else None,
        checkpoint=saved[-1].path if saved else None,
        checkpoint_age_s=now - (saved[-1].path / runs.MARKER).stat().st_mtime if saved else None,
        attempts=tried,
        stop=sent.stop if sent and waits and sent.kind != "debug" else None,
        findings=find(run, tried, state == FAILED, sent),
    )


def _config(run: Path) -> Config | None:
    try:
        return load(run / "config.yaml")
    except (InputError, ConfigError):
        return None


def _state(run: Path, config: Config | None, sent: Record | None, tried: Sequence[Attempt]) -> tuple[str, str]:
    """State and detail. A job that is there outweighs what the files say of an earlier one."""
    there = record.queued(sent) if sent is not None else None
    own = [attempt for attempt in tried if sent is None or attempt.job == sent.attempt_job]
    last = own[-1] if own else None
    if isinstance(there, slurm_queue.Queued):
        if there.state == "PENDING":
            return ("requeued" if own else "queued"), there.text.removeprefix("queued").strip(" ()")
        if there.state != "RUNNING":
            return "ending", there.state.lower()
        if last is None:
            return "starting", ""
        if last.outcome is None:
            return "running", ""
        return ("done", "") if last.outcome == "done" else ("starting", f"the last attempt: {last.outcome}")
    saved = runs.checkpoints(run)
    finished = config is not None and saved and saved[-1].step >= config.train.steps
    if finished and (last is None or last.outcome in ("done", None)):
        return "done", ""
    if last is None:
        return _never_began(sent, there)
    if last.outcome is None:
        if there is None:
            return "running", "as far as its files say; nobody here knows the job"
        return FAILED, f"ended without a word{_slurm_says(sent)}"
    if last.outcome == "requeue":
        return "stopped", "saved to make room, and was not started again; submit it again to go on"
    return {"done": "done", "stopped": "stopped"}.get(last.outcome, FAILED), ""


def _never_began(sent: Record | None, there: object) -> tuple[str, str]:
    if sent is None:
        return "not submitted", ""
    if there is None:
        return "queued", "or already gone: nobody here knows the job"
    if sent.kind != "slurm":
        return FAILED, "ended before training began"
    said = slurm_queue.final_state(sent.job) or ""
    if said.startswith("CANCELLED"):
        return "stopped", f"cancelled before it began, or the stage before has failed{_slurm_says(sent)}"
    return FAILED, f"ended before training began{_slurm_says(sent)}"


def _slurm_says(sent: Record | None) -> str:
    if sent is None or sent.kind != "slurm":
        return ""
    said = slurm_queue.final_state(sent.job)
    return f" (Slurm: {said})" if said else ""


def text(one: Status) -> str:
    """A status in words."""
    name = f"stage {one.stage}" if one.stage is not None else str(one.run)
    state = one.state + (f" ({one.detail})" if one.detail else "")
    rows = [("", f"{name}: {state}")]
    if one.job is not None and one.kind != "debug":
        rows.append(("job", f"{one.job} ({one.kind})" + (f"; end it with: {one.stop}" if one.stop else "")))
    if one.line:
        age = f"  (last step {duration(one.last_step_age_s or 0)} ago)" if one.state != "done" else ""
        rows.append(("step", one.line + age))
    if one.checkpoint is not None:
        rows.append(("checkpoint", f"{one.checkpoint}, {duration(one.checkpoint_age_s or 0)} old"))
    rows += [("attempts" if i == 0 else "", line) for i, line in enumerate(_attempt_lines(one.attempts))]
    found = one.findings
    rows += [
        (name, line)
        for name, line in (
            ("recovery", found.recovery), ("error", found.error), ("log", found.log), ("hang", found.hang),
            ("not finite", found.nonfinite), ("slowest", found.slowest),
        )
        if line
    ]  # fmt: skip
    return "\n".join(line if not name and i == 0 else f"  {name:<11}{line}" for i, (name, line) in enumerate(rows))


def _attempt_lines(tried: Sequence[Attempt], shown: int = 5) -> list[str]:
    """One line for each of the last attempts."""
    lines = []
    for attempt in tried[-shown:]:
        begun = f"{attempt.number}: from step {attempt.first_step} on {attempt.host}"
        if attempt.outcome is None or attempt.ended is None:
            lines.append(f"{begun}, since {duration(time.time() - attempt.started)}")
            continue
        reason = f": {attempt.reason}" if attempt.reason else ""
        took = duration(attempt.ended - attempt.started)
        lines.append(f"{begun}, {attempt.outcome} at step {attempt.last_step} after {took}{reason}")
    if len(tried) > shown:
        lines[0] = f"{len(tried)} in all, the last {shown}: {lines[0]}"
    return lines


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    parser = argparse.ArgumentParser(prog="status", description="What a run does and what went wrong last.")
    parser.add_argument("run", type=Path, metavar="RUN_DIR", help="run directory, or that of stage=all")
    parser.add_argument("--json", action="store_true", help="a list with an object for each stage")
    given = parser.parse_args(argv)
    folders = runs.stage_runs(given.run)
    if not any((folder / name).exists() for folder in folders for name in ("config.yaml", "logs", "checkpoints")):
        why = "is no run directory (no config.yaml in it)" if given.run.is_dir() else "no such run directory"
        print(f"error: {given.run}: {why}", file=sys.stderr)
        return 2
    found = [status(folder) for folder in folders]
    if given.json:
        print(json.dumps([asdict(one) for one in found], indent=1, default=str))
    else:
        print(f"run_dir: {given.run}")
        print("\n".join(text(one) for one in found))
    return 1 if any(one.state == FAILED for one in found) else 0


if __name__ == "__main__":
    sys.exit(main())
