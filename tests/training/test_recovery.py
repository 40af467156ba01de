"""The break between two attempts, as a run directory shows it."""

from __future__ import annotations

import json
import time

from megatron_elva.training import runs
from megatron_elva.training.recovery import RECOVERIES, Break, last_line


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


def test_a_torn_line_is_passed_over(tmp_path):
    path = tmp_path / "lines"
    path.write_text('{"a": 1}\n{"a": 2}\nnot json\n{"a": 3')
    assert last_line(path) == {"a": 2}
    path.write_text('{"a": 1')
    assert last_line(path) is None
    assert last_line(tmp_path / "missing") is None


def test_only_the_end_of_a_long_file_is_read(tmp_path):
    path = tmp_path / "lines"
    path.write_text("".join(json.dumps({"step": i, "text": "x" * 100}) + "\n" for i in range(2000)))
    line = last_line(path)
    assert line is not None
    assert line["step"] == 1999


def test_a_disk_that_takes_no_record_does_not_end_the_run(tmp_path, capsys):
    (tmp_path / "logs" / RECOVERIES).mkdir(parents=True)  # no file can be opened there
    assert Break(7, time.time(), 4).ended(tmp_path, 5).startswith("recovered in ")
    assert capsys.readouterr().out.startswith("warning: ")
