"""The attempts of a run: when a job started, how it ended, and whether there is a point in starting it again.

One attempt is one start of a job; a requeue starts the next one. The log `logs/attempts.jsonl` holds a line for each
begin and each end. The order of its lines decides, never their times, which are those of several hosts.

A batch script runs this file by its path on a host that may have nothing but a plain Python (3.8 or later):

python3 attempts.py RUN_DIR --code CODE --limit N [--ended-by-slurm | --preempted]

It closes the job's attempt if nobody did, prints one line, and says by its exit status what to do: 0 start again, 1 do
not, 3 do not because the run is done.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import socket
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

OUTCOMES = ("done", "requeue", "stopped", "refused", "failed", "hang", "lost")
REQUEUE_CODE = 75
"""Exit code of ranks that have saved and want to go on."""
REFUSED_CODE = 2
"""Exit code of ranks whose configuration or input cannot be used."""
REQUEUE, LEAVE, DONE = 0, 1, 3
"""Exit statuses of the command line."""
FRUITLESS = 10
"""Attempts of a job in a row that gained no checkpoint, at whatever steps they failed, after which it is left alone."""
_LOG = Path("logs", "attempts.jsonl")
_TAIL_BYTES = 65_536


@dataclass(frozen=True)
class Attempt:
    """One start of a job.

    Attributes:
        number: counts from 1 over the life of the run directory.
        job: the Slurm job, ``local-`` and the process group of a local one, or nothing.
        restart: how often that job had been started before.
        host: where its rank 0 was.
        pid: the process of its rank 0.
        started: unix time, of ``host``.
        first_step: steps done at its start.
        ended: unix time, never before ``started``; None while it runs, or where nobody could say its end.
        outcome: one of `OUTCOMES`; None likewise.
        reason: one line.
        last_step: steps done at its end.
    """

    number: int
    job: str
    restart: int
    host: str
    pid: int
    started: float
    first_step: int
    ended: float | None = None
    outcome: str | None = None
    reason: str = ""
    last_step: int | None = None


class _Identity(NamedTuple):
    job: str
    restart: int
    host: str
    pid: int


def begin(run: Path, step: int) -> None:
    """Record that a job starts: rank 0, before the ranks meet. Does nothing when this process has begun already.

    An earlier attempt without an end is closed as ``lost``. A disk that takes no more is a warning, not an error.

    Args:
        run: the run directory.
        step: that of the newest complete checkpoint, or 0.
    """
    run, me = Path(run), _identity()
    attempts = read(run)
    still_open = [attempt for attempt in attempts if attempt.outcome is None]
    if any(_Identity(attempt.job, attempt.restart, attempt.host, attempt.pid) == me for attempt in still_open):
        return
    for attempt in still_open:
        _write_end(run, attempt, "lost", "ended without a word: killed, or its node was lost", last_step(run))
    _write_begin(run, attempts, step)


def end(run: Path, outcome: str, reason: str, step: int | None = None) -> None:
    """Record how this job's attempt ended. The first end counts, later ones change nothing.

    Args:
        run: the run directory.
        outcome: one of `OUTCOMES`.
        reason: why, in one line.
        step: steps done; None: those that `metrics.jsonl` says.

    Raises:
        ValueError: an outcome that there is not.
    """
    if outcome not in OUTCOMES:
        raise ValueError(f"outcome={outcome}: allowed: {', '.join(OUTCOMES)}")
    run = Path(run)
    own = _own(read(run))
    if own is not None and own.outcome is None:
        _write_end(run, own, outcome, reason, step)


def read(run: Path) -> list[Attempt]:
    """All attempts of a run, oldest first. Lines that are torn or not understood are passed over."""
    try:
        lines = (Path(run) / _LOG).read_bytes().split(b"\n")
    except OSError:
        return []
    found: list[Attempt] = []
    for line in lines:
        try:
            record = json.loads(line)
            _take(found, record)
        except (ValueError, KeyError, TypeError, AttributeError):
            continue
    return found


def verdict(run: Path, limit: int, starting: bool = False) -> str | None:
    """Why the job should not be started again, or None where it may.

    Only attempts of one job count: this process's, or outside any job the last one's. Who submits again has changed
    something.

    Args:
        run: the run directory.
        limit: so many attempts in a row that ended at the same step are enough.
        starting: ask as a job that is being started, by an operator or by Slurm itself after a node was lost: that the
            last attempt was stopped, refused or done is then no reason.
    """
    attempts = [attempt for attempt in read(run) if attempt.outcome is not None]
    job = _identity().job or (attempts[-1].job if attempts else "")
    attempts = [attempt for attempt in attempts if attempt.job == job]
    return _judge(attempts, limit, starting)


def current(run: Path) -> Attempt | None:
    """This job's attempt, open or ended; None where its rank 0 has not begun one."""
    return _own(read(run))


def last_step(run: Path) -> int | None:
    """The step of the last complete line of a run's `metrics.jsonl`; None where there is none."""
    return next((line["step"] for line in reversed(tail(Path(run) / "metrics.jsonl")) if "step" in line), None)


def tail(path: Path) -> list[dict[str, Any]]:
    """The last whole lines of a file of JSON lines that someone else may be writing, oldest first.

    Lines that are torn, no objects, or of a `step` that is no number are passed over; none where there is no file.
    """
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _TAIL_BYTES))
            lines = file.read().split(b"\n")[:-1]  # what follows the last line break is not complete
    except OSError:
        return []
    found = []
    for line in lines:
        try:
            value = json.loads(line)
        except ValueError:
            continue
        if isinstance(value, dict) and isinstance(value.get("step", 0), int):
            found.append(value)
    return found


def newest(path: Path) -> dict[str, Any]:
    """The last of the lines that `tail` finds, or nothing."""
    lines = tail(path)
    return lines[-1] if lines else {}


def close(run: Path, code: int, limit: int, ended_by_slurm: bool = False, preempted: bool = False) -> int:
    """Close this job's attempt after its last process has ended, and decide; prints one line.

    Args:
        run: the run directory.
        code: the exit code of all ranks together, as srun gives it.
        limit: as for `verdict`.
        ended_by_slurm: the job was cancelled, requeued or preempted, so that Slurm knows what comes next.
        preempted: the job was told to make room and left before Slurm ended it, so that it is for us to start it again.

    Returns:
        ``REQUEUE``, ``LEAVE`` or ``DONE``.
    """
    run = Path(run)
    own = _own(read(run))
    outcome, reason = _from_code(code, own is not None)
    if (ended_by_slurm or preempted) and outcome in ("lost", "failed"):
        outcome, reason = "stopped", "Slurm ended the job: cancelled, requeued or preempted"
    if own is None:  # no rank came so far: without a record nothing would count such starts
        # one that is open may be that of another job at work, whose lock kept this one out
        _write_begin(run, read(run), last_step(run) or 0)
        own = _own(read(run))
    if own is not None and own.outcome is None:
        _write_end(run, own, outcome, reason, None)
        own = _own(read(run))
    if own is None or own.outcome is None:
        return _close_unwritten(outcome, reason, limit)
    room = preempted and own.outcome == "stopped"  # stopped by a preemption, not by somebody
    why = "Slurm says what comes next" if ended_by_slurm else verdict(run, limit, starting=room)
    told = f"attempt {own.number} at step {own.last_step}: {own.outcome}" + (f": {own.reason}" if own.reason else "")
    if own.outcome == "done":
        print(told, flush=True)
        return DONE
    print(f"{told}; starts again" if why is None else f"{told}; not started again: {why}", flush=True)
    return REQUEUE if why is None else LEAVE


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Close a job's attempt and say whether to start it again.")
    parser.add_argument("run", type=Path, help="run directory")
    parser.add_argument("--code", type=int, required=True, help="exit code of all ranks together")
    parser.add_argument("--limit", type=int, required=True, help="attempts in a row at the same step that are enough")
    ended = parser.add_mutually_exclusive_group()
    ended.add_argument("--ended-by-slurm", action="store_true", help="cancelled, requeued or preempted")
    ended.add_argument("--preempted", action="store_true", help="left to make room, before Slurm ended it")
    given = parser.parse_args(argv)
    try:
        return close(given.run, given.code, given.limit, given.ended_by_slurm, given.preempted)
    except Exception as error:  # nothing in the run directory may keep a job from starting again
        outcome, reason = _from_code(given.code, begun=True)
        return _close_unwritten(outcome, f"{reason} ({type(error).__name__}: {error})", given.limit)


def _close_unwritten(outcome: str, reason: str, limit: int) -> int:
    """Decide where the disk takes no line, or cannot be read: Slurm's own count then stands for the log."""
    me = _identity()
    again = outcome not in ("done", "refused", "stopped") and me.restart < limit
    tail = "starts again" if again else "not started again"
    print(f"job {me.job}: {outcome}: {reason}; its log cannot be written; restart {me.restart}: {tail}", flush=True)
    return REQUEUE if again else DONE if outcome == "done" else LEAVE


def _identity() -> _Identity:
    environment = os.environ
    if "SLURM_JOB_ID" in environment:
        job, restart = environment["SLURM_JOB_ID"], environment.get("SLURM_RESTART_COUNT", "0")
    else:
        local = environment.get("SUBMITIT_LOCAL_JOB_ID")
        job, restart = f"local-{local}" if local else "", "0"
    return _Identity(job, int(restart) if restart.isdigit() else 0, socket.gethostname(), os.getpid())


def _own(attempts: Sequence[Attempt]) -> Attempt | None:
    """This job's attempt: a process that was left over from an earlier start must not end a later one."""
    me = _identity()
    if not me.job:
        return attempts[-1] if attempts else None
    own = [attempt for attempt in attempts if (attempt.job, attempt.restart) == (me.job, me.restart)]
    return own[-1] if own else None


def _judge(attempts: Sequence[Attempt], limit: int, starting: bool) -> str | None:
    if not attempts:
        return None
    last = attempts[-1]
    if last.outcome in ("done", "refused", "stopped") and not starting:
        return {"done": "all steps are done", "refused": "what was refused will be refused again"}.get(
            last.outcome, "somebody stopped it"
        )
    same = 0
    for attempt in reversed(attempts):
        planned = attempt.outcome == "requeue" and attempt.last_step != attempt.first_step
        if attempt.outcome in ("done", "stopped") or attempt.last_step != last.last_step or planned:
            break
        same += 1
    if same < limit:
        return _without_gain(attempts)
    return (
        f"{same} attempts in a row ended at step {last.last_step} (fault.same_step={limit}); last: {last.outcome}: "
        f"{last.reason}; when the cause is mended, submit it again"
    )


def _without_gain(attempts: Sequence[Attempt]) -> str | None:
    """Why to stop a job that fails at one step and another but never comes to a new checkpoint."""
    last, starts = attempts[-1], 0
    for attempt in reversed(attempts):
        if attempt.outcome in ("done", "stopped") or attempt.first_step != last.first_step:
            break
        starts += 1
    if starts < FRUITLESS or (last.outcome == "requeue" and last.last_step != last.first_step):
        return None
    return (
        f"{starts} attempts in a row came to no checkpoint behind step {last.first_step}; last: {last.outcome}: "
        f"{last.reason}; lower train.checkpoint_every or mend the cause, and submit it again"
    )


def _from_code(code: int, begun: bool) -> tuple[str, str]:
    """The outcome of an attempt of which no rank has said how it ended."""
    when = "" if begun else " before training began"
    if code == 0:
        return "done", ""
    if code in (REQUEUE_CODE, 128 + signal.SIGUSR2):
        return "requeue", f"asked to make room{when}"
    if code == REFUSED_CODE and begun:
        return "refused", "its configuration or input cannot be used; the log says why"
    if code > 128:
        try:
            name = signal.Signals(code - 128).name
        except ValueError:
            name = f"code {code}"
        if code == 128 + signal.SIGTERM:  # what srun does to the others once one has ended
            return "lost", f"ranks ended by SIGTERM{when}, of which none said why; the log has what srun saw"
        return "lost", f"a rank ended by {name}{when}"
    return "failed", f"ended with code {code}{when}; the log says why"


def _take(found: list[Attempt], record: dict[str, Any]) -> None:
    """Add what one line says."""
    if record["event"] == "begin":
        names = {"number": int, "restart": int, "pid": int, "job": str, "host": str}
        values = {name: kind(record[name]) for name, kind in names.items()}
        found.append(Attempt(started=float(record["time"]), first_step=int(record["step"]), **values))
        return
    places = [i for i, attempt in enumerate(found) if attempt.number == int(record["number"])]
    if record["event"] != "end" or not places or found[places[-1]].outcome is not None:
        return
    old = found[places[-1]]
    values = {**vars(old), "outcome": str(record["outcome"]), "reason": str(record["reason"])}
    values.update(ended=max(old.started, float(record["time"])), last_step=int(record["step"]))
    found[places[-1]] = Attempt(**values)


def _write_begin(run: Path, before: Sequence[Attempt], step: int) -> None:
    number = before[-1].number + 1 if before else 1
    record = {"event": "begin", "number": number, "time": time.time(), "step": int(step)}
    _append(run, {**record, **_identity()._asdict()})


def _write_end(run: Path, attempt: Attempt, outcome: str, reason: str, step: int | None) -> None:
    if step is None:
        step = last_step(run)
    if step is None:
        step = attempt.first_step
    line = " ".join(str(reason).split())
    record = {"event": "end", "number": attempt.number, "time": time.time(), "outcome": outcome, "reason": line}
    _append(run, {**record, "step": int(step)})


def _append(run: Path, record: dict[str, Any]) -> None:
    """One line in one write, behind whatever a torn one left. Never raises for the disk's sake."""
    path = run / _LOG
    data = json.dumps(record).encode() + b"\n"
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = os.open(str(path), os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
        try:
            size = os.fstat(file).st_size
            if size and os.pread(file, 1, size - 1) != b"\n":
                data = b"\n" + data
            if os.write(file, data) != len(data):
                raise OSError("the disk took only a part of a line")
            os.fsync(file)
        finally:
            os.close(file)
    except OSError as error:
        print(f"warning: {path}: cannot record the {record['event']} of an attempt: {error}", file=sys.stderr)


if __name__ == "__main__":
    sys.exit(main())
