"""The break between two attempts, as a run directory shows it."""

from __future__ import annotations

import json
import time

from megatron_elva.training import runs
from megatron_elva.training.recovery import RECOVERIES, Break


def _write(path, *lines):
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))


def test_a_first_start_is_no_break(tmp_path):
    assert Break.of(tmp_path) is None
    (tmp_path / runs.METRICS).write_text("")
    assert Break.of(tmp_path) is None


def test_a_break_counts_from_the_last_step_and_says_what_is_done_again(tmp_path):
    (tmp_path / "logs").mkdir()
    checkpoint = tmp_path / "checkpoints" / "step_4"
    checkpoint.mkdir(parents=True)
    runs.write_marker(checkpoint, {"step": 4})
    _write(tmp_path / runs.METRICS, {"step": 6, "time": 1.0}, {"step": 7, "time": time.time() - 30})
    found = Break.of(tmp_path)
    assert found is not None
    assert (found.step, found.resumed) == (7, 4)
    line = found.ended(tmp_path, 5)
    assert line.startswith("recovered in 30.")
    assert line.endswith(
        "from the end of step 7 in the attempt before to that of step 5 in this one; steps done again: 3"
    )
    record = json.loads((tmp_path / "logs" / RECOVERIES).read_text())
    assert (record["step"], record["last_step"], record["done_again"]) == (5, 7, 3)
    assert 30 <= record["seconds"] < 32


def test_lines_of_older_runs_have_no_time(tmp_path):
    _write(tmp_path / runs.METRICS, {"step": 6})
    assert Break.of(tmp_path) is None
