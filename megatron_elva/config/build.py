"""Nested dicts to the frozen config tree and back, with type checks and messages of one line."""

from __future__ import annotations

import dataclasses
import math
import os
import re
import types
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from megatron_elva.config.errors import ConfigError, InputError, did_you_mean
from megatron_elva.config.schema import Config

T = TypeVar("T")

_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "a text"}
_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d+)?")


def build(kind: type[T], tree: Mapping[str, Any]) -> T:
    """Make a dataclass of type ``kind`` from nested dicts, lists and plain values.

    Args:
        kind: a dataclass of ``schema.py``.
        tree: its fields by name.

    Raises:
        ConfigError: an unknown or missing key, or a value of the wrong type.
    """
    return _dataclass(kind, tree, "")


def to_dict(config: Config) -> dict[str, Any]:
    """The config as nested dicts, lists and plain values."""
    return dataclasses.asdict(config)


def save(config: Config, path: str | Path) -> None:
    """Write the config as YAML; a reader sees the old file or the new one, never a part."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.{os.getpid()}")
    part.write_text(yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True), encoding="utf-8")
    part.replace(path)


def load(path: str | Path) -> Config:
    """Read a config that `save` wrote.

    Raises:
        InputError: the file is missing or is no YAML mapping.
        ConfigError: its keys or values do not fit the schema.
    """
    try:
        tree = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"{path}: not a readable config file ({type(error).__name__})") from error
    if not isinstance(tree, dict):
        raise InputError(f"{path}: not a config file (no keys)")
    try:
        return build(Config, tree)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


@cache
def known_keys() -> tuple[str, ...]:
    """Every key of the tree with dots; names inside an open mapping stand as ``*``."""
    return tuple(_keys(Config, ""))


def find_key(key: str) -> str | None:
    """The entry of `known_keys` that ``key`` is, or None where there is none."""
    for known in known_keys():
        pattern = re.escape(known).replace(r"\*", r"[^.]+")
        if re.fullmatch(pattern, key):
            return known
    return None


def unknown_key(key: str, known: Iterable[str] | None = None) -> ConfigError:
    """The error for a key that does not exist, with the nearest one that does."""
    keys = list(known_keys() if known is None else known)
    last = key.rpartition(".")[2]
    # a right name in the wrong group is the likeliest slip: steps, model.lr
    same_name = [k for k in keys if k.rpartition(".")[2] == last]
    hint = f" (did you mean '{same_name[0]}'?)" if same_name else did_you_mean(key, keys)
    return ConfigError(f"unknown key '{key}'{hint}")


def _keys(kind: Any, prefix: str) -> Iterable[str]:
    """Dotted keys below a type, the type's own key first."""
    if prefix:
        yield prefix
    base = f"{prefix}." if prefix else ""
    kind = _without_none(kind)
    if dataclasses.is_dataclass(kind):
        for name, hint in get_type_hints(kind).items():
            yield from _keys(hint, base + name)
    elif get_origin(kind) is dict:
        yield from _keys(get_args(kind)[1], base + "*")


def _without_none(kind: Any) -> Any:
    rest = [k for k in get_args(kind) if k is not types.NoneType]
    return rest[0] if get_origin(kind) in (Union, types.UnionType) and len(rest) == 1 else kind


def _value(kind: Any, value: Any, key: str) -> Any:
    """Check one value against a type hint and build what is nested in it."""
    inner = _without_none(kind)
    if value is None and inner is not kind:
        return None
    origin = get_origin(inner)
    if dataclasses.is_dataclass(inner):
        return _dataclass(inner, value, key)
    if origin is list:
        if not isinstance(value, list):
            raise ConfigError(f"{_shown(key, value)}: must be a list, such as [a, b]")
        return [_value(get_args(inner)[0], v, f"{key}[{i}]") for i, v in enumerate(value)]
    if origin is dict:
        if not isinstance(value, Mapping):
            raise ConfigError(f"{_shown(key, value)}: must be a mapping, such as {{name: value}}")
        return {str(k): _value(get_args(inner)[1], v, f"{key}.{k}") for k, v in value.items()}
    return _plain(inner, value, key, optional=inner is not kind)


def _plain(kind: type, value: Any, key: str, optional: bool) -> Any:
    if kind is float:
        if isinstance(value, str) and _NUMBER.fullmatch(value):
            return float(value)  # YAML 1.1 reads 4e-5, without a dot, as a text
        if isinstance(value, int) and not isinstance(value, bool):
            return float(value)
    if kind is str and isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)  # partition=1, positions=1: a name that looks like a number
    # bool is an int to Python, but not to a user
    if isinstance(value, kind) and not (kind is int and isinstance(value, bool)):
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{_shown(key, value)}: must be a finite number")
        return value
    raise ConfigError(f"{_shown(key, value)}: must be {_NAMES[kind]}{' or null' if optional else ''}")


def _shown(key: str, value: Any) -> str:
    """``key=value`` as the user would write it."""
    if value is None or isinstance(value, bool):
        value = {None: "null", True: "true", False: "false"}[value]
    return f"{key}={value}"


def _dataclass(kind: Any, value: Any, key: str) -> Any:
    if not isinstance(value, Mapping):
        raise ConfigError(f"{_shown(key, value)}: must be a group of keys")
    base = f"{key}." if key else ""
    hints = get_type_hints(kind)
    for name in value:
        if name not in hints:
            raise unknown_key(f"{base}{name}", None if "[" not in key else [base + h for h in hints])
    for field in dataclasses.fields(kind):
        optional = field.default is not dataclasses.MISSING or field.default_factory is not dataclasses.MISSING
        if not optional and field.name not in value:
            raise ConfigError(f"{base}{field.name} is missing")
    return kind(**{name: _value(hints[name], v, f"{base}{name}") for name, v in value.items()})
