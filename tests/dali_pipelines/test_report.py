"""Quarantine, quota and report of bad samples."""

import json

import pytest

from dali_pipelines.report import WINDOW, BadQuota, PassedBy, Quarantine, report_lines, short
from megatron_elva.config.errors import InputError
from megatron_elva.layout import Skipped

KEYS = [
    "a.tar/x",
    "b.tar/v#005",
    "c.tar#5",
    " d.tar/ blanks  # inside ",
    "g.tar/line\u2028end\x0cfeed",
    "e.tar/" + "k" * 600,
    "f.tar/" + "k" * 599 + "l",
]


def test_a_quarantine_is_kept_and_read_again(tmp_path):
    path = tmp_path / "run" / "quarantine.txt"
    first = Quarantine(path)
    for key in KEYS:
        assert not first.has(key, False) and not first.has(key, True)
        first.add(key, "hung for\n60 s", building=False)
        first.add(key, "again", building=False)
    again = Quarantine(path)
    assert path.read_text().count("\n") == len(KEYS) == len(again.listed.keys)
    for key in KEYS:
        assert first.has(key, False) and again.has(key, False) and again.has(key, True)
    assert not again.has("b.tar/v", True) and not again.has("c.tar", True)
    assert path.read_text().startswith("a.tar/x\thung for 60 s\n")
    assert all(len(short(key).encode()) <= 400 for key in KEYS)


def test_what_failed_while_its_pack_was_built_is_measured_all_the_same(tmp_path):
    first = Quarantine(tmp_path / "list.txt")
    first.add("a.tar/x", "crashed", building=True)
    for quarantine in (first, Quarantine(tmp_path / "list.txt")):
        assert quarantine.has("a.tar/x", building=True) and not quarantine.has("a.tar/x", building=False)
    first.add("a.tar/x", "hung", building=False)
    assert first.has("a.tar/x", building=False)


def test_a_list_written_by_hand(tmp_path):
    path = tmp_path / "list.txt"
    path.write_bytes("\ufeff# seen last week\n\n a.tar/x \r\nb.tar/v#005\n#not a key\nlast.tar/k".encode())
    quarantine = Quarantine(tmp_path / "own.txt", [path])
    assert quarantine.listed == PassedBy(frozenset({"a.tar/x", "b.tar/v#005", "last.tar/k"}))
    quarantine.add("new.tar/k", "crashed", building=False)
    assert "new" not in path.read_text() and "new.tar/k" in (tmp_path / "own.txt").read_text()


def test_a_list_without_a_last_line_end_goes_on_in_a_new_line(tmp_path):
    path = tmp_path / "list.txt"
    path.write_text("a.tar/x\nb.tar/y")
    Quarantine(path).add("c.tar/z", "crashed", building=False)
    assert Quarantine(path).listed.keys == {"a.tar/x", "b.tar/y", "c.tar/z"}


def test_a_list_that_cannot_be_read_or_written(tmp_path, caplog):
    with pytest.raises(InputError, match=r"data\.quarantine=.*cannot be read"):
        Quarantine(tmp_path / "own", [tmp_path / "typo.txt"])
    (tmp_path / "file").write_text("")
    blocked = Quarantine(tmp_path / "file" / "list.txt")
    blocked.add("k", "r", building=False)
    assert blocked.has("k", False)
    assert "cannot be written" in caplog.text and "sample k is passed by from now on: r" in caplog.text


def test_the_report_says_that_a_worker_was_lost(tmp_path):
    quarantine = Quarantine(tmp_path / "list.txt")
    quarantine.add("a.tar/x", "crashed: signal 11", building=True)
    listed = Skipped("a.tar/x", "on the list", "quarantine", "a.tar/other")
    told = quarantine.explained(listed)
    assert (told.stage, told.reason, told.replaced_by) == ("worker", "crashed: signal 11", "a.tar/other")
    other = Skipped("a.tar/y", "on the list", "quarantine")
    assert quarantine.explained(other) == other


def test_a_few_bad_samples_are_no_reason_to_stop():
    quota = BadQuota(0.1)
    for _ in range(500):
        quota.count(32, 3, "logs")


def test_too_many_bad_samples_stop_the_run():
    quota = BadQuota(0.1)
    for _ in range(100):
        quota.count(32, 0, "logs")
    with pytest.raises(InputError, match=r"max_bad_share=0\.1: 1\d\d of the last 10\d\d samples .* logs says why"):
        for step in range(40):
            quota.count(32, 16, "logs")
            assert step <= WINDOW * 0.1 / 16 + 1


def test_a_corpus_bad_from_the_start_stops_soon():
    quota = BadQuota(0.1)
    with pytest.raises(InputError, match="101 of the last 101"):
        for _ in range(200):
            quota.count(1, 1, "logs")


def test_old_steps_are_forgotten():
    quota = BadQuota(0.1)
    quota.count(200, 99, "logs")
    for _ in range(20):
        quota.count(100, 0, "logs")
    quota.count(200, 99, "logs")


def test_a_report_has_one_object_a_line():
    bad = [Skipped("s.tar/dir/k", "torn", "decode", "s.tar/other"), Skipped("s.tar#7", "no json", "read")]
    lines = [json.loads(line) for line in report_lines(bad, step=4).splitlines()]
    assert lines == [
        {"step": 4, "key": "s.tar/dir/k", "shard": "s.tar", "stage": "decode", "reason": "torn",
         "replaced_by": "s.tar/other"},
        {"step": 4, "key": "s.tar#7", "shard": "s.tar", "stage": "read", "reason": "no json", "replaced_by": None},
    ]  # fmt: skip
    assert report_lines([]) == ""
