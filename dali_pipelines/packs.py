"""Samples of the stream as tokens and patches, and several of them as one pack."""

from __future__ import annotations

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from itertools import accumulate
from typing import Any
from zlib import crc32

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.chat_format import EncodedSample, encode_sample, prompt_tokens
from dali_pipelines.codecs import NativeCodecs
from dali_pipelines.decode import frames_of, measure, select, watch
from dali_pipelines.geometry import Geometry, plan
from dali_pipelines.graph import GraphItem
from dali_pipelines.media import probe
from dali_pipelines.options import VisionOptions
from dali_pipelines.packing import Length
from dali_pipelines.remux import NotCopiedError, sparse
from dali_pipelines.shards import RawSample, SampleMeta, ShardIndex
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


class UnusableError(Exception):
    """A sample that cannot be used: `stage` of its processing, `reason` in one line, `key` where it is known."""

    def __init__(self, stage: str, reason: str, key: str | None = None) -> None:
        super().__init__(stage, reason, key)
        self.stage, self.reason, self.key = stage, reason, key


@contextmanager
def at_stage(stage: str) -> Iterator[None]:
    """Whatever goes wrong with a sample concerns that sample alone; a wrong config concerns the run."""
    try:
        yield
    except (ConfigError, UnusableError, MemoryError):
        raise
    except InputError as error:
        raise UnusableError(stage, str(error)) from error
    except Exception as error:
        raise UnusableError(stage, f"{type(error).__name__}: {' '.join(str(error).split())}") from error


_DESCRIBED = ("height", "width", "frames")  # of an entry of a sample's `media`: upright size, and frames

Cells = np.ndarray | GraphItem
"""Patches of a video ``[N * r * r, P * P * 3]`` uint8, or what the device makes them of."""


@dataclass(frozen=True)
class Encoded:
    """One sample ready to be packed.

    Attributes:
        spec: its segments.
        tokens: ``[S]`` int64.
        labels: ``[S]`` int64.
        cells: one entry for each of its videos.
        video_bytes: size of those videos' files.
    """

    spec: SampleSpec
    tokens: np.ndarray
    labels: np.ndarray
    cells: tuple[Cells, ...] = ()
    video_bytes: int = 0

    @property
    def length(self) -> Length:
        """Its tokens by kind."""
        visual = sum(video.tokens for video in self.spec.videos)
        return Length(self.spec.tokens - visual, visual)


class SampleEncoder:
    """A raw sample -> tokens, labels and cells. The tokenizer is loaded once in each process that encodes.

    Args:
        data: the data settings.
        options: how videos are seen.
        tokenizer: its folder.
        max_tokens: of a sample.
        seed: of the run.
        native: codecs that a device decodes; None: PyAV decodes all.
        device_scales: leave the scaling of what PyAV decoded to the device as well.
    """

    def __init__(
        self,
        data: DataConfig,
        options: VisionOptions,
        tokenizer: str,
        max_tokens: int,
        seed: int,
        native: NativeCodecs | None = None,
        device_scales: bool = False,
    ) -> None:
        self.data, self.options, self.tokenizer_path = data, options, tokenizer
        self.max_tokens, self.seed = max_tokens, seed
        self.native, self.device_scales = native, device_scales
        self._tokenizer: Any = None
        self._cache: OrderedDict[tuple[str, int, int], tuple[np.ndarray, VideoSpec]] = OrderedDict()
        self._cached = 0

    def __call__(self, raw: RawSample, task: str, epoch: int, on_device: bool = True, place: str = "") -> Encoded:
        """Encode one sample; the order of its questions, and a random clip, change from epoch to epoch.

        Args:
            raw: the sample.
            task: of its source.
            epoch: of its source.
            on_device: False keeps all decoding with PyAV.
            place: where the sample stands, to be known again in the cache: keys of two folders may be equal.

        Raises:
            UnusableError: the sample cannot be used.
            ConfigError: the tokenizer's chat template cannot be used.
        """
        text = self._text(raw.key, raw.meta, len(raw.media), task, epoch)
        with at_stage("decode"):
            watched = [self._watch(raw, i, epoch, on_device, place) for i in range(len(raw.media))]
        spec, tokens, labels = text.assemble([video for _, video in watched])
        cells = tuple(cells for cells, _ in watched)
        encoded = Encoded(spec, tokens, labels, cells, sum(len(file) for file in raw.media))
        self._checked(encoded.length)
        return encoded

    def measure(self, raw: RawSample, task: str, epoch: int) -> Length:
        """Tokens that the sample will have at most, without decoding anything.

        Raises:
            UnusableError: the sample cannot be used.
        """
        text = self._text(raw.key, raw.meta, len(raw.media), task, epoch)
        with at_stage("decode"):
            visual = sum(self._measure(raw, i, epoch).tokens for i in range(len(raw.media)))
        return self._checked(Length(text.text_tokens, visual))

    def measure_described(self, sample: SampleMeta, task: str, epoch: int) -> Length | None:
        """As `measure`, from what the preparation wrote of the files; None where that does not tell it.

        Raises:
            UnusableError: the sample cannot be used.
        """
        described = sample.meta.get("media", [])
        if self.options.sampling.mode != "uniform" or not isinstance(described, list):
            return None
        if len(described) != sample.media:
            return None
        text = self._text(sample.key, sample.meta, sample.media, task, epoch)
        visual = 0
        for one in described:
            values: list[Any] = [one.get(k) for k in _DESCRIBED] if isinstance(one, dict) else [None]
            if not all(type(v) is int and 1 <= v < 1 << 24 for v in values):
                return None
            height, width, frames = values
            taken = min(frames, self.options.sampling.frames)
            visual += plan((height, width), 0, taken, self.options).video.tokens
        length = Length(text.text_tokens, visual)
        return length if length.tokens <= self.max_tokens else None

    def _checked(self, length: Length) -> Length:
        """Refuse a sample that no pack can hold."""
        if length.tokens > self.max_tokens:
            raise UnusableError("length", f"{length.tokens} tokens, model.max_position is {self.max_tokens}")
        return length

    def _text(self, key: str, meta: dict[str, Any], media: int, task: str, epoch: int) -> EncodedSample:
        data, seed = self.data, self._seed(key, epoch)
        with at_stage("text"):
            return encode_sample(self.tokenizer, meta, media, task, data.caption_prompt, data.max_text_tokens, seed)

    def _seed(self, key: str, epoch: int) -> tuple[int, int, int]:
        return (self.seed, crc32(key.encode()), epoch)

    def _measure(self, raw: RawSample, i: int, epoch: int) -> VideoSpec:
        return measure(raw.media[i], self.options, self._seed(raw.key, epoch), _timestamps(raw, i))

    def _watch(self, raw: RawSample, i: int, epoch: int, on_device: bool, place: str) -> tuple[Cells, VideoSpec]:
        """Cells of one video. Sampling is the same in every epoch but for random clips, so they may be cached."""
        key = (place or raw.key, i, epoch if self.options.sampling.mode == "clip" else 0)
        if key in self._cache:
            self._cache.move_to_end(key)
            return self._cache[key]
        if self.native is not None and on_device:
            item = self._for_device(raw, i, epoch)
            if item is not None:
                return item, item.geometry.video
        seen = watch(raw.media[i], self.options, self._seed(raw.key, epoch), _timestamps(raw, i))
        self._keep(key, seen.patches, seen.video)
        return seen.patches, seen.video

    def _keep(self, key: tuple[str, int, int], cells: np.ndarray, video: VideoSpec) -> None:
        if cells.nbytes > self.data.cache_mb * 10**6:
            return
        self._cache[key] = (cells, video)
        self._cached += cells.nbytes
        while self._cached > self.data.cache_mb * 10**6:
            self._cached -= self._cache.popitem(last=False)[1][0].nbytes

    def _for_device(self, raw: RawSample, i: int, epoch: int) -> GraphItem | None:
        """What the device makes cells of; None where PyAV is to do all of it."""
        assert self.native is not None
        medium, limits = raw.media[i], self.options.limits
        found = probe(medium, limits)
        indices, geometry = select(found, self.options, self._seed(raw.key, epoch), _timestamps(raw, i))
        if self.native.takes(found)[0]:
            with suppress(NotCopiedError):  # then PyAV may decode it all the same
                data, kept = sparse(medium, indices, limits)
                return GraphItem(data, kept, None, geometry)
        if self.device_scales and _is_scaled(geometry):
            return GraphItem(None, (), frames_of(medium, indices, limits), geometry)
        return None

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


def _is_scaled(geometry: Geometry) -> bool:
    return any(fit.size != geometry.native for fit in geometry.classes)


def _timestamps(raw: RawSample, i: int) -> Sequence[float] | None:
    """Seconds that the sample's JSON names for its video ``i``: a list of numbers, or one such list for each video."""
    named = raw.meta.get("timestamps")
    if not isinstance(named, list):
        return None
    if named and isinstance(named[0], list):
        return named[i] if i < len(named) else None
    return named


@dataclass
class Built:
    """A pack before what the device decodes is there.

    Attributes:
        samples: in order.
        keys: of the samples.
        skipped: samples of the stream that are not in it.
        drawn: samples of the stream that it is made of.
    """

    samples: list[Encoded]
    keys: list[str]
    skipped: list[Skipped]
    drawn: int

    @property
    def items(self) -> list[GraphItem]:
        """What the device has to decode, in order."""
        return [cells for sample in self.samples for cells in sample.cells if isinstance(cells, GraphItem)]

    @property
    def keys_on_device(self) -> list[str]:
        """Samples of `items`."""
        pairs = zip(self.keys, self.samples, strict=True)
        return [key for key, sample in pairs if any(isinstance(c, GraphItem) for c in sample.cells)]

    def pack(self, pad_multiple: int, patch_values: int, decoded: Sequence[Tensor] = ()) -> Pack:
        """Join the samples into one sequence and pad it to a multiple of ``pad_multiple``.

        A pack with no sample left holds a text of two tokens without labels, so that every rank runs the same step.

        Args:
            pad_multiple: of the length.
            patch_values: numbers of a patch.
            decoded: patches of each of `items`, on their device; all patches go there.
        """
        samples = self.samples
        if not samples:
            two = np.zeros(2, np.int64)
            samples = [Encoded(SampleSpec((2,)), two, np.full(2, IGNORE, np.int64))]
        spec = PackSpec(tuple(s.spec for s in samples)).padded_to(pad_multiple)
        padding = np.zeros(spec.padding, np.int64)
        tokens = np.concatenate([*(s.tokens for s in samples), padding])
        labels = np.concatenate([*(s.labels for s in samples), padding + IGNORE])
        cells = [c for s in samples for c in s.cells]
        return Pack(
            spec,
            torch.from_numpy(tokens),
            torch.from_numpy(labels),
            _joined(cells, patch_values, decoded),
            self.keys,
            self.skipped,
            samples=self.drawn,
            video_bytes=sum(s.video_bytes for s in samples),
        )


def _joined(cells: Sequence[Cells], patch_values: int, decoded: Sequence[Tensor]) -> Tensor:
    """All patches in order, on the device of the decoded ones if there are any."""
    nothing = np.empty((0, patch_values), np.uint8)
    if not decoded:
        return torch.from_numpy(np.concatenate([nothing, *(c for c in cells if isinstance(c, np.ndarray))]))
    left, device = iter(decoded), decoded[0].device
    return torch.cat([torch.from_numpy(c).to(device) if isinstance(c, np.ndarray) else next(left) for c in cells])
