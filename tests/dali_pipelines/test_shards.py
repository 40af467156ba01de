"""Tar shards, whole and cut."""

import json
import os
import pickle
import tarfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dali_pipelines.shards import ShardIndex, find_shards, iterate_meta, split_name
from megatron_elva.config.errors import InputError
from tests.dali_pipelines.make_samples import write_shard


def numbered(n, size=700):
    return [(f"clip/{i:03d}", {"json": {"caption": f"number {i}"}, "mp4": bytes([i]) * size}) for i in range(n)]


@pytest.mark.parametrize(
    ("name", "key", "extension"),
    [
        ("a.json", "a", "json"),
        ("dir.v2/a.0.mp4", "dir.v2/a", "0.mp4"),
        ("./a.MP4", "a", "mp4"),
        ("folder/.hidden", "", "hidden"),
        ("plain", "plain", ""),
    ],
)
def test_split_name(name, key, extension):
    assert split_name(name) == (key, extension)


def test_random_access(tmp_path):
    shard = ShardIndex(write_shard(tmp_path / "s.tar", numbered(6)))
    assert len(shard) == 6
    assert shard.warning is None
    for i in (5, 0, 3):
        sample = shard.read(i)
        assert sample.key == f"s.tar/clip/{i:03d}"
        assert sample.meta == {"caption": f"number {i}"}
        assert sample.media == [bytes([i]) * 700]
    assert [m["caption"] for m in iterate_meta(tmp_path / "s.tar")] == [f"number {i}" for i in range(6)]


def test_long_names_folders_and_several_media(tmp_path):
    key = "deep/" * 30 + "x" * 90
    members = {"1.jpg": b"second", "0.png": b"first", "json": {}, "txt": "not media"}
    path = write_shard(tmp_path / "s.tar", [(key, members), ("b", {"json": {"n": 1}})])
    with tarfile.open(path, "a") as tar:
        folder = tarfile.TarInfo("folder")
        folder.type = tarfile.DIRTYPE
        tar.addfile(folder)
    shard = ShardIndex(path)
    assert len(shard) == 2
    assert shard.read(0).key == f"s.tar/{key}"
    assert shard.read(0).media == [b"first", b"second"]
    assert shard.read(1).media == []


def test_index_is_cached_and_checked(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", numbered(3))
    ShardIndex(path)
    cache = tmp_path / "s.tar.index.json"
    assert cache.is_file()
    assert [p.name for p in tmp_path.iterdir() if "tmp" in p.name] == []
    with monkeypatch.context() as patch:
        patch.setattr("dali_pipelines.shards.scan", lambda *_: pytest.fail("scanned again"))
        assert len(ShardIndex(path)) == 3
    write_shard(path, numbered(5))
    assert len(ShardIndex(path)) == 5
    stamp = path.stat()
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns + 1))
    assert json.loads(cache.read_text())["stamp"][2] != path.stat().st_mtime_ns
    cache.write_text("{broken")
    assert len(ShardIndex(path)) == 5


def test_a_folder_that_cannot_be_written(tmp_path, monkeypatch):
    path = write_shard(tmp_path / "s.tar", numbered(3))

    def refuse(*_args, **_kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("pathlib.Path.write_bytes", refuse)
    assert len(ShardIndex(path)) == 3
    assert [p.name for p in tmp_path.iterdir()] == ["s.tar"]


def test_sent_to_another_process(tmp_path):
    shard = ShardIndex(write_shard(tmp_path / "s.tar", numbered(3)))
    assert pickle.loads(pickle.dumps(shard)).read(2).key == shard.read(2).key


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_a_cut_tar_gives_its_complete_samples(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("cut")
    path = write_shard(folder / "s.tar", numbered(5))
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        ends = [m.offset_data + m.size for m in tar if m.name.endswith("mp4")]
    at = data.draw(st.one_of(st.integers(1, len(whole) - 1), st.sampled_from([-(-e // 512) * 512 for e in ends])))
    path.write_bytes(whole[:at])
    complete = sum(end <= at for end in ends)
    try:
        shard = ShardIndex(path)
    except InputError:
        assert complete == 0
        return
    # A sample cut right behind its last member cannot be told from one that goes on.
    assert len(shard) in (complete, complete - (at <= ends[complete - 1] + 1024 if complete else 0))
    for i in range(len(shard)):
        assert shard.read(i).media == [bytes([i]) * 700]
    if at <= -(-ends[-1] // 512) * 512:
        assert shard.warning is not None
        assert "s.tar: cut at byte" in shard.warning


def test_damage_in_the_middle(tmp_path):
    path = write_shard(tmp_path / "s.tar", numbered(5))
    data = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        at = tar.getmember("clip/003.json").offset
    data[at : at + 512] = b"x" * 512
    path.write_bytes(data)
    shard = ShardIndex(path)
    assert len(shard) == 2  # sample 2 might go on with the damaged member
    assert "damaged header" in shard.warning


@pytest.mark.parametrize("content", [b"", b"no tar file at all" * 100])
def test_not_a_tar(tmp_path, content):
    path = tmp_path / "s.tar"
    path.write_bytes(content)
    with pytest.raises(InputError, match="not a tar file"):
        ShardIndex(path)


def test_missing_files(tmp_path):
    with pytest.raises(InputError, match="No such file"):
        ShardIndex(tmp_path / "none.tar")
    with pytest.raises(InputError, match=r"data.sources.x.shards: no file matches .*none"):
        find_shards([str(tmp_path / "none*.tar")], "data.sources.x.shards")
    for name in ("b.tar", "a.tar"):
        write_shard(tmp_path / name, numbered(1))
    found = find_shards([str(tmp_path / "*.tar"), str(tmp_path / "a.tar")], "x")
    assert [p.name for p in found] == ["a.tar", "b.tar"]


def test_bad_json(tmp_path):
    path = write_shard(tmp_path / "s.tar", [("a", {"json": "{"}), ("b", {"json": "[]"}), ("c", {"mp4": b"x"})])
    shard = ShardIndex(path)
    for i, reason in enumerate(["a: its .json cannot be read", "b: its .json holds no object", "c: no .json member"]):
        with pytest.raises(InputError, match=f"s.tar/{reason}"):
            shard.read(i)


def test_a_shard_that_shrinks_while_it_is_used(tmp_path):
    path = write_shard(tmp_path / "s.tar", numbered(5))
    shard = ShardIndex(path)
    path.write_bytes(path.read_bytes()[:3000])
    for i in (4, 0):
        with pytest.raises(InputError, match="become shorter"):
            shard.read(i)
    path.write_bytes(bytes(40960))
    with pytest.raises(InputError, match="become longer"):
        shard.read_meta(0)
