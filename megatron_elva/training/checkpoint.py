"""What is saved in a checkpoint, and loading: at any layout, or by one process. `saver` says when and by whom."""

from __future__ import annotations

import errno
import json
import re
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.core import dist_checkpointing
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from dali_pipelines.plans import merged
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config, ModelConfig
from megatron_elva.model.hf_names import VISUAL, from_hf
from megatron_elva.model.weights import load_full
from megatron_elva.parallel.collectives import first_finds
from megatron_elva.parallel.engine import Engine
from megatron_elva.parallel.optimizer_state import corrected
from megatron_elva.parallel.ranks import Ranks
from megatron_elva.training import runs
from megatron_elva.training.stored_weights import read_safetensors

_OPTIMIZER = {"distrib_optim_sharding_type": "fully_reshardable"}
_HF_FIELDS = {
    "layers": ("num_hidden_layers", None),
    "hidden": ("hidden_size", None),
    "ffn_hidden": ("intermediate_size", None),
    "heads": ("num_attention_heads", None),
    "kv_heads": ("num_key_value_heads", None),
    "tied_head": ("tie_word_embeddings", False),
}
"""Our names of sizes to those in a Qwen2's config.json, with what a missing one means."""


def _model_state(engine: Engine) -> dict[str, Any]:
    return {f"model{i}": chunk.sharded_state_dict() for i, chunk in enumerate(engine.chunks)}


def state_of(engine: Engine, loading: bool) -> dict[str, Any]:
    """What this rank saves or loads, as megatron-core describes it; inside of `corrected`."""
    model = _model_state(engine)
    flat = {name: entry for part in model.values() for name, entry in part.items()} if len(model) == 1 else model
    optimizer = engine.optimizer.sharded_state_dict(flat, is_loading=loading, metadata=dict(_OPTIMIZER))
    return {**model, "optimizer": optimizer}


def meta_of(config: Config, vocab: int, step: int, samples: int) -> dict[str, Any]:
    """What the marker of a checkpoint says.

    Args:
        config: of the run.
        vocab: rows of the word embedding.
        step: steps done.
        samples: samples drawn.
    """
    return {
        "step": step,
        "samples": samples,
        "stage": config.stage.id,
        "vocab": vocab,
        "global_batch": config.train.global_batch,
        "pack_tokens": config.data.pack_tokens,
        "order": order_of(config),
        "model": asdict(config.model),
        "merging": asdict(config.merging),
    }


def order_of(config: Config) -> dict[str, Any]:
    """What the order of samples follows from, besides the shards themselves."""
    return {"seed": config.seed, "stage.blend": config.stage.blend}


def data_state(path: Path) -> dict[str, Any] | None:
    """Where the data streams of all ranks stood, as one; None where the step says it all.

    Raises:
        InputError: a file of it is damaged.
    """
    try:
        states = [json.loads(file.read_text()) for file in sorted(path.glob("data_*.json"))]
        if not all(isinstance(state, dict) and isinstance(state.get("lanes"), dict) for state in states):
            raise ValueError("not an object with lanes")
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the state of its data cannot be read: {error}") from error
    return merged(states) if states else None


def resume(engine: Engine, config: Config) -> runs.Checkpoint | None:
    """Load the newest complete checkpoint of the run itself: weights, optimizer, where it stood. None if none."""
    newest = first_finds(partial(_newest, config))
    if newest is None:
        return None
    _check_rows(newest.meta["vocab"], engine, f"run_dir={config.run_dir}", grow=False)
    with corrected(engine.optimizer):
        loaded = _load(state_of(engine, loading=True), newest.path)
        _fill_chunks(engine, loaded)
        engine.optimizer.load_state_dict(loaded["optimizer"])
    return newest


def _newest(config: Config) -> runs.Checkpoint | None:
    runs.check_resumable(config)
    found = runs.checkpoints(Path(config.run_dir))
    return found[-1] if found else None


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
        _check_hf(folder, config.model)
        state = read_safetensors(folder)
        full = from_hf(state, config.model)
        _check_rows(full["embedding.word_embeddings.weight"].shape[0], engine, f"init_from={source}", grow=True)
        missing: list[str] = []
        kept = {name: p for p, name in engine.names.items()}

        def give(name: str, shape: tuple[int, ...]) -> Tensor:
            if name in full:
                return _rows(full[name], shape)
            if not name.startswith(VISUAL):
                raise InputError(f"{folder}: holds no {name}")
            missing.append(name)
            return kept[name].detach().clone()

        load_full(engine.chunks, give, ranks.tensor, ranks.tensor_size)
        line = f"weights from {folder} (Hugging Face); drawn anew: {len(missing)} tensors of the patch embedding"
    else:
        newest = first_finds(partial(runs.latest, folder))
        runs.check_shapes(newest.meta["model"], config.model, f"init_from={source}")
        _check_rows(newest.meta["vocab"], engine, f"init_from={source}", grow=True)
        _fill_chunks(engine, _load(_model_state(engine), newest.path))
        line = f"weights from {newest.path}"
    engine.optimizer.reload_model_params()
    return line


def _check_hf(folder: Path, model: ModelConfig) -> None:
    """Refuse a Qwen2 of other sizes before its tensors are looked for."""
    saved = json.loads((folder / "config.json").read_text())
    sizes = {own: saved.get(theirs, default) for own, (theirs, default) in _HF_FIELDS.items()}
    runs.check_shapes(sizes, model, f"init_from={folder}", tuple(_HF_FIELDS))


def _check_rows(saved: int, engine: Engine, source: str, grow: bool) -> None:
    """Refuse another vocabulary: megatron-core would cut it, or fill it with zeros, without a word."""
    rows = engine.chunks[0].vocab_size
    if saved > rows or (saved < rows and not grow):
        raise ConfigError(
            f"model.vocab_size: the model has {rows} rows of word embeddings and {source} holds {saved}; "
            f"set model.vocab_size={saved} or name another checkpoint"
        )


def _rows(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """Word embeddings padded with zero rows where the model rounds the vocabulary up."""
    if tensor.ndim == 2 and tensor.shape[0] < shape[0] and tensor.shape[1] == shape[1]:
        return torch.cat([tensor, tensor.new_zeros(shape[0] - tensor.shape[0], shape[1])])
    return tensor


def _load(state: dict[str, Any], path: Path) -> dict[str, Any]:
    try:
        return dist_checkpointing.load(state, str(path))
    except (Exception, CheckpointException) as error:  # the second, of torch, is no Exception
        causes = [pair[0] for pair in error.failures.values()] if isinstance(error, CheckpointException) else [error]
        cause = next((c for c in causes if not _is_damage(c)), causes[0])
        line = f"{path}: cannot be loaded: {' '.join(str(cause).split())[:300]}"
        # what is not the files' fault may go well in another attempt
        raise (InputError if _is_damage(cause) else RuntimeError)(line) from error


def _is_damage(error: BaseException) -> bool:
    """Whether files are missing or torn, rather than a rank, its memory or a file server gone."""
    if isinstance(error, OSError):
        return error.errno in (None, errno.ENOENT, errno.EINVAL)
    if isinstance(error, RuntimeError):  # its subclasses are those of devices and of torch.distributed
        return type(error) is RuntimeError and not re.search("gloo|NCCL|CUDA", str(error))
    return not isinstance(error, MemoryError)


def _fill_chunks(engine: Engine, loaded: dict[str, Any]) -> None:
    for i, chunk in enumerate(engine.chunks):
        chunk.load_state_dict(loaded[f"model{i}"], strict=False)
