"""From command-line overrides and the files of ``configs/`` to a `Config`, with errors of one line."""

from __future__ import annotations

import dataclasses
import math
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import hydra
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from megatron_elva.config.build import build, find_key, known_keys, unknown_key
from megatron_elva.config.errors import ConfigError, did_you_mean
from megatron_elva.config.schema import Config

CONFIG_DIR = Path(__file__).resolve().parents[2] / "configs"
"""The shipped YAML files."""

STAGES = ("1", "2", "3")
"""The options of the group ``stage`` that ``stage=all`` chains."""

_PREFIX = re.compile(r"stage_([^.=]*)\.(.*)", re.DOTALL)
_CHAIN_WIDE = ("stage", "run_dir", "cluster", "dry_run", "follow")


def compose(overrides: list[str], config_dir: Path | None = None) -> Config:
    """Compose the config of one stage.

    Args:
        overrides: Hydra overrides such as ``model=tiny`` or ``train.lr=1e-4``.
        config_dir: folder of the YAML files; the shipped one by default.

    Raises:
        ConfigError: an unknown key or option, a value of the wrong type, or bad syntax; one line.
    """
    folder = (config_dir or CONFIG_DIR).resolve()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"{folder}: no config.yaml in it; the package must be installed from its repository (pip -e)")
    if _stage_choice(overrides) == "all":
        raise ConfigError("stage=all makes three configs; one config has stage=1, 2 or 3")
    options = group_options(folder)
    lines = [line for override in _parse(overrides) for line in _hydra_lines(override, options)]
    return build(Config, _tree(lines, folder))


def compose_all(overrides: list[str], config_dir: Path | None = None) -> list[Config]:
    """Compose all stages of a submission: three with ``stage=all``, else one.

    With ``stage=all`` an override may begin with a stage, ``stage_1.train.steps=100``, and then holds for it alone.
    Stage k writes to ``run_dir/stage_k`` and starts from the weights of stage k - 1.

    Args:
        overrides: Hydra overrides.
        config_dir: folder of the YAML files; the shipped one by default.

    Raises:
        ConfigError: as `compose`.
    """
    common = [o for o in overrides if not _PREFIX.match(o)]
    own = [m.groups() for o in overrides if (m := _PREFIX.match(o))]
    if _stage_choice(common) != "all":
        if own:
            raise ConfigError(f"stage_{own[0][0]}.{own[0][1]}: a stage in front of a key goes with stage=all")
        return [compose(common, config_dir)]
    for stage, rest in own:
        key = rest.partition("=")[0]
        if stage not in STAGES:
            raise ConfigError(f"stage_{stage}.{rest}: no such stage; allowed: stage_{', stage_'.join(STAGES)}")
        if key.partition(".")[0] in _CHAIN_WIDE:
            raise ConfigError(f"stage_{stage}.{rest}: {key} is the same for all stages; give it without stage_{stage}.")
    shared = [o for o in common if o.partition("=")[0] != "stage"]
    configs = [
        compose([*shared, f"stage={stage}", *(rest for s, rest in own if s == stage)], config_dir) for stage in STAGES
    ]
    return _chain(configs, _given(shared, "run_dir"), {s for s, rest in own if _given([rest], "init_from")})


def group_options(config_dir: Path | None = None) -> dict[str, list[str]]:
    """The options of every config group, by the group's name."""
    folder = config_dir or CONFIG_DIR
    return {g.name: sorted(f.stem for f in g.glob("*.yaml")) for g in sorted(folder.iterdir()) if g.is_dir()}


def _chain(configs: list[Config], run_dir_given: bool, own_start: set[str]) -> list[Config]:
    """Give each stage its run directory and its start."""
    root = Path(configs[0].run_dir if run_dir_given else f"runs/{configs[0].model.name}_stages_{_utc_now()}")
    chained: list[Config] = []
    for stage, config in zip(STAGES, configs, strict=True):
        start = chained[-1].run_dir if chained and stage not in own_start else config.init_from
        tracking = dataclasses.replace(config.tracking, nested=True)
        run_dir = str(root / f"stage_{stage}")
        chained.append(dataclasses.replace(config, run_dir=run_dir, init_from=start, tracking=tracking))
    return chained


def _given(overrides: list[str], key: str) -> bool:
    return any(o.partition("=")[0] == key for o in overrides)


def _stage_choice(overrides: list[str]) -> str | None:
    chosen = [o.partition("=")[2].strip("'\"") for o in overrides if _given([o], "stage")]
    return chosen[-1] if chosen else None


def _parse(overrides: list[str]) -> list[Override]:
    parsed = []
    for line in overrides:
        if line.startswith(("+", "~")):
            raise ConfigError(f"{line}: keys are neither added nor removed; give key=value without '{line[0]}'")
        try:
            parsed += OverridesParser.create().parse_overrides([line])
        except HydraException as error:
            raise ConfigError(f"{line}: not of the form key=value (quote text with , = or brackets)") from error
    return parsed


def _hydra_lines(override: Override, options: dict[str, list[str]]) -> list[str]:
    """Check one override against groups and schema and return it in the form that Hydra takes."""
    key, line = override.key_or_group, override.input_line or ""
    if override.is_sweep_override():
        raise ConfigError(f"{line}: one value only; sweeps are not supported")
    if override.package is not None:
        raise ConfigError(f"{line}: '@' is not supported; give {key}=value")
    if key in options:
        return [_group_line(key, override.value(), options[key])]
    known = find_key(key)
    if known is None:
        raise unknown_key(key, [*known_keys(), *options])
    if f"{known}.*" in known_keys():
        return [f"~{key}", f"++{line}"]  # a mapping given whole replaces the one of the files; Hydra would merge them
    # names inside an open mapping (a new source, a new sbatch key) are for Hydra keys to add
    return [f"++{line}" if "*" in known else line]


def _group_line(group: str, value: Any, options: list[str]) -> str:
    if value is None and group == "recipe":
        return "~recipe"
    name = str(value)
    if name not in options:
        allowed = [*options, *(["all"] if group == "stage" else []), *(["null"] if group == "recipe" else [])]
        raise ConfigError(f"{group}={name}: no such option{did_you_mean(name, options)}; allowed: {', '.join(allowed)}")
    return f"{group}='{name}'"  # quoted, as Hydra takes no number for the name of a file


def _tree(lines: list[str], folder: Path) -> dict[str, Any]:
    """Run Hydra and resolve interpolations."""
    OmegaConf.register_new_resolver("product", lambda *factors: math.prod(factors), replace=True)
    OmegaConf.register_new_resolver("utc_now", _utc_now, replace=True, use_cache=True)
    GlobalHydra.instance().clear()
    try:
        with hydra.initialize_config_dir(version_base="1.3", config_dir=str(folder)):
            composed = hydra.compose("config", overrides=lines)
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except (HydraException, OmegaConfBaseException, ValueError) as error:
        raise ConfigError(" ".join(str(error).split())) from error
    assert isinstance(tree, dict)  # config.yaml is a mapping; to_container's type says less
    stage = tree.get("stage")
    if isinstance(stage, dict) and isinstance(stage.get("blend"), dict):
        # mappings are merged, so a weight of 0 is how a recipe or a user takes a source out
        stage["blend"] = {name: weight for name, weight in stage["blend"].items() if weight != 0}
    return {str(key): value for key, value in tree.items()}


def _utc_now() -> str:
    return datetime.now(UTC).strftime("%Y%m%d-%H%M%S")
