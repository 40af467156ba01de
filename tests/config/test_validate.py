"""Each rule refuses what it is for, in one line that names the key."""

from __future__ import annotations

import pytest

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
        (LOCAL, ["merging=paper"], "merging.kind=hierarchical: merging is not built yet: merging=none"),
        (SLURM, ["precision=fp8_blockwise"], "precision.fp8=blockwise: FP8 is not built yet: precision=bf16"),
        (SLURM, ["layers=te"], "layers=te: the Transformer Engine layers are not built yet: layers=local"),
        (
            LOCAL,
            ["data.pack_tokens=4096", "train.global_batch=4"],
            "data.pack_tokens=4096: a token budget is not built",
        ),
        (LOCAL, ["debug.dump_merge_index=true"], "debug.dump_merge_index=true: merging is not built yet"),
        (LOCAL, ["merging=pooling"], "merging.kind=pooling: merging is not built yet: merging=none"),
        (LOCAL, ["merging=paper", "merging.points=[]"], "merging.points=[]: merging.kind=hierarchical needs"),
        (LOCAL, ["merging.points=[{after: 1, rule: thresh}]"], "merging.points[0].rule=thresh: allowed: threshold"),
        (LOCAL, ["merging.points=[{after: 4, rule: budget, keep: 1}]"], "merging.points[0].after=4: must be"),
        (LOCAL, ["merging.points=[{after: 2, rule: budget}]"], "merging.points[0].keep=None: must be a share"),
        (LOCAL, ["merging.points=[{after: 2, rule: threshold, tau: 2}]"], "merging.points[0].tau=2.0: must be"),
    ],
)
def test_rule(base, overrides, message):
    with pytest.raises(ConfigError) as caught:
        validate(compose([*base, *overrides]))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


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
    assert ["parallel.sequence=true" in said[0], "train.accumulate=1" in said[1]] == [True, True]


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
