"""The copy of the code in a run directory, from a small git tree."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import snapshot


def git(folder: Path, *command: str) -> str:
    who = ["-c", "user.name=n", "-c", "user.email=e@example.org"]
    return subprocess.run(["git", *who, "-C", str(folder), *command], check=True, capture_output=True, text=True).stdout


@pytest.fixture
def tree(tmp_path):
    """A checkout with a change, a new file, a deleted one, an ignored folder, a link and an executable."""
    root = tmp_path / "tree"
    (root / "megatron_elva").mkdir(parents=True)
    (root / "megatron_elva" / "__init__.py").write_text("VALUE = 1\n")
    (root / "gone.py").write_text("")
    (root / ".gitignore").write_text("runs/\n")
    (root / "go.sh").write_text("#!/bin/sh\n")
    (root / "go.sh").chmod(0o755)
    (root / "link.py").symlink_to("megatron_elva/__init__.py")
    git(root, "init", "-q", "-b", "main")
    git(root, "add", ".")
    git(root, "commit", "-q", "-m", "first")
    (root / "megatron_elva" / "__init__.py").write_text("VALUE = 2\n")
    (root / "new file.py").write_text("new\n")
    (root / "gone.py").unlink()
    (root / "runs").mkdir()
    (root / "runs" / "large.bin").write_text("data")
    return root


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}


def test_the_tree_as_it_is_now(tree, tmp_path):
    run = tmp_path / "run"
    planned = snapshot.planned(run, True, tree)
    code = snapshot.take(run, True, tree)
    commit = git(tree, "rev-parse", "HEAD").strip()
    assert code.path == planned
    assert code.path.parent == run / "code"
    assert code.path.name.startswith(commit[:12] + "-")
    source = {".gitignore", "go.sh", "link.py", "megatron_elva/__init__.py", "new file.py"}
    assert names(code.path) == source | {"git.json", "git.diff"}
    assert (code.path / "megatron_elva" / "__init__.py").read_text() == "VALUE = 2\n"
    assert os.access(code.path / "go.sh", os.X_OK)
    for folder in (run / "code", code.path):
        about = json.loads((folder / "git.json").read_text())
        assert (about["commit"], about["branch"], about["dirty"]) == (commit, "main", True)
        assert (about["snapshot"], about["source"]) == (str(code.path), str(tree))
        diff = (folder / about["diff"]).read_text()
        assert "+VALUE = 2" in diff
        assert "gone.py" in diff
    assert "changed" in code.line


def test_named_by_content(tree, tmp_path):
    run = tmp_path / "run"
    first = snapshot.take(run, True, tree).path
    before = (first / "go.sh").stat().st_ino
    assert snapshot.take(run, True, tree).path == first
    assert (first / "go.sh").stat().st_ino == before  # not copied again
    (tree / "megatron_elva" / "__init__.py").write_text("VALUE = 3\n")
    second = snapshot.take(run, True, tree).path
    assert second != first
    assert (first / "megatron_elva" / "__init__.py").read_text() == "VALUE = 2\n"  # a job in the queue may need it
    assert [path.name for path in run.glob("code/.*")] == []


def test_a_copy_that_broke_off_is_no_snapshot(tree, tmp_path, monkeypatch):
    run = tmp_path / "run"

    def full(*arguments):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(snapshot.shutil, "copy2", full)
        with pytest.raises(OSError, match="No space"):
            snapshot.take(run, True, tree)
    code = snapshot.take(run, True, tree)
    assert (code.path / "go.sh").is_file()


def test_without_a_copy_commit_and_diff_are_recorded(tree, tmp_path):
    code = snapshot.take(tmp_path / "run", False, tree)
    assert code.path == tree
    assert names(tmp_path / "run" / "code") == {"git.json", "git.diff"}
    about = json.loads((tmp_path / "run" / "code" / "git.json").read_text())
    assert about["snapshot"] is None
    assert about["commit"]


def test_what_is_no_checkout_is_used_where_it_is(tree, tmp_path):
    """An installed package, also one in a virtual environment below somebody's checkout."""
    plain = tmp_path / "plain"
    (plain / "megatron_elva").mkdir(parents=True)
    (plain / "megatron_elva" / "__init__.py").touch()
    installed = tree / "runs" / "site-packages"
    (installed / "megatron_elva").mkdir(parents=True)
    (installed / "megatron_elva" / "__init__.py").touch()
    for root in (plain, installed):
        code = snapshot.take(tmp_path / "run", True, root)
        assert code.path == root
        assert code.about["commit"] is None
        assert "no git checkout, so no snapshot is taken" in code.line


def test_large_files_that_git_does_not_know_are_left_out(tree, tmp_path, monkeypatch):
    monkeypatch.setattr(snapshot, "_MAX_UNTRACKED", 1000)
    (tree / "videos.tar").write_bytes(bytes(1001))
    code = snapshot.take(tmp_path / "run", True, tree)
    assert not (code.path / "videos.tar").exists()
    assert code.about["skipped"] == ["videos.tar"]


def test_a_job_imports_the_snapshot_wherever_it_is_started(tree, tmp_path):
    code = snapshot.take(tmp_path / "run", True, tree)
    (tree / "megatron_elva" / "__init__.py").write_text("VALUE = 9\n")
    environment = {**os.environ, "PYTHONPATH": str(code.path), "PYTHONSAFEPATH": "1"}
    call = [sys.executable, "-c", "import megatron_elva; print(megatron_elva.VALUE)"]
    done = subprocess.run(call, cwd=tree, env=environment, capture_output=True, text=True, check=True)
    assert done.stdout == "2\n"


def test_runs_in_the_tree_are_no_code(tree):
    """Where git does not ignore them, each copy would hold all copies before, and no two would be alike."""
    (tree / "linked").symlink_to("megatron_elva")
    run = tree / "experiments" / "mine"
    first = snapshot.take(run, True, tree)
    (run / "metrics.jsonl").write_text("{}\n")
    assert snapshot.planned(run, True, tree) == snapshot.take(run, True, tree).path == first.path
    other = snapshot.take(tree / "experiments" / "other", True, tree)
    assert not [name for name in names(other.path) if name.startswith("experiments")]
    assert other.about["skipped"] == ["linked"]
