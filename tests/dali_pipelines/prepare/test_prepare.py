"""Whole runs of the command line, read back as training reads them."""

import json
import os
from xml.etree import ElementTree

import pytest
from PIL import Image

from dali_pipelines.chat_format import encode_sample
from dali_pipelines.media import probe
from dali_pipelines.options import Limits
from dali_pipelines.prepare import cli
from dali_pipelines.shards import ShardIndex
from dali_pipelines.tokenizer import load_tokenizer, train_tokenizer
from tests.dali_pipelines.prepare.conftest import members, read_all

LIMITS = Limits(1 << 24, 10_000, 1 << 30, 1e4)


def report(run):
    return [json.loads(line) for line in (run.out / "report.jsonl").read_text().splitlines()]


def test_what_is_good_is_in_the_shards_as_it_was(prepare, media):
    run = prepare()
    found = read_all(run.out)
    assert len(found) == 15
    by_caption = {raw.meta.get("caption"): raw for raw in found.values()}
    for i in range(12):
        raw = by_caption[f"Clip {i}."]
        assert raw.media == [(media / f"sub/v{i}.mp4").read_bytes()]
        (about,) = raw.meta["media"]
        assert (about["width"], about["height"], about["frames"], about["codec"]) == (48, 32 + 2 * i, 4 + i, "h264")
        assert about["seconds"] == pytest.approx((4 + i) / 10, abs=1e-3) and about["file"] == f"sub/v{i}.mp4"
    (pair,) = [raw for raw in found.values() if "messages" in raw.meta]
    assert pair.media == [(media / name).read_bytes() for name in ("c.webp", "a.png")]
    assert [m["frames"] for m in pair.meta["media"]] == [1, 1]
    assert [m["seconds"] for m in pair.meta["media"]] == [0, 0]
    (text,) = [raw for raw in found.values() if "text" in raw.meta]
    assert text.media == [] and text.meta == {"text": "Plain text."}


def test_the_json_comes_first_and_several_files_keep_their_order(prepare):
    (shard,) = sorted(prepare().out.glob("*.tar"))
    for key, names in members(shard).items():
        assert names[0] == "json" and "." not in key
    assert members(shard)["00000012_two"] == ["json", "0.webp", "1.png"]


def test_more_than_ten_files_keep_their_order(tmp_path, media):
    paths = [f"sub/v{i}.mp4" for i in (3, 1, 2, 0, 5, 4, 9, 8, 7, 6, 11, 10)]
    row = {
        "videos": paths,
        "messages": [{"role": "user", "content": "<video>" * 12}, {"role": "assistant", "content": "A"}],
    }
    (tmp_path / "a.json").write_text(json.dumps([row]))
    assert cli.main([f"--input={tmp_path / 'a.json'}", f"--media={media}", f"--out={tmp_path / 'o'}"]) == 0
    (raw,) = read_all(tmp_path / "o").values()
    assert raw.media == [(media / path).read_bytes() for path in paths]


def test_every_bad_sample_is_in_the_report(prepare, capsys):
    run = prepare()
    lines = report(run)
    assert [(line["stage"], line["key"][:8]) for line in lines] == [
        ("scan", "00000018"), ("probe", "00000015"), ("read", "00000016"), ("probe", "00000017"), ("dedup", "00000019"),
    ]  # fmt: skip
    reasons = {line["key"][:8]: line["reason"] for line in lines}
    assert "control token" in reasons["00000018"] and "none.mp4: no such file" in reasons["00000016"]
    assert "00000005" in reasons["00000019"]
    assert "15 samples (train 15) in 1 shards" in capsys.readouterr().out
    made = json.loads((run.out / "manifest.json").read_text())
    assert (made["samples"], made["left_out"], made["duplicates"], made["samples_that_share_files"]) == (15, 5, 1, 2)


def test_the_samples_are_what_training_takes(prepare, tmp_path):
    train_tokenizer(["Clip number 1 of 2. Which? The first. Plain text. Another text."] * 9, 300, tmp_path / "tok")
    run = prepare(
        f"--tokenizer={tmp_path / 'tok'}", "--frames=4", "--max-pixels=1000", "--patch=4", "--cell-reduction=2"
    )
    tokenizer = load_tokenizer(tmp_path / "tok")
    lengths = []
    for raw in read_all(run.out).values():
        tasks = {"caption": "caption", "messages": "conversation", "text": "text"}
        (task,) = [task for key, task in tasks.items() if key in raw.meta]
        encoded = encode_sample(tokenizer, raw.meta, len(raw.media), task, "Describe the video in detail.", 999)
        lengths.append(encoded.text_tokens)
        for about, data in zip(raw.meta.get("media", []), raw.media, strict=True):
            found = probe(data, LIMITS)
            assert (found.frames, found.codec, found.native) == (
                about["frames"],
                about["codec"],
                (about["height"], about["width"]),
            )
    counted = json.loads((run.out / "manifest.json").read_text())["statistics"]
    assert counted["text"]["sum"] == sum(lengths) and counted["text"]["max"] == max(lengths)
    assert counted["refused"] == {}


def test_visual_tokens_are_those_of_the_decoder(prepare):
    from dali_pipelines.decode import measure
    from dali_pipelines.prepare.stats import View

    view = View(frames=3, max_pixels=900, patch=4, cell_reduction=2)
    run = prepare("--frames=3", "--max-pixels=900", "--patch=4", "--cell-reduction=2")
    wanted = [
        sum(measure(data, view.options(), ()).tokens for data in raw.media)
        for raw in read_all(run.out).values()
        if raw.media
    ]
    counted = json.loads((run.out / "manifest.json").read_text())["statistics"]["visual"]
    assert (counted["count"], counted["sum"], counted["max"]) == (len(wanted), sum(wanted), max(wanted))


def test_shards_are_cut_by_number_and_by_size(prepare):
    by_number = prepare("--shard-samples=4", out="number")
    assert list(by_number.shards) == [f"train-{i:05d}.tar" for i in range(4)]
    assert [len(ShardIndex(by_number.out / name)) for name in by_number.shards] == [4, 4, 4, 3]
    one = len(prepare(out="one").shards["train-00000.tar"])
    assert one < 1_000_000
    made = json.loads((by_number.out / "manifest.json").read_text())
    assert [shard["bytes"] for shard in made["shards"]] == [len(data) for data in by_number.shards.values()]


def test_a_shard_is_no_larger_than_allowed(tmp_path):
    import numpy as np

    from tests.dali_pipelines.make_samples import image

    noise = np.random.default_rng(0)
    (tmp_path / "in").mkdir()
    for i in range(7):
        size = 800 if i == 3 else 330  # the fourth alone is larger than a shard
        (tmp_path / f"in/{i}.png").write_bytes(image(noise.integers(0, 255, (size, size, 3), dtype=np.uint8)))
        (tmp_path / f"in/{i}.txt").write_text(f"Noise {i}.")
    assert cli.main([f"--input={tmp_path / 'in'}", f"--out={tmp_path / 'out'}", "--shard-mb=1", "--no-shuffle"]) == 0
    sizes = [path.stat().st_size for path in sorted((tmp_path / "out").glob("*.tar"))]
    assert len(read_all(tmp_path / "out")) == 7
    assert [size > 1_000_000 for size in sizes] == [False, True, False]


def test_the_order_is_shuffled_unless_it_is_to_stay(prepare):
    keys = {name: list(read_all(prepare(*more, out=name).out)) for name, more in
            {"a": (), "b": ("--shuffle=1",), "c": ("--no-shuffle",), "d": ("--workers=1",)}.items()}  # fmt: skip
    assert keys["c"] == sorted(keys["c"])
    assert keys["a"] == keys["d"]
    assert len({tuple(k) for k in keys.values()}) == 3
    assert all(sorted(k) == keys["c"] for k in keys.values())


def test_splits_share_no_file(prepare):
    run = prepare("--split=val=0.2", "--split=test=0.1")
    patterns = {"train": "train-*.tar", "val": "val/*.tar", "test": "test/*.tar"}
    found = {name: read_all(run.out, pattern).values() for name, pattern in patterns.items()}
    names = {name: {m["file"] for raw in raws for m in raw.meta.get("media", [])} for name, raws in found.items()}
    counts = {name: s["samples"] for name, s in json.loads((run.out / "manifest.json").read_text())["splits"].items()}
    assert counts == {"train": 10, "val": 3, "test": 2}
    assert not names["train"] & names["val"] and not names["train"] & names["test"] and not names["val"] & names["test"]


def test_duplicates_may_stay(prepare):
    run = prepare("--dedup=off")
    assert len(read_all(run.out)) == 16
    assert "dedup" not in {line["stage"] for line in report(run)}


def test_the_page_stands_alone_and_the_picture_opens(prepare):
    run = prepare()
    page = (run.out / "stats.html").read_text()
    pictures = page.count("<svg")
    assert pictures == 12
    for part in page.split("<svg")[1:]:
        ElementTree.fromstring("<svg" + part.partition("</svg>")[0] + "</svg>")
    assert "src=" not in page and "href" not in page
    assert "this is no video" not in page and "broken.mp4" in page and "control token" in page
    with Image.open(run.out / "stats.png") as picture:
        assert picture.size == (1200, 960)
        assert len(picture.getcolors(1 << 20)) > 5


def test_columns_may_have_other_names(tmp_path, media):
    (tmp_path / "t.csv").write_text("clip,title\nsub/v1.mp4,A cat.\nsub/v2.mp4,A dog.\n")
    given = [f"--input={tmp_path / 't.csv'}", f"--media={media}", f"--out={tmp_path / 'o'}"]
    assert cli.main([*given, "--column=video=clip", "--column=caption=title", "--no-shuffle"]) == 0
    assert [raw.meta["caption"] for raw in read_all(tmp_path / "o").values()] == ["A cat.", "A dog."]


def test_limits_are_told_apart(prepare):
    run = prepare("--max-source-frames=9", "--max-source-pixels=2400")
    reasons = " ".join(line["reason"] for line in report(run) if line["stage"] == "probe")
    assert "too long" in reasons and "--max-source-frames" in reasons
    assert "too large" in reasons and "--max-source-pixels is 2400" in reasons
    assert len(read_all(run.out)) < 12


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (["--shard-mb=0"], "--shard-mb 0"),
        (["--split=val"], "NAME=SHARE"),
        (["--split=train=0.1"], "NAME=SHARE"),
        (["--split=a/b=0.1"], "NAME=SHARE"),
        (["--split=a=0.5,b=0.5"], "leave nothing"),
        (["--reencode=gpo=3"], "did you mean 'gop'"),
        (["--reencode=gop=x"], "a whole number"),
        (["--reencode=preset=x"], "ultrafast"),
        (["--reencode=crf=90"], "crf 0 to 51"),
        (["--column=video"], "OURS=THEIRS"),
        (["--hybrid=big"], "hi=336"),
        (["--tokenizer=none"], "tokenizer"),
        (["--max-source-mb=9000"], "at most 8000"),
        (["--wrokers=2"], "--wrokers=2"),
        (["--input=none.json"], "none.json: no such file"),
        (["--slurm", "nodes"], "KEY=VALUE"),
        (["--slurm", "nodez=2"], "nodez"),
    ],
)
def test_bad_arguments_are_one_line_and_exit_2(prepare, capsys, more, says):
    prepare(*more, expect=2)
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and says in line


def test_no_usable_sample_is_exit_2(tmp_path, capsys):
    (tmp_path / "a.jsonl").write_text('{"video": "none.mp4", "caption": "c"}\n')
    assert cli.main([f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'o'}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "no usable sample" in line and "no such file" in line
    (tmp_path / "a.jsonl").write_text("\n")
    assert cli.main([f"--input={tmp_path / 'a.jsonl'}", f"--out={tmp_path / 'p'}"]) == 2
    assert "no usable sample" in capsys.readouterr().err


def test_media_without_text_are_told_what_they_need(tmp_path, media, capsys):
    assert cli.main([f"--input={media}", f"--out={tmp_path / 'o'}"]) == 2
    assert "neither a.txt nor a.json" in capsys.readouterr().err


def test_names_and_texts_that_are_no_unicode(tmp_path, media, capsys):
    folder = tmp_path / "in"
    folder.mkdir()
    strange = os.fsdecode(b"caf\xe9.mp4")
    for i, name in enumerate(("köln.mp4", strange)):
        (folder / name).write_bytes((media / "sub" / f"v{i}.mp4").read_bytes())
        (folder / name).with_suffix(".json").write_text(json.dumps({"caption": "Straße."}))
    (folder / "half.mp4").write_bytes((media / "sub/v1.mp4").read_bytes())
    (folder / "half.json").write_text('{"caption": "half \\ud83d"}')
    os.link(folder / "half.mp4", folder / os.fsdecode(b"no\xfftext.mp4"))
    assert cli.main([f"--input={folder}", f"--out={tmp_path / 'o'}"]) == 0
    found = list(read_all(tmp_path / "o").values())
    assert sorted(raw.meta["media"][0]["file"] for raw in found) == sorted(["köln.mp4", strange])
    assert {raw.meta["caption"] for raw in found} == {"Straße."}
    lines = [json.loads(line) for line in (tmp_path / "o/report.jsonl").read_text().splitlines()]
    assert sorted("half a character" in line["reason"] for line in lines) == [False, True]
