"""Lines of a run's files as points of curves, and the notes about what was sent. No MLflow."""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise

from megatron_elva.training.tracking import plot, system
from megatron_elva.training.tracking.lines import Point, read_lines, system_points, training_points
from megatron_elva.training.tracking.state import State, locked, without_password
from tests.training.tracking.steps import line, write_lines


def test_every_number_of_a_line_is_a_point_and_the_main_ones_also_by_samples():
    fields = {"step": 3, "stage": 2, "samples": 96, "time": 12.3456, "loss": 2.5, "mfu": None, "kind": "a", "ok": True}
    assert training_points(fields, 0) == [
        Point("samples", 96.0, 12345, 3),
        Point("loss", 2.5, 12345, 3),
        Point("by_samples/loss", 2.5, 12345, 96),
    ]
    del fields["time"]
    assert {p.timestamp for p in training_points(fields, 7000)} == {7003}  # the same whenever it is read
    assert {p.timestamp for p in training_points({**fields, "time": None}, 7000)} == {7003}
    assert training_points({}, 0) == [] == system_points({}, "0")


def test_points_of_a_machine_carry_its_number():
    assert system_points({"step": 5, "time": 2.0, "cpu %": 50}, "12") == [Point("system/node_12/cpu _", 50.0, 2000, 5)]


def test_reading_goes_on_behind_whole_lines_only(tmp_path):
    path = tmp_path / "metrics.jsonl"
    assert list(read_lines(path, 0)) == []
    path.write_text('{"step": 1}\n{"step": 2, "lo\n[3]\n\n{"step": 4}\n{"step": 5')
    found = list(read_lines(path, 0))
    assert [x for x, _ in found] == [{"step": 1}, {}, {}, {}, {"step": 4}]
    assert found[-1][1] == path.read_bytes().rindex(b"\n") + 1
    assert list(read_lines(path, found[-1][1])) == []
    assert [offset for _, offset in read_lines(path, 10**6)] == [offset for _, offset in found]  # written anew


def test_passwords_stay_out_of_the_notes(tmp_path):
    assert without_password("http://me:secret@host:5000/a@b") == "http://host:5000/a@b"
    assert without_password("asked https://me:sec@ret@host/api: 500") == "asked https://host/api: 500"
    State(tmp_path, "https://me:secret@host")
    assert "secret" not in (tmp_path / "mlflow" / "run.json").read_text()


def test_another_server_means_another_run_and_naming_none_keeps_the_first(tmp_path):
    first = State(tmp_path, "http://a")
    first.run_id, first.offsets = "r", {"metrics.jsonl": 9}
    first.save()
    first.save_sent()
    same = State(tmp_path, None)
    assert (same.run_id, same.offsets, same.key, same.uri) == ("r", {"metrics.jsonl": 9}, first.key, "http://a")
    other = State(tmp_path, "http://b")
    assert other.run_id is None and other.offsets == {} and other.key != first.key


def test_damaged_notes_are_no_notes(tmp_path):
    (tmp_path / "mlflow").mkdir()
    for text in ("", "{", "[]", '{"run_id": 3'):
        (tmp_path / "mlflow" / "run.json").write_text(text)
        (tmp_path / "mlflow" / "sent.json").write_text(text)
        assert State(tmp_path, None).run_id is None
    for text in ('{"run_id": "r", "offsets": null, "files": [3]}', '{"run_id": "r"}'):
        (tmp_path / "mlflow" / "run.json").write_text('{"run_id": "r"}')
        (tmp_path / "mlflow" / "sent.json").write_text(text)
        assert (State(tmp_path, None).offsets, State(tmp_path, None).files) == ({}, {})


def test_a_lock_is_held_by_one(tmp_path):
    with locked(tmp_path / "lock") as mine:
        assert mine
        with locked(tmp_path / "lock", wait=False) as other:
            assert not other
    with locked(tmp_path / "lock", wait=False) as free:
        assert free


def test_a_long_curve_is_thinned_and_the_last_of_a_step_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(plot, "_MOST", 50)
    path = tmp_path / "metrics.jsonl"
    write_lines(tmp_path, range(1, 300))
    curves = plot.Curves(path)
    assert curves.update() and not curves.update()
    assert 25 <= len(curves._rows) <= 50 and len({b - a for a, b in pairwise(curves._rows)}) == 1
    step = max(curves._rows)
    with path.open("a") as file:
        file.write(json.dumps({**line(step), "loss": 77.0}) + "\n")
    assert curves.update() and curves._rows[step][0] == 77.0
    curves.draw(tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_machine_is_sampled_ever_more_rarely_and_numbers_go_on(tmp_path, monkeypatch):
    monkeypatch.setattr(system, "_LINES_PER_AGE", 4)
    (tmp_path / "mlflow").mkdir()
    (tmp_path / "mlflow" / "system_1.jsonl").write_text('{"step": 41, "time": 1.0}\n{"step": 42, "ti')
    before = threading.active_count()
    sampler = system.Sampler(tmp_path, 1, 0.02)
    sampler.start()
    until = time.monotonic() + 60
    while len(lines := [x for x, _ in read_lines(tmp_path / "mlflow" / "system_1.jsonl", 0) if x]) < 9:
        assert time.monotonic() < until
        time.sleep(0.05)
    sampler.close()
    sampler.join(10)
    assert threading.active_count() == before
    assert [x["step"] for x in lines] == list(range(41, 41 + len(lines)))
    gaps = [b["time"] - a["time"] for a, b in pairwise(lines[1:])]
    assert gaps[-1] > 3 * gaps[0]
    expected = {"cpu_utilization_percentage", "system_memory_usage_megabytes", "run_disk_available_megabytes"}
    assert expected <= set(lines[-1])
    about = json.loads((tmp_path / "mlflow" / "node_1.json").read_text())
    assert about["host"] and isinstance(about["gpus"], list)
