"""The demo corpus on disk: shards, files, resuming, the command line."""

import io
import json
import tarfile
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from dali_pipelines import demo_corpus
from dali_pipelines.demo_corpus import CorpusArgs, main, render_corpus, scene_of, shard_paths
from dali_pipelines.demo_render import draw_frames

ARGS = CorpusArgs(images=30, videos=60, heldout=30, seed=5, shard_samples=20)


def content(out: Path) -> dict[str, bytes]:
    return {str(p.relative_to(out)): p.read_bytes() for p in sorted(out.rglob("*")) if p.is_file()}


def members(shard: Path) -> dict[str, bytes]:
    with tarfile.open(shard) as tar:
        return {m.name: tar.extractfile(m).read() for m in tar}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    out = tmp_path_factory.mktemp("corpus")
    render_corpus(out, ARGS)
    return out


def test_layout(corpus):
    expected = [
        "corpus.json",
        "heldout/videos-00000.tar",
        "heldout/videos-00001.tar",
        "images/train-00000.tar",
        "images/train-00001.tar",
        "videos/train-00000.tar",
        "videos/train-00001.tar",
        "videos/train-00002.tar",
    ]
    assert list(content(corpus)) == expected
    about = json.loads((corpus / "corpus.json").read_text())
    assert about["arguments"] == {"images": 30, "videos": 60, "heldout": 30, "seed": 5, "shard_samples": 20}
    assert about["bytes"] == sum(len(c) for name, c in content(corpus).items() if name.endswith("tar"))


def test_every_sample_is_what_its_json_says(corpus):
    keys = set()
    for shard, (part, start, stop) in shard_paths(ARGS).items():
        found = members(corpus / shard)
        assert len(found) == 2 * (stop - start)
        names = list(found)
        for index, pixels_name, json_name in zip(range(start, stop), names[::2], names[1::2], strict=True):
            key, suffix = pixels_name.split(".")
            assert json_name == f"{key}.json"
            keys.add(key)
            about, scene = json.loads(found[json_name]), scene_of(part, ARGS.seed, index)
            assert about["caption"] == scene.caption
            assert [(q["question"], q["answer"], q["type"]) for q in about["qa"]] == [
                (q.question, q.answer, q.type) for q in scene.qa
            ]
            true = draw_frames(scene)
            if part == "images":
                assert suffix == "png"
                frames = np.asarray(Image.open(io.BytesIO(found[pixels_name])))[None]
                assert np.array_equal(frames, true)
            else:
                assert suffix == "mp4"
                with av.open(io.BytesIO(found[pixels_name])) as container:
                    stream = container.streams.video[0]
                    assert stream.codec_context.name == "h264"
                    assert stream.codec_context.pix_fmt == "yuv420p"
                    assert stream.average_rate == about["fps"]
                    frames = np.stack([f.to_ndarray(format="rgb24") for f in container.decode(video=0)])
                # Chroma is halved; the worst video loses little enough for every digit to be where it was.
                assert np.abs(frames.astype(int) - true).mean() < 12
            assert frames.shape == (about["frames"], about["height"], about["width"], 3)
    assert len(keys) == ARGS.images + ARGS.videos + ARGS.heldout


def test_workers_do_not_change_a_byte(corpus, tmp_path):
    render_corpus(tmp_path, ARGS, workers=2)
    assert content(tmp_path) == content(corpus)


def test_another_seed_changes_every_shard(corpus, tmp_path):
    render_corpus(tmp_path, CorpusArgs(images=30, videos=60, heldout=30, seed=6, shard_samples=20))
    old, new = content(corpus), content(tmp_path)
    assert set(old) == set(new)
    assert all(old[name] != new[name] for name in old)


def test_a_complete_corpus_is_left_alone(corpus, monkeypatch):
    before = content(corpus)
    monkeypatch.setattr(demo_corpus, "_render_chunk", lambda chunk: pytest.fail("rendered again"))
    assert render_corpus(corpus, ARGS)["arguments"]["seed"] == 5
    assert content(corpus) == before


def test_an_interrupted_render_goes_on(corpus, tmp_path, monkeypatch):
    render, calls = demo_corpus._render_chunk, []

    def breaks(chunk):
        calls.append(chunk)
        if len(calls) == 4:
            raise KeyboardInterrupt
        return render(chunk)

    monkeypatch.setattr(demo_corpus, "_render_chunk", breaks)
    with pytest.raises(KeyboardInterrupt):
        render_corpus(tmp_path, ARGS)
    assert not (tmp_path / "corpus.json").exists()
    complete = sorted(str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*.tar"))
    assert complete == ["images/train-00000.tar", "images/train-00001.tar", "videos/train-00000.tar"]
    stamps = {name: (tmp_path / name).stat().st_mtime_ns for name in complete}
    render_corpus(tmp_path, ARGS)
    assert content(tmp_path) == content(corpus)
    assert stamps == {name: (tmp_path / name).stat().st_mtime_ns for name in complete}
    assert [(c.part, c.start) for c in calls[4:]] == [("videos", 20), ("videos", 40), ("heldout", 0), ("heldout", 20)]


def test_shards_of_other_arguments_are_not_kept(corpus, tmp_path, monkeypatch):
    other = CorpusArgs(images=30, videos=80, heldout=0, seed=9, shard_samples=20)
    render_corpus(tmp_path, other)
    (tmp_path / "corpus.json").rename(tmp_path / "corpus.partial.json")  # as if interrupted at the very end
    (tmp_path / "mine.tar").write_bytes(b"mine")
    render_corpus(tmp_path, ARGS)
    assert content(tmp_path) == content(corpus) | {"mine.tar": b"mine"}
    monkeypatch.setattr(demo_corpus, "renderer_digest", lambda: "newer")
    monkeypatch.setattr(demo_corpus, "_render_chunk", lambda chunk: [(f"{chunk.part}.json", b"{}")])
    render_corpus(tmp_path, ARGS)
    assert members(tmp_path / "images/train-00000.tar") == {"images.json": b"{}"}


def test_shards_of_unknown_origin_are_not_kept(corpus, tmp_path):
    (tmp_path / "videos").mkdir()
    (tmp_path / "videos/train-00001.tar").write_bytes(b"not ours")
    render_corpus(tmp_path, ARGS)
    assert content(tmp_path) == content(corpus)


def test_command_line(tmp_path, capsys):
    arguments = ["--out", str(tmp_path / "c"), "--images", "3", "--videos", "2", "--heldout", "0", "--workers", "1"]
    assert main(arguments) == 0
    assert "3 images, 2 videos, 0 heldout" in capsys.readouterr().out
    assert len(members(tmp_path / "c/images/train-00000.tar")) == 6
    assert not (tmp_path / "c/heldout").exists()
    with pytest.raises(SystemExit) as stop:
        main([*arguments, "--videos", "-1"])
    assert stop.value.code == 2
    assert "--videos" in capsys.readouterr().err
