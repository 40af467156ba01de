"""Packs by micro-step number."""

import pickle
from dataclasses import replace

import pytest
import torch

from dali_pipelines.decode import decode
from dali_pipelines.loader import build_dataset
from dali_pipelines.shards import ShardIndex
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.layout import IGNORE, Kind, build_layout
from tests.dali_pipelines.make_samples import BAD, same


def test_a_pack_is_whole(config):
    dataset = build_dataset(config, 0, 1, 16)
    for step in range(8):
        pack = dataset[step]
        layout = build_layout(pack.spec)
        assert layout.tokens == len(pack.tokens) == len(pack.labels)
        assert layout.tokens % 16 == 0
        assert pack.tokens.dtype == pack.labels.dtype == torch.int64
        assert pack.patches.dtype == torch.uint8
        assert pack.patches.shape == (sum(v.cells for v in pack.spec.videos) * 4, 7 * 7 * 3)
        text = layout.kind == Kind.TEXT
        assert (pack.tokens[~text] == 0).all()
        assert (pack.tokens[text] < 300).all()
        assert len(pack.spec.samples) == len(pack.keys)
        assert len(pack.keys) + len(pack.skipped) == pack.samples == 8
        # A label is the next token of the same sample, and visual tokens are never one.
        for at in (pack.labels != IGNORE).nonzero().flatten().tolist():
            assert pack.labels[at] == pack.tokens[at + 1]
            assert layout.kind[at + 1] == Kind.TEXT
            assert layout.sample[at] == layout.sample[at + 1]


def test_bad_samples_are_skipped_with_a_reason(config):
    dataset = build_dataset(config, 0, 1, 8)
    packs = [dataset[step] for step in range(12)]
    found = {s.key.split("/")[-1]: s.reason for p in packs for s in p.skipped}
    assert set(found) == set(BAD)
    for key, reason in BAD.items():
        assert found[key].startswith(reason)
        assert "\n" not in found[key]
    good = {key for p in packs for key in p.keys}
    assert len(good) == 24 + 9 + 5 - len(BAD)
    assert "video-1.tar/v010" in good


def test_unexpected_faults_are_skipped_too(config, monkeypatch):
    dataset = build_dataset(config, 0, 1, 8)
    monkeypatch.setattr("dali_pipelines.packs.to_cells", lambda *_: 1 // 0)
    reasons = {s.reason for s in dataset[0].skipped}
    assert "ZeroDivisionError: integer division or modulo by zero" in reasons
    assert all(key.startswith("text") for key in dataset[0].keys)


def test_a_sample_that_cannot_be_read_is_skipped(config, monkeypatch):
    dataset = build_dataset(config, 0, 1, 8)

    def fail(self, i):
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(ShardIndex, "read", fail)
    pack = dataset[0]
    assert pack.keys == []
    assert len(pack.skipped) == pack.samples == 8
    assert all("#" in s.key and "Input/output error" in s.reason for s in pack.skipped)
    # Nothing is left: two tokens without labels keep the ranks together.
    assert [s.segments for s in pack.spec.samples] == [(2,)]
    assert len(pack.tokens) == 8
    assert (pack.labels == IGNORE).all()
    assert pack.patches.shape == (0, 147)


@pytest.mark.parametrize("size", [2, 3, 8])
def test_ranks_share_a_micro_step_whatever_their_number(config, size):
    one = build_dataset(config, 0, 1, 1)
    ranks = [build_dataset(config, rank, size, 1) for rank in range(size)]
    for step in range(4):
        whole, parts = one[step], [r[step] for r in ranks]
        assert [key for p in parts for key in p.keys] == whole.keys
        assert [s for p in parts for s in p.skipped] == whole.skipped
        assert sum(p.samples for p in parts) == whole.samples
        for name in ("tokens", "labels", "patches"):
            kept = [getattr(p, name) for p in parts if p.keys]
            assert torch.equal(torch.cat(kept), getattr(whole, name))


def test_an_epoch_holds_every_sample_once(config):
    config.stage.blend = {"images": 1.0}
    config.train.global_batch, config.train.accumulate = 3, 1
    dataset = build_dataset(config, 0, 1, 1)
    first = [key for step in range(3) for key in dataset[step].keys]
    second = [key for step in range(3, 6) for key in dataset[step].keys]
    assert sorted(first) == sorted(second) == [f"image-0.tar/i{i:02d}" for i in range(9)]
    assert first != second

    def answers(step, at):
        pack = dataset[step]
        first = sum(s.tokens for s in pack.spec.samples[:at])
        return pack.labels[first : first + pack.spec.samples[at].tokens].tolist()

    # The next epoch asks other questions about the same picture.
    asked = {key: answers(i // 3, i % 3) for i, key in enumerate(first)}
    later = {key: answers(3 + i // 3, i % 3) for i, key in enumerate(second)}
    assert sum(asked[key] != later[key] for key in asked) > 6


def test_a_copy_in_another_process_gives_the_same(config):
    dataset = build_dataset(config, 0, 1, 8)
    expected = [dataset[step] for step in range(3)]
    copy = pickle.loads(pickle.dumps(dataset))
    assert all(same(copy[step], expected[step]) for step in (2, 0, 1))
    assert not same(expected[0], replace(expected[0], labels=expected[0].labels + 1))


def test_what_cannot_be_built(config, tmp_path):
    def message(kind=ConfigError, rank=0, size=1, **changes):
        changed = pickle.loads(pickle.dumps(config))
        for path, value in changes.items():
            *parts, last = path.split("__")
            holder = changed
            for part in parts:
                holder = getattr(holder, part)
            setattr(holder, last, value)
        with pytest.raises(kind) as caught:
            build_dataset(changed, rank, size, 8)
        return str(caught.value)

    assert message(data__pack_tokens=4096).startswith("data.pack_tokens: 4096")
    assert "allowed: crop, pad" in message(data__fit="stretch")
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
    config.data.tokenizer, config.init_from = None, str(corpus / "tokenizer")
    assert len(build_dataset(config, 0, 1, 8)[0].tokens)


def test_a_cut_shard_is_reported(config, corpus, tmp_path, caplog):
    whole = (corpus / "image-0.tar").read_bytes()
    (tmp_path / "cut.tar").write_bytes(whole[: len(whole) // 2])
    config.data.sources["images"].shards = [str(tmp_path / "cut.tar")]
    config.stage.blend = {"images": 1.0}
    dataset = build_dataset(config, 0, 1, 8)
    assert "cut.tar: cut at byte" in caplog.text
    assert not dataset[0].skipped


def test_the_cache_gives_the_same_packs_with_fewer_decodes_and_keeps_its_bound(config, monkeypatch):
    def packs(megabytes):
        counted = []
        monkeypatch.setattr("dali_pipelines.packs.decode", lambda *a: counted.append(1) or decode(*a))
        config.data.cache_mb = megabytes
        dataset = build_dataset(config, 0, 1, 4)
        return [dataset[i] for i in range(12)], len(counted), dataset.encoder

    plain, all_decodes, _ = packs(0)
    cached, few_decodes, _ = packs(100)
    assert few_decodes < all_decodes / 2
    for a, b in zip(plain, cached, strict=True):
        assert a.spec == b.spec and torch.equal(a.patches, b.patches) and a.keys == b.keys
    _, _, encoder = packs(0.02)
    assert 0 < encoder._cached == sum(cells.nbytes for cells, _ in encoder._cache.values()) <= 20_000
