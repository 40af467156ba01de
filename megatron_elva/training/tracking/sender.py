"""The process beside training that sends to MLflow; started by `Tracker`, on each node one.

By hand it sends what was left over, such as an evaluation or an export made since, and ends:

python -m megatron_elva.training.tracking.sender runs/mine --once
"""

from __future__ import annotations

import argparse
import contextlib
import logging
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from megatron_elva.config.build import load
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config
from megatron_elva.training import attempts
from megatron_elva.training.runs import METRICS
from megatron_elva.training.stop import ignore_in_child
from megatron_elva.training.tracking import about
from megatron_elva.training.tracking.answering import Answering
from megatron_elva.training.tracking.sending import Sending
from megatron_elva.training.tracking.state import FOLDER, RunDeletedError, locked, without_password
from megatron_elva.training.tracking.system import Sampler

NOT_SENT = 3
"""Exit code when something is left to send."""

_NICE = 10  # a tenth of a full core: at 19 the last lines of a run would wait long on a busy machine
_SEND_EVERY_S = 3.0
_LONGEST_PAUSE_S = 30.0
_START_S = 15.0
_END_PAUSE_S = 3.0
_LOST_S = 30.0


class Inbox:
    """Word from the trainer: its standard input says the end, and its closing that there is no trainer any more.

    Args:
        parent: process number of the trainer.
    """

    def __init__(self, parent: int) -> None:
        self._parent = parent
        self._text = b""

    def wait(self, seconds: float) -> str | None:
        """The outcome that the trainer says, ``lost`` where it died without a word, None while it is at work."""
        until = time.monotonic() + seconds
        while True:
            # a process that the trainer has forked may hold the other end of the pipe open after its death
            if os.getppid() != self._parent:
                return self._outcome()
            ready, _, _ = select.select([0], [], [], max(0.0, min(1.0, until - time.monotonic())))
            if ready:
                part = os.read(0, 4096)
                self._text += part
                if not part or b"\n" in self._text:
                    return self._outcome()
            if time.monotonic() >= until:
                return None

    def _outcome(self) -> str:
        word, _, outcome = self._text.decode(errors="replace").strip().partition(" ")
        return outcome if word == "finish" and outcome in about.STATUS else "failed" if word else "lost"


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    given = _arguments(argv)
    _settle_in(by_hand=given.once)
    run = Path(given.run).absolute()
    try:
        config = load(run / "config.yaml")
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        return _once(run, config) if given.once else _beside_training(run, config, given)
    except RunDeletedError as error:
        print(f"{time.strftime('%F %T')} {error}; nothing more is sent", flush=True)
        return 0


def _beside_training(run: Path, config: Config, given: argparse.Namespace) -> int:
    """Until the trainer ends. Returns the exit code."""
    sampler = Sampler(run, given.node, config.tracking.system_every_s)
    if config.tracking.system_every_s > 0:
        sampler.start()
    inbox = Inbox(given.parent)
    try:
        if given.send:
            return _serve(run, config, given.world, inbox)
        while inbox.wait(3600) is None:
            pass
        return 0
    finally:
        sampler.close()
        print(f"{time.strftime('%F %T')} ends; used {time.process_time():.1f} s of CPU", flush=True)


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="sender", description="Send what a run directory holds to MLflow.")
    parser.add_argument("run", help="run directory of one stage")
    parser.add_argument("--once", action="store_true", help="send what is not sent yet, and end")
    inside = parser.add_argument_group("given by the trainer")
    inside.add_argument("--node", type=int, default=0)
    inside.add_argument("--parent", type=int, default=0)
    inside.add_argument("--world", type=int)
    inside.add_argument("--send", action="store_true")
    return parser.parse_args(argv)


def _settle_in(by_hand: bool) -> None:
    """Be a process that disturbs nobody and that no signal to the job ends before it has sent its last."""
    if not by_hand:
        ignore_in_child()
        os.nice(_NICE)
    defaults = {
        "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # its own retries take minutes and cannot be broken off; ours can
        "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
        "MLFLOW_DISABLE_TELEMETRY": "true",
        "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
        "GIT_PYTHON_REFRESH": "quiet",
    }
    for name, value in defaults.items():
        os.environ.setdefault(name, value)
    logging.basicConfig(level=logging.WARNING)
    for name in ("alembic", "mlflow", "urllib3"):
        logging.getLogger(name).setLevel(logging.ERROR)


def _serve(run: Path, config: Config, world: int | None, inbox: Inbox) -> int:
    """Send until the trainer says the end or dies, and then for so long as `tracking.flush_s`."""
    outcome = inbox.wait(0)
    with contextlib.ExitStack() as stack:
        # an earlier attempt's process may still be sending
        while not stack.enter_context(locked(run / FOLDER / "lock", wait=False)):
            if outcome is not None:
                return NOT_SENT
            outcome = inbox.wait(1.0)
        outcome = outcome or _first_step(run, inbox)
        sending, answering = Sending(run, config, world), Answering(run, config)
        pause = 0.0
        while outcome is None:
            answering.go_on()
            pause = _try(sending.send, pause)
            outcome = inbox.wait(pause or _SEND_EVERY_S)
        if outcome == "lost":
            outcome = about.outcome_of(run, config.train.steps)
        return _end(sending, answering, outcome, config.tracking.flush_s)


def _end(sending: Sending, answering: Answering, outcome: str, seconds: float) -> int:
    """Send the last within a time that holds whatever the server does. Returns the exit code."""
    last = threading.Timer(seconds + _LOST_S, os._exit, [NOT_SENT])  # should a request hang on
    last.daemon = True
    last.start()
    until = time.monotonic() + seconds
    sent = _try_until(until, lambda: sending.send_end(outcome))
    if answering.last(until) and sent:
        sent = _try_until(until, sending.send_files)
    return 0 if sent else NOT_SENT


def _try_until(until: float, action: Callable[[], None]) -> bool:
    """Try again until it goes well, or there is no time left. Returns whether it went well."""
    pause = 0.0
    while (pause := _try(action, pause)) and time.monotonic() < until:
        time.sleep(min(pause, _END_PAUSE_S))
    return not pause


def _first_step(run: Path, inbox: Inbox) -> str | None:
    """Leave the CPU to the start of training: wait for its first line, but not for long."""
    path = run / METRICS
    size = path.stat().st_size if path.is_file() else 0
    until = time.monotonic() + _START_S
    while (outcome := inbox.wait(0.5)) is None and time.monotonic() < until:
        if path.is_file() and path.stat().st_size > size:
            break
    return outcome


def _try(action: Callable[[], None], pause: float) -> float:
    """Do what talks to the server. Returns the pause before the next try; 0 when it went well.

    Raises:
        RunDeletedError: there is nothing to send to any more.
    """
    try:
        action()
    except RunDeletedError:
        raise
    except Exception as error:  # MLflow raises its own, those of requests, of SQLAlchemy and of the disk
        if not pause:
            text = without_password(" ".join(str(error).split()))[:300]
            print(f"{time.strftime('%F %T')} not sent, tries again: {type(error).__name__}: {text}", flush=True)
        return min(2 * pause, _LONGEST_PAUSE_S) if pause else 1.0
    if pause:
        print(f"{time.strftime('%F %T')} sends again", flush=True)
    return 0.0


def _once(run: Path, config: Config) -> int:
    """Send what is left over. Returns the exit code."""
    with locked(run / FOLDER / "lock", wait=False) as alone:
        if not alone:
            print(f"error: {run}: is being sent by another process", file=sys.stderr)
            return 2
        noted = attempts.read(run)
        outcome, ended = about.outcome_of(run, config.train.steps), noted[-1].ended if noted else None
        sending = Sending(run, config, None)
        if _try_until(time.monotonic() + config.tracking.flush_s, lambda: sending.send_end(outcome, ended)):
            return 0
    print(f"error: {run}: not sent within tracking.flush_s={config.tracking.flush_s:g} seconds", file=sys.stderr)
    return NOT_SENT


if __name__ == "__main__":
    sys.exit(main())
