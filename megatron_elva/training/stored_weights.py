"""Weights on disk as whole tensors, read in one process without a process group and without megatron-core."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.metadata import TensorStorageMetadata
from torch.distributed.checkpoint.state_dict_loader import load

from megatron_elva.config.errors import InputError


def read_weights(path: Path) -> dict[str, Tensor]:
    """All weights of a checkpoint as whole tensors under global names, in one process and without a process group."""
    try:
        return _read(FileSystemReader(path))
    except Exception as error:  # torch raises many kinds for a damaged file
        raise InputError(f"{path}: cannot be read: {' '.join(str(error).split())[:300]}") from error


def _read(reader: FileSystemReader) -> dict[str, Tensor]:
    entries = reader.read_metadata().state_dict_metadata
    tensors: dict[str, Any] = {
        name: torch.empty(entry.size, dtype=entry.properties.dtype)
        for name, entry in entries.items()
        if isinstance(entry, TensorStorageMetadata) and not name.startswith("optimizer")
    }
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # which is what is wanted
        load(tensors, storage_reader=reader, planner=DefaultLoadPlanner(), no_dist=True)
    return tensors


def read_safetensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a Hugging Face folder.

    Raises:
        InputError: there are none.
    """
    index = folder / "model.safetensors.index.json"
    files = (
        sorted(set(json.loads(index.read_text())["weight_map"].values())) if index.is_file() else ["model.safetensors"]
    )
    out: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            raise InputError(f"{folder}: {file} is missing")
        with safe_open(folder / file, framework="pt") as f:
            out.update({name: f.get_tensor(name) for name in f.keys()})  # noqa: SIM118 - not a mapping
    return out
