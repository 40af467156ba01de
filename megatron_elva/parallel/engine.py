"""The model on this rank with its optimizer, and one training step through megatron-core's pipeline schedules."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig, finalize_model_grads
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.optimizer.clip_grads import get_grad_norm_fp32
from megatron.core.optimizer.optimizer_config import ParamKey, ParamPredicate
from megatron.core.pipeline_parallel.schedules import get_forward_backward_func
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_elva.config.errors import ConfigError
from megatron_elva.config.merge_schedule import resolve
from megatron_elva.config.schema import Config, ModelConfig, TrainConfig
from megatron_elva.layout import PackState
from megatron_elva.model.decoder import MergeSchedule
from megatron_elva.model.elva import ElvaModel
from megatron_elva.model.inputs import LossInputs, ModelInputs
from megatron_elva.model.layer_spec import resolve_layers
from megatron_elva.model.transformer_config import transformer_config
from megatron_elva.model.weights import initialise, named_global_parameters
from megatron_elva.parallel.carrier import Carrier, Traffic, message_tokens
from megatron_elva.parallel.ranks import Ranks

PATCH_EMBEDDING = ("patch_embedding.*", "projector.*")


@dataclass(frozen=True)
class StepResult:
    """What a step gave on this rank.

    Attributes:
        loss_sum: sum of the token losses of this replica; 0 but on the one rank of it that counts them.
        loss_tokens: number of those tokens; likewise.
        grad_norm: norm of the whole gradient, on every rank; NaN or Inf on every rank when the loss of any pack is.
        layers: ``(layers, lengths of the samples)`` of each layer group of each pack that this rank computed.
        visual_tokens: visual tokens left at the end; 0 but on the one rank of the replica that counts them.
        nonfinite: micro-steps, from 0, whose loss is not finite; None but on the one rank of the replica that knows.
    """

    loss_sum: float
    loss_tokens: int
    grad_norm: float
    layers: list[tuple[int, tuple[int, ...]]]
    visual_tokens: int
    nonfinite: tuple[int, ...] | None = None


Draw = Callable[[list[ElvaModel], ModelConfig, int, int, int], None]
"""Fills the weights of chunks: with sizes, seed, tensor rank and number of tensor ranks."""


def layers_of(config: Config) -> str:
    """``local`` or ``te``: what the layers here are made of."""
    precision = config.precision
    return resolve_layers(config.layers, config.device, config.model.attention_mask, precision.fp8, precision.dtype)


def build_chunks(config: Config, vocab: int, ranks: Ranks, draw: Draw = initialise) -> list[ElvaModel]:
    """The model chunks of this rank (several with interleaving), with weights drawn from `config.seed`.

    Args:
        config: sizes, layout, layers.
        vocab: rows of the word embedding.
        ranks: this rank.
        draw: fills the weights.
    """
    mcore = transformer_config(config)
    virtual = mcore.virtual_pipeline_model_parallel_size
    layers = layers_of(config)
    schedule = MergeSchedule(resolve(config.merging, config.model.layers), config.merging.survivor, config.pad_multiple)
    tokens = message_tokens(config)
    rows = None if tokens is None else tokens // config.sequence_shards
    carrier = Carrier(mcore.pipeline_dtype, rows) if ranks.pipeline_size > 1 else None
    chunks = [
        ElvaModel(
            mcore,
            config.model,
            vocab,
            ranks.groups,
            layers=layers,
            recompute=config.train.recompute,
            pre_process=ranks.is_first and (stage in (None, 0)),
            post_process=ranks.is_last and (stage is None or stage == (virtual or 1) - 1),
            vp_stage=stage,
            schedule=schedule,
            boundary=carrier,
        )
        for stage in (range(virtual) if virtual else [None])
    ]
    draw(chunks, config.model, config.seed, ranks.tensor, ranks.tensor_size)
    return chunks


class Engine:
    """Chunks, DDP, distributed optimizer and schedule of this rank.

    Args:
        config: the stage's config.
        chunks: the model chunks of this rank.
        ranks: this rank.
    """

    def __init__(self, config: Config, chunks: list[ElvaModel], ranks: Ranks) -> None:
        self.config, self.chunks, self.ranks = config, chunks, ranks
        self.mcore: TransformerConfig = chunks[0].config
        self.names = {parameter: name for name, parameter in named_global_parameters(chunks)}
        self._mark_groups(config)
        ddp = DistributedDataParallelConfig(
            grad_reduce_in_fp32=True,
            overlap_grad_reduce=False,
            use_distributed_optimizer=True,
            check_for_nan_in_grad=False,
        )
        self.models = [
            DistributedDataParallel(
                config=self.mcore, ddp_config=ddp, module=chunk, disable_bucketing=i > 0, pg_collection=ranks.groups
            )
            for i, chunk in enumerate(chunks)
        ]
        for model in self.models:
            model.broadcast_params()
        self.optimizer = get_megatron_optimizer(
            _optimizer_config(config),
            self.models,
            config_overrides=_overrides(config.train),
            use_gloo_process_groups=False,
        )
        self.mcore.finalize_model_grads_func = partial(self._finalize)
        self.mcore.grad_scale_func = self.optimizer.scale_loss
        self._frozen = False

    def _mark_groups(self, config: Config) -> None:
        """Mark parameters for `_overrides`, and check that every frozen pattern matches something on some rank."""
        patterns = config.stage.frozen
        hits = torch.zeros(len(patterns))
        for parameter, name in self.names.items():
            parameter.elva_patch = any(fnmatch(name, p) for p in PATCH_EMBEDDING)  # type: ignore[attr-defined]
            matches = [fnmatch(name, p) for p in patterns]
            parameter.elva_frozen = any(matches)  # type: ignore[attr-defined]
            hits += torch.tensor(matches, dtype=torch.float32)
        hits = hits.to(self.ranks.device)
        dist.all_reduce(hits)
        missed = [p for p, n in zip(patterns, hits.tolist(), strict=True) if not n]
        if missed:
            raise ConfigError(
                f"stage.frozen={missed}: matches no parameter; their names begin with embedding., patch_embedding., "
                "projector., decoder. or output_layer."
            )

    def _finalize(self, models: list[Any], num_tokens: Tensor | None = None, **kwargs: Any) -> None:
        finalize_model_grads(models, num_tokens, **kwargs)
        if self._frozen:
            for parameter in self.names:
                if parameter.elva_frozen:  # type: ignore[attr-defined]
                    parameter.main_grad.zero_()  # type: ignore[attr-defined]

    def set_learning_rate(self, share: float, frozen: bool) -> None:
        """Set every group's learning rate to `share` of its full one.

        Frozen parameters get zero gradients and learning rate 0, so that they, their moments and the gradient norm of
        the rest stay as if they were not there, and unfreezing needs no new optimizer. Adam's step count goes on: the
        first steps after unfreezing have no bias correction.
        """
        self._frozen = frozen
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0 if frozen and group.get("frozen") else share * group["max_lr"]

    def train_step(self, microbatches: Sequence[ModelInputs | None]) -> StepResult:
        """Forward, backward and one optimizer step.

        A step with a loss or a gradient that is not finite changes no weight and no state of the optimizer, on any
        rank.

        Args:
            microbatches: None on ranks in the middle of the pipeline.
        """
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self.optimizer.zero_grad()
        sums = self._run(microbatches)
        grad_norm = self._grad_norm(sums)
        if math.isfinite(grad_norm) and grad_norm > 0:  # 0: no sample could be used, and momentum alone must not move
            self.optimizer.step()
        counts = self.ranks.is_last and self.ranks.tensor == 0
        total = (
            torch.stack([torch.stack([p["loss_sum"].double(), p["tokens"].double()]) for p in sums]) if counts else None
        )
        each = [] if total is None else total.tolist()
        loss_sum, tokens = (sum(column) for column in zip(*each, strict=True)) if each else (0.0, 0.0)
        traces = [chunk.decoder.trace for chunk in self.chunks]
        return StepResult(
            loss_sum,
            int(tokens),
            grad_norm,
            layers=[group for trace in traces for group in trace.layers],
            visual_tokens=sum(trace.visual_tokens for trace in traces) if counts else 0,
            nonfinite=tuple(i for i, (loss, _) in enumerate(each) if not math.isfinite(loss)) if counts else None,
        )

    def _grad_norm(self, sums: Sequence[dict[str, Tensor]]) -> float:
        """Norm of the whole gradient, the same on every rank.

        Only some ranks see the losses. They add `0 * loss` to what the norm is taken of: nothing where it is finite,
        NaN where it is not. So all ranks agree whether to step, without a collective of its own or another wait for
        the device.
        """
        self.optimizer.prepare_grads()
        grads = [g for part in _parts(self.optimizer) for g in _grads_of(part)]
        if sums:
            losses = torch.stack([p["loss_sum"].float() for p in sums])
            grads.append((0 * losses).sum(0, keepdim=True))
        group = self.optimizer.get_grad_stats_parallel_group()
        return float(get_grad_norm_fp32(grads, grad_stats_parallel_group=group))

    @property
    def traffic(self) -> Traffic:
        """What this rank has sent to the next pipeline rank."""
        boundary = self.chunks[0].boundary
        return boundary.traffic if isinstance(boundary, Carrier) else Traffic()

    def keep_merge_states(self) -> None:
        """Keep the state after each merge point of the last step, for `merge_indices`."""
        for chunk in self.chunks:
            chunk.decoder.trace.keep_states = True

    def merge_indices(self) -> list[tuple[int, int, PackState]]:
        """Microbatch, merge point and state after it, for all that this rank's layers merged in the last step."""
        out = []
        for chunk in self.chunks:
            decoder = chunk.decoder
            points = sum(0 < p.layer - decoder.first_layer <= len(decoder.layers) for p in decoder.schedule.points)
            out += [(i // points, state.done - 1, state) for i, state in enumerate(decoder.trace.states)]
        return out

    def gradients(self, microbatches: Sequence[ModelInputs | None]) -> dict[str, Tensor]:
        """Gradients by global name of this rank's shards, without an optimizer step (for comparisons)."""
        for model in self.models:
            model.train()
            model.zero_grad_buffer()
        self._run(microbatches, all_reduce=True)
        return {name: p.main_grad.clone() for p, name in self.names.items()}  # type: ignore[attr-defined]

    def release(self) -> None:
        """Give back the memory of weights, gradients and optimizer; nothing can be done with the engine afterwards.

        megatron-core's gradient hooks keep the model alive, out of reach of Python's garbage collection, so that the
        next stage of the same process would find the device full.
        """
        buffers = [b for model in self.models for b in (*model.buffers, *model.expert_parallel_buffers)]
        held: list[Tensor | None] = [t for b in buffers for t in (b.param_data, b.grad_data)]
        held += list(self.names)
        for part in _parts(self.optimizer):
            inner = part.optimizer
            held += [p for group in inner.param_groups for p in group["params"]]
            held += [t for state in inner.state.values() for t in state.values() if isinstance(t, Tensor)]
        for tensor in held:
            if tensor is not None:
                tensor.untyped_storage().resize_(0)
        if self.config.precision.fp8 is not None:
            from megatron_elva.model.te_spec import release_fp8

            release_fp8(self.models)

    def _run(self, microbatches: Sequence[ModelInputs | None], all_reduce: bool = False) -> list[dict[str, Tensor]]:
        for chunk in self.chunks:
            chunk.decoder.trace.clear()
        iterators: list[Iterator[ModelInputs | None]] = [iter(microbatches) for _ in self.models]
        return get_forward_backward_func()(
            forward_step_func=forward_step,
            data_iterator=iterators if len(iterators) > 1 else iterators[0],
            model=self.models if len(self.models) > 1 else self.models[0],
            num_microbatches=len(microbatches),
            seq_length=message_tokens(self.config) or 1,  # read only where every message has one shape
            micro_batch_size=1,
            forward_only=False,
            force_all_reduce=all_reduce,
        )


def _parts(optimizer: Any) -> list[Any]:
    """The optimizers of a chain, or the lone one."""
    return list(getattr(optimizer, "chained_optimizers", [optimizer]))


def _grads_of(optimizer: Any) -> list[Tensor]:
    """The gradients that a norm is taken of; megatron-core 0.19 has another name for it."""
    old = getattr(optimizer, "get_main_grads_for_grad_norm", None)
    return list(optimizer.get_grads_for_grad_norm() if old is None else old())


def forward_step(data: Iterator[ModelInputs | None], model: Any) -> tuple[Tensor, Any]:
    """One micro-step on one chunk, in the form that megatron-core's schedules call."""
    inputs = next(data)
    return model(inputs), partial(loss_sums, None if inputs is None else inputs.loss)


def loss_sums(loss: LossInputs | None, losses: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Token losses ``[K]`` to their sum and count; megatron-core divides the gradients once, by the count of all."""
    if loss is None:
        raise ValueError("losses are summed on the last pipeline rank, which has labels")
    loss_sum = (losses * loss.weights).sum()
    count = loss.weights.sum().to(torch.int)
    return loss_sum, count, {"loss_sum": loss_sum.detach(), "tokens": count}


def _optimizer_config(config: Config) -> OptimizerConfig:
    train = config.train
    bf16 = config.precision.dtype == "bf16"
    return OptimizerConfig(
        optimizer="adam",
        lr=train.lr,
        min_lr=0.0,
        weight_decay=train.weight_decay,
        adam_beta1=train.beta1,
        adam_beta2=train.beta2,
        adam_eps=train.eps,
        clip_grad=train.clip_grad,
        bf16=bf16,
        params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=True,
    )


def _overrides(train: TrainConfig) -> dict[ParamKey, Any]:
    """Parameter groups: no decay on vectors, an own learning rate for the patch embedding, a mark on frozen ones."""

    def marked(mark: str) -> ParamKey:
        return ParamKey(predicate=ParamPredicate(name=mark, fn=lambda p: bool(getattr(p, mark))))

    return {
        ParamKey(predicate=ParamPredicate(name="vector", fn=lambda p: p.ndim == 1)): {"wd_mult": 0.0},
        marked("elva_patch"): {"max_lr": train.lr_patch_embedding},
        marked("elva_frozen"): {"frozen": 1.0},
    }
