"""A trained run in one process, for chat and evaluation: weights of any checkpoint, tokenizer, videos."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from dali_pipelines.chat_format import Message, prompt_tokens
from dali_pipelines.decode import watch
from dali_pipelines.options import VisionOptions
from dali_pipelines.tokenizer import IM_END, load_tokenizer
from megatron_elva.config.build import load
from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config, DebugConfig, MergingConfig, ModelConfig
from megatron_elva.config.validate import check_merging
from megatron_elva.config.values import check_choices, check_ranges
from megatron_elva.inference.elva import Elva
from megatron_elva.layout import SampleSpec, VideoSpec
from megatron_elva.layout.spec import Segment
from megatron_elva.model.hf_names import to_hf
from megatron_elva.training.runs import latest
from megatron_elva.training.stored_weights import read_weights

__all__ = ["Assistant", "Elva", "Video"]


@dataclass(frozen=True)
class Video:
    """A video or image as the model takes it.

    Attributes:
        patches: ``[N * r * r, P * P * 3]`` uint8.
        spec: its grid and frames.
    """

    patches: Tensor
    spec: VideoSpec


def _with_merging(config: Config, merging: MergingConfig) -> Config:
    """The config with another merging; of its rules only those that have to do with merging are checked."""
    changed = replace(config, merging=merging, debug=DebugConfig())
    for rule in (check_choices, check_ranges, check_merging):
        rule(changed)
    return changed


class Assistant:
    """A trained run that answers questions about videos.

    Args:
        run: a run directory, a ``stage=all`` directory or a checkpoint folder.
        merging: how tokens merge, in place of how they did in training.

    Raises:
        InputError: there is no complete checkpoint, or its run lacks config or tokenizer.
        ConfigError: `merging` does not fit the model.
    """

    def __init__(self, run: str | Path, merging: MergingConfig | None = None) -> None:
        self.checkpoint = latest(run)
        folder = self.checkpoint.run
        if not (folder / "config.yaml").is_file():
            raise InputError(f"{folder}: has no config.yaml")
        written: Config = load(folder / "config.yaml")
        # the checkpoint says what model it holds; the file beside it may have been written since
        self.config = replace(written, model=ModelConfig(**self.checkpoint.meta["model"]))
        if merging is not None:
            self.config = _with_merging(self.config, merging)
        self.tokenizer: Any = load_tokenizer(str(folder / "tokenizer"))
        self.model = Elva(self.config.model, int(self.checkpoint.meta["vocab"]), self.config.merging).eval()
        state = to_hf(read_weights(self.checkpoint.path), self.config.model)
        visual = {n: t for n, t in state.items() if n.startswith(("patch_embedding.", "projector."))}
        language = {f"language.{n}": t for n, t in state.items() if n not in visual}
        self.model.load_state_dict({**visual, **language})
        self.model.float()

    def watch(self, data: bytes) -> Video:
        """Decode a video or image as in training.

        Raises:
            InputError: it cannot be decoded.
        """
        settings = self.config.data
        if settings.sampling in ("clip", "timestamps"):  # a question is about the whole video, and brings no times
            settings = replace(settings, sampling="uniform")
        watched = watch(data, VisionOptions.from_config(settings, self.config.model))
        return Video(torch.from_numpy(watched.patches), watched.video)

    def answer(self, messages: list[Message], videos: Sequence[Video], max_new_tokens: int = 256) -> str:
        """The assistant's next turn of a conversation, greedily.

        Args:
            messages: turns with ``role`` and ``content``; videos stand at the start of the first user turn unless
                placeholders say otherwise.
            videos: in the order of their places.
            max_new_tokens: length at most.
        """
        sample, tokens = self.prompt(messages, videos)
        patches = torch.cat([v.patches for v in videos]) if videos else self._no_patches()
        ids = self.model.generate(
            sample,
            tokens,
            patches,
            stop=self.tokenizer.convert_tokens_to_ids(IM_END),
            known_tokens=len(self.tokenizer),
            max_new_tokens=max_new_tokens,
        )
        return str(self.tokenizer.decode(ids)).strip()

    def prompt(self, messages: list[Message], videos: Sequence[Video]) -> tuple[SampleSpec, Tensor]:
        """The conversation as a sample, and its token ids ``[S]``."""
        left = iter(videos)
        segments: list[Segment] = []
        tokens: list[np.ndarray] = []
        for piece in prompt_tokens(self.tokenizer, messages, len(videos)):
            if piece is None:
                spec = next(left).spec
                segments.append(spec)
                tokens.append(np.zeros(spec.tokens, np.int64))
            else:
                segments.append(len(piece))
                tokens.append(piece)
        sample = SampleSpec(tuple(segments))
        length = self.model.spec(sample).tokens
        if length > self.config.model.max_position:
            raise InputError(f"{length} tokens, model.max_position is {self.config.model.max_position}")
        return sample, torch.from_numpy(np.concatenate(tokens))

    def _no_patches(self) -> Tensor:
        return torch.empty(0, self.config.model.patch_values, dtype=torch.uint8)
