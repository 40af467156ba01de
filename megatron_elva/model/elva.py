"""ELVA: patches and text in, logits or losses out. One pipeline chunk of it, whatever the parallel layout.

Shape letters: S tokens of the pack, H hidden width, C width of the patch embedding, K positions with a loss,
V vocabulary.
"""

from __future__ import annotations

import copy
from typing import Protocol

import torch
from megatron.core import tensor_parallel
from megatron.core.enums import ModelType
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.transformer.transformer_layer import get_transformer_layer_offset
from torch import Tensor, nn

from megatron_elva.config.schema import ModelConfig
from megatron_elva.layout import PackState
from megatron_elva.model.decoder import Attending, Decoder, MergeSchedule
from megatron_elva.model.inputs import LossInputs, ModelInputs, VisualInputs
from megatron_elva.model.layer_spec import layer_spec
from megatron_elva.model.patch_embedding import PatchEmbedding


class Embedding(MegatronModule):
    """Holds the word embedding under the name that megatron-core's tying of embedding and head expects."""

    def __init__(self, config: TransformerConfig, vocab: int, tp_group: torch.distributed.ProcessGroup) -> None:
        super().__init__(config=config)
        self.tp_group = tp_group
        self.word_embeddings = tensor_parallel.VocabParallelEmbedding(
            vocab, config.hidden_size, init_method=config.init_method, config=config, tp_group=tp_group
        )


class Boundary(Protocol):
    """How hidden states and the state of their pack cross to the next pipeline chunk."""

    def send(self, hidden: Tensor, state: PackState) -> Tensor:
        """``[S / tp, 1, H]`` and state -> message."""

    def receive(self, message: Tensor) -> tuple[Tensor, PackState]:
        """Message -> ``[S / tp, 1, H]`` and state."""


class ElvaModel(LanguageModule):
    """One pipeline chunk of ELVA.

    Args:
        config: megatron-core's config.
        model: sizes.
        vocab: rows of the word embedding.
        pg_collection: process groups.
        layers: ``local`` or ``te``.
        recompute: recompute activations layer by layer.
        pre_process: the chunk begins with the embeddings.
        post_process: the chunk ends with the head.
        vp_stage: number of the virtual chunk, None without interleaving.
        schedule: merge points of the whole model.
        boundary: how packs come and go; None where this chunk is the whole model.
    """

    def __init__(
        self,
        config: TransformerConfig,
        model: ModelConfig,
        vocab: int,
        pg_collection: ProcessGroupCollection,
        layers: str = "local",
        recompute: bool = False,
        pre_process: bool = True,
        post_process: bool = True,
        vp_stage: int | None = None,
        schedule: MergeSchedule | None = None,
        boundary: Boundary | None = None,
    ) -> None:
        super().__init__(config=config, pg_collection=pg_collection)
        self.boundary = boundary
        self.model_type = ModelType.encoder_or_decoder
        self.pre_process, self.post_process, self.vp_stage = pre_process, post_process, vp_stage
        self.share_embeddings_and_output_weights = model.tied_head
        self.vocab_size = vocab
        self.input_tensor: Tensor | None = None
        if pre_process:
            self.embedding = Embedding(config, vocab, self.tp_group)
            self.patch_embedding = PatchEmbedding(
                model.patch_values,
                model.patch_width,
                model.patch_heads,
                model.cell_reduction**2,
                model.patch_embedding,
            ).to(device=torch.cuda.current_device(), dtype=config.params_dtype)
            self.projector = nn.Linear(
                model.patch_width, model.hidden, device=torch.cuda.current_device(), dtype=config.params_dtype
            )
        chunks = config.pipeline_model_parallel_size * (config.virtual_pipeline_model_parallel_size or 1)
        self.decoder = Decoder(
            config,
            layer_spec(layers),
            pg_collection,
            first_layer=get_transformer_layer_offset(config, vp_stage, pg_collection.pp.rank()),
            layers=config.num_layers // chunks,
            final_norm=post_process,
            recompute=recompute,
            attending=Attending(model.head_dim, model.rope_theta, model.attention_mask),
            schedule=schedule or MergeSchedule(),
            vp_stage=vp_stage,
        )
        if post_process:
            self.output_layer = self._head(config, vocab)
        if pre_process or post_process:
            self.setup_embeddings_and_output_layer()

    def _head(self, config: TransformerConfig, vocab: int) -> nn.Module:
        # the head reads the gathered sequence (only positions with a loss), so it is not sequence parallel itself
        config = copy.copy(config)
        config.sequence_parallel = False
        return tensor_parallel.ColumnParallelLinear(
            config.hidden_size,
            vocab,
            config=config,
            init_method=config.init_method,
            bias=False,
            gather_output=False,
            skip_weight_param_allocation=self.pre_process and self.share_embeddings_and_output_weights,
            tp_group=self.tp_group,
        )

    def set_input_tensor(self, input_tensor: Tensor | list[Tensor | None] | None) -> None:
        """Take what the previous pipeline chunk sent; megatron-core's schedules hand it over in a list."""
        self.input_tensor = input_tensor[0] if isinstance(input_tensor, list) else input_tensor

    def forward(self, inputs: ModelInputs | None, with_loss: bool = True) -> Tensor:
        """Run this chunk.

        Args:
            inputs: the microbatch; state and visual part are read on the first chunk only, the loss part on the last
                only, nothing in between.
            with_loss: last chunk: return losses, else logits of all positions that are left.

        Returns:
            The message to the next chunk; on the last, fp32 losses ``[K]`` (one for each position with a loss, not yet
            weighted) or fp32 logits ``[S, V / tp]``.
        """
        hidden, state = self._begin(inputs)
        hidden, state = self.decoder(hidden, state)
        if not self.post_process:
            if self.boundary is None:
                raise ValueError("a pipeline chunk that is not the last needs a boundary to send through")
            return self.boundary.send(hidden, state)
        if self.config.sequence_parallel:
            # the head below all-reduces its input's gradient, so each rank already holds the whole of it here
            hidden = tensor_parallel.gather_from_sequence_parallel_region(
                hidden, tensor_parallel_output_grad=False, group=self.tp_group
            )
        if not with_loss:
            return self._logits(hidden)[:, 0].float()
        if inputs is None or inputs.loss is None:
            raise ValueError("the last pipeline chunk got no labels")
        logits = self._logits(hidden.index_select(0, loss_rows(inputs.loss, state)))
        return tensor_parallel.vocab_parallel_cross_entropy(logits.float(), inputs.loss.targets[:, None])[:, 0]

    def _begin(self, inputs: ModelInputs | None) -> tuple[Tensor, PackState]:
        """Hidden states and state at the first layer of this chunk."""
        if not self.pre_process:
            if self.input_tensor is None or self.boundary is None:
                raise ValueError("this pipeline chunk got no input from the one before it")
            return self.boundary.receive(self.input_tensor)
        if inputs is None or inputs.state is None or inputs.visual is None:
            raise ValueError("the first pipeline chunk got no pack")
        return self._embed(inputs.visual), inputs.state

    def _embed(self, visual: VisualInputs) -> Tensor:
        """Word embeddings with the visual tokens put in their places, ``[S / tp, 1, H]``."""
        hidden = self.embedding.word_embeddings(visual.tokens)
        vectors = self.projector(torch.cat(self.patch_embedding(visual.patches, visual.index)))
        hidden = hidden.index_copy(0, visual.order, vectors)[:, None]
        if self.config.sequence_parallel:
            hidden = tensor_parallel.scatter_to_sequence_parallel_region(hidden, group=self.tp_group)
        return hidden

    def _logits(self, hidden: Tensor) -> Tensor:
        weight = self.shared_embedding_or_output_weight() if self.share_embeddings_and_output_weights else None
        return self.output_layer(hidden, weight=weight)[0]


def loss_rows(loss: LossInputs, state: PackState) -> Tensor:
    """``[K]``: where the positions with a loss are now. They are never cells, so each still has its token."""
    layout = state.layout
    if not state.done:
        return loss.positions
    size = state.spec.tokens
    rows = torch.zeros(size + 1, dtype=torch.long, device=layout.origin.device)
    rows.scatter_(
        0,
        torch.where(layout.origin < 0, size, layout.origin),
        torch.arange(layout.tokens, device=layout.origin.device),
    )
    return rows[loss.positions]
