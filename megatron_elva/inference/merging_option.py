"""Another merging than a run was trained with, named on a command line."""

from __future__ import annotations

from pathlib import Path

import yaml

from megatron_elva.config.build import build
from megatron_elva.config.compose import CONFIG_DIR, group_options
from megatron_elva.config.errors import ConfigError, InputError, did_you_mean
from megatron_elva.config.schema import MergingConfig


def read_merging(given: str) -> MergingConfig:
    """Read a merging config.

    Args:
        given: a YAML file with the keys of ``configs/merging``, or the name of a file there.

    Raises:
        InputError: there is no such file, or it is no YAML mapping.
        ConfigError: its keys or values do not fit the schema.
    """
    path = Path(given)
    if path.suffix not in (".yaml", ".yml"):
        names = group_options()["merging"]
        if given not in names:
            hint = did_you_mean(given, names)
            raise InputError(f"merging={given}: must be a YAML file or one of {', '.join(names)}{hint}")
        path = CONFIG_DIR / "merging" / f"{given}.yaml"
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"{path}: {error.strerror}") from error
    except (UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable YAML file ({type(error).__name__})") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a merging config (no keys)")
    try:
        return build(MergingConfig, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
