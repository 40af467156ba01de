"""Shards cut anywhere and with damaged headers: each sample is one that was there, or it is refused."""

import io
import json
import tarfile
import time

import numpy as np
import pytest

from dali_pipelines.shards import ShardIndex, iterate_meta
from megatron_elva.config.errors import InputError


def make(path, form=tarfile.PAX_FORMAT, long_names=False):
    """A shard of texts, images and videos in mixed order; gives its samples and where its headers stand."""
    rng = np.random.default_rng(0)
    kinds = [("json",), ("json", "mp4"), ("json", "0.png", "1.png"), ("mp4", "json"), ("json",), ("json", "mp4")]
    originals = {}
    with tarfile.open(path, "w", format=form) as tar:
        for i, kind in enumerate(kinds * 2):
            key = f"{'deep/' * 25 if long_names else ''}clip/{i:03d}"
            meta, media = {"n": i, "text": "x" * int(rng.integers(1, 600))}, {}
            for extension in kind:
                content = json.dumps(meta).encode() if extension == "json" else rng.bytes(int(rng.integers(1, 1800)))
                if extension != "json":
                    media[extension] = content
                info = tarfile.TarInfo(f"{key}.{extension}")
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
            originals[f"s.tar/{key}"] = (meta, [media[extension] for extension in sorted(media)])
    with tarfile.open(path) as tar:
        headers = [(m.offset, m.offset_data) for m in tar]
    return originals, headers


def deliver(path, originals):
    """Read all that a shard still gives; each sample must be an original one. Gives how many came."""
    start = time.monotonic()
    came = 0
    try:
        shard = ShardIndex(path)
        list(iterate_meta(path))
    except InputError as error:
        assert "\n" not in str(error)
        return 0
    for i in range(len(shard)):
        try:
            sample = shard.read(i)
            meta = shard.read_meta(i)
        except InputError as error:
            assert "\n" not in str(error)
            continue
        assert (sample.meta, sample.media) == originals[sample.key]
        assert (meta.key, meta.meta, meta.media) == (sample.key, sample.meta, len(sample.media))
        came += 1
    assert came == len(originals) or shard.warning
    assert time.monotonic() - start < 20  # not endless, on a busy machine too
    return came


FORMS = [(tarfile.PAX_FORMAT, False), (tarfile.GNU_FORMAT, True), (tarfile.PAX_FORMAT, True)]


@pytest.mark.parametrize(("form", "long_names"), FORMS)
def test_cut_anywhere(tmp_path, form, long_names):
    path = tmp_path / "s.tar"
    originals, _ = make(path, form, long_names)
    whole = path.read_bytes()
    rng = np.random.default_rng(1)
    at = [*range(0, len(whole) + 1, 512), *rng.integers(0, len(whole), 60).tolist()]
    came = []
    for end in sorted(at):
        path.write_bytes(whole[:end])
        came.append(deliver(path, originals))
    assert came == sorted(came)  # more of the shard never gives less
    assert came[-1] == len(originals)


@pytest.mark.parametrize(("form", "long_names"), FORMS)
def test_a_byte_of_a_header_is_damaged(tmp_path, form, long_names):
    path = tmp_path / "s.tar"
    originals, headers = make(path, form, long_names)
    whole = path.read_bytes()
    rng = np.random.default_rng(2)
    came = []
    for _ in range(250):
        damaged = bytearray(whole)
        first, end = headers[rng.integers(len(headers))]
        # the last block is the header itself: what stands before it, for a long name, has no checksum in a tar file
        damaged[rng.integers(end - 512 if long_names else first, end)] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        came.append(deliver(path, originals))
    assert 0 < np.mean(came) < len(originals)


@pytest.mark.parametrize(("form", "long_names"), FORMS)
def test_damage_behind_the_index(tmp_path, form, long_names):
    """An index that was made of the whole shard finds any damage to names and sizes, long names too."""
    path = tmp_path / "s.tar"
    originals, headers = make(path, form, long_names)
    whole = path.read_bytes()
    shard = ShardIndex(path)
    rng = np.random.default_rng(3)
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 5)):
            first, end = headers[rng.integers(len(headers))]
            damaged[rng.integers(first, end)] ^= int(rng.integers(1, 256))
        path.write_bytes(damaged)
        for i in range(len(shard)):
            try:
                sample = shard.read(i)
            except InputError as error:
                assert "\n" not in str(error)
                refused += 1
                continue
            assert (sample.meta, sample.media) == originals[sample.key]
    assert refused > 100


def test_random_bytes_anywhere(tmp_path):
    """Damage to names and contents cannot be seen in all cases, but nothing crashes or hangs."""
    path = tmp_path / "s.tar"
    _, headers = make(path, long_names=True)
    whole = path.read_bytes()
    rng = np.random.default_rng(4)
    start = time.monotonic()
    for _ in range(300):
        damaged = bytearray(whole)
        for _ in range(rng.integers(1, 30)):
            first, end = headers[rng.integers(len(headers))]
            damaged[rng.integers(first, end)] = rng.integers(256)
        path.write_bytes(damaged)
        try:
            shard = ShardIndex(path)
            list(iterate_meta(path))
            for i in range(len(shard)):
                shard.read(i)
        except InputError as error:
            assert "\n" not in str(error)
    assert time.monotonic() - start < 120


def header(name, size, kind=b"0"):
    """A header with any size field, whose checksum holds."""
    block = bytearray(tarfile.TarInfo(name).tobuf(tarfile.USTAR_FORMAT))
    block[124:136] = size
    block[156:157] = kind
    block[148:156] = b" " * 8
    block[148:156] = b"%06o\0 " % sum(block)
    return bytes(block)


NEGATIVE = b"\xff" * 11 + b"\0"
HUGE = b"\x80" + b"\0" * 4 + b"\x7f" + b"\xff" * 6


@pytest.mark.parametrize("size", [NEGATIVE, HUGE, b"77777777777\0"])
@pytest.mark.parametrize("kind", [b"0", b"x", b"g", b"L", b"K", b"S", b"1", b"5"])
def test_sizes_that_cannot_be(tmp_path, size, kind):
    path = tmp_path / "s.tar"
    originals, _ = make(path)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        at = tar.getmember("clip/003.mp4").offset
    path.write_bytes(whole[:at] + header("clip/003.mp4", size, kind) + whole[at + 512 :])
    assert deliver(path, originals) <= 3


def test_a_long_chain_of_extended_headers(tmp_path):
    path = tmp_path / "s.tar"
    originals, _ = make(path)
    with tarfile.open(path) as tar:
        at = tar.getmember("clip/003.mp4").offset
    whole = path.read_bytes()
    path.write_bytes(whole[:at] + header("x", b"00000000000\0", b"x") * 5000 + whole[at:])
    assert deliver(path, originals) <= 3


@pytest.mark.parametrize("zeros", [512, 1024, 4096])
def test_zeros_in_the_middle(tmp_path, zeros):
    """As a page of a file that was never written; tar takes them for the end."""
    path = tmp_path / "s.tar"
    originals, _ = make(path)
    whole = path.read_bytes()
    with tarfile.open(path) as tar:
        at = tar.getmember("clip/005.mp4").offset
    path.write_bytes(whole[:at] + bytes(zeros) + whole[at + zeros :])
    assert deliver(path, originals) == 5
    assert "end mark in the middle" in ShardIndex(path).warning


@pytest.mark.parametrize("kind", [tarfile.LNKTYPE, tarfile.SYMTYPE])
def test_links_are_refused(tmp_path, kind):
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("a.json", "a.mp4", "b.json"):
            tar.addfile(((info := tarfile.TarInfo(name)) and setattr(info, "size", 2)) or info, io.BytesIO(b"{}"))
        link = tarfile.TarInfo("b.mp4")
        link.type, link.linkname = kind, "a.mp4"
        tar.addfile(link)
    shard = ShardIndex(path)
    assert shard.read(0).media == [b"{}"]
    with pytest.raises(InputError, match=r"^s.tar#1: cannot be read: member b.mp4 is a link; allowed: plain files$"):
        shard.read(1)
