"""A folder of small media with annotations, as a user would have it."""

import json
import tarfile
from types import SimpleNamespace

import pytest

from dali_pipelines.prepare.cli import main
from dali_pipelines.prepare.settings import Room
from dali_pipelines.shards import ShardIndex, split_name
from tests.dali_pipelines.make_samples import encode, image, textured_frames


def caption(path, text):
    return {"video": path, "caption": text}


@pytest.fixture(scope="session")
def media(tmp_path_factory):
    """Twelve videos and three images in a folder."""
    folder = tmp_path_factory.mktemp("media")
    (folder / "sub").mkdir()
    for i in range(12):
        (folder / "sub" / f"v{i}.mp4").write_bytes(encode(textured_frames(4 + i, 32 + 2 * i, 48)))
    for name, height in (("a.png", 30), ("b.jpg", 40), ("c.webp", 50)):
        kind = {"jpg": "jpeg"}.get(name[2:], name[2:])
        (folder / name).write_bytes(image(textured_frames(1, height, 44)[0], kind))
    return folder


@pytest.fixture
def annotations(tmp_path, media):
    """A file of mixed rows about them, good and bad; the bad ones say so in their caption."""
    (tmp_path / "broken.mp4").write_bytes(b"this is no video")
    (tmp_path / "cut.mp4").write_bytes((media / "sub/v11.mp4").read_bytes()[:-600])
    turns = [{"from": "human", "value": "<image>\n<image>\nWhich?"}, {"from": "gpt", "value": "The first."}]
    rows = [
        *(caption(f"sub/v{i}.mp4", f"Clip {i}.") for i in range(12)),
        {"id": "two", "image": ["c.webp", "a.png"], "conversations": turns},
        {"text": "Plain text."},
        caption("sub/v3.mp4", "Another text."),
        caption(str(tmp_path / "broken.mp4"), "bad: probe"),
        caption("none.mp4", "bad: read"),
        caption(str(tmp_path / "cut.mp4"), "bad: probe"),
        caption("sub/v4.mp4", "bad <|im_start|>: scan"),
        caption("sub/v5.mp4", "Clip 5."),
    ]
    path = tmp_path / "train.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def prepare(annotations, media, tmp_path):
    """Run the command line on them."""

    def run(*more, out="out", expect=0):
        folder = tmp_path / out
        given = [f"--input={annotations}", f"--media={media}", f"--out={folder}", "--workers=2", *more]
        assert main(given) == expect
        return SimpleNamespace(out=folder, room=Room(folder), given=given, shards=shard_bytes(folder))

    return run


def shard_bytes(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*.tar"))}


def read_all(folder, pattern="*.tar"):
    """``{key: RawSample}`` of all shards, in order."""
    shards = [ShardIndex(path) for path in sorted(folder.glob(pattern))]
    return {raw.key.partition("/")[2]: raw for shard in shards for raw in map(shard.read, range(len(shard)))}


def members(path):
    """Names of a shard's members by key."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            key, extension = split_name(member.name)
            found.setdefault(key, []).append(extension)
    return found
