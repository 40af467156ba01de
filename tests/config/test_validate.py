"""Each rule refuses what it is for, in one line that names the key."""

from __future__ import annotations

import pytest

from megatron_elva.config import validate as validate_module
from megatron_elva.config.compose import compose, compose_all
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.validate import check_files, file_problems, notes, validate, validate_all

LOCAL = ["cluster=local", "train.steps=500", "train.global_batch=32", "train.accumulate=4", "parallel.sequence=true"]
SLURM: list[str] = []


@pytest.mark.parametrize(
    ("base", "overrides", "message"),
    [
        (LOCAL, ["device=gpu"], "device=gpu: allowed: cuda, cpu"),
        (LOCAL, ["layers=tee"], "layers=tee: allowed: auto, local, te (did you mean 'te'?)"),
        (LOCAL, ["data.fit=stretch"], "data.fit=stretch: allowed: crop, pad"),
        (LOCAL, ["model.patch_embedding=conv"], "model.patch_embedding=conv: allowed"),
        (LOCAL, ["model.attention_mask=full"], "model.attention_mask=full: allowed"),
        (LOCAL, ["model.positions=2d"], "model.positions=2d: allowed"),
        (LOCAL, ["model.positions=thw"], "model.positions=thw: not built yet: model.positions=1d"),
        (LOCAL, ["merging.kind=tome"], "merging.kind=tome: allowed"),
        (LOCAL, ["merging.survivor=middle"], "merging.survivor=middle: allowed: first, last"),
        (LOCAL, ["precision.dtype=fp16"], "precision.dtype=fp16: allowed: fp32, bf16"),
        (LOCAL, ["precision.fp8=tensor"], "precision.fp8=tensor: allowed: null, delayed"),
        (LOCAL, ["cluster.kind=pbs"], "cluster.kind=pbs: allowed"),
        (LOCAL, ["train.steps=0"], "train.steps=0: must be above 0"),
        (LOCAL, ["data.max_pixels=-1"], "data.max_pixels=-1: must be above 0"),
        (LOCAL, ["train.lr=-1"], "train.lr=-1.0: must be 0 or more"),
        (LOCAL, ["stage.frozen_share=1.5"], "stage.frozen_share=1.5: must be a share from 0 to 1"),
        (LOCAL, ["train.beta2=1.0"], "train.beta2=1.0: must be at least 0 and below 1"),
        (LOCAL, ["model.hidden=130"], "model.hidden=130: must be divisible by model.heads=4"),
        (LOCAL, ["model.heads=8", "model.kv_heads=3"], "model.heads=8: must be divisible by model.kv_heads=3"),
        (LOCAL, ["model.patch_heads=3"], "model.patch_width=128: must be divisible by model.patch_heads=3"),
        (LOCAL, ["model.hidden=132"], "model.heads=4: gives head width 33"),
        (LOCAL, ["parallel.tensor=4"], "model.kv_heads=2: must be divisible by parallel.tensor=4"),
        (LOCAL, ["parallel.tensor=3"], "model.heads=4: must be divisible by parallel.tensor=3"),
        (LOCAL, ["model.vocab_size=1001"], "model.vocab_size=1001: must be divisible by parallel.tensor=2"),
        (
            LOCAL,
            ["model.heads=6", "model.kv_heads=6", "model.hidden=132", "model.ffn_hidden=384", "parallel.tensor=3"],
            "must divide 64",
        ),
        (LOCAL, ["parallel.pipeline=3"], "model.layers=4: must be divisible by parallel.pipeline=3"),
        (LOCAL, ["parallel.virtual_pipeline=4"], "parallel.pipeline=2 x parallel.virtual_pipeline=4"),
        (LOCAL, ["parallel.virtual_pipeline=2", "parallel.pipeline=1"], "needs parallel.pipeline above 1"),
        (
            LOCAL,
            ["parallel.virtual_pipeline=2", "train.accumulate=1"],
            "train.accumulate=1: must be divisible by parallel.pipeline=2",
        ),
        (LOCAL, ["nodes=2"], "nodes=2: cluster=local runs on one machine"),
        (["cluster=debug"], ["tasks_per_node=2"], "tasks_per_node=2: cluster=debug runs one rank"),
        (LOCAL, ["tasks_per_node=6"], "tasks_per_node=6: with nodes=1 these are 6 ranks, not divisible by"),
        (LOCAL, ["train.global_batch=30"], "train.global_batch=30: must be divisible by train.accumulate=4"),
        (LOCAL, ["tasks_per_node=12"], "train.global_batch=32: with train.accumulate=4 a micro-step has 8 samples"),
        (LOCAL, ["data.pack_tokens=4096"], "must be 4 (train.accumulate=4 x 1 copies)"),
        (LOCAL, ["train.warmup_steps=9999"], "train.warmup_steps=9999: must be at most train.steps=500"),
        (LOCAL, ["layers=te"], "layers=te: Transformer Engine needs device=cuda"),
        (LOCAL, ["precision=fp8_current"], "precision.fp8=current: needs device=cuda"),
        (SLURM, ["precision=fp8_current", "layers=local"], "precision.fp8=current: needs Transformer Engine"),
        (SLURM, ["precision=fp8_delayed", "precision.dtype=fp32"], "precision.dtype=fp32: must be bf16"),
        (LOCAL, ["data.sources.videos.task=captoin"], "data.sources.videos.task=captoin: allowed: caption"),
        (LOCAL, ["data.sources.videos.shards=[]"], "data.sources.videos.shards=[]: needs at least one"),
        (LOCAL, ["stage.blend={video: 1}"], "stage.blend.video=1.0: no such source in data=demo; it has images"),
        (LOCAL, ["stage.blend.videos=-1"], "stage.blend.videos=-1.0: a weight must be above 0"),
        (LOCAL, ["stage.blend={}"], "stage.blend={}: needs at least one source"),
        (LOCAL, ["stage=1", "data=clips"], "stage.blend.images=1.0: no such source in data=clips"),
        (LOCAL, ["stage.losses=[gen,msee]"], "allowed: gen, mse, con (did you mean 'mse'?)"),
        (LOCAL, ["stage.losses=[gen,mse]"], "guidance is not built yet: stage.losses=[gen]"),
        (SLURM, ["precision=fp8_current", "model.ffn_hidden=18896"], "model.ffn_hidden=18896: gives products of width"),
        (SLURM, ["layers=te", "model.attention_mask=frame_bidirectional"], "=frame_bidirectional: must be causal with"),
        (LOCAL, ["data.pack_text_tokens=64"], "data.pack_text_tokens=64: a part of data.pack_tokens=None"),
        (
            LOCAL,
            ["data.pack_tokens=64", "data.pack_text_tokens=64", "train.global_batch=4"],
            "data.pack_text_tokens=64: a part of data.pack_tokens=64; must be smaller",
        ),
        (LOCAL, ["data.sampling=rate"], "data.rate: null; data.sampling=rate needs a number above 0"),
        (LOCAL, ["data.sampling=rates"], "allowed: uniform, rate, clip, timestamps (did you mean 'rate'?)"),
        (LOCAL, ["data.hybrid='hi=336'"], "data.hybrid: 'hi=336'; allowed: a text such as hi=336,lo=168,k=3"),
        (LOCAL, ["data.decoder=ffmpeg"], "data.decoder=ffmpeg"),
        (LOCAL, ["data.max_bad_share=1.5"], "data.max_bad_share=1.5"),
        (LOCAL, ["data.decode_timeout_s=0"], "data.decode_timeout_s=0"),
    ],
)
def test_rule(base, overrides, message):
    with pytest.raises(ConfigError) as caught:
        validate(compose([*base, *overrides]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def _points(*points):
    return ["merging=paper", f"merging.points=[{', '.join('{' + point + '}' for point in points)}]"]


_RANGE = "must be a layer from 1 to 3, or a share of the depth between 0 and 1 that rounds to one of these"


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["debug.dump_merge_index=true"], "debug.dump_merge_index=true: needs merging.kind=hierarchical; it is none"),
        (["debug.dump_merge_index=true", "merging=pooling"], "debug.dump_merge_index=true: needs merging.kind="),
        (["merging=paper", "merging.points=[]"], "merging.points=[]: merging.kind=hierarchical needs"),
        (
            ["merging=paper", "merging.kind=none"],
            "merging.kind=none: must be hierarchical with merging.points (2 given); or merging.points=[]",
        ),
        (["merging=fast", "merging.kind=pooling"], "merging.kind=pooling: must be hierarchical with merging.points"),
        (
            ["merging=pooling", "merging.pooling.window=1"],
            "merging.pooling.window=1: must be at least 2 with merging.kind=pooling; or merging=none",
        ),
        (["merging=none", "merging.pooling.window=0"], "merging.pooling.window=0: must be above 0"),
        (
            ["merging=fast", "model.layers=1", "parallel.pipeline=1"],
            "model.layers=1: must be at least 2 with merging.kind=hierarchical; or merging=none",
        ),
        (_points("after: 1, rule: thresh"), "merging.points[0].rule=thresh: allowed: threshold, budget (did you mean"),
        (_points("after: 4, rule: budget, keep: 1"), f"merging.points[0].after=4: {_RANGE}"),
        (_points("after: 0, rule: budget, keep: 1"), f"merging.points[0].after=0: {_RANGE}"),
        (_points("after: -1, rule: budget, keep: 1"), f"merging.points[0].after=-1: {_RANGE}"),
        (_points("after: 1.5, rule: budget, keep: 1"), f"merging.points[0].after=1.5: {_RANGE}"),
        (_points("after: 0.99, rule: budget, keep: 1"), f"merging.points[0].after=0.99 (layer 4): {_RANGE}"),
        (_points("after: nan, rule: budget, keep: 1"), "merging.points[0].after=nan: must be a finite number"),
        (
            _points("after: 0.5, rule: budget, keep: 1", "after: 1, rule: budget, keep: 1"),
            "merging.points[1].after=1 (layer 1): must be layer 2 or later, as the point before it",
        ),
        (_points("after: 2, rule: threshold"), "merging.points[0].tau=null: must be a similarity from -1 to 1"),
        (_points("after: 2, rule: threshold, tau: 2"), "merging.points[0].tau=2.0: must be a similarity from -1 to 1"),
        (_points("after: 2, rule: threshold, tau: -1.1"), "merging.points[0].tau=-1.1: must be a similarity"),
        (_points("after: 2, rule: budget"), "merging.points[0].keep=null: must be a share above 0 and up to 1"),
        (_points("after: 2, rule: budget, keep: 0"), "merging.points[0].keep=0.0: must be a share above 0 and up to 1"),
        (_points("after: 2, rule: budget, keep: 1.1"), "merging.points[0].keep=1.1: must be a share above 0"),
        (
            _points("after: 2, rule: budget, keep: 0.5, tau: 0.6"),
            "merging.points[0].tau=0.6: must be left out with rule=budget",
        ),
        (
            _points("after: 2, rule: threshold, tau: 0.6, keep: 0.5"),
            "merging.points[0].keep=0.5: must be left out with rule=threshold",
        ),
        (
            _points(
                "after: 1, rule: budget, keep: 0.4",
                "after: 1, rule: threshold, tau: 0.6",
                "after: 2, rule: budget, keep: 0.5",
            ),
            "merging.points[2].keep=0.5: must be at most the 0.4 of an earlier point",
        ),
    ],
)
def test_merging(overrides, start):
    with pytest.raises(ConfigError) as caught:
        validate(compose([*LOCAL, *overrides]))
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


def test_a_share_may_not_round_to_the_last_layer_of_a_real_model():
    with pytest.raises(
        ConfigError, match=r"^merging\.points\[0\]\.after=0\.99 \(layer 28\): must be a layer from 1 to 27"
    ):
        validate(compose(_points("after: 0.99, rule: budget, keep: 0.5")))
    validate(compose(_points("after: 0.98, rule: budget, keep: 0.5")))


def test_merging_that_is_right():
    for points in (
        _points("after: 0.001, rule: threshold, tau: -1", "after: 3, rule: threshold, tau: 1"),
        _points("after: 2, rule: budget, keep: 0.5", "after: 2, rule: budget, keep: 0.5"),
    ):
        validate(compose([*LOCAL, *points, "debug.dump_merge_index=true"]))


_VIRTUAL = "parallel.virtual_pipeline=2"


@pytest.mark.parametrize(
    ("overrides", "start"),
    [
        (["parallel.carrier=row"], "parallel.carrier=row: allowed: rows, fixed (did you mean 'rows'?)"),
        (["parallel.carrier_tokens=0"], "parallel.carrier_tokens=0: must be above 0"),
        (["parallel.carrier_tokens=64"], "parallel.carrier_tokens=64: must be null with parallel.carrier=rows; or"),
        (
            ["parallel.overlap_p2p=true"],
            "parallel.overlap_p2p=true: needs parallel.virtual_pipeline above 1: megatron-core overlaps only",
        ),
        (
            ["parallel.overlap_p2p=false", _VIRTUAL],
            "parallel.overlap_p2p=false: megatron-core mixes up messages or hangs when it interleaves without overlap; "
            "must be null or true",
        ),
        (
            ["parallel.deallocate_outputs=true", _VIRTUAL],
            "parallel.deallocate_outputs=true: with overlapped exchange megatron-core 0.18.4 corrupts data; "
            "null or false, or 0.19 or later",
        ),
    ],
)
def test_pipeline_exchange(overrides, start, monkeypatch):
    monkeypatch.setattr(validate_module, "version", lambda name: "0.18.4")
    with pytest.raises(ConfigError) as caught:
        validate(compose([*LOCAL, *overrides]))
    assert str(caught.value).startswith(start)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "overrides",
    [
        ["parallel.carrier=fixed"],
        ["parallel.carrier=fixed", "parallel.carrier_tokens=64"],
        ["parallel.overlap_p2p=true", _VIRTUAL],
        ["parallel.deallocate_outputs=true"],
    ],
)
def test_pipeline_exchange_that_is_right(overrides, monkeypatch):
    monkeypatch.setattr(validate_module, "version", lambda name: "0.16.1")
    validate(compose([*LOCAL, *overrides]))


@pytest.mark.parametrize(("release", "safe"), [("0.19.0", True), ("0.19.0rc1", True), ("1.0", True), (None, False)])
def test_outputs_of_an_overlapped_exchange_are_freed_from_0_19_on(release, safe, monkeypatch):
    def version(name):
        if release is None:
            raise validate_module.PackageNotFoundError(name)
        return release

    monkeypatch.setattr(validate_module, "version", version)
    config = compose([*LOCAL, "parallel.deallocate_outputs=true", _VIRTUAL])
    if safe:
        validate(config)
    else:
        with pytest.raises(ConfigError, match=r"^parallel\.deallocate_outputs=true"):
            validate(config)


def test_valid_layouts():
    for overrides in (
        [*LOCAL, "parallel.virtual_pipeline=2"],
        [*LOCAL, "tasks_per_node=8"],
        ["parallel.pipeline=1"],
    ):
        validate(compose(overrides))


def test_stages_are_named_and_checked_together():
    with pytest.raises(ConfigError, match=r"^stage 2: train.lr=-1.0"):
        validate_all(compose_all(["stage=all", "cluster=local", "stage_2.train.lr=-1"]))
    with pytest.raises(ConfigError, match="stage_3: 8 ranks on cpu after 4 on cpu"):
        validate_all(compose_all(["stage=all", "cluster=local", "stage_3.tasks_per_node=8"]))
    validate_all(compose_all(["stage=all", "stage_2.nodes=2"]))


def test_notes():
    assert notes(compose(LOCAL)) == []
    said = notes(compose([*LOCAL, "parallel.tensor=1", "parallel.sequence=true", "train.accumulate=1"]))
    assert notes(compose([*LOCAL, "parallel.carrier=fixed"])) == []
    assert notes(compose([*LOCAL, "parallel.carrier=fixed", "parallel.pipeline=1"])) == [
        "parallel.carrier=fixed: no effect with parallel.pipeline=1"
    ]
    assert ["parallel.sequence=true" in said[0], "train.accumulate=1" in said[1]] == [True, True]
    fp8 = [*SLURM, "precision=fp8_delayed"]
    plain = notes(compose([*fp8, "train.recompute=false"]))
    (added,) = [n for n in notes(compose([*fp8, "train.recompute=true"])) if n not in plain]
    assert added.startswith("train.recompute=true: with precision.fp8=delayed")


def test_files(tmp_path):
    overrides = [*LOCAL, f"data.root={tmp_path}", "init_from=nowhere"]
    assert len(file_problems(compose(overrides))) == 4
    with pytest.raises(InputError, match=r"data\.sources\.images\.shards=.*no such file \(and 3 more"):
        check_files(compose(overrides))
    for kind in ("images", "videos"):
        (tmp_path / kind).mkdir()
        (tmp_path / kind / "train-000.tar").touch()
    (tmp_path / "tokenizer").mkdir()
    assert file_problems(compose(overrides)) == [
        "init_from=nowhere: no such folder; must be a run or a Hugging Face folder"
    ]
    check_files(compose(overrides), coming=["nowhere"])
    assert "data.tokenizer=null" in file_problems(compose([*LOCAL, f"data.root={tmp_path}", "data.tokenizer=null"]))[0]


def test_relative_shards(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "shards").mkdir()
    (tmp_path / "shards" / "a.tar").touch()
    config = compose([*LOCAL, "data=clips", "data.root=shards", f"data.tokenizer={tmp_path}"])
    check_files(config)
