"""A process that hangs, crashes or says nothing is told as such, and leaves nothing behind."""

from __future__ import annotations

import sys
import time

import pytest

from megatron_elva.doctor.asking import ask, probe
from megatron_elva.doctor.findings import one_line
from tests.doctor.machines import write_package

TORCH = "__version__ = '9.0'\nclass version: cuda = None\nclass cuda:\n    is_available = staticmethod(lambda: False)\n"


@pytest.fixture
def site(tmp_path, monkeypatch):
    """A folder of packages that come before the installed ones."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


def test_the_end_of_a_process_is_told():
    good = ask([sys.executable, "-ISc", "print('said')"], 30)
    assert (good.out, good.trouble) == ("said\n", None)
    assert ask([sys.executable, "-ISc", "raise SystemExit('why')"], 30).trouble == "exit code 1: why"
    assert ask(["/nowhere/at/all"], 30).trouble == "/nowhere/at/all cannot be started: No such file or directory"
    killed = ask([sys.executable, "-ISc", "import os; os.kill(os.getpid(), 11)"], 30)
    assert killed.trouble == "killed by SIGSEGV"


def test_a_process_that_hangs_ends_with_its_children(tmp_path):
    beat = tmp_path / "beat"
    child = f"import time\nwhile True:\n    open({str(beat)!r}, 'w').close(); time.sleep(0.02)"
    began = time.monotonic()
    parent = f"import subprocess, sys; subprocess.run([sys.executable, '-ISc', {child!r}])"
    assert ask([sys.executable, "-ISc", parent], 1.0).trouble == "no answer within 1 s"
    assert time.monotonic() - began < 10
    assert beat.exists()
    time.sleep(0.2)
    beat.unlink()
    time.sleep(0.3)
    assert not beat.exists()


def test_facts_told_before_a_crash_are_kept(site):
    write_package(site, "torch", TORCH)
    write_package(site, "transformer_engine", "__version__ = '2.17.1'")
    write_package(site, "transformer_engine.pytorch")
    write_package(site, "triton", "__version__ = '9.9'\nprint('noise on stdout')")
    write_package(site, "triton.backends", "import os; os.kill(os.getpid(), 6)")
    assert probe("te", 60) == {"imported": True, "version": "2.17.1", "libraries": {}}
    assert probe("triton", 60) == {"version": "9.9", "error": "killed by SIGABRT: noise on stdout"}


def test_a_probe_that_hangs_raises_or_leaves_is_told(site):
    write_package(site, "torch", "import time; time.sleep(600)")
    assert probe("torch", 1.0) == {"error": "no answer within 1 s"}
    write_package(site, "torch", "raise SystemExit(0)")
    assert probe("torch", 60) == {"error": "SystemExit: 0"}
    write_package(site, "torch", "import os; os._exit(0)")
    assert probe("torch", 60) == {"error": "it ended without a word"}


def test_the_working_folder_shadows_nothing(tmp_path, monkeypatch):
    write_package(tmp_path, "triton", "__version__ = 'of the working folder'")
    monkeypatch.chdir(tmp_path)
    assert "of the working folder" not in str(probe("triton", 60))


def test_the_apex_of_pypi_is_told_from_that_of_nvidia(site):
    write_package(site, "torch", TORCH)
    write_package(site, "apex", "from pyramid.session import UnencryptedCookieSessionFactoryConfig")
    write_package(site, "apex.lib")
    foreign = probe("apex", 60)
    assert foreign["nvidia"] is False and foreign["guarded"] is True
    assert foreign["import_error"][0] == "ModuleNotFoundError"

    write_package(site, "apex", "raise SyntaxError('written for Python 2')")
    assert probe("apex", 60)["guarded"] is False  # megatron-core guards against ImportError alone

    write_package(site, "apex")
    write_package(site, "apex.optimizers")
    write_package(site, "apex.multi_tensor_apply")
    write_package(site, "amp_C")
    assert probe("apex", 60) == {"nvidia": True, "folder": str(site / "apex"), "extensions": ["amp_C"]}


def test_a_long_error_becomes_one_line_with_its_begin_and_end():
    line = one_line("first\n" + "x" * 1000 + "\nlast")
    assert line.startswith("first x") and line.endswith("x last") and len(line) <= 240
