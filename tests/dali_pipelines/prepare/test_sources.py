"""Annotation files as they come, whole and damaged."""

import json

import pytest

from dali_pipelines.prepare.sources import parquet_bytes, rows_of
from megatron_elva.config.errors import InputError

ROWS = [{"video": "a.mp4", "caption": 'one, "two"; three'}, {"video": "b.mp4", "caption": "vier\nfünf"}]


def contents(path):
    return [row.content for row in rows_of(path)]


@pytest.mark.parametrize("name", ["list.json", "list.jsonl"])
def test_a_list_of_objects(tmp_path, name):
    path = tmp_path / name
    path.write_text("\ufeff" + json.dumps(ROWS, indent=1, ensure_ascii=False))
    assert contents(path) == ROWS
    assert [row.where for row in rows_of(path)] == [f"{path}:1", f"{path}:2"]
    assert {row.base for row in rows_of(path)} == {str(tmp_path)}


@pytest.mark.parametrize("name", ["lines.jsonl", "lines.json"])
def test_an_object_a_line(tmp_path, name):
    path = tmp_path / name
    path.write_text("\n".join([json.dumps(ROWS[0]), "", "no json", "[1]", json.dumps(ROWS[1])]) + "\n")
    rows = list(rows_of(path))
    assert [row.content for row in rows] == [ROWS[0], None, None, ROWS[1]]
    assert "not JSON" in rows[1].fault and "not an object" in rows[2].fault
    assert rows[3].where == f"{path}:5"


def test_a_list_that_is_cut_gives_what_comes_before(tmp_path):
    path = tmp_path / "cut.json"
    path.write_text(json.dumps([*ROWS, *ROWS])[:-30])
    rows = list(rows_of(path))
    assert [row.content for row in rows] == [*ROWS, ROWS[0], None]
    assert "all that follows" in rows[3].fault


@pytest.mark.parametrize("key", ["data", "annotations"])
def test_an_object_that_holds_the_list(tmp_path, key):
    path = tmp_path / "whole.json"
    path.write_text(json.dumps({"version": 1, key: ROWS}, indent=1))
    assert contents(path) == ROWS
    path.write_text(json.dumps(ROWS[0], indent=1))
    assert contents(path) == ROWS[:1]


@pytest.mark.parametrize(("name", "delimiter"), [("t.csv", ","), ("t.csv", ";"), ("t.tsv", "\t")])
def test_tables(tmp_path, name, delimiter):
    path = tmp_path / name
    talk = json.dumps([{"from": "human", "value": 'Q, "q"'}, {"from": "gpt", "value": "A"}])
    cells = [
        ["video", "caption", "conversations"],
        ["a.mp4", 'one, "two"', ""],
        ["b.mp4", "", talk],
        ["c", "d", "", "e"],
    ]
    quoted = ['"' + cell.replace('"', '""') + '"' for line in cells for cell in line]
    sizes = iter(quoted)
    path.write_text("\n".join(delimiter.join(next(sizes) for _ in line) for line in cells) + "\n")
    rows = list(rows_of(path))
    assert rows[0].content == {"video": "a.mp4", "caption": 'one, "two"', "conversations": ""}
    assert rows[1].content["conversations"] == json.loads(talk)
    assert rows[2].content is None and "more cells" in rows[2].fault


def test_a_folder_takes_the_text_beside_each_file(tmp_path):
    for name in ("b.mp4", "sub/a.MP4", "c.png", "d.webm", "e.mp4", "notes.doc"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "b.txt").write_text(" A cat. \n")
    (tmp_path / "sub/a.json").write_text('{"caption": "A dog.", "video": "elsewhere.mp4"}')
    (tmp_path / "c.json").write_text('{"conversations": []}')
    (tmp_path / "d.json").write_text("broken")
    rows = {row.where.removeprefix(f"{tmp_path}/"): row for row in rows_of(tmp_path)}
    assert list(rows) == sorted(rows)
    assert rows["b.mp4"].content == {"caption": "A cat.", "path": "b.mp4", "id": "b"}
    assert rows["sub/a.MP4"].content == {"caption": "A dog.", "path": "sub/a.MP4", "id": "sub/a"}
    assert rows["c.png"].content["conversations"] == []
    assert "d.json: not JSON" in rows["d.webm"].fault
    assert "neither e.txt nor e.json" in rows["e.mp4"].fault
    assert len(rows) == 5


@pytest.mark.parametrize("name", ["annotations.jsonl", "metadata.csv"])
def test_a_folder_with_annotations_is_described_by_them(tmp_path, name):
    (tmp_path / "a.mp4").touch()
    text = "file_name,text\na.mp4,A cat.\n" if name.endswith("csv") else '{"file_name": "a.mp4", "text": "A cat."}\n'
    (tmp_path / name).write_text(text)
    (row,) = rows_of(tmp_path)
    assert row.content == {"file_name": "a.mp4", "text": "A cat."}
    assert row.base == str(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("none.json", None, "no such file"),
        ("a.xml", "<a/>", "allowed are"),
        ("bytes.jsonl", b"\xff\xfe\x00", "cannot be read"),
        ("folder", "", "holds no annotations.jsonl"),
    ],
)
def test_what_cannot_be_read_at_all(tmp_path, name, content, says):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
    elif content is not None:
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(InputError, match=says):
        list(rows_of(path))


def test_parquet_with_paths_and_with_bytes_inside(tmp_path):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    rows = [
        {"id": str(i), "image": {"bytes": bytes([i] * 9), "path": f"{i}.png"}, "caption": f"c{i}"} for i in range(5)
    ]
    rows.append({"id": "5", "image": {"bytes": None, "path": "x.png"}, "caption": "c5"})
    path = tmp_path / "train.parquet"
    parquet.write_table(pyarrow.Table.from_pylist(rows), path, row_group_size=2)
    found = contents(path)
    assert [c["caption"] for c in found] == [f"c{i}" for i in range(6)]
    assert [parquet_bytes(c["image"]) for c in found[:5]] == [bytes([i] * 9) for i in range(5)]
    assert found[3]["image"]["name"] == "3.png" and found[5]["image"]["path"] == "x.png"


def test_parquet_without_its_reader_is_one_line(tmp_path, monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    (tmp_path / "t.parquet").touch()
    with pytest.raises(InputError, match="pip install pyarrow"):
        list(rows_of(tmp_path / "t.parquet"))


PLAIN = [{"video": "a.mp4", "caption": "one"}, {"video": "b.mp4", "caption": "two"}]


@pytest.mark.parametrize("text", [
    json.dumps({"data": PLAIN}), json.dumps({"data": PLAIN}, indent=1),
    '{"annotations": [\n' + ",\n".join(map(json.dumps, PLAIN)) + "\n]}\n",
])  # fmt: skip
def test_an_object_that_holds_the_list_is_read_however_it_is_written(tmp_path, text):
    (tmp_path / "rows.json").write_text(text)
    rows = list(rows_of(tmp_path / "rows.json"))
    assert [row.content for row in rows] == PLAIN and not any(row.fault for row in rows)


def test_one_row_that_is_not_utf8_stops_nothing(tmp_path):
    (tmp_path / "rows.jsonl").write_bytes(b'{"video":"a.mp4","caption":"one"}\n{"video":"b.mp4","caption":"caf\xe9"}\n')
    first, second = rows_of(tmp_path / "rows.jsonl")
    assert first.content == PLAIN[0] and second.content["caption"] == "caf\udce9"  # which no tokenizer takes


def test_a_folder_is_walked_through_links_and_names_what_it_cannot_take(tmp_path):
    inside, outside = tmp_path / "in", tmp_path / "disk"
    inside.mkdir()
    outside.mkdir()
    (outside / "b.mp4").write_bytes(b"b")
    (outside / "b.txt").write_text("two")
    (inside / "linked").symlink_to(outside)
    (outside / "loop").symlink_to(inside)
    (inside / "a.mp4").write_bytes(b"a")
    (inside / "a.txt").write_text("one")
    (inside / "c.flv").write_bytes(b"c")
    (inside / "c.txt").write_text("three")
    rows = list(rows_of(inside))
    assert sorted(row.content["caption"] for row in rows if row.content) == ["one", "two"]
    (fault,) = (row for row in rows if row.fault)
    assert fault.where.endswith("c.flv") and "of no known kind: allowed are avi, gif" in fault.fault
