"""The builder: round trip, atomic writing, errors of files."""

from __future__ import annotations

import dataclasses

import pytest
import yaml

from megatron_elva.config.build import build, find_key, known_keys, load, save, to_dict
from megatron_elva.config.compose import compose
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config


@pytest.mark.parametrize(
    "overrides", [["merging=paper"], ["cluster=local", "model=tiny"], ["data=clips", "train.lr=1e-9"]]
)
def test_round_trip(tmp_path, overrides):
    config = compose(overrides)
    path = tmp_path / "run" / "config.yaml"
    save(config, path)
    assert load(path) == config
    assert [p.name for p in path.parent.iterdir()] == ["config.yaml"]


def test_shell_lines_survive(tmp_path):
    config = compose([])
    config = dataclasses.replace(
        config, cluster=dataclasses.replace(config.cluster, setup=["echo ${HOME:-x} $((1+1))"])
    )
    save(config, tmp_path / "config.yaml")
    assert load(tmp_path / "config.yaml") == config


def test_merge_points_become_dataclasses():
    points = compose(["merging=paper"]).merging.points
    assert [(p.after, p.rule, p.tau, p.keep) for p in points] == [
        (0.07, "threshold", 0.6, None),
        (0.25, "budget", None, 0.5),
    ]


def test_written_by_hand(tmp_path):
    tree = to_dict(compose([]))
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tree).replace("lr: 4.0e-05", "lr: 4e-5"))
    assert load(path).train.lr == 4e-5  # YAML 1.1 reads 4e-5 as a text


def test_defaults_of_the_schema_fill_in():
    tree = to_dict(compose([]))
    del tree["debug"]["dump_merge_index"], tree["merging"]["points"]
    assert build(Config, tree) == compose([f"run_dir={tree['run_dir']}"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["train"].pop("lr"), "train.lr is missing"),
        (lambda t: t["train"].update(lrr=1), "unknown key 'train.lrr' (did you mean 'train.lr'?)"),
        (lambda t: t["data"]["sources"]["videos"].update(tsk="x"), "unknown key 'data.sources.videos.tsk'"),
        (lambda t: t["merging"].update(points=[{"after": 1, "rule": "budget", "kep": 1}]), "points[0].kep"),
        (lambda t: t["merging"].update(points=[{"after": "x", "rule": "budget"}]), "merging.points[0].after=x"),
        (lambda t: t["stage"].update(losses=[1.5, None]), "stage.losses[1]=null: must be a text"),
        (lambda t: t.update(model=[1]), "model=[1]: must be a group of keys"),
    ],
)
def test_errors_name_the_key(change, message):
    tree = to_dict(compose([]))
    change(tree)
    with pytest.raises(ConfigError) as caught:
        build(Config, tree)
    assert message in str(caught.value)


def test_bad_files(tmp_path):
    path = tmp_path / "config.yaml"
    with pytest.raises(InputError, match="not a readable config file"):
        load(path)
    path.write_text("just text")
    with pytest.raises(InputError, match="no keys"):
        load(path)
    path.write_text("a: [")
    with pytest.raises(InputError, match="not a readable config file"):
        load(path)
    path.write_text("a: 1")
    with pytest.raises(ConfigError, match=r"config\.yaml: unknown key 'a'"):
        load(path)


def test_known_keys():
    assert {"train.lr", "data.sources.*.task", "stage.blend.*", "nodes", "merging.pooling.window"} <= set(known_keys())
    assert find_key("data.sources.mine.task") == "data.sources.*.task"
    assert find_key("data.sources.a.b.task") is None


def test_a_config_written_before_a_key_existed_is_read(tmp_path):
    config = compose(["cluster=local", f"run_dir={tmp_path}"])
    save(config, tmp_path / "config.yaml")
    lines = (tmp_path / "config.yaml").read_text().splitlines(keepends=True)
    (tmp_path / "config.yaml").write_text("".join(line for line in lines if "cache_mb" not in line))
    assert load(tmp_path / "config.yaml") == config


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_numbers_are_finite(value):
    with pytest.raises(ConfigError, match=r"^train.lr=.*must be a"):
        compose([f"train.lr={value}"])
