"""Shards behind URLs: a real S3-compatible server and a web server, both in this process, well-behaved and not."""

import json
import multiprocessing
import os
import pickle
import subprocess
import sys
import time
from types import SimpleNamespace

import pytest

from dali_pipelines import clients, shards, storage
from dali_pipelines.shards import ShardIndex, find_shards, iterate_meta
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.files import file_problems
from tests.dali_pipelines.make_samples import write_shard
from tests.dali_pipelines.servers import Log, numbered, s3_server, web_server

pytest.importorskip("s3fs")
pytest.importorskip("moto")
boto3 = pytest.importorskip("boto3")


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    """Short pauses, a cache folder of its own, fresh clients, and nobody's credentials."""
    monkeypatch.setattr(clients, "PAUSES", (0.01, 0.01, 0.01))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in [name for name in os.environ if name.startswith("AWS_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    clients._clients.clear()
    storage._listed.clear()


@pytest.fixture(scope="module")
def log():
    return Log()


@pytest.fixture(scope="module")
def server(log):
    with s3_server(log) as address:
        yield address


@pytest.fixture
def bucket(server, log, monkeypatch):
    """An empty bucket, with the variables that lead to it."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "secret")
    monkeypatch.setenv("AWS_REGION", "us-east-1")
    s3 = boto3.resource("s3", endpoint_url=server, region_name="us-east-1")
    made = s3.create_bucket(Bucket="shards")
    made.objects.delete()
    log.faults = []
    log.empty()
    return made


def upload(bucket, tmp_path, name, samples, log, with_index=False):
    """Put a shard there; gives the local copy."""
    local = write_shard(tmp_path / name.replace("/", "-"), samples)
    bucket.put_object(Key=name, Body=local.read_bytes())
    index = ShardIndex(local)
    if with_index:
        bucket.put_object(Key=name + ".index.json", Body=(tmp_path / (local.name + ".index.json")).read_bytes())
    log.empty()
    return index


def same(a, b):
    """The same samples under the same keys, but for the shard's name."""
    assert len(a) == len(b)
    for i in range(len(a)):
        x, y = a.read(i), b.read(i)
        assert (x.key.partition("/")[2], x.meta, x.media) == (y.key.partition("/")[2], y.meta, y.media)


def test_s3_from_listing_to_samples(bucket, tmp_path, log):
    local = {n: upload(bucket, tmp_path, f"data/train-{n}.tar", numbered(3 + n), log) for n in range(3)}
    bucket.put_object(Key="data/other.tar", Body=b"")
    bucket.put_object(Key="data/deep/train-9.tar", Body=b"")
    bucket.put_object(Key="data/train-0.tar.index.json", Body=b"{}")
    log.empty()
    urls = find_shards(["s3://shards/data/train-*", str(local[0].path)], "x")
    assert urls == [local[0].path, *(f"s3://shards/data/train-{n}.tar" for n in range(3))]
    assert log == ["GET /shards?list"]
    for n, url in enumerate(urls[1:]):
        log.empty()
        shard = ShardIndex(url)
        # what the listing said is not asked again; a small shard is one read
        assert log[0] == f"GET /shards/data/train-{n}.tar.index.json"
        assert [entry.split()[0] for entry in log] == ["GET", "GET"]
        assert (shard.name, shard.path, shard.url, shard.warning) == (f"train-{n}.tar", None, url, None)
        assert shard.sizes.tolist() == local[n].sizes.tolist()
        for i in (2, 0, 1):
            log.empty()
            sample = shard.read(i)
            first, end = shard.spans[i]
            assert log == [f"GET /shards/data/train-{n}.tar {first}-{end}"]
            assert sample.key == f"train-{n}.tar/clip/{i:03d}"
            log.empty()
            meta = shard.read_meta(i)
            assert (meta.key, meta.meta, meta.media, meta.size) == (sample.key, sample.meta, 1, end - first)
            assert len(log) == 1
            assert log.bytes < 1100
        same(shard, local[n])
    log.empty()
    assert [m["n"] for m in iterate_meta(urls[3])] == list(range(5))
    assert len(log.parts()) == 1


def test_patterns_on_s3(bucket, log, monkeypatch):
    for name in ("a/x.tar", "a/y.tar", "a/b/x.tar", "a/b/c/x.tar", "b/z[1].tar", "a/w.zip"):
        bucket.put_object(Key=name, Body=b"x")

    def keys(*patterns):
        return [url.removeprefix("s3://shards/") for url in find_shards([f"s3://shards/{p}" for p in patterns], "x")]

    assert keys("a/*.tar") == ["a/x.tar", "a/y.tar"]
    assert keys("a/**/x.tar") == ["a/b/c/x.tar", "a/b/x.tar", "a/x.tar"]
    assert keys("*/*/?.tar") == ["a/b/x.tar"]
    assert keys("a/[!x].tar") == ["a/y.tar"]
    assert keys("a/{x,nowhere}.tar", "a/x.tar") == ["a/nowhere.tar", "a/x.tar"]  # names are not asked for here
    monkeypatch.setenv("MOTO_S3_DEFAULT_MAX_KEYS", "2")
    log.empty()
    assert len(keys("**/*.tar")) == 5
    assert len(log) == 3  # pages
    with pytest.raises(InputError, match=r"^x: no file matches s3://shards/c/\*.tar$"):
        keys("c/*.tar")


def test_an_index_beside_the_shard(bucket, tmp_path, log):
    local = upload(bucket, tmp_path, "a.tar", numbered(4), log, with_index=True)
    shard = ShardIndex("s3://shards/a.tar")
    assert log == ["HEAD /shards/a.tar", "GET /shards/a.tar.index.json"]
    same(shard, local)
    log.empty()
    again = ShardIndex("s3://shards/a.tar")  # now from the local cache
    assert log == ["HEAD /shards/a.tar"]
    same(again, local)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"null", b'{"stamp": [2]}', b'{"stamp": [1, 10240, 0]}'])
def test_a_useless_index_beside_the_shard(bucket, tmp_path, log, content):
    local = upload(bucket, tmp_path, "a.tar", numbered(4), log)
    bucket.put_object(Key="a.tar.index.json", Body=content)
    same(ShardIndex("s3://shards/a.tar"), local)


def test_an_index_of_another_shard_gives_no_other_samples(bucket, tmp_path, log):
    """Of the same size and with samples at the same places, but with other names."""
    upload(bucket, tmp_path, "a.tar", numbered(4), log, with_index=True)
    other = [(f"clop/{i:03d}", members) for i, (_, members) in enumerate(numbered(4))]
    bucket.put_object(Key="a.tar", Body=write_shard(tmp_path / "other.tar", other).read_bytes())
    shard = ShardIndex("s3://shards/a.tar")
    with pytest.raises(InputError, match=r"^a.tar#1: is not what the index says"):
        shard.read(1)


def test_media_are_jumped_over(bucket, tmp_path, log):
    large = upload(bucket, tmp_path, "large.tar", numbered(6, 3 << 20), log)
    shard = ShardIndex("s3://shards/large.tar")
    assert len(log.parts()) <= 8
    assert log.bytes < 1 << 20
    assert shard.spans.tolist() == large.spans.tolist()
    many = upload(bucket, tmp_path, "many.tar", numbered(250, 30_000), log)
    shard = ShardIndex("s3://shards/many.tar")
    assert len(log.parts()) <= 8
    assert shard.spans.tolist() == many.spans.tolist()


def test_a_shard_that_changes(bucket, tmp_path, log):
    upload(bucket, tmp_path, "a.tar", numbered(4), log)
    shard = ShardIndex("s3://shards/a.tar")
    upload(bucket, tmp_path, "a.tar", numbered(4)[::-1], log)  # of the same size
    with pytest.raises(InputError, match=r"^s3://shards/a.tar: the shard has changed since it was opened"):
        shard.read(1)
    bucket.put_object(Key="a.tar", Body=b"x" * 1000)
    with pytest.raises(InputError, match=r"416|become shorter"):
        shard.read(3)
    upload(bucket, tmp_path, "a.tar", numbered(40), log)
    with pytest.raises(InputError, match="become longer"):
        shard.read_meta(1)
    assert len(ShardIndex("s3://shards/a.tar")) == 40


@pytest.mark.parametrize("fault", [(500, "InternalError"), (503, "SlowDown"), (400, "RequestTimeout"), "reset", "slow"])
def test_faults_that_pass(bucket, tmp_path, log, fault, monkeypatch):
    monkeypatch.setattr(clients, "READ_S", 0.7)
    local = upload(bucket, tmp_path, "a.tar", numbered(4), log)
    shard = ShardIndex("s3://shards/a.tar")
    log.faults = [fault, fault]
    log.empty()
    assert shard.read(2).media == local.read(2).media
    assert len(log) == 3


@pytest.mark.parametrize(
    ("fault", "tries", "reason"),
    [
        ((500, "InternalError"), 4, r"HTTP status 500, InternalError \(after \d+ s of tries\)"),
        ("reset", 4, r"\(after \d+ s of tries\)"),
        ("slow", 4, r"no answer within 0.3 s \(after \d+ s of tries\)"),
        (
            (403, "AccessDenied"),
            1,
            r"access denied \(HTTP status 403, AccessDenied\); credentials come from AWS_ACCESS_",
        ),
        ((400, "ExpiredToken"), 1, r"access denied \(HTTP status 400, ExpiredToken\)"),
        ((404, "NoSuchKey"), 1, r"no such file \(HTTP status 404, NoSuchKey\)"),
    ],
)
def test_faults_that_stay(bucket, tmp_path, log, fault, tries, reason, monkeypatch):
    monkeypatch.setattr(clients, "READ_S", 0.3)
    upload(bucket, tmp_path, "a.tar", numbered(4), log)
    shard = ShardIndex("s3://shards/a.tar")
    log.faults = [fault] * 9
    log.empty()
    with pytest.raises(InputError, match=f"^s3://shards/a.tar: .*{reason}") as caught:
        shard.read(2)
    assert "\n" not in str(caught.value)
    assert len(log) == tries


def test_what_is_not_there(bucket):
    with pytest.raises(InputError, match=r"^s3://shards/none.tar: no such file"):
        ShardIndex("s3://shards/none.tar")
    with pytest.raises(InputError, match=r"^s3://no-bucket/\*.tar: no such bucket"):
        find_shards(["s3://no-bucket/*.tar"], "x")
    with pytest.raises(InputError, match=r"^s3://no bucket/a.tar: .*Invalid bucket name"):
        ShardIndex("s3://no bucket/a.tar")


def test_no_credentials(bucket, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    with pytest.raises(InputError, match=r"^s3://shards/a.tar: no usable credentials .* AWS_ACCESS_KEY_ID and AWS_S"):
        ShardIndex("s3://shards/a.tar")
    monkeypatch.setenv("AWS_PROFILE", "nobody")
    clients._clients.clear()
    with pytest.raises(InputError, match=r"no usable credentials .*nobody"):
        ShardIndex("s3://shards/a.tar")


def test_no_server(bucket, monkeypatch):
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    start = time.monotonic()
    with pytest.raises(InputError, match=r"^s3://shards/a.tar: Could not connect .*127.0.0.1:9.*of tries\)$"):
        ShardIndex("s3://shards/a.tar")
    assert time.monotonic() - start < 30


def read_all(shard, environment, results):
    os.environ.update(environment)  # a fork server that another test started has an older one
    results.put([shard.read(i).media for i in range(len(shard))])


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_in_other_processes(bucket, tmp_path, log, method):
    """Also in a process forked from one whose client runs."""
    local = upload(bucket, tmp_path, "a.tar", numbered(4), log)
    shard = ShardIndex("s3://shards/a.tar")
    shard.read(0)
    assert len(pickle.dumps(shard)) < 2000
    context = multiprocessing.get_context(method)
    results = context.Queue()
    processes = [context.Process(target=read_all, args=(shard, dict(os.environ), results)) for _ in range(2)]
    for process in processes:
        process.start()
    for _ in processes:
        assert results.get(timeout=60) == [local.read(i).media for i in range(4)]
    for process in processes:
        process.join(20)
        assert process.exitcode == 0
    shard.read(1)


def open_cached(url, folder, results):
    shard = ShardIndex(url, cache_dir=folder)
    results.put((str(shard.path), [shard.read(i).media for i in range(len(shard))]))


def test_a_shard_kept_on_the_disk(bucket, tmp_path, log, monkeypatch):
    monkeypatch.setattr(storage, "_PIECE", 1 << 16)
    local = upload(bucket, tmp_path, "d/a.tar", numbered(4, 50_000), log)
    folder = tmp_path / "kept"
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    processes = [context.Process(target=open_cached, args=("s3://shards/d/a.tar", folder, results)) for _ in range(3)]
    for process in processes:
        process.start()
    answers = [results.get(timeout=60) for _ in processes]
    for process in processes:
        process.join(20)
    assert answers == answers[:1] * 3
    assert answers[0][1] == [local.read(i).media for i in range(4)]
    assert len(log.parts()) == -(-local._stat.size // (1 << 16))  # one download
    log.empty()
    shard = ShardIndex("s3://shards/d/a.tar", cache_dir=folder)
    same(shard, local)
    assert shard.read(0).key == "a.tar/clip/000"  # not the name in the cache: seeds come from keys
    assert log == ["HEAD /shards/d/a.tar"]
    assert not list((folder / "shards").glob(".*.part"))
    upload(bucket, tmp_path, "d/a.tar", numbered(5), log)
    assert len(ShardIndex("s3://shards/d/a.tar", cache_dir=folder)) == 5


def test_a_download_that_fails_leaves_nothing(bucket, tmp_path, log, monkeypatch):
    monkeypatch.setattr(storage, "_PIECE", 1 << 16)
    upload(bucket, tmp_path, "a.tar", numbered(4, 50_000), log)
    log.faults = [None, "reset", *[(500, "InternalError")] * 9]
    with pytest.raises(InputError, match=r"^s3://shards/a.tar: HTTP status 500"):
        ShardIndex("s3://shards/a.tar", cache_dir=tmp_path / "kept")
    assert [p.name for p in (tmp_path / "kept" / "shards").iterdir() if not p.name.endswith(".lock")] == []
    log.faults = []
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1000))
    with pytest.raises(InputError, match=r"^data.cache_dir: .* has 0.0 GB left, s3://shards/a.tar is 0.0 GB$"):
        ShardIndex("s3://shards/a.tar", cache_dir=tmp_path / "kept")
    (tmp_path / "file").touch()
    with pytest.raises(InputError, match=r"^data.cache_dir: .*file"):
        find_shards(["s3://shards/a.tar"], "x", cache_dir=tmp_path / "file")


# ---- web servers


@pytest.fixture
def web(tmp_path):
    folder = tmp_path / "web"
    folder.mkdir()
    for n in range(3):
        write_shard(folder / f"s-{n:03d}.tar", numbered(4 + n, 3000))
    log = Log()
    with web_server(folder, log) as address:
        yield address, folder, log


def test_http(web, tmp_path):
    address, folder, log = web
    urls = find_shards([f"{address}/s-{{000..002}}.tar"], "x")
    assert urls == [f"{address}/s-{n:03d}.tar" for n in range(3)]
    assert log == []
    for n, url in enumerate(urls):
        shard = ShardIndex(url)
        log.empty()
        same(shard, ShardIndex(folder / f"s-{n:03d}.tar"))
        assert len(log) == len(shard)
        assert len(log.parts()) == len(shard)
    log.empty()
    kept = ShardIndex(urls[2], cache_dir=tmp_path / "kept")
    assert len(log) == 2
    same(kept, shard)
    for wrong, why in ((f"{address}/none.tar", "no such file"), (f"{address}/*.tar", "a web server lists no files")):
        with pytest.raises(InputError, match=why):
            ShardIndex(find_shards([wrong], "x")[0])


@pytest.mark.parametrize("fault", [500, 429, "reset", "short", "slow"])
def test_http_faults(web, fault, monkeypatch):
    address, folder, log = web
    monkeypatch.setattr(clients, "READ_S", 0.5)
    shard = ShardIndex(f"{address}/s-000.tar")
    log.faults = [fault, fault]
    log.empty()
    assert shard.read(1).media == ShardIndex(folder / "s-000.tar").read(1).media
    assert len(log) == 3
    log.faults = [fault] * 9
    with pytest.raises(InputError, match=rf"^{address}/s-000.tar: .*\(after \d+ s of tries\)$"):
        shard.read(1)


def test_http_status_that_stays(web):
    address, _, log = web
    shard = ShardIndex(f"{address}/s-000.tar?signature=secret")
    log.faults = [403]
    log.empty()
    with pytest.raises(InputError, match=r"/s-000.tar: access denied \(HTTP status 403\)$"):
        shard.read(1)
    assert len(log) == 1


def test_http_shard_that_changes(web):
    address, folder, _ = web
    shard = ShardIndex(f"{address}/s-000.tar")
    write_shard(folder / "s-000.tar", numbered(40))
    with pytest.raises(InputError, match="the shard has become longer"):
        shard.read(1)


def test_a_web_server_without_parts(tmp_path):
    local = ShardIndex(write_shard(tmp_path / "a.tar", numbered(4)))
    log = Log()
    with web_server(tmp_path, log, ranges=False) as address:
        (tmp_path / "a.tar.index.json").unlink()
        with pytest.raises(InputError, match=r"/a.tar: the server gives no parts of files; set data.cache_dir"):
            ShardIndex(f"{address}/a.tar")
        same(ShardIndex(f"{address}/a.tar", cache_dir=tmp_path / "kept"), local)


# ---- names


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("a", ["a"]),
        ("a-{08..11}.tar", ["a-08.tar", "a-09.tar", "a-10.tar", "a-11.tar"]),
        ("{8..10}", ["8", "9", "10"]),
        ("s3://b/{x,y}/{0..1}", ["s3://b/x/0", "s3://b/x/1", "s3://b/y/0", "s3://b/y/1"]),
        ("{a}{}", ["{a}{}"]),
    ],
)
def test_braces(pattern, names):
    assert storage.expand(pattern) == names


@pytest.mark.parametrize("pattern", ["{3..1}", "{0..99999999}", "{0..9999}{0..9999}"])
def test_braces_that_cannot_be(pattern):
    with pytest.raises(InputError, match=r"braces|count up"):
        storage.expand(pattern)


@pytest.mark.parametrize(
    ("url", "why"),
    [
        ("gs://bucket/a.tar", "scheme gs; allowed: s3, http, https, or a local path"),
        ("s3:///a.tar", "names no bucket"),
        ("s3://*/a.tar", "names no bucket"),
        ("s3://bucket", "names no shard"),
        ("https://host/a-*.tar", "a web server lists no files"),
    ],
)
def test_urls_that_cannot_be(url, why):
    with pytest.raises(InputError, match=f"^data.x: .*: {why}"):
        find_shards([url], "data.x")


def test_local_braces(tmp_path):
    for n in range(9, 12):
        write_shard(tmp_path / f"s-{n:02d}.tar", numbered(1))
    assert [p.name for p in find_shards([f"{tmp_path}/s-{{09..11}}.tar"], "x")] == ["s-09.tar", "s-10.tar", "s-11.tar"]
    with pytest.raises(InputError, match=r"no file matches .*s-12.tar"):
        find_shards([f"{tmp_path}/s-{{09..12}}.tar"], "x")
    write_shard(tmp_path / "{1,2}.tar", numbered(1))
    assert [p.name for p in find_shards([f"{tmp_path}/{{1,2}}.tar"], "x")] == ["{1,2}.tar"]


def test_what_messages_show():
    assert storage.shown("https://me:pass@host:1/a/b.tar?X-Amz-Signature=1") == "https://host:1/a/b.tar"
    assert storage.shown("s3://b/what?.tar") == "s3://b/what?.tar"
    assert storage.shown("/a?b") == "/a?b"
    assert storage.index_url("https://h/a.tar?x=1") == "https://h/a.tar.index.json?x=1"
    assert storage.base_name("https://h/d/a.tar?x=/1") == "a.tar"


def test_nothing_is_loaded_for_local_shards(tmp_path):
    path = write_shard(tmp_path / "s.tar", numbered(2))
    code = (
        "import sys; from dali_pipelines.shards import *; "
        f"ShardIndex(find_shards([{str(path)!r}], 'x')[0]).read(1); "
        "assert not {'fsspec', 's3fs', 'aiohttp', 'botocore'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)


@pytest.mark.parametrize("missing", ["s3fs", "fsspec"])
def test_libraries_missing(missing, monkeypatch):
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(InputError, match=r"^s3://b/a.tar: needs s3fs: pip install 'megatron-elva\[s3\]'"):
        ShardIndex("s3://b/a.tar")


def test_errors_of_our_own_are_not_hidden(bucket, monkeypatch):
    async def wrong(*_):
        raise ConfigError("not a fault of the request")

    monkeypatch.setattr(clients._S3Client, "stat", wrong)
    with pytest.raises(ConfigError):
        ShardIndex("s3://shards/a.tar")


def test_an_index_that_cannot_be_kept(bucket, tmp_path, log, monkeypatch):
    local = upload(bucket, tmp_path, "a.tar", numbered(4), log)
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    same(ShardIndex("s3://shards/a.tar"), local)


def test_versions_of_the_index(tmp_path):
    path = write_shard(tmp_path / "s.tar", numbered(3))
    cache = tmp_path / "s.tar.index.json"
    expected = ShardIndex(path).spans.tolist()
    stored = json.loads(cache.read_text())
    old = {"stamp": [1, *stored["stamp"][1:]], "warning": None, "spans": expected[:1]}
    wrong = [{**stored, "first": stored["first"][::-1]}, {**stored, "size": [1 << 40] * 3}, {**stored, "media": []}]
    for content in (old, *wrong):
        cache.write_text(json.dumps(content))
        assert ShardIndex(path).spans.tolist() == expected
        assert json.loads(cache.read_text()) == stored
    assert shards.VERSION == stored["stamp"][0] == 2


def test_urls_before_submission(tmp_path):
    """Only their form is checked then; local patterns with braces need every file."""
    write_shard(tmp_path / "s-0.tar", numbered(1))
    shards_of = {
        "good": ["s3://bucket/train-*.tar", "https://host/s-{0..3}.tar", f"{tmp_path}/s-{{0..0}}.tar"],
        "scheme": ["gs://bucket/a.tar"],
        "web": ["https://host/*.tar"],
        "local": [f"{tmp_path}/s-{{0..1}}.tar"],
    }
    sources = {name: SimpleNamespace(shards=names) for name, names in shards_of.items()}
    data = SimpleNamespace(sources=sources, tokenizer=str(tmp_path), quarantine=str(tmp_path / "typo.txt"))
    config = SimpleNamespace(stage=SimpleNamespace(blend=shards_of), data=data, init_from=None)
    problems = file_problems(config)
    assert problems.pop() == f"data.quarantine={tmp_path}/typo.txt: no such file; null: the run's own list alone"
    assert [problem.partition(".shards=")[0] for problem in problems] == [
        f"data.sources.{name}" for name in ("scheme", "web", "local")
    ]
    assert "allowed: s3, http, https" in problems[0]
    assert problems[2].endswith(f"no such file: {tmp_path}/s-1.tar")
