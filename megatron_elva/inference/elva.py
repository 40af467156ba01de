"""ELVA in one process on plain transformers: patch embedding, Qwen2 in layer groups, and merging between them.

Merging takes place once, when a prompt is read. The layers behind a merge point then hold fewer keys and values than
those before it, and a generated token, which never merges, is one more in each.

Shape letters: S tokens of a sample, K of them left behind the last merge point, H hidden width, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import DynamicCache, Qwen2Config, Qwen2ForCausalLM

from megatron_elva.config.merge_schedule import ResolvedPoint, resolve
from megatron_elva.config.schema import MergingConfig, ModelConfig
from megatron_elva.layout import Kind, PackSpec, PackState, SampleSpec, TokenLayout, initial_state
from megatron_elva.layout.pooling import pool_columns
from megatron_elva.model.inputs import pooling_window
from megatron_elva.model.merging import merge
from megatron_elva.model.patch_embedding import PatchEmbedding, VisualIndex


@dataclass(frozen=True)
class Merged:
    """A merge point and what it left.

    Attributes:
        point: the rule and the layer behind which it is.
        state: the sample's tokens after it.
    """

    point: ResolvedPoint
    state: PackState


@dataclass(frozen=True)
class Prefilled:
    """A prompt that was read.

    Attributes:
        hidden: ``[K, H]`` after the last norm, of the positions that are left.
        cache: keys and values of each layer, fewer behind a merge point.
        start: the sample's tokens before any merge; with pooling those of the pooled sample.
        merges: one for each merge point, in order.
    """

    hidden: Tensor
    cache: DynamicCache
    start: PackState
    merges: tuple[Merged, ...]

    @property
    def state(self) -> PackState:
        """The positions that are left; its ``layout.origin`` says where each stood in `start`."""
        return self.merges[-1].state if self.merges else self.start

    @property
    def next_position(self) -> int:
        """Position id of the first generated token: merging takes tokens away, but no position ids."""
        return self.start.layout.tokens


class Elva(nn.Module):
    """Patch embedding, projector and transformers' Qwen2, with merging and greedy generation.

    Args:
        model: sizes.
        vocab: rows of the word embedding.
        merging: where tokens merge; None: nowhere.
    """

    def __init__(self, model: ModelConfig, vocab: int, merging: MergingConfig | None = None) -> None:
        super().__init__()
        self.config = model
        self.merging = merging or MergingConfig(kind="none")
        self.points = resolve(self.merging, model.layers)
        self.patch_embedding = PatchEmbedding(
            model.patch_values, model.patch_width, model.patch_heads, model.cell_reduction**2, model.patch_embedding
        )
        self.projector = nn.Linear(model.patch_width, model.hidden)
        self.language = Qwen2ForCausalLM(qwen2_config(model, vocab))

    def spec(self, sample: SampleSpec) -> PackSpec:
        """The sample as its tokens enter the first layer: pooled where pooling is on."""
        return PackSpec((sample,)).pooled(pooling_window(self.merging))

    def embed(self, sample: SampleSpec, tokens: Tensor, patches: Tensor) -> tuple[Tensor, PackState]:
        """Input vectors ``[1, S, H]`` of a sample, and what they stand for.

        Args:
            sample: its segments, before pooling.
            tokens: token ids for each of its positions, 0 at visual ones.
            patches: its pixels.
        """
        device, window = self.projector.weight.device, pooling_window(self.merging)
        whole, spec = PackSpec((sample,)), self.spec(sample)
        if window > 1:
            tokens, _ = pool_columns(whole, spec, tokens, tokens)
        state = initial_state(spec)
        order = torch.cat([state.layout.where(kind) for kind in (Kind.CELL, Kind.FRAME, Kind.LINE)]).to(device)
        index = VisualIndex.of(whole, window).to(device)
        vectors = self.projector(torch.cat(self.patch_embedding(patches.to(device), index)))
        words = self.language.model.embed_tokens(tokens.to(device))
        return words.index_copy(0, order, vectors)[None], state.to(device)

    @torch.inference_mode()
    def prefill(self, sample: SampleSpec, tokens: Tensor, patches: Tensor) -> Prefilled:
        """Read a sample, merging on the way; arguments as in `embed`."""
        hidden, start = self.embed(sample, tokens, patches)
        cache, state, done = DynamicCache(), start, 0
        merges: list[Merged] = []
        for point in self.points:
            hidden, done = self._group(hidden, state.layout, cache, done, point.layer), point.layer
            left, state = merge(hidden[0], state, point, self.merging.survivor)
            hidden = left[None]
            merges.append(Merged(point, state))
        hidden = self._group(hidden, state.layout, cache, done, self.config.layers)
        return Prefilled(self.language.model.norm(hidden)[0], cache, start, tuple(merges))

    @torch.inference_mode()
    def logits(self, sample: SampleSpec, tokens: Tensor, patches: Tensor) -> Tensor:
        """Logits ``[K, V]`` of all positions of a sample that are left; arguments as in `embed`."""
        return self.language.lm_head(self.prefill(sample, tokens, patches).hidden)

    @torch.inference_mode()
    def generate(
        self, sample: SampleSpec, tokens: Tensor, patches: Tensor, stop: int, known_tokens: int, max_new_tokens: int
    ) -> list[int]:
        """Continue a sample greedily.

        Args:
            sample: the prompt.
            tokens: token ids for each of its positions, 0 at visual ones.
            patches: its pixels.
            stop: token id that ends the answer (not returned).
            known_tokens: size of the tokenizer; rows of the embedding behind it are padding and never chosen.
            max_new_tokens: length at most.

        Returns:
            The new token ids.
        """
        read = self.prefill(sample, tokens, patches)
        last, out = read.hidden[-1], list[int]()
        while len(out) < max_new_tokens:
            if out:
                last = self._step(out[-1], read.next_position + len(out) - 1, read.cache)
            token = int(self.language.lm_head(last)[:known_tokens].argmax())
            if token == stop:
                break
            out.append(token)
        return out

    def _step(self, token: int, position: int, cache: DynamicCache) -> Tensor:
        """``[H]`` of one more token, which sees all that the cache holds."""
        device = self.projector.weight.device
        hidden = self.language.model.embed_tokens(torch.tensor([[token]], device=device))
        hidden = self._layers(hidden, torch.tensor([position], device=device), None, cache, 0, self.config.layers)
        return self.language.model.norm(hidden)[0, -1]

    def _group(self, hidden: Tensor, layout: TokenLayout, cache: DynamicCache, first: int, end: int) -> Tensor:
        """Run the layers from `first` up to `end` on tokens laid out as `layout` says."""
        if first == end:  # two merge points at one place
            return hidden
        mask = visible(layout, hidden.dtype) if self.config.attention_mask == "frame_bidirectional" else None
        return self._layers(hidden, layout.position, mask, cache, first, end)

    def _layers(
        self, hidden: Tensor, position: Tensor, mask: Tensor | None, cache: DynamicCache, first: int, end: int
    ) -> Tensor:
        rotation = self.language.model.rotary_emb(hidden, position[None])
        for layer in self.language.model.layers[first:end]:
            hidden = layer(hidden, attention_mask=mask, position_embeddings=rotation, past_key_values=cache)
        return hidden


def visible(layout: TokenLayout, dtype: torch.dtype) -> Tensor:
    """Additive mask ``[1, 1, S, S]`` of ``frame_bidirectional``: earlier tokens, and cells of the same frame."""
    block = torch.where(layout.kind == Kind.CELL, layout.video * layout.tokens + layout.frame, -1)
    seen = torch.ones(layout.tokens, layout.tokens, dtype=torch.bool, device=block.device).tril()
    seen |= (block[:, None] == block[None]) & (block >= 0)[:, None]
    mask = torch.zeros(seen.shape, dtype=dtype, device=block.device).masked_fill(~seen, torch.finfo(dtype).min)
    return mask[None, None]


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
