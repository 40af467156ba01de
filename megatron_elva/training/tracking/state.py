"""What tracking keeps in `run_dir/mlflow`: which MLflow run this is, and how far sending came."""

from __future__ import annotations

import fcntl
import json
import os
import re
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from megatron_elva.config.schema import Config
from megatron_elva.training.runs import write_atomic

FOLDER = "mlflow"
_PASSWORD = re.compile(r"//[^/\s]*@")


class RunDeletedError(Exception):
    """Somebody deleted the run on the server, so nothing more is to be sent."""


def home(config: Config, run: Path) -> Path:
    """The folder that the local store lies in: that of the run, or of the run of all stages."""
    return run.parent.parent if config.tracking.nested else run.parent


def explicit_uri(config: Config) -> str | None:
    """The tracking server that the config or the environment names, or None."""
    return config.tracking.uri or os.environ.get("MLFLOW_TRACKING_URI") or None


def without_password(text: str) -> str:
    """A text as it may stand in files and on pages: without user and password in its URIs."""
    return _PASSWORD.sub("//", text)


class State:
    """The MLflow run of a run directory.

    A run that is to be sent elsewhere than before, and a copy of another run's directory, become new runs with the
    whole curve.

    Args:
        run: the run directory, absolute.
        uri: the server that is named now, or None.

    Attributes:
        key: found again by it when an answer of the server was lost; a tag of the run.
        started: when tracking began, in milliseconds since 1970.
        uri: the server that was named, without a password; None for the local store.
        run_id: of the MLflow run; None as long as there is none.
        parent_id: of the MLflow run above it, or None.
        offsets: bytes of each file whose lines are sent.
        files: modification time and size of each file as it was sent.
    """

    def __init__(self, run: Path, uri: str | None) -> None:
        self.run = run
        self.folder = run / FOLDER
        self.folder.mkdir(parents=True, exist_ok=True)
        named = None if uri is None else without_password(uri)
        known = _read(self.folder / "run.json")
        if self._is_copy(known) or (named is not None and named != known.get("uri")):
            known = {}
        self.uri = named if named is not None else known.get("uri")
        self.key: str = known.get("key") or uuid.uuid4().hex
        self.started: int = known.get("started") or int(time.time() * 1000)
        self.run_id: str | None = known.get("run_id")
        self.parent_id: str | None = known.get("parent_id")
        sent = _read(self.folder / "sent.json") if self.run_id else {}
        sent = sent if sent.get("run_id") == self.run_id else {}
        offsets, files = sent.get("offsets"), sent.get("files")
        self.offsets: dict[str, int] = offsets if isinstance(offsets, dict) else {}
        self.files: dict[str, list[int]] = files if isinstance(files, dict) else {}
        self.save()

    def _is_copy(self, known: dict[str, Any]) -> bool:
        """Whether these notes belong to a run directory elsewhere that still has them."""
        place = known.get("place")
        if not place or not Path(place).is_dir() or self.run.samefile(place):
            return False
        return bool(_read(Path(place, FOLDER, "run.json")).get("key") == known.get("key"))

    def forget(self) -> None:
        """The server does not know the run (any more): make a new one and send everything."""
        self.run_id, self.parent_id, self.key = None, None, uuid.uuid4().hex
        self.offsets, self.files = {}, {}
        self.save()

    def save(self) -> None:
        """Write which run this is."""
        fields = ("key", "started", "uri", "run_id", "parent_id")
        notes = {"place": str(self.run), **{name: getattr(self, name) for name in fields}}
        write_atomic(self.folder / "run.json", json.dumps(notes, indent=1))

    def save_sent(self) -> None:
        """Write how far sending came."""
        notes = {"run_id": self.run_id, "offsets": self.offsets, "files": self.files}
        write_atomic(self.folder / "sent.json", json.dumps(notes, indent=1))


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


@contextmanager
def locked(path: Path, wait: bool = True) -> Iterator[bool]:
    """Hold a lock file; gives whether it is held. Where the file system has no locks, it counts as held."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError:
            yield False
            return
        except OSError:
            pass
        yield True
