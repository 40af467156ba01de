"""Commands and probes in processes of their own, which may hang or crash without harm to who asks."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from megatron_elva.doctor.findings import one_line

_ROOT = Path(__file__).resolve().parents[2]
_START = (
    "import sys; sys.path[:] = [p for p in sys.path if p]; sys.path.append(sys.argv[1]); "  # not this working folder
    "from megatron_elva.doctor.probes import main; main(sys.argv[2])"
)
_MOST_BYTES = 1 << 20
UNANSWERED = "no answer within"
"""How the trouble of a process begins that did not end."""

_running: set[subprocess.Popen[bytes]] = set()


@dataclass(frozen=True)
class Answer:
    """What a process said.

    Attributes:
        out: its standard output.
        err: its standard error.
        trouble: why it did not end as it should, one line, or None.
    """

    out: str
    err: str
    trouble: str | None


def ask(command: Sequence[str], timeout: float) -> Answer:
    """Run a command to its end, or for ``timeout`` seconds at most; its children end with it."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:  # a pipe may be held open by a grandchild
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=err, start_new_session=True
            )
        except OSError as error:
            return Answer("", "", one_line(f"{command[0]} cannot be started: {error.strerror or error}"))
        trouble = _wait(process, timeout)
        said, complaint = _read(out), _read(err)
    if trouble is None and process.returncode != 0:
        trouble = _ended(process.returncode, complaint or said)
    return Answer(said, complaint, trouble)


def probe(name: str, timeout: float) -> dict[str, Any]:
    """Run a probe of `megatron_elva.doctor.probes` in a process of its own.

    Args:
        name: a key of `megatron_elva.doctor.probes.PROBES`.
        timeout: seconds.

    Returns:
        The last facts that it told, and with the key ``error`` why there are no more of them, one line.
    """
    alike = [flag for flag, set_ in (("-I", sys.flags.isolated), ("-S", sys.flags.no_site)) if set_]
    answer = ask([sys.executable, *alike, "-c", _START, str(_ROOT), name], timeout)
    facts: dict[str, Any] = {}
    for line in answer.out.splitlines():
        with contextlib.suppress(ValueError):
            facts = json.loads(line)
    if answer.trouble is not None or not facts:
        facts["error"] = answer.trouble or "it ended without a word"
    return facts


def _wait(process: subprocess.Popen[bytes], timeout: float) -> str | None:
    _running.add(process)
    try:
        process.wait(timeout)
    except subprocess.TimeoutExpired:
        _kill(process)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(2)  # what waits for a dead driver or file system cannot be killed, and is left behind
        return f"{UNANSWERED} {timeout:g} s"
    finally:
        _running.discard(process)
    return None


def end_all() -> None:
    """Kill what still runs: the user does not want to wait for it."""
    for process in tuple(_running):
        _kill(process)


def _kill(process: subprocess.Popen[bytes]) -> None:
    with contextlib.suppress(OSError):
        os.killpg(process.pid, signal.SIGKILL)


def _ended(code: int, said: str) -> str:
    """What a process died of, with the last line that it wrote."""
    last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
    try:
        how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
    except ValueError:
        how = f"killed by signal {-code}"
    return one_line(f"{how}: {last}" if last else how)


def _read(file: IO[bytes]) -> str:
    file.seek(0)
    return file.read(_MOST_BYTES).decode(errors="replace")
