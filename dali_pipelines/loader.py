"""From a config to an endless, exactly resumable stream of packs."""

from __future__ import annotations

import itertools
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from multiprocessing import resource_tracker
from types import TracebackType
from typing import Any

import torch
from torch.utils.data import DataLoader, Sampler

from dali_pipelines.blend import Blend
from dali_pipelines.chat_format import TASKS
from dali_pipelines.packs import PackDataset, SampleEncoder, Source
from dali_pipelines.patches import FITS
from dali_pipelines.shards import ShardIndex, find_shards
from megatron_elva.config.errors import ConfigError, InputError, did_you_mean
from megatron_elva.config.schema import Config, SourceConfig
from megatron_elva.layout import Pack
from megatron_elva.training import runs

logger = logging.getLogger(__name__)

# Sent to every process of a job when its time runs out or a user stops it: the trainer decides what happens then.
_TRAINERS_SIGNALS = {signal.SIGINT, signal.SIGUSR2}


def build_dataset(config: Config, dp_rank: int, dp_size: int, pad_multiple: int) -> PackDataset:
    """Make the dataset of one data-parallel rank.

    Args:
        config: the whole configuration of the stage.
        dp_rank: which share of each micro-step.
        dp_size: number of shares.
        pad_multiple: the length of a pack becomes a multiple of this.

    Raises:
        ConfigError: a value that cannot work.
        InputError: shards or tokenizer are missing or unreadable.
    """
    data, train = config.data, config.train
    if data.pack_tokens is not None:
        raise ConfigError(f"data.pack_tokens: {data.pack_tokens}; a token budget is not built yet; allowed: null")
    if data.fit not in FITS:
        raise ConfigError(f"data.fit: {data.fit}; allowed: {', '.join(FITS)}")
    if train.global_batch % train.accumulate:
        raise ConfigError(
            f"train.global_batch: {train.global_batch}; allowed: multiples of train.accumulate = {train.accumulate}"
        )
    for name in config.stage.blend:
        if name not in data.sources:
            known = ", ".join(sorted(data.sources))
            raise ConfigError(f"stage.blend.{name}: no such source{did_you_mean(name, data.sources)}; allowed: {known}")
    used = {name: data.sources[name] for name, weight in config.stage.blend.items() if weight}
    sources = {name: open_source(name, source) for name, source in used.items()}
    weights = {name: config.stage.blend[name] for name in sources}
    blend = Blend({name: len(source) for name, source in sources.items()}, weights, config.seed)
    model = config.model
    encoder = SampleEncoder(
        data, tokenizer_folder(config), model.patch_size, model.cell_reduction, model.max_position, config.seed
    )
    encoder.check()
    per_step = train.global_batch // train.accumulate
    return PackDataset(sources, blend, encoder, per_step, dp_rank, dp_size, pad_multiple)


def open_source(name: str, source: SourceConfig) -> Source:
    """Index the shards of a source. Cut shards are reported and used as far as they go."""
    if source.task not in TASKS:
        raise ConfigError(f"data.sources.{name}.task: {source.task}; allowed: {', '.join(TASKS)}")
    paths = find_shards(source.shards, f"data.sources.{name}.shards")
    with ThreadPoolExecutor(8) as pool:
        shards = list(pool.map(ShardIndex, paths))
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


class _CountUp(Sampler[int]):
    """Micro-step numbers from ``start`` on, without end."""

    def __init__(self, start: int) -> None:
        self.start = start

    def __iter__(self) -> Iterator[int]:
        return itertools.count(self.start)


class PackLoader:
    """Packs in order from a micro-step on, without end.

    The stream depends on the dataset and the number to start with alone, never on the number of workers. To resume,
    start again with `state`.
    """

    def __init__(self, dataset: PackDataset, start: int = 0, workers: int = 0, prefetch: int = 2) -> None:
        """Start loading.

        Args:
            dataset: the packs.
            start: first micro-step number.
            workers: processes that decode; 0 decodes in this one when a pack is asked for.
            prefetch: packs that each worker makes ahead.
        """
        self._next = start
        self._iterator: Iterator[Pack] | None
        if workers == 0:
            self._iterator = (dataset[i] for i in itertools.count(start))
            return
        # Not fork: the trainer's threads and its GPU context do not survive in a forked process.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([PackDataset.__module__, "transformers.models.auto.tokenization_auto"])
        loader: DataLoader[Pack] = DataLoader(
            dataset,
            batch_size=None,
            sampler=_CountUp(start),
            num_workers=workers,
            prefetch_factor=max(prefetch, 1),
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # its own: the global one is the model's, and loading must not move it
            worker_init_fn=_start_worker,
            multiprocessing_context=context,
            persistent_workers=True,
        )
        with _blocked(_TRAINERS_SIGNALS) as block:
            resource_tracker.ensure_running()
            block()  # starting that helper has let SIGINT through again
            self._iterator = iter(loader)

    @property
    def state(self) -> int:
        """Number of the next micro-step that was not handed out yet."""
        return self._next

    def __iter__(self) -> PackLoader:
        return self

    def __next__(self) -> Pack:
        """The next pack; waits for it."""
        if self._iterator is None:
            raise ValueError("the loader is closed")
        pack = next(self._iterator)
        self._next += 1
        return pack

    def close(self) -> None:
        """End the workers. Packs made ahead are dropped."""
        iterator, self._iterator = self._iterator, None
        shut_down = getattr(iterator, "_shutdown_workers", None)  # what torch's own iterator does when it is deleted
        if shut_down is not None:
            shut_down()

    def __enter__(self) -> PackLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _as_it_is(pack: Any) -> Any:
    return pack


def _start_worker(_: int) -> None:
    """Set a worker up: one thread, deaf to what is meant for the trainer, gone when the trainer is."""
    torch.set_num_threads(1)
    for number in _TRAINERS_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=_exit_with_trainer, daemon=True).start()


def _exit_with_trainer() -> None:
    """End this process once the trainer is gone, however it went.

    torch watches the parent process; here that is the fork server, which lives as long as its workers do.
    """
    trainer = multiprocessing.parent_process()
    if trainer is not None:
        trainer.join()
        os._exit(1)


@contextmanager
def _blocked(signals: set[signal.Signals]) -> Iterator[Callable[[], object]]:
    """Hold signals back while processes start, which inherit that: a helper that dies takes its workers with it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    try:
        yield lambda: signal.pthread_sigmask(signal.SIG_BLOCK, signals)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
