"""ELVA in one process on plain transformers: for chat and evaluation, from any run's checkpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from dali_pipelines.chat_format import Message, prompt_tokens
from dali_pipelines.decode import decode
from dali_pipelines.patches import to_cells
from dali_pipelines.tokenizer import IM_END, load_tokenizer
from megatron_elva.config.build import load
from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config, ModelConfig
from megatron_elva.layout import Kind, PackSpec, SampleSpec, VideoSpec, build_layout
from megatron_elva.layout.spec import Segment
from megatron_elva.model.hf_names import to_hf
from megatron_elva.model.patch_embedding import PatchEmbedding, VisualIndex
from megatron_elva.training.runs import latest
from megatron_elva.training.stored_weights import read_weights


@dataclass(frozen=True)
class Video:
    """A video or image as the model takes it.

    Attributes:
        patches: ``[N * r * r, P * P * 3]`` uint8.
        spec: its grid and frames.
    """

    patches: Tensor
    spec: VideoSpec


class Elva(nn.Module):
    """Patch embedding, projector and transformers' Qwen2, with greedy generation.

    Args:
        model: sizes.
        vocab: rows of the word embedding.
    """

    def __init__(self, model: ModelConfig, vocab: int) -> None:
        super().__init__()
        self.config = model
        self.patch_embedding = PatchEmbedding(
            model.patch_values, model.patch_width, model.patch_heads, model.cell_reduction**2, model.patch_embedding
        )
        self.projector = nn.Linear(model.patch_width, model.hidden)
        self.language = Qwen2ForCausalLM(qwen2_config(model, vocab))

    def embed(self, sample: SampleSpec, tokens: Tensor, patches: Tensor) -> Tensor:
        """``[1, S, H]`` input vectors of a sample from its token ids ``[S]`` and patches."""
        spec = PackSpec((sample,))
        layout = build_layout(spec)
        vectors = self.projector(torch.cat(self.patch_embedding(patches, VisualIndex.of(spec))))
        order = torch.cat([layout.where(kind) for kind in (Kind.CELL, Kind.FRAME, Kind.LINE)])
        return self.language.model.embed_tokens(tokens).index_copy(0, order, vectors)[None]

    def visible(self, sample: SampleSpec, dtype: torch.dtype) -> Tensor | None:
        """Additive mask ``[1, 1, S, S]`` of ``frame_bidirectional``; None where plain causal attention serves."""
        if self.config.attention_mask == "causal":
            return None
        layout = build_layout(PackSpec((sample,)))
        block = torch.where(layout.kind == Kind.CELL, layout.video * layout.tokens + layout.frame, -1)
        seen = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool).tril()
        seen |= (block[:, None] == block[None]) & (block >= 0)[:, None]
        return torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)[None, None]

    @torch.inference_mode()
    def logits(self, sample: SampleSpec, tokens: Tensor, patches: Tensor) -> Tensor:
        """Logits ``[S, V]`` of a whole sample."""
        embeds = self.embed(sample, tokens, patches)
        return self.language(inputs_embeds=embeds, attention_mask=self.visible(sample, embeds.dtype)).logits[0]

    @torch.inference_mode()
    def generate(
        self, sample: SampleSpec, tokens: Tensor, patches: Tensor, stop: int, known_tokens: int, max_new_tokens: int
    ) -> list[int]:
        """Continue a sample greedily.

        Args:
            sample: the prompt.
            tokens: ``[S]`` its token ids, 0 at visual positions.
            patches: its pixels.
            stop: token id that ends the answer (not returned).
            known_tokens: size of the tokenizer; rows of the embedding behind it are padding and never chosen.
            max_new_tokens: length at most.

        Returns:
            The new token ids.
        """
        cache = DynamicCache()
        embeds = self.embed(sample, tokens, patches)
        mask = self.visible(sample, embeds.dtype)
        out: list[int] = []
        for _ in range(max_new_tokens):
            step = self.language(
                inputs_embeds=embeds, attention_mask=mask, past_key_values=cache, use_cache=True, logits_to_keep=1
            )
            token = int(step.logits[0, -1, :known_tokens].argmax())
            if token == stop:
                break
            out.append(token)
            embeds, mask = self.language.model.embed_tokens(torch.tensor([[token]])), None
        return out


def qwen2_config(model: ModelConfig, vocab: int) -> Qwen2Config:
    """The same language model as transformers describes it."""
    return Qwen2Config(
        vocab_size=vocab,
        hidden_size=model.hidden,
        intermediate_size=model.ffn_hidden,
        num_hidden_layers=model.layers,
        num_attention_heads=model.heads,
        num_key_value_heads=model.kv_heads,
        max_position_embeddings=model.max_position,
        rms_norm_eps=model.norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": model.rope_theta},
        tie_word_embeddings=model.tied_head,
        use_sliding_window=False,
    )


class Assistant:
    """A trained run that answers questions about videos.

    Args:
        run: a run directory, a ``stage=all`` directory or a checkpoint folder.

    Raises:
        InputError: there is no complete checkpoint, or its run lacks config or tokenizer.
    """

    def __init__(self, run: str | Path) -> None:
        self.checkpoint = latest(run)
        folder = self.checkpoint.run
        if not (folder / "config.yaml").is_file():
            raise InputError(f"{folder}: has no config.yaml")
        written: Config = load(folder / "config.yaml")
        # the checkpoint says what model it holds; the file beside it may have been written since
        self.config = replace(written, model=ModelConfig(**self.checkpoint.meta["model"]))
        self.tokenizer: Any = load_tokenizer(str(folder / "tokenizer"))
        self.model = Elva(self.config.model, int(self.checkpoint.meta["vocab"])).eval()
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
        settings, model = self.config.data, self.config.model
        decoded = decode(
            data, settings.frames, settings.max_pixels, settings.max_source_pixels, settings.max_source_frames
        )
        patches, spec = to_cells(decoded.frames, model.patch_size, model.cell_reduction, settings.fit)
        return Video(torch.from_numpy(patches), spec)

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
        if sample.tokens > self.config.model.max_position:
            raise InputError(f"{sample.tokens} tokens, model.max_position is {self.config.model.max_position}")
        return sample, torch.from_numpy(np.concatenate(tokens))

    def _no_patches(self) -> Tensor:
        return torch.empty(0, self.config.model.patch_values, dtype=torch.uint8)
