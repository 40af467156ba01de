"""Sizes known before a run: parameters, memory, tokens. Pure arithmetic on the config; needs no torch.

Letters: H hidden width, F width inside SwiGLU, C width of the patch embedding, P side of a patch, Hp and Wp rows and
columns of cells in a frame.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import isqrt

from megatron_elva.config.merge_schedule import kept_cells, resolve
from megatron_elva.config.schema import Config, ModelConfig

ASSUMED_PIXELS = 336 * 336
"""Area of a frame where the config sets no bound."""


def patch_embedding_parameters(model: ModelConfig) -> int:
    """Parameters of the patch embedding; 9,003,008 at P = 14, C = 1024 (the "9M" of ELVA, arXiv 2503.18422)."""
    width = model.patch_width
    projection, tokens = model.patch_values * width, 2 * width
    if model.patch_embedding == "naive":
        return projection + tokens
    # q, k, v and output matrices, the output's bias, weight and bias of two norms
    block = 4 * width * width + 5 * width
    return projection + 2 * block + tokens


def projector_parameters(model: ModelConfig) -> int:
    """Parameters of the projector C -> H."""
    return model.patch_width * model.hidden + model.hidden


def layer_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """Parameters of one decoder layer on one of ``tensor`` ranks: qkv with bias, output, SwiGLU, two norms."""
    hidden, qkv = model.hidden, model.hidden + 2 * model.kv_heads * model.head_dim
    split = qkv * (hidden + 1) + hidden * hidden + 3 * hidden * model.ffn_hidden
    return split // tensor + 2 * hidden


def vocabulary(model: ModelConfig, tokenizer_size: int | None = None) -> int | None:
    """Rows of the word embedding; None while neither config nor tokenizer gives them."""
    if model.vocab_size is not None or tokenizer_size is None:
        return model.vocab_size
    return -(-tokenizer_size // 64) * 64


def language_model_parameters(model: ModelConfig, vocab: int) -> int:
    """Parameters of the language model: embedding, layers, last norm, and a head where it is not tied."""
    words = vocab * model.hidden * (1 if model.tied_head else 2)
    return words + model.layers * layer_parameters(model) + model.hidden


def rank_parameters(config: Config, vocab: int) -> list[int]:
    """Parameters on one rank of each pipeline rank, first to last."""
    model, tensor, pipeline = config.model, config.parallel.tensor, config.parallel.pipeline
    words = vocab * model.hidden // tensor
    sizes = [model.layers // pipeline * layer_parameters(model, tensor)] * pipeline
    sizes[0] += words + patch_embedding_parameters(model) + projector_parameters(model)
    sizes[-1] += model.hidden
    if not model.tied_head or pipeline > 1:
        sizes[-1] += words  # a tied head has a copy of its own on the last pipeline rank
    return sizes


def frame_grid(config: Config) -> tuple[int, int]:
    """``(Hp, Wp)`` of one frame of the largest allowed area, as square as cells allow."""
    cells = (config.data.max_pixels or ASSUMED_PIXELS) // config.model.cell_pixels**2
    rows = max(1, isqrt(cells))
    return rows, max(1, cells // rows)


def frame_tokens(config: Config) -> int:
    """Tokens of one frame of the largest allowed area: ``1 + Hp * (Wp + 1)``."""
    rows, columns = frame_grid(config)
    return 1 + rows * (columns + 1)


@dataclass(frozen=True)
class PackEstimate:
    """How large a pack gets at most.

    Attributes:
        samples: samples in it, None where a token budget fills it.
        visual: visual tokens.
        text: text tokens.
    """

    samples: int | None
    visual: int
    text: int

    @property
    def tokens(self) -> int:
        """All tokens."""
        return self.visual + self.text


def pack_estimate(config: Config) -> PackEstimate:
    """The largest pack as the data gives it, before any merging and pooling.

    Every sample has all its frames and as much text as ``data.max_text_tokens`` lets in.
    """
    visual, text = config.data.frames * frame_tokens(config), config.data.max_text_tokens
    budget = config.data.pack_tokens
    if budget is not None and config.data.pack_text_tokens is not None:
        return PackEstimate(None, budget - config.data.pack_text_tokens, config.data.pack_text_tokens)
    if budget is not None:
        return PackEstimate(None, budget * visual // (visual + text), budget - budget * visual // (visual + text))
    samples = config.train.global_batch // config.train.accumulate // config.data_parallel
    return PackEstimate(samples, samples * visual, samples * text)


def layer_tokens(config: Config) -> list[int]:
    """Tokens of the largest pack in each decoder layer, where merging and pooling leave no more whatever the video.

    Budgets and pooling count. A threshold may remove nothing. With a token budget nothing is taken off either, as
    images could fill the pack, and those neither merge nor pool.
    """
    pack, merging, layers = pack_estimate(config), config.merging, config.model.layers
    if pack.samples is None:
        return [pack.tokens] * layers
    frames, (rows, columns) = config.data.frames, frame_grid(config)
    if merging.kind == "pooling":
        frames = -(-frames // merging.pooling.window)
    other = frames * (1 + rows) + config.data.max_text_tokens  # FRAME, LINE and text stay
    points = resolve(merging, layers)
    cells = [frames * rows * columns, *(kept.count for kept in kept_cells(points, frames, rows * columns))]
    passed = [sum(point.layer <= layer for point in points) for layer in range(layers)]
    return [pack.samples * (other + cells[number]) for number in passed]


def rank_layers(config: Config, pipeline_rank: int) -> list[int]:
    """Decoder layers of a pipeline rank, from 0; with interleaving its chunks lie apart."""
    pipeline, chunks = config.parallel.pipeline, config.parallel.virtual_pipeline or 1
    size = config.model.layers // (pipeline * chunks)
    starts = [(chunk * pipeline + pipeline_rank) * size for chunk in range(chunks)]
    return [layer for start in starts for layer in range(start, start + size)]


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on the fullest rank."""

    weights: int
    gradients: int
    optimizer: int
    activations: int

    @property
    def total(self) -> int:
        """All of them; without the allocator's slack, communication buffers and the CUDA context."""
        return self.weights + self.gradients + self.optimizer + self.activations


def memory_estimate(config: Config, vocab: int) -> MemoryEstimate:
    """Memory of the fullest rank.

    Bytes a parameter are those of Megatron-LM's distributed optimizer over d data-parallel ranks
    (docs "Distributed Optimizer"): bf16 2 for weights, 4 for fp32 gradients, 12 / d for fp32 weights and Adam's two
    moments; fp32 4, 4 and 8 / d.
    """
    weight, states = (2, 12) if config.precision.dtype == "bf16" else (4, 8)
    ranks = [
        MemoryEstimate(
            weights=weight * size,
            gradients=4 * size,
            optimizer=states * size // config.data_parallel,
            activations=activation_bytes(config, vocab, pipeline_rank),
        )
        for pipeline_rank, size in enumerate(rank_parameters(config, vocab))
    ]
    return max(ranks, key=lambda estimate: estimate.total)


def activation_bytes(config: Config, vocab: int, pipeline_rank: int) -> int:
    """Activations that wait for the backward pass on one pipeline rank.

    Counted as in Korthikanti et al. (arXiv 2205.05198) for this layer: fused attention keeps no score matrix, SwiGLU
    keeps three tensors of width F, no dropout. Each layer counts with the tokens that merging leaves there at most
    (`layer_tokens`). In flight are as many packs as pipeline ranks follow, itself included
    (1F1B, Narayanan et al., arXiv 2104.04473), and a little more with interleaving.
    """
    parallel, pack = config.parallel, pack_estimate(config)
    element = 2 if config.precision.dtype == "bf16" else 4
    in_flight = min(parallel.pipeline - pipeline_rank, config.train.accumulate)
    tokens = layer_tokens(config)
    here = [tokens[layer] for layer in rank_layers(config, pipeline_rank)]
    waiting = sum(here) * in_flight  # tokens x layers
    if (parallel.virtual_pipeline or 1) > 1:
        # interleaving holds 1 + (p - 1) / (p v) times as much on the first rank (arXiv 2205.05198, section 4.2.3)
        waiting += waiting * (parallel.pipeline - 1) // (parallel.pipeline * (parallel.virtual_pipeline or 1))
    if config.train.recompute:
        # the input of every layer, and one layer in full while its backward pass runs
        inputs = waiting * config.model.hidden // (parallel.tensor if parallel.sequence else 1)
        kept = inputs + max(here) * _layer_elements(config)
    else:
        kept = waiting * _layer_elements(config)
    total = element * kept
    if pipeline_rank == 0:
        width = config.model.patch_values + 11 * config.model.patch_width  # cells, their norms, keys and values, twice
        visual = pack.visual + tokens[0] - pack.tokens  # after pooling
        total += element * visual * width * in_flight
    if pipeline_rank == parallel.pipeline - 1:
        # logits of positions with a loss (text at most): once in the dtype, once in fp32 for the softmax
        total += pack.text * (vocab // parallel.tensor) * (element + 4)
    return total


def _layer_elements(config: Config) -> int:
    """Numbers that one layer keeps for a token on one rank."""
    model, tensor = config.model, config.parallel.tensor
    keys = model.kv_heads * model.head_dim
    # inputs of the two norms and of the matrices behind them
    around = 4 * model.hidden // (tensor if config.parallel.sequence else 1)
    # q, k, v, attention's output; gate, up and their product
    inside = (2 * model.hidden + 2 * keys + 3 * model.ffn_hidden) // tensor
    return around + inside
