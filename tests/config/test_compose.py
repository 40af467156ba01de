"""Composition: every option of every group, overrides, defaults of a local run, the chain of stages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from megatron_elva.config.compose import CONFIG_DIR, compose, compose_all, group_options
from megatron_elva.config.errors import ConfigError
from megatron_elva.config.validate import validate

OPTIONS = [(group, name) for group, names in group_options().items() for name in names if group != "recipe"]


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_option_composes_and_validates(group, name):
    # clips hold videos alone, which is what stage 2 reads; the layout of 1.5B leaves 8 copies on a node of 8
    validate(compose([f"{group}={name}"]))


@pytest.mark.parametrize("stage", [1, 2, 3])
@pytest.mark.parametrize("data", ["demo", "web"])
@pytest.mark.parametrize("cluster", ["local", "debug", "slurm"])
def test_every_stage_runs_with_every_full_data_set(stage, data, cluster):
    validate(compose([f"stage={stage}", f"data={data}", f"cluster={cluster}"]))


@pytest.mark.parametrize("name", ["elva_1_5b", "elva_7b"])
@pytest.mark.parametrize("nodes", [1, 2])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_batches_divide_on_small_clusters(name, nodes, stage):
    validate(compose([f"model={name}", f"nodes={nodes}", f"stage={stage}"]))


@pytest.mark.parametrize("nodes", [4, 8, 16])
@pytest.mark.parametrize("stage", [1, 2, 3])
def test_shipped_batches_of_7b_divide_on_large_clusters(nodes, stage):
    validate(compose([f"nodes={nodes}", f"stage={stage}"]))


def test_defaults():
    config = compose([])
    assert (config.model.name, config.cluster.kind, config.device, config.tasks_per_node) == (
        "elva_7b",
        "slurm",
        "cuda",
        8,
    )
    assert (config.precision.name, config.nodes, config.stage.id, config.data.name) == ("bf16", 1, 2, "web")
    assert (config.seed, config.layers, config.init_from, config.dry_run, config.follow) == (
        1234,
        "auto",
        None,
        False,
        False,
    )
    assert re.fullmatch(r"runs/elva_7b_stage2_\d{8}-\d{6}", config.run_dir)
    assert config.parallel.tensor * config.parallel.pipeline == 8


def test_local_defaults():
    config = compose(["cluster=local"])
    assert (config.model.name, config.device, config.precision.name, config.data.name) == (
        "tiny",
        "cpu",
        "fp32",
        "demo",
    )
    assert config.tasks_per_node == config.parallel.tensor * config.parallel.pipeline == 4
    assert compose(["cluster=local", "parallel.tensor=1"]).tasks_per_node == 2


def test_local_defaults_give_way():
    config = compose(
        ["precision=bf16", "cluster=local", "model=elva_1_5b", "device=cuda", "tasks_per_node=8", "data=web"]
    )
    assert (config.model.name, config.device, config.precision.name, config.data.name) == (
        "elva_1_5b",
        "cuda",
        "bf16",
        "web",
    )
    assert (config.tasks_per_node, config.parallel.tensor) == (8, 1)


def test_debug_is_one_rank():
    config = compose(["cluster=debug"])
    assert (config.world_size, config.parallel.tensor, config.parallel.pipeline, config.model.name) == (1, 1, 1, "tiny")


@pytest.mark.parametrize("merging", ["none", "pooling", "paper", "fast"])
@pytest.mark.parametrize("model", ["tiny", "elva_1_5b", "elva_7b"])
def test_shipped_merging_fits_every_model(model, merging):
    validate(compose([f"model={model}", f"merging={merging}"]))


def test_pipeline_exchange_follows_the_schedule():
    plain = compose([]).parallel
    assert (plain.carrier, plain.carrier_tokens, plain.overlap_p2p, plain.deallocate_outputs) == (
        "rows", None, None, None,
    )  # fmt: skip
    assert (plain.interleaved, plain.overlaps_p2p, plain.deallocates_outputs) == (False, False, True)
    virtual = compose(["parallel.virtual_pipeline=2"]).parallel
    assert (virtual.interleaved, virtual.overlaps_p2p, virtual.deallocates_outputs) == (True, True, False)
    said = compose(["parallel.overlap_p2p=false", "parallel.deallocate_outputs=false"]).parallel
    assert (said.overlaps_p2p, said.deallocates_outputs) == (False, False)


def test_packs_are_padded_to_whole_shards():
    assert compose(["parallel.tensor=4", "parallel.sequence=true"]).pad_multiple == 4
    assert compose(["parallel.tensor=4", "parallel.sequence=false"]).pad_multiple == 1
    assert compose(["parallel.tensor=1", "parallel.sequence=true"]).pad_multiple == 1


@pytest.mark.parametrize(("name", "tokens"), [("delayed", 16), ("current", 16), ("blockwise", 128)])
def test_with_fp8_each_shard_of_a_pack_has_a_length_that_the_recipe_takes(name, tokens):
    config = compose([f"precision=fp8_{name}", "parallel.tensor=4", "parallel.sequence=true"])
    assert (config.sequence_shards, config.pad_multiple) == (4, 4 * tokens)
    config = compose([f"precision=fp8_{name}", "parallel.tensor=4", "parallel.sequence=false"])
    assert (config.sequence_shards, config.pad_multiple) == (1, tokens)


def test_recipe_applies_to_its_data_alone_and_can_be_left_out():
    assert compose(["data=demo"]).train.lr == 1.2e-3
    assert compose(["data=web"]).train.lr == 4e-5
    assert compose(["data=demo", "recipe=null"]).train.lr == 4e-5
    assert compose(["data=demo", "train.lr=0.5"]).train.lr == 0.5


def test_clips_take_images_out_of_the_blend():
    config = compose(["data=clips", "cluster=local"])
    assert config.stage.blend == {"videos": 1.0}
    assert (config.data.frames, config.data.max_pixels) == (4, 12544)


def test_open_mappings():
    assert compose(["stage.blend={videos: 3}"]).stage.blend == {"videos": 3.0}
    assert compose(["stage.blend.videos=0"]).stage.blend == {"images": 0.2}
    assert compose(["cluster.sbatch_args.constraint=h100"]).cluster.sbatch_args["constraint"] == "h100"
    config = compose(["data.sources.mine={shards: [a.tar], task: text}", "stage.blend.mine=1"])
    assert config.data.sources["mine"].shards == ["a.tar"]
    assert config.stage.blend["mine"] == 1.0


def test_data_root_moves_every_shard(monkeypatch):
    monkeypatch.setenv("ELVA_DATA", "/elsewhere")
    assert compose([]).data.sources["videos"].shards == ["/elsewhere/videos/train-*.tar"]
    assert compose(["data=demo", "data.root=/d"]).data.tokenizer == "/d/tokenizer"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["train.stpes=3"], "unknown key 'train.stpes' (did you mean 'train.steps'?)"),
        (["steps=3"], "unknown key 'steps' (did you mean 'train.steps'?)"),
        (["stag=2"], "unknown key 'stag' (did you mean 'stage'?)"),
        (["data.sources.videos.shard=[a]"], "unknown key 'data.sources.videos.shard'"),
        (["hydra.verbose=true"], "unknown key 'hydra.verbose'"),
        (["stage=4"], "stage=4: no such option; allowed: 1, 2, 3, all"),
        (["cluster=loca"], "cluster=loca: no such option (did you mean 'local'?); allowed: debug, local, slurm"),
        (["model=null"], "model=None: no such option"),
        (["train.steps=abc"], "train.steps=abc: must be a whole number"),
        (["train.steps=1.5"], "train.steps=1.5: must be a whole number"),
        (["train.steps=true"], "train.steps=true: must be a whole number"),
        (["train.lr=fast"], "train.lr=fast: must be a number"),
        (["train.recompute=1"], "train.recompute=1: must be true or false"),
        (["data.max_pixels=big"], "data.max_pixels=big: must be a whole number or null"),
        (["stage.losses=gen"], "stage.losses=gen: must be a list"),
        (["stage.blend=images"], "stage.blend=images: must be a mapping"),
        (["model.hidden=null"], "model.hidden=null: must be a whole number"),
        (["train=3"], "train=3: must be a group of keys"),
        (["+train.more=1"], "+train.more=1: keys are neither added nor removed"),
        (["~train.lr"], "~train.lr: keys are neither added nor removed"),
        (["train.lr"], "train.lr: not of the form key=value"),
        (["model=tiny,elva_7b"], "model=tiny,elva_7b: one value only"),
        (["model@other=tiny"], "model@other=tiny: '@' is not supported"),
        (["train.lr=${nowhere}"], "Interpolation key 'nowhere' not found"),
        (["stage_1.train.steps=3"], "stage_1.train.steps=3: a stage in front of a key goes with stage=all"),
        (["stage=all", "stage_4.train.steps=3"], "stage_4.train.steps=3: no such stage; allowed: stage_1"),
        (["stage=all", "stage_1.run_dir=x"], "run_dir is the same for all stages"),
        (["stage=all", "stage_1.train.stpes=3"], "unknown key 'train.stpes'"),
    ],
)
def test_refusals_are_one_line(overrides, message):
    with pytest.raises(ConfigError) as caught:
        compose_all(overrides)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_unknown_key_in_a_file(tmp_path):
    for source in CONFIG_DIR.rglob("*.yaml"):
        target = tmp_path / source.relative_to(CONFIG_DIR)
        target.parent.mkdir(exist_ok=True)
        target.write_text(source.read_text())
    broken = tmp_path / "stage" / "2.yaml"
    broken.write_text(broken.read_text().replace("warmup_steps:", "warmup_step:"))
    with pytest.raises(ConfigError, match=r"unknown key 'train.warmup_step' \(did you mean 'train.warmup_steps'\?\)"):
        compose([], tmp_path)
    validate(compose(["stage=1"], tmp_path))


def test_compose_leaves_the_chain_to_compose_all():
    with pytest.raises(ConfigError, match="stage=all makes three configs"):
        compose(["stage=all"])
    assert len(compose_all(["stage=1"])) == 1


def test_chain():
    configs = compose_all(
        [
            *("stage=all", "cluster=local", "run_dir=D", "init_from=hf", "train.log_every=7"),
            *("stage_1.train.steps=100", "stage_3.train.steps=700"),
        ]
    )
    assert [c.stage.id for c in configs] == [1, 2, 3]
    assert [c.run_dir for c in configs] == ["D/stage_1", "D/stage_2", "D/stage_3"]
    assert [c.init_from for c in configs] == ["hf", "D/stage_1", "D/stage_2"]
    assert [c.train.steps for c in configs] == [100, compose(["cluster=local"]).train.steps, 700]
    assert {c.train.log_every for c in configs} == {7}


def test_chain_without_run_dir_and_with_an_own_start():
    configs = compose_all(["stage=all", "stage_3.init_from=other"])
    folders = {str(Path(c.run_dir).parent) for c in configs}
    assert len(folders) == 1
    assert re.fullmatch(r"runs/elva_7b_stages_\d{8}-\d{6}", folders.pop())
    assert [c.init_from for c in configs] == [None, configs[0].run_dir, "other"]


@pytest.mark.parametrize("path", sorted(CONFIG_DIR.rglob("*.yaml")), ids=lambda p: str(p.relative_to(CONFIG_DIR)))
def test_every_key_has_a_comment(path):
    lines = path.read_text().splitlines()
    said = set()
    asked = {}
    for number, line in enumerate(lines, 1):
        match = re.match(r"\s*(?:- \{)?(\w+):\s*(\S?)", line)
        if match is None or line.lstrip().startswith("#"):
            continue
        name, value = match.groups()
        if "#" in line:
            said.add(name)
        elif value:
            asked[name] = number
    assert not {name: number for name, number in asked.items() if name not in said}
