"""Packs built of sample numbers: what is in them, and what becomes of bad samples."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dali_pipelines import packs as packs_module
from dali_pipelines.builder import TRIES, Build, Measure
from dali_pipelines.from_config import open_stream
from dali_pipelines.packing import Budget, Length
from dali_pipelines.report import PassedBy
from dali_pipelines.shards import ShardIndex
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.layout import IGNORE, Kind, build_layout
from tests.dali_pipelines.make_samples import BAD, encode, same, textured_frames, write_shard


class Packs:
    """The packs of one rank by micro-step, built in this process."""

    def __init__(self, config, rank=0, size=1):
        self.config = config
        self.stream = open_stream(config, rank, size)
        self.builder, self.share = self.stream.builder, self.stream.share

    def __getitem__(self, step):
        built = self.builder(Build(self.share.numbers(step)))
        return built.pack(self.config.pad_multiple, 7 * 7 * 3)


def with_(config, **data):
    """The config with other data settings."""
    return SimpleNamespace(**{**vars(config), "data": SimpleNamespace(**{**vars(config.data), **data})})


def last(key):
    return key.split("/")[-1]


def test_a_pack_is_whole(config):
    packs = Packs(config)
    for step in range(8):
        pack = packs[step]
        layout = build_layout(pack.spec)
        assert layout.tokens == len(pack.tokens) == len(pack.labels)
        assert layout.tokens % 8 == 0
        assert pack.tokens.dtype == pack.labels.dtype == torch.int64
        assert pack.patches.dtype == torch.uint8
        assert pack.patches.shape == (sum(v.cells for v in pack.spec.videos) * 4, 7 * 7 * 3)
        text = layout.kind == Kind.TEXT
        assert (pack.tokens[~text] == 0).all()
        assert (pack.tokens[text] < 300).all()
        assert len(pack.spec.samples) == len(pack.keys) == pack.samples == 8  # bad ones were replaced
        # A label is the next token of the same sample, and visual tokens are never one.
        for at in (pack.labels != IGNORE).nonzero().flatten().tolist():
            assert pack.labels[at] == pack.tokens[at + 1]
            assert layout.kind[at + 1] == Kind.TEXT
            assert layout.sample[at] == layout.sample[at + 1]


STAGES = {"v007": "decode", "v013": "text", "t02": "text"}


def test_bad_samples_are_replaced_from_their_source_with_a_reason(config):
    packs = Packs(config)
    bad = [s for step in range(12) for s in packs[step].skipped]
    assert {last(s.key) for s in bad} == set(BAD)
    for skipped in bad:
        assert skipped.reason.startswith(BAD[last(skipped.key)])
        assert "\n" not in skipped.reason
        assert skipped.stage == STAGES[last(skipped.key)]
        assert skipped.replaced_by is not None
        assert last(skipped.replaced_by)[0] == last(skipped.key)[0], "from another source"
        assert last(skipped.replaced_by) not in BAD
    good = {key for step in range(12) for key in packs[step].keys}
    assert len(good) == 24 + 9 + 5 - len(BAD)
    assert "video-1.tar/v010" in good


def test_a_replacement_stands_where_the_bad_sample_stood(config):
    packs = Packs(config)
    step = next(step for step in range(12) if packs[step].skipped)
    pack = packs[step]
    numbers = packs.share.numbers(step)
    names = [packs.builder.blend[n][0] for n in numbers]
    assert [last(key)[0] for key in pack.keys] == [name[0] for name in names]
    assert pack.skipped[0].replaced_by in pack.keys
    assert same(pack, packs[step])


def test_a_source_with_nothing_good_leaves_holes(config, monkeypatch):
    packs = Packs(config)
    looked_at = []
    read = ShardIndex.read

    def broken(self, i):
        looked_at.append(self.name_of(i))
        if "text" in str(self.path):
            raise InputError(f"{self.name_of(i)}: torn")
        return read(self, i)

    monkeypatch.setattr(ShardIndex, "read", broken)
    step = next(s for s in range(12) if any("text" in packs.builder.blend[n][0] for n in packs.share.numbers(s)))
    looked_at.clear()
    pack = packs[step]
    texts = sum(packs.builder.blend[n][0] == "texts" for n in packs.share.numbers(step))
    holes = [s for s in pack.skipped if s.replaced_by is None]
    assert len(holes) == texts > 0
    assert all((s.stage, s.reason[-4:]) == ("read", "torn") for s in holes)
    assert sum("text" in name for name in looked_at) == texts * (1 + TRIES)
    assert len(pack.keys) == pack.samples - texts


def test_unexpected_faults_concern_a_sample_alone(config, monkeypatch):
    packs = Packs(config)
    monkeypatch.setattr(packs_module, "watch", lambda *_: 1 // 0)
    pack = packs[0]
    assert {(s.stage, s.reason) for s in pack.skipped} == {
        ("decode", "ZeroDivisionError: integer division or modulo by zero")
    }
    assert all(key.startswith("text") for key in pack.keys)


def test_a_pack_with_nothing_in_it_can_be_trained_on(config, monkeypatch):
    packs = Packs(config)
    monkeypatch.setattr(ShardIndex, "read", lambda *_: 1 // 0)
    pack = packs[0]
    assert pack.keys == [] and len(pack.skipped) == 8
    assert pack.spec.tokens == 8 and (pack.labels == IGNORE).all() and pack.patches.shape == (0, 147)


def test_samples_passed_by_are_replaced(config):
    packs = Packs(config)
    numbers = packs.share.numbers(0)
    keys = packs[0].keys
    built = packs.builder(Build(numbers, PassedBy(frozenset(keys[:1]), frozenset(keys[1:2]))))
    assert [(s.key, s.stage) for s in built.skipped if s.stage == "quarantine"] == [
        (keys[0], "quarantine"),
        (keys[1], "quarantine"),
    ]
    assert built.keys[2:] == keys[2:] and not set(keys[:2]) & set(built.keys)


def test_a_sample_is_not_even_read_when_its_place_is_listed(config, monkeypatch):
    packs = Packs(config)
    number = next(n for n in range(50) if packs.builder.blend[n][0] == "videos")
    shard, i = packs.builder.sources["videos"].locate(packs.builder.blend[number][1])
    reads = []
    read = ShardIndex.read
    monkeypatch.setattr(ShardIndex, "read", lambda self, k: reads.append(self.name_of(k)) or read(self, k))
    built = packs.builder(Build((number,), PassedBy(frozenset({shard.name_of(i)}))))
    assert built.skipped[0].key == shard.name_of(i) and shard.name_of(i) not in reads and reads


def test_replacements_are_spread_and_differ(config, monkeypatch):
    packs = Packs(config)
    numbers = [n for n in range(200) if packs.builder.blend[n][0] == "videos"][:60]
    keys = {n: packs.builder(Build((n,))).keys[0] for n in numbers}
    chosen = []
    for n in numbers:
        built = packs.builder(Build((n,), PassedBy(frozenset({keys[n]}))))
        chosen.append(last(built.keys[0]))
        assert chosen[-1] != last(keys[n])
    assert len(set(chosen)) > 12 and max(chosen) > "v018" and min(chosen) < "v005"


def test_several_replacements_keep_the_budget(config):
    """All of a tight pack is bad: what takes their place must fit together."""
    builder = Packs(with_(config, pack_tokens=10_000)).builder
    numbers = tuple(n for n in range(100) if builder.blend[n][0] == "videos")[:6]
    keys = [builder(Build((n,))).keys[0] for n in numbers]
    whole = [s.length.tokens for n in numbers for s in builder(Build((n,))).samples]
    for share in (0.3, 0.5, 0.8):
        builder.budget = Budget(int(sum(whole) * share))
        built = builder(Build(numbers, PassedBy(frozenset(keys))))
        assert sum(s.length.tokens for s in built.samples) <= builder.budget.tokens
        assert 0 < len(built.samples) < len(numbers) or share == 0.8


def test_epochs_differ_through_the_builder(config):
    """The order of questions is another one in the next epoch, for a sample as for a replacement, measured as built."""
    config.stage.blend = {"images": 1.0}
    builder = Packs(config).builder
    first = {builder(Build((n,))).keys[0]: builder(Build((n,))).samples[0].tokens.tolist() for n in range(9)}
    lengths = {builder(Build((n,))).keys[0]: m.length for n, m in enumerate(builder(Measure(tuple(range(9)))))}
    changed = {"tokens": 0, "lengths": 0, "replaced": 0}
    for n in range(9, 18):
        built = builder(Build((n,)))
        key = built.keys[0]
        changed["tokens"] += built.samples[0].tokens.tolist() != first[key]
        measured = builder(Measure((n,)))[0].length
        assert measured == built.samples[0].length
        changed["lengths"] += measured != lengths[key]
        other = builder(Build((n,), PassedBy(frozenset({key}))))
        changed["replaced"] += other.samples[0].tokens.tolist() != first[other.keys[0]]
    assert changed["tokens"] > 5 and changed["replaced"] > 5


def test_equal_keys_of_two_folders_are_two_samples_in_the_cache(config, corpus, tmp_path):
    frames = [textured_frames(2, 28, 28), 255 - textured_frames(2, 28, 28)]
    for name, content in zip("xy", frames, strict=True):
        (tmp_path / name).mkdir()
        write_shard(tmp_path / name / "train.tar", [("0", {"json": {"caption": "Clip 1."}, "mp4": encode(content)})])
        config.data.sources[name] = SimpleNamespace(shards=[str(tmp_path / name / "*.tar")], task="caption")
    config.stage.blend = {"x": 1.0, "y": 1.0}
    plain, cached = Packs(config)[0], Packs(with_(config, cache_mb=8))[0]
    assert torch.equal(plain.patches, cached.patches) and len(plain.patches.unique(dim=0)) > 8


LIES = [10**400, -5, 0, True, 2.5, "56", None, 1 << 30]


@pytest.mark.parametrize("lie", LIES)
def test_a_description_that_cannot_be_is_not_believed(config, corpus, tmp_path, lie):
    clip = encode(textured_frames(3, 28, 28))
    media = [{"height": 28, "width": lie, "frames": 3}]
    write_shard(tmp_path / "video-0.tar", [("v0", {"json": {"caption": "Clip 1.", "media": media}, "mp4": clip})])
    config.data.sources["videos"].shards = [str(tmp_path / "*.tar")]
    config.stage.blend = {"videos": 1.0}
    for bound in (None, 500):
        builder = Packs(with_(config, max_pixels=bound)).builder
        assert builder(Measure((0,)))[0].length == builder(Build((0,))).samples[0].length


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_share_a_micro_step_whatever_their_number(config, size):
    whole = Packs(config)
    ranks = [Packs(config, rank, size) for rank in range(size)]
    for step in range(3):
        parts = [rank[step] for rank in ranks]
        assert [key for part in parts for key in part.keys] == whole[step].keys
        assert sum(part.samples for part in parts) == 8
        assert torch.equal(torch.cat([p.patches for p in parts]), whole[step].patches)


def test_an_epoch_holds_every_sample_once(config):
    config.stage.blend = {"images": 1.0}
    packs = Packs(config)
    keys = [key for step in range(9) for key in packs[step].keys]
    assert sorted(keys[:9]) == sorted(set(keys))
    assert sorted(keys[9:18]) == sorted(set(keys))
    assert keys[:9] != keys[9:18]


def test_a_copy_in_another_process_gives_the_same(config):
    packs = Packs(config)
    expected = packs.builder(Build(packs.share.numbers(2)))
    again = pickle.loads(pickle.dumps(packs.builder))(Build(packs.share.numbers(2)))
    assert again.keys == expected.keys
    assert same(again.pack(8, 147), expected.pack(8, 147))


def test_measured_lengths_are_those_of_the_samples(config):
    packs = Packs(config)
    numbers = tuple(range(80))
    bad = {}
    for measured in packs.builder(Measure(numbers)):
        built = packs.builder(Build((measured.number,)))
        if measured.length is None:
            bad[last(measured.bad.key)] = measured.bad.reason
            assert built.skipped[0].key == measured.bad.key
        else:
            assert [s.length for s in built.samples] == [measured.length]
            assert measured.length.tokens == built.samples[0].spec.tokens
    assert set(bad) == set(BAD)


def test_lengths_come_from_what_the_preparation_wrote(config, corpus, tmp_path, monkeypatch):
    """Equal to those of the files, which are not even read; what is wrong with a text is found all the same."""
    from dali_pipelines.media import probe

    source = open_stream(config, 0, 1).builder.sources["videos"]
    limits = Packs(config).builder.encoder.options.limits
    samples = []
    for shard in source.shards:
        for raw in map(shard.read, range(len(shard))):
            meta = dict(raw.meta)
            if last(raw.key) != "v007":
                found = probe(raw.media[0], limits)
                meta["media"] = [{"height": found.native[0], "width": found.native[1], "frames": found.frames}]
            samples.append((last(raw.key), {"json": meta, "mp4": raw.media[0]}))
    write_shard(tmp_path / "video-9.tar", samples)
    config.stage.blend = {"videos": 1.0}
    plain = Packs(config).builder(Measure(tuple(range(24))))
    config.data.sources["videos"].shards = [str(tmp_path / "video-9.tar")]
    packs = Packs(config)
    reads = []
    read = ShardIndex.read
    monkeypatch.setattr(ShardIndex, "read", lambda self, i: reads.append(i) or read(self, i))
    described = packs.builder(Measure(tuple(range(24))))
    assert len(reads) == 1  # v007 has no description
    assert [m.length for m in described] == [m.length for m in plain]
    assert [m.bad and last(m.bad.key) for m in described] == [m.bad and last(m.bad.key) for m in plain]


def test_a_sample_longer_than_the_budget_is_refused_when_measured(config):
    stream = open_stream(with_(config, pack_tokens=60), 0, 1)
    measured = stream.builder(Measure(tuple(range(40))))
    refused = [m.bad for m in measured if m.bad is not None and m.bad.stage == "length"]
    assert refused
    assert all("data.pack_tokens is 60" in bad.reason for bad in refused)
    assert all(m.length.tokens <= 60 for m in measured if m.length is not None)


def test_what_is_longer_than_measured_does_not_break_the_budget(config):
    builder = Packs(config).builder
    numbers = tuple(range(8))
    whole = builder(Build(numbers))
    total = sum((s.length for s in whole.samples), Length(0, 0)).tokens
    builder.budget = Budget(total - 1)
    built = builder(Build(numbers))
    assert any(s.stage == "length" and "more than its metadata says" in s.reason for s in built.skipped)
    assert sum(s.length.tokens for s in built.samples) <= total - 1


def test_random_clips_differ_by_epoch_and_repeat_exactly(config):
    config = with_(config, sampling="clip", clip_seconds=0.2, frames=2, cache_mb=64)
    builder = Packs(config).builder
    source = builder.sources["videos"]
    raw = next(r for r in (source.shards[0].read(i) for i in range(10)) if last(r.key) == "v003")
    seen = [builder.encoder(raw, "caption", epoch).cells[0] for epoch in (0, 0, 1, 2, 3, 4)]
    assert np.array_equal(seen[0], seen[1])
    assert any(not np.array_equal(seen[0], other) for other in seen[2:])


def test_what_cannot_be_built(config, tmp_path):
    def message(kind=ConfigError, rank=0, size=1, **changes):
        changed = pickle.loads(pickle.dumps(config))
        for path, value in changes.items():
            *parts, name = path.split("__")
            holder = changed
            for part in parts:
                holder = getattr(holder, part)
            setattr(holder, name, value)
        with pytest.raises(kind) as caught:
            open_stream(changed, rank, size)
        return str(caught.value)

    assert "16 packs a step cannot be shared evenly by 3" in message(size=3, data__pack_tokens=400)
    assert "allowed: crop, pad" in message(data__fit="stretch")
    assert "data.decoder: ffmpeg; allowed: auto, dali, pyav" in message(data__decoder="ffmpeg")
    assert "multiples of train.accumulate = 2" in message(train__global_batch=7)
    assert "(did you mean 'videos'?)" in message(stage__blend={"video": 1.0})
    assert "weight above 0" in message(stage__blend={"videos": 0.0})
    assert "at least one for each" in message(size=9)
    assert "data.tokenizer: null" in message(data__tokenizer=None)
    assert f"{tmp_path} holds no tokenizer" in message(InputError, data__tokenizer=str(tmp_path))
    assert "init_from" in message(InputError, data__tokenizer=None, init_from=str(tmp_path))
    config.data.sources["videos"].task = "sing"
    assert "data.sources.videos.task: sing" in message()
    config.data.sources["videos"].shards = [str(tmp_path / "*.tar")]
    config.data.sources["videos"].task = "caption"
    assert "data.sources.videos.shards: no file matches" in message(InputError)


def test_the_tokenizer_may_come_with_the_weights(config, corpus):
    config = with_(config, tokenizer=None)
    config.init_from = str(corpus / "tokenizer")
    assert len(open_stream(config, 0, 1).builder.encoder.tokenizer) > 200


def test_a_cut_shard_is_reported(config, corpus, tmp_path, caplog):
    whole = (corpus / "video-0.tar").read_bytes()
    (tmp_path / "video-0.tar").write_bytes(whole[: len(whole) * 2 // 3])
    config.data.sources["videos"].shards = [str(tmp_path / "video-0.tar")]
    stream = open_stream(config, 0, 1)
    assert any("cut at byte" in record.message for record in caplog.records)
    assert 0 < len(stream.builder.sources["videos"]) < 10


def test_the_cache_gives_the_same_packs_with_fewer_decodes_and_keeps_its_bound(config, monkeypatch):
    expected = [Packs(config)[step] for step in range(6)]
    decodes = []
    original = packs_module.watch

    def counted(*args):
        decodes.append(1)
        return original(*args)

    monkeypatch.setattr(packs_module, "watch", counted)
    cached = Packs(with_(config, cache_mb=8))
    assert all(same(cached[step], expected[step]) for step in range(6))
    first = len(decodes)
    assert all(same(cached[step], expected[step]) for step in range(6))
    assert len(decodes) - first <= sum(len(p.skipped) for p in expected) * 2
    tight = Packs(with_(config, cache_mb=1))
    for step in range(6):
        _ = tight[step]
    assert tight.builder.encoder._cached <= 10**6
