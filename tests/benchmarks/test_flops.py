"""The table of operations, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import flops

RESULTS = Path(flops.__file__).parent / "results"


def table(tmp_path, capsys, *arguments):
    """The lines of a run by name, and its text."""
    file = tmp_path / "figures.json"
    assert flops.main([*arguments, "--json", str(file)]) == 0
    result = json.loads(file.read_text())
    return {row["name"]: row for row in result["rows"]}, capsys.readouterr().out


def test_the_shape_of_the_paper(tmp_path, capsys):
    rows, text = table(tmp_path, capsys)
    none, fast = rows["none"], rows["fast"]
    assert none["tokens_in"] == none["tokens_out"] == 32 * 157 + 64
    assert none["token_layers"] == 1
    assert none["tflop_full"] == pytest.approx(75, rel=0.03)  # published
    assert none["tflop_causal"] == pytest.approx(71.6, rel=0.005)  # by hand: study, section 1
    # 20% of 4,608 cells, rounded up, with 32 FRAMEs, 384 LINEs and the text
    assert fast["tokens_out"] == 922 + 416 + 64
    assert fast["token_layers"] == pytest.approx((2 * 5088 + 3 * (1844 + 480) + 23 * (922 + 480)) / (28 * 5088))
    assert "75 (published)" not in text
    assert "no merging (published)" in text
    assert "The schedules are ours" in text


def test_a_threshold_that_keeps_less_costs_less(tmp_path, capsys):
    rows, _ = table(tmp_path, capsys, "--threshold-kept", "1", "0.5", "0.25")
    kept = [rows[f"paper, threshold keeps {share}%"] for share in (100, 50, 25)]
    assert [row["tokens_out"] for row in kept] == [2304 + 480, 2304 + 480, 1152 + 480]
    assert kept[0]["tflop_full"] > kept[1]["tflop_full"] > kept[2]["tflop_full"]
    for row in rows.values():
        assert 0 < row["tflop_causal"] < row["tflop_full"] <= rows["none"]["tflop_full"]


def test_the_stored_table_is_that_of_the_code(tmp_path, capsys):
    rows, _ = table(tmp_path, capsys)
    stored = json.loads((RESULTS / "flops_elva_7b.json").read_text())["rows"]
    assert [row["name"] for row in stored] == list(rows)
    for row in stored:
        assert row == pytest.approx(rows[row["name"]])


@pytest.mark.parametrize("size", ["100", "7"])
def test_frames_are_whole_cells(size):
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.flops", "--size", size], capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2
    assert done.stderr == f"--size={size}: must be a multiple of a cell's 28 pixels\n"
    assert not done.stdout
