"""Packs by number: item m of the dataset is what one data-parallel rank trains on in micro-step m."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch.utils.data import Dataset

from dali_pipelines.blend import Blend
from dali_pipelines.chat_format import encode_sample, prompt_tokens
from dali_pipelines.decode import decode
from dali_pipelines.patches import to_cells
from dali_pipelines.shards import RawSample, ShardIndex
from dali_pipelines.tokenizer import load_tokenizer
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import DataConfig
from megatron_elva.layout import IGNORE, Pack, PackSpec, SampleSpec, Skipped, VideoSpec


class Source:
    """The shards of one source as one sequence of samples."""

    def __init__(self, shards: Sequence[ShardIndex], task: str) -> None:
        self.shards = list(shards)
        self.task = task
        self._ends = list(accumulate(len(s) for s in self.shards))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def locate(self, i: int) -> tuple[ShardIndex, int]:
        """The shard of sample ``i``, and its number there."""
        shard = bisect_right(self._ends, i)
        return self.shards[shard], i - (self._ends[shard - 1] if shard else 0)


@dataclass(frozen=True)
class Encoded:
    """One sample ready to be packed.

    Attributes:
        spec: its segments.
        tokens: ``[S]`` int64.
        labels: ``[S]`` int64.
        patches: ``[N * r * r, P * P * 3]`` uint8.
    """

    spec: SampleSpec
    tokens: np.ndarray
    labels: np.ndarray
    patches: np.ndarray


class SampleEncoder:
    """A raw sample -> tokens, labels and patches. The tokenizer is loaded once in each process that encodes."""

    def __init__(
        self, data: DataConfig, tokenizer: str, patch_size: int, cell_reduction: int, max_tokens: int, seed: int
    ) -> None:
        self.data = data
        self.max_tokens = max_tokens
        self.tokenizer_path = tokenizer
        self.patch_size = patch_size
        self.cell_reduction = cell_reduction
        self.seed = seed
        self._tokenizer: Any = None
        self._cache: OrderedDict[tuple[str, int], tuple[np.ndarray, VideoSpec]] = OrderedDict()
        self._cached = 0

    def __call__(self, raw: RawSample, task: str, epoch: int) -> Encoded:
        """Encode one sample; the order of its questions changes from epoch to epoch.

        Raises:
            InputError: the sample cannot be used.
        """
        data = self.data
        text = encode_sample(
            self.tokenizer,
            raw.meta,
            len(raw.media),
            task,
            data.caption_prompt,
            data.max_text_tokens,
            turn_seed=(self.seed, crc32(raw.key.encode()), epoch),
        )
        watched = [self._watch((raw.key, i), medium) for i, medium in enumerate(raw.media)]
        patches = [np.empty((0, self.patch_size**2 * 3), np.uint8), *(cells for cells, _ in watched)]
        spec, tokens, labels = text.assemble([video for _, video in watched])
        if spec.tokens > self.max_tokens:
            raise InputError(f"{spec.tokens} tokens, model.max_position is {self.max_tokens}")
        return Encoded(spec, tokens, labels, np.concatenate(patches))

    def _watch(self, key: tuple[str, int], medium: bytes) -> tuple[np.ndarray, VideoSpec]:
        """Cells of one video. Sampling is the same in every epoch, so they may come from the cache."""
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        data = self.data
        decoded = decode(medium, data.frames, data.max_pixels, data.max_source_pixels, data.max_source_frames)
        cells, video = to_cells(decoded.frames, self.patch_size, self.cell_reduction, data.fit)
        if cells.nbytes <= data.cache_mb * 10**6:
            self._cache[key] = (cells, video)
            self._cached += cells.nbytes
            while self._cached > data.cache_mb * 10**6:
                self._cached -= self._cache.popitem(last=False)[1][0].nbytes
        return cells, video

    def check(self) -> None:
        """Fail before training does where the tokenizer is missing or its chat template is of another form.

        Raises:
            InputError: it cannot be loaded.
            ConfigError: its chat template cannot be used.
        """
        prompt_tokens(self.tokenizer, [{"role": role, "content": "a"} for role in ("user", "assistant", "user")])

    @property
    def tokenizer(self) -> Any:
        """The tokenizer, loaded on first use."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.tokenizer_path)
        return self._tokenizer

    def __getstate__(self) -> dict[str, object]:
        """Each process loads its own tokenizer and fills its own cache."""
        return {**self.__dict__, "_tokenizer": None, "_cache": OrderedDict(), "_cached": 0}


class PackDataset(Dataset[Pack]):
    """Map-style and endless: any micro-step number from 0 on is an item, the same whenever it is asked for.

    Of the ``per_step`` samples of micro-step m, which are numbers ``m * per_step`` and on of the blend, rank d of D
    packs those from ``d * per_step // D`` to ``(d + 1) * per_step // D``.
    """

    def __init__(
        self,
        sources: dict[str, Source],
        blend: Blend,
        encoder: SampleEncoder,
        per_step: int,
        dp_rank: int,
        dp_size: int,
        pad_multiple: int,
    ) -> None:
        if not 0 <= dp_rank < dp_size <= per_step:
            raise ConfigError(
                f"train.global_batch: {per_step} samples a micro-step cannot be shared by {dp_size} data-parallel "
                f"ranks (this is rank {dp_rank}); allowed: at least one for each"
            )
        self.sources = sources
        self.blend = blend
        self.encoder = encoder
        self.per_step = per_step
        self.share = range(dp_rank * per_step // dp_size, (dp_rank + 1) * per_step // dp_size)
        self.pad_multiple = pad_multiple

    def __getitem__(self, step: int) -> Pack:
        """Build the pack of one micro-step."""
        _ = self.encoder.tokenizer  # if it cannot be loaded that ends the run; it is no fault of a sample's
        samples: list[Encoded] = []
        keys: list[str] = []
        skipped: list[Skipped] = []
        for number in self.share:
            key, outcome = self._sample(step * self.per_step + number)
            if isinstance(outcome, str):
                skipped.append(Skipped(key, outcome))
            else:
                samples.append(outcome)
                keys.append(key)
        return assemble_pack(samples, keys, skipped, self.pad_multiple, self.encoder.patch_size)

    def _sample(self, number: int) -> tuple[str, Encoded | str]:
        """Key of a sample of the blend, and the sample or why it cannot be used."""
        name, index, epoch = self.blend[number]
        source = self.sources[name]
        shard, i = source.locate(index)
        key = shard.name_of(i)
        try:
            raw = shard.read(i)
            key = raw.key
            return key, self.encoder(raw, source.task, epoch)
        except ConfigError:
            raise
        except InputError as error:
            return key, str(error)
        except Exception as error:  # one sample must not end a run, whatever is wrong with it
            return key, f"{type(error).__name__}: {' '.join(str(error).split())}"


def assemble_pack(
    samples: Sequence[Encoded], keys: list[str], skipped: list[Skipped], pad_multiple: int, patch_size: int
) -> Pack:
    """Join samples into one sequence and pad it to a multiple of ``pad_multiple``.

    A pack with no sample left holds a text of two tokens without labels, so that every rank runs the same step.
    """
    drawn = len(samples) + len(skipped)
    if not samples:
        two = np.zeros(2, np.int64)
        nothing = np.empty((0, patch_size**2 * 3), np.uint8)
        samples = [Encoded(SampleSpec((2,)), two, np.full(2, IGNORE, np.int64), nothing)]
    spec = PackSpec(tuple(s.spec for s in samples)).padded_to(pad_multiple)
    padding = np.zeros(spec.padding, np.int64)
    tokens = np.concatenate([*(s.tokens for s in samples), padding])
    labels = np.concatenate([*(s.labels for s in samples), padding + IGNORE])
    patches = np.concatenate([s.patches for s in samples])
    return Pack(
        spec, torch.from_numpy(tokens), torch.from_numpy(labels), torch.from_numpy(patches), keys, skipped, drawn
    )
