"""Which code a run runs: a copy of the tree as it is at submission, with its git commit and what differs from it."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import time
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from megatron_elva.training.runs import write_atomic

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "megatron_elva"
_MAX_UNTRACKED = 16 * 2**20
"""Larger files that git does not know are data somebody left lying, not source."""


@dataclass(frozen=True)
class Code:
    """The code of a job.

    Attributes:
        path: folder that the job imports from.
        about: what is recorded: ``commit``, ``branch``, ``dirty``, ``diff``, ``snapshot``, ``source``, ``version``.
    """

    path: Path
    about: dict[str, Any]

    @property
    def line(self) -> str:
        """One line for people."""
        commit = self.about["commit"]
        if commit is None:
            return f"{self.path} (version {self.about['version']}; no git checkout, so no snapshot is taken)"
        changed = ", changed" if self.about["dirty"] else ""
        return f"{self.path} (commit {commit[:12]}{changed})"


def take(run: Path, copy: bool, root: Path = ROOT) -> Code:
    """Record the code in a run directory, and copy it there.

    The copy is named by its content: the same code is copied once, and what an older job in the queue needs stays.

    Args:
        run: the run directory; ``code/`` in it is written to.
        copy: make a copy; otherwise the job imports from ``root``, and only commit and diff are recorded.
        root: the tree.

    Returns:
        What the job is to import from. Where ``root`` is no git checkout, that is ``root`` itself.
    """
    folder = run.absolute() / "code"
    folder.mkdir(parents=True, exist_ok=True)
    about: dict[str, Any] = {"source": str(root), "version": _version(), "time": time.time(), "snapshot": None}
    files = _files(root)
    if files is None:
        about |= {"commit": None, "branch": None, "dirty": None, "diff": None, "skipped": []}
        write_atomic(folder / "git.json", json.dumps(about, indent=1))
        return Code(root, about)
    kept, skipped = files
    diff = _git(root, "diff", "HEAD", "--binary", "--no-color", "--no-ext-diff", "--", ".") or b""
    about |= {
        "commit": _line(root, "rev-parse", "HEAD"),
        "branch": _line(root, "rev-parse", "--abbrev-ref", "HEAD"),
        "dirty": bool(_git(root, "status", "--porcelain", "--", ".")),
        "diff": "git.diff",
        "skipped": skipped,
    }
    if copy:
        path = folder / f"{(about['commit'] or 'none')[:12]}-{_digest(root, kept)}"
        about["snapshot"] = str(path)
        if not path.is_dir():
            _copy(root, kept, path, about, diff)
    (folder / "git.diff").write_bytes(diff)
    write_atomic(folder / "git.json", json.dumps(about, indent=1))
    return Code(path if copy else root, about)


def planned(run: Path, copy: bool, root: Path = ROOT) -> Path:
    """Where `take` would let the job import from; writes nothing."""
    files = _files(root) if copy else None
    if files is None:
        return root
    commit = _line(root, "rev-parse", "HEAD") or "none"
    return run.absolute() / "code" / f"{commit[:12]}-{_digest(root, files[0])}"


def _files(root: Path) -> tuple[list[str], list[str]] | None:
    """Tracked files and those that git would add, and what is left out; None where git has no tree.

    Left out are what is too large, runs, links to folders and submodules.
    """
    tracked = _git(root, "ls-files", "-z", "--cached")
    others = _git(root, "ls-files", "-z", "--others", "--exclude-standard")
    if tracked is None or others is None or f"{PACKAGE}/__init__.py" not in tracked.decode().split("\0"):
        return None
    known = set(tracked.decode().split("\0"))
    runs: dict[Path, bool] = {}
    kept: list[str] = []
    skipped: list[str] = []
    for name in sorted({*known, *others.decode().split("\0")} - {""}):
        path = root / name
        if name not in known and _in_a_run(Path(name), root, runs):
            continue  # with its own copies of the code, which would be copied again and again
        try:
            large = path.stat().st_size > _MAX_UNTRACKED and name not in known
        except OSError:
            continue  # deleted
        (skipped if large or not path.is_file() else kept).append(name)
    return kept, skipped


def _in_a_run(name: Path, root: Path, known: dict[Path, bool]) -> bool:
    """Whether a file lies in a run directory, as where runs are written to a folder that git does not ignore."""
    for folder in name.parents:
        if folder not in known:
            known[folder] = (root / folder / "code" / "git.json").is_file()
        if known[folder]:
            return True
    return False


def _digest(root: Path, files: list[str]) -> str:
    digest = hashlib.sha256()
    for name in files:
        data = (root / name).read_bytes()
        digest.update(f"{name}\0{os.access(root / name, os.X_OK)}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()[:12]


def _copy(root: Path, files: list[str], path: Path, about: dict[str, Any], diff: bytes) -> None:
    """Copy to a folder of another name first: a snapshot is there as a whole or not at all."""
    part = path.with_name(f".{path.name}.{os.getpid()}")
    for name in files:
        (part / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root / name, part / name)  # what a link names, for its target may lie outside
    (part / "git.json").write_text(json.dumps(about, indent=1))
    (part / "git.diff").write_bytes(diff)
    try:
        part.rename(path)
    except OSError:
        shutil.rmtree(part, ignore_errors=True)  # another submission was faster
        if not path.is_dir():
            raise


def _git(root: Path, *command: str) -> bytes | None:
    """Output of git; None where it fails, or there is none."""
    # the user is about to run this very tree, whoever owns it
    call = ["git", "-c", f"safe.directory={root}", "-C", str(root), *command]
    try:
        done = subprocess.run(call, capture_output=True, check=False, timeout=120)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None


def _line(root: Path, *command: str) -> str | None:
    out = _git(root, *command)
    return out.decode().strip() if out is not None else None


def _version() -> str | None:
    try:
        return version(PACKAGE)
    except PackageNotFoundError:
        return None
