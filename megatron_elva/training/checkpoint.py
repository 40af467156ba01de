"""Checkpoints in megatron-core's torch_dist format: written by all ranks, readable at any layout, or by one process."""

from __future__ import annotations

import shutil
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing
from torch import Tensor

from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config, ModelConfig
from megatron_elva.model.hf_names import from_hf
from megatron_elva.model.weights import load_full
from megatron_elva.parallel.engine import Engine
from megatron_elva.parallel.ranks import Ranks
from megatron_elva.training import runs
from megatron_elva.training.stored_weights import read_safetensors

_OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}
_SHAPE_FIELDS = ("layers", "hidden", "ffn_hidden", "heads", "kv_heads", "tied_head", "patch_size", "patch_width",
                 "patch_heads", "cell_reduction", "patch_embedding")  # fmt: skip


def _model_state(engine: Engine) -> dict[str, Any]:
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(engine.chunks)}


def _state(engine: Engine, loading: bool) -> dict[str, Any]:
    model = _model_state(engine)
    flat = {name: entry for part in model.values() for name, entry in part.items()} if len(model) == 1 else model
    optimizer = engine.optimizer.sharded_state_dict(flat, is_loading=loading, metadata=dict(_OPTIMIZER))
    return {**model, "optimizer": optimizer}


def save(engine: Engine, config: Config, vocab: int, step: int, samples: int) -> tuple[Path, float]:
    """Write a checkpoint; all ranks call it. The marker is written once everything else is on disk.

    Returns:
        Its folder and the seconds it took.
    """
    began = time.perf_counter()
    path = Path(config.run_dir, "checkpoints", f"step_{step}")
    if dist.get_rank() == 0:
        shutil.rmtree(path, ignore_errors=True)  # what a killed run left half-written
        path.mkdir(parents=True)
    dist.barrier()
    dist_checkpointing.save(_state(engine, loading=False), str(path))
    dist.barrier()
    if dist.get_rank() == 0:
        meta = {
            "step": step,
            "samples": samples,
            "stage": config.stage.id,
            "vocab": vocab,
            "model": asdict(config.model),
        }
        runs.write_marker(path, meta)
        runs.prune(Path(config.run_dir), config.train.keep_checkpoints)
    dist.barrier()
    return path, time.perf_counter() - began


def resume(engine: Engine, config: Config) -> runs.Checkpoint | None:
    """Load the newest complete checkpoint of the run itself: weights, optimizer, where it stood. None if none."""
    found = runs.checkpoints(Path(config.run_dir))
    if not found:
        return None
    newest = found[-1]
    check_shapes(newest.meta["model"], config.model, f"run_dir={config.run_dir}")
    loaded = _load(_state(engine, loading=True), newest.path)
    _fill_chunks(engine, loaded)
    engine.optimizer.load_state_dict(loaded["optimizer"])
    return newest


def initialise_from(engine: Engine, source: str, config: Config, ranks: Ranks) -> str:
    """Take weights alone from a run or a Hugging Face folder.

    Returns:
        One line that says what was taken.

    Raises:
        InputError: the source is neither.
        ConfigError: its sizes are not this model's.
    """
    folder = Path(source)
    if (folder / "config.json").is_file():
        state = read_safetensors(folder)
        full = from_hf(state, config.model)
        missing: list[str] = []
        kept = {name: p for p, name in engine.names.items()}

        def give(name: str, shape: tuple[int, ...]) -> Tensor:
            if name in full:
                return _rows(full[name], shape)
            missing.append(name)
            return _whole(kept[name], ranks)

        load_full(engine.chunks, give, ranks.tensor, ranks.tensor_size)
        line = f"weights from {folder} (Hugging Face); drawn anew: {len(missing)} tensors of the patch embedding"
    else:
        newest = runs.latest(folder)
        check_shapes(newest.meta["model"], config.model, f"init_from={source}")
        _fill_chunks(engine, _load(_model_state(engine), newest.path))
        line = f"weights from {newest.path}"
    engine.optimizer.reload_model_params()
    return line


def _whole(shard: torch.nn.Parameter, ranks: Ranks) -> Tensor:
    """A parameter that no tensor rank splits; only such ones are missing in a language model's folder."""
    if getattr(shard, "tensor_model_parallel", False) and ranks.tensor_size > 1:
        raise InputError("the Hugging Face folder lacks weights of the language model")
    return shard.detach().clone()


def _rows(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Word embeddings padded with zero rows where the model rounds the vocabulary up."""
    if tensor.ndim == 2 and tensor.shape[0] < shape[0] and tensor.shape[1] == shape[1]:
        return torch.cat([tensor, tensor.new_zeros(shape[0] - tensor.shape[0], shape[1])])
    return tensor


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path))
    except Exception as error:
        raise InputError(f"{path}: cannot be loaded: {' '.join(str(error).split())[:300]}") from error


def _fill_chunks(engine: Engine, loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)


def check_shapes(saved: dict[str, Any], model: ModelConfig, source: str) -> None:
    """Refuse weights of another model in one line.

    Raises:
        ConfigError: names the first field that differs.
    """
    for field in _SHAPE_FIELDS:
        if saved.get(field) != getattr(model, field):
            raise ConfigError(
                f"model.{field}={getattr(model, field)}: {source} holds a model with {field}={saved.get(field)}; "
                f"set model.{field}={saved.get(field)} or name another checkpoint"
            )
