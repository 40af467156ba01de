"""The script around the figures of one GPU: what it runs, skips, repeats and reports, with a stand-in for Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PIECES = ["install", "same_answers", "fp8_curves", "training_speed", "prefill", "profile_step", "decode"]
PYTHON = """#!/usr/bin/env bash
# what the script asks of Python: whether a module is there, the state, a package, a piece
here=$(dirname "$0")
[ "$1" = -u ] && shift
case "$1 $2" in
  "-c "*) for name in $LACKING; do
            [[ "$2" == *"'$name'"* ]] && ! [ -e "$SITE/wheels/$name" ] && exit 1
          done; exit 0 ;;
  "-m pip") echo "$*" >>"$here/pip"; touch "$SITE/wheels/av" ;;
  "-m benchmarks.gpu.state") echo "${CODE:-c0de}"; echo "GPU of $3" ;;
  "-m benchmarks.gpu."*)
    piece=${2##*.}
    echo "$piece $*" >>"$here/ran"
    echo "BUNDLE_SEEN=${BUNDLE_SEEN:-}" >>"$here/seen"
    [ "$piece" = "${HANGS:-}" ] && sleep 60
    out=${*: -1}
    status=ok; [[ " ${FAILS:-} " == *" $piece "* ]] && status=failed
    printf '{\\n  "code": "%s",\\n  "device": "GPU of %s",\\n  "status": "%s"\\n}\\n' "${CODE:-c0de}" cuda $status \\
      >"$out/gpu_$piece.json"
    [ $status = ok ] ;;
  *) exit 3 ;;
esac
"""


@pytest.fixture
def script(tmp_path):
    """Runs the script of a copy of the repository that has nothing but it: arguments, and what the environment adds."""
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "benchmarks" / "gpu.sh", tmp_path / "benchmarks")
    python = tmp_path / "python"
    python.write_text(PYTHON)
    python.chmod(0o755)
    clean = {k: v for k, v in os.environ.items() if k in ("PATH", "HOME", "LANG")}

    def run(*arguments, **environment):
        (tmp_path / "ran").unlink(missing_ok=True)
        done = subprocess.run(
            ["bash", str(tmp_path / "benchmarks" / "gpu.sh"), *arguments], capture_output=True, text=True, timeout=60,
            env={**clean, "PYTHON": str(python), "SITE": str(tmp_path / "site"), **environment},
        )  # fmt: skip
        file = tmp_path / "ran"
        done.ran = [line.split()[0] for line in file.read_text().splitlines()] if file.exists() else []
        return done

    run.folder = tmp_path
    return run


def test_every_piece_is_a_module_and_has_a_line(script):
    listed = script("list")
    assert listed.returncode == 0 and not listed.ran
    assert [line.split()[0] for line in listed.stdout.splitlines()] == PIECES
    assert all(len(line.split()) > 3 for line in listed.stdout.splitlines())
    assert all((ROOT / "benchmarks" / "gpu" / f"{piece}.py").is_file() for piece in PIECES)


def test_all_pieces_run_once_and_again_only_by_force(script):
    first = script()
    assert (first.returncode, first.ran) == (0, PIECES)
    assert sorted(p.name for p in (script.folder / "benchmarks" / "results").iterdir()) == sorted(
        f"gpu_{piece}.json" for piece in PIECES
    )
    again = script()
    assert (again.returncode, again.ran) == (0, [])
    assert again.stdout.count("done before") == len(PIECES)
    assert script("prefill", "decode", FORCE="1").ran == ["prefill", "decode"]


def test_another_code_or_device_is_measured_anew(script):
    assert script("prefill").ran == ["prefill"]
    assert script("prefill", CODE="other").ran == ["prefill"]
    assert script("prefill", CODE="other").ran == []
    file = script.folder / "benchmarks" / "results" / "gpu_prefill.json"
    file.write_text(file.read_text().replace("GPU of cuda", "another GPU"))
    assert script("prefill", CODE="other").ran == ["prefill"]


def test_a_piece_that_fails_is_named_at_the_end_and_repeated(script):
    failing = script(FAILS="fp8_curves prefill")
    assert (failing.returncode, failing.ran) == (1, PIECES)
    ends = failing.stderr.splitlines()[-2:]
    assert [line.split(",")[0] for line in ends] == ["FAILED: fp8_curves", "FAILED: prefill"]
    again = script()
    assert (again.returncode, again.ran) == (0, ["fp8_curves", "prefill"])


def test_a_piece_that_takes_too_long_is_stopped(script):
    slow = script("install", "prefill", "decode", HANGS="prefill", LIMIT="2")
    assert (slow.returncode, slow.ran) == (1, ["install", "prefill", "decode"])
    assert "FAILED: prefill" in slow.stderr and "exit status 124" in slow.stdout


def test_an_unknown_piece_runs_nothing(script):
    wrong = script("prefil", "decode")
    assert (wrong.returncode, wrong.ran) == (2, [])
    assert "prefil: no such piece" in wrong.stderr


def test_a_bundle_is_installed_and_its_environment_used(script):
    bundle = script.folder / "bundle"
    bundle.mkdir()
    (bundle / "install_gpu_bundle.sh").write_text('mkdir -p "$2" && echo "export BUNDLE_SEEN=$1" > "$2/env.sh"\n')
    assert script("install", BUNDLE=str(bundle)).returncode == 0
    assert (script.folder / "seen").read_text() == f"BUNDLE_SEEN={bundle}\n"
    missing = script("install", BUNDLE=str(script.folder / "nowhere"), FORCE="1")
    assert (missing.returncode, missing.ran) == (1, [])
    assert "cannot be installed" in missing.stderr


def test_missing_packages_come_from_a_folder_of_wheels(script):
    without = script("install", LACKING="hydra")
    assert (without.returncode, without.ran) == (1, [])
    assert "hydra-core is missing" in without.stderr
    some = script("install", LACKING="av")  # only one piece needs it
    assert some.returncode == 0 and "av is missing" in some.stderr
    (script.folder / "pip").unlink(missing_ok=True)
    found = script("install", LACKING="av", WHEELS="/wheels", FORCE="1")
    assert found.returncode == 0 and "missing" not in found.stderr
    asked = (script.folder / "pip").read_text()
    assert "--no-index" in asked and "--find-links /wheels" in asked and asked.rstrip().endswith(" av")


def test_a_rehearsal_has_tiny_sizes_and_leaves_the_results_alone(script):
    assert script("prefill", DEVICE="cpu").ran == ["prefill"]
    assert not (script.folder / "benchmarks" / "results").exists()
    assert (script.folder / "runs" / "gpu_rehearsal" / "gpu_prefill.json").is_file()
    ran = (script.folder / "ran").read_text()
    assert "--device cpu" in ran and "--model tiny" in ran


def test_stored_figures_have_their_origin_and_none_is_of_a_cpu():
    for file in (ROOT / "benchmarks" / "results").glob("gpu_*.json"):
        stored = json.loads(file.read_text())
        assert {"command", "date", "commit", "code", "device", "versions", "status"} <= set(stored)
        assert stored["device_kind"] == "cuda"
