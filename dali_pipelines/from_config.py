"""The data side of a run as its config describes it."""

from __future__ import annotations

import logging
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_pipelines.blend import Blend
from dali_pipelines.builder import Builder
from dali_pipelines.chat_format import TASKS
from dali_pipelines.graph import DeviceDecoder
from dali_pipelines.loader import PackLoader
from dali_pipelines.options import VisionOptions
from dali_pipelines.packing import Budget
from dali_pipelines.packs import SampleEncoder, Source
from dali_pipelines.plans import LaneShare, SampleShare
from dali_pipelines.report import Quarantine
from dali_pipelines.routes import choose_route
from dali_pipelines.shards import ShardIndex, find_shards
from megatron_elva.config.errors import ConfigError, InputError, did_you_mean
from megatron_elva.config.schema import Config, SourceConfig
from megatron_elva.training import runs

logger = logging.getLogger(__name__)

QUARANTINE = "quarantine.txt"
"""A run's list of samples to pass by, in its directory."""

_MAX_VIDEOS = 256  # that a device decodes at once; a pack with more goes in several turns


@dataclass(frozen=True)
class PackStream:
    """The packs of one data-parallel rank, from any state on.

    Attributes:
        builder: makes packs of sample numbers.
        share: which packs are this rank's.
        quarantine: samples to pass by.
        pad_multiple: of a pack's length.
        device_decoder: what decodes on the device, or None.
        route: one line, what decodes and why.
    """

    builder: Builder
    share: SampleShare | LaneShare
    quarantine: Quarantine
    pad_multiple: int
    device_decoder: DeviceDecoder | None
    route: str

    def loader(self, state: dict[str, Any], workers: int = 0, prefetch: int = 2, timeout_s: float = 60.0) -> PackLoader:
        """Start loading behind a state."""
        return PackLoader(
            self.builder,
            self.share,
            state,
            self.quarantine,
            self.pad_multiple,
            workers,
            prefetch,
            timeout_s,
            self.device_decoder,
        )


def open_stream(config: Config, dp_rank: int, dp_size: int, device: str = "cpu") -> PackStream:
    """Open shards and tokenizer and choose what decodes.

    Args:
        config: the whole configuration of the stage.
        dp_rank: which share of each step.
        dp_size: number of shares.
        device: of the packs.

    Raises:
        ConfigError: a value that cannot work.
        InputError: shards or tokenizer are missing or unreadable.
    """
    data, model = config.data, config.model
    for name in config.stage.blend:
        if name not in data.sources:
            known = ", ".join(sorted(data.sources))
            raise ConfigError(f"stage.blend.{name}: no such source{did_you_mean(name, data.sources)}; allowed: {known}")
    used = {name: data.sources[name] for name, weight in config.stage.blend.items() if weight}
    sources = {name: open_source(name, source, data.cache_dir) for name, source in used.items()}
    weights = {name: config.stage.blend[name] for name in sources}
    blend = Blend({name: len(source) for name, source in sources.items()}, weights, config.seed)
    options = VisionOptions.from_config(data, model)
    route = choose_route(data.decoder, device)
    encoder = SampleEncoder(
        data,
        options,
        tokenizer_folder(config),
        model.max_position,
        config.seed,
        native=route.native,
        device_scales=route.native is not None and device != "cpu",
    )
    encoder.check()
    budget = None if data.pack_tokens is None else Budget(data.pack_tokens, data.pack_text_tokens)
    decoder = None
    if route.native is not None:
        decoder = DeviceDecoder(device, _MAX_VIDEOS, model.patch_size, model.cell_reduction)
    quarantine = _quarantine(config)
    return PackStream(
        Builder(sources, blend, encoder, budget, quarantine.listed),
        _share(config, budget, dp_rank, dp_size),
        quarantine,
        config.pad_multiple,
        decoder,
        route.about,
    )


def _quarantine(config: Config) -> Quarantine:
    """The run's own list, that of the config, and with ``stage=all`` those of the other stages."""
    own = Path(config.run_dir, QUARANTINE)
    others = [Path(config.data.quarantine)] if config.data.quarantine else []
    if own.parent.name.startswith("stage_"):
        others += [path for path in sorted(own.parent.parent.glob(f"stage_[0-9]/{QUARANTINE}")) if path != own]
    return Quarantine(own, others)


def _share(config: Config, budget: Budget | None, dp_rank: int, dp_size: int) -> SampleShare | LaneShare:
    train = config.train
    if budget is not None:
        return LaneShare(budget, config.data.pack_buffer, train.global_batch, dp_rank, dp_size)
    if train.global_batch % train.accumulate:
        raise ConfigError(
            f"train.global_batch: {train.global_batch}; allowed: multiples of train.accumulate = {train.accumulate}"
        )
    return SampleShare(train.global_batch // train.accumulate, dp_rank, dp_size)


def open_source(name: str, source: SourceConfig, cache_dir: str | None = None) -> Source:
    """Index the shards of a source. Cut shards are reported and used as far as they go."""
    if source.task not in TASKS:
        raise ConfigError(f"data.sources.{name}.task: {source.task}; allowed: {', '.join(TASKS)}")
    paths = find_shards(source.shards, f"data.sources.{name}.shards", cache_dir)
    with ThreadPoolExecutor(8) as pool:
        shards = list(pool.map(lambda path: ShardIndex(path, cache_dir=cache_dir), paths))
    for shard in shards:
        if shard.warning:
            logger.warning(shard.warning)
    return Source(shards, source.task)


def tokenizer_folder(config: Config) -> str:
    """The tokenizer's folder: ``data.tokenizer``, or else that of the run or Hugging Face folder in ``init_from``.

    Raises:
        InputError: there is no tokenizer.
    """
    folder = config.data.tokenizer or config.init_from
    if folder is None:
        raise ConfigError("data.tokenizer: null; allowed: a tokenizer's folder, or null with init_from set")
    found = runs.tokenizer_folder(folder)
    if found is None:
        key = "data.tokenizer" if config.data.tokenizer else "data.tokenizer: null, and init_from"
        raise InputError(f"{key}: {folder} holds no tokenizer")
    return str(found)
