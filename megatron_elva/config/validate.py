"""What the schema's types cannot say: sizes that divide, ranges, choices. Every refusal is one line."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version

from dali_pipelines.options import VisionOptions
from megatron_elva.config.errors import ConfigError, did_you_mean
from megatron_elva.config.files import check_files, file_problems
from megatron_elva.config.merge_schedule import layer_of
from megatron_elva.config.schema import Config, MergePoint
from megatron_elva.config.values import check_choices, check_ranges, divides, refuse, shown

__all__ = ["RULES", "check_files", "check_merging", "file_problems", "notes", "validate", "validate_all"]

_TASKS = ("caption", "conversation", "text")
_LOSSES = ("gen", "mse", "con")
_RULES = ("threshold", "budget")
_SAFE_RELEASE = (0, 19)
"""Release of megatron-core from which on an overlapped exchange may free the outputs that it sends."""


def validate(config: Config) -> None:
    """Refuse a config that cannot run.

    Raises:
        ConfigError: one line with the key, its value, and what is allowed.
    """
    for rule in RULES:
        rule(config)


def validate_all(configs: Sequence[Config]) -> None:
    """Refuse stages of one submission that cannot run, alone or together.

    Raises:
        ConfigError: one line; with several stages it begins with the stage.
    """
    for config in configs:
        try:
            validate(config)
        except ConfigError as error:
            raise ConfigError(f"stage {config.stage.id}: {error}" if len(configs) > 1 else str(error)) from error
    first = configs[0]
    for config in configs[1:]:
        shape = (config.world_size, config.device)
        if config.cluster.kind != "slurm" and shape != (first.world_size, first.device):
            raise ConfigError(
                f"stage_{config.stage.id}: {config.world_size} ranks on {config.device} after {first.world_size} on "
                f"{first.device}; with cluster={config.cluster.kind} all stages run in the same processes"
            )


def notes(config: Config) -> list[str]:
    """What runs, but not as its reader may think."""
    out = []
    if config.parallel.sequence and config.parallel.tensor == 1:
        out.append("parallel.sequence=true: no effect with parallel.tensor=1")
    if config.parallel.carrier == "fixed" and config.parallel.pipeline == 1:
        out.append("parallel.carrier=fixed: no effect with parallel.pipeline=1")
    if config.parallel.pipeline > 1 and config.train.accumulate < config.parallel.pipeline:
        out.append(
            f"train.accumulate={config.train.accumulate}: fewer micro-steps than parallel.pipeline="
            f"{config.parallel.pipeline}, so that some ranks always wait"
        )
    if config.precision.fp8 == "delayed" and config.train.recompute:
        out.append(
            "train.recompute=true: with precision.fp8=delayed scales are taken anew for each layer that is computed "
            "again, which looks back less far and costs time; precision=fp8_current has no such history"
        )
    fault = config.fault
    if fault.start_timeout_s is not None and fault.start_timeout_s >= fault.collective_timeout_s:
        out.append(
            f"fault.start_timeout_s={fault.start_timeout_s:g}: above fault.collective_timeout_s="
            f"{fault.collective_timeout_s:g}, which ends a hang before the first step, or in a checkpoint, unexplained"
        )
    return out


def _model_sizes(config: Config) -> None:
    divides(config, "model.hidden", "model.heads")
    divides(config, "model.heads", "model.kv_heads")
    divides(config, "model.patch_width", "model.patch_heads")
    if config.model.head_dim % 2:
        refuse(config, "model.heads", f"gives head width {config.model.head_dim}; rotary positions need an even one")


def _tensor_split(config: Config) -> None:
    for key in ("model.heads", "model.kv_heads", "model.ffn_hidden"):
        divides(config, key, "parallel.tensor")
    if config.model.vocab_size is not None:
        divides(config, "model.vocab_size", "parallel.tensor")
    elif 64 % config.parallel.tensor:
        refuse(config, "parallel.tensor", "must divide 64 with model.vocab_size=null (rows in multiples of 64)")


def _pipeline_split(config: Config) -> None:
    parallel = config.parallel
    chunks = parallel.pipeline * (parallel.virtual_pipeline or 1)
    if config.model.layers % chunks:
        virtual = f" x parallel.virtual_pipeline={parallel.virtual_pipeline}" if parallel.virtual_pipeline else ""
        refuse(config, "model.layers", f"must be divisible by parallel.pipeline={parallel.pipeline}{virtual}")
    if parallel.interleaved:
        if parallel.pipeline == 1:
            refuse(config, "parallel.virtual_pipeline", "needs parallel.pipeline above 1; or null")
        divides(config, "train.accumulate", "parallel.pipeline")


def _exchange(config: Config) -> None:
    """How hidden states go from one pipeline rank to the next."""
    parallel = config.parallel
    if parallel.carrier_tokens is not None and parallel.carrier != "fixed":
        refuse(config, "parallel.carrier_tokens", "must be null with parallel.carrier=rows; or parallel.carrier=fixed")
    if parallel.overlap_p2p and not parallel.interleaved:
        why = "needs parallel.virtual_pipeline above 1: megatron-core overlaps only the interleaved schedule; or null"
        refuse(config, "parallel.overlap_p2p", why)
    if parallel.interleaved and not parallel.overlaps_p2p:
        # on 2 pipeline ranks previous and next are the same one, and without the overlap its messages of the forward
        # and the backward pass are taken for each other, silently; on 4 the exchange hung (megatron-core 0.16.1, gloo)
        why = "megatron-core mixes up messages or hangs when it interleaves without overlap; must be null or true"
        refuse(config, "parallel.overlap_p2p", why)
    if parallel.deallocates_outputs and parallel.overlaps_p2p and _core_release() < _SAFE_RELEASE:
        # 0.16.1 corrupted 2 of 8 runs, one of them silently; 0.19.2 none of 4
        why = f"with overlapped exchange megatron-core {_core_version()} corrupts data; null or false, or 0.19 or later"
        refuse(config, "parallel.deallocate_outputs", why)


def _core_version() -> str:
    """The version of megatron-core that is installed; 0 where there is none."""
    try:
        return version("megatron-core")
    except PackageNotFoundError:
        return "0"


def _core_release() -> tuple[int, ...]:
    """Major and minor number of `_core_version`."""
    return tuple(int(number) for number in re.findall(r"\d+", _core_version())[:2])


def _ranks(config: Config) -> None:
    parallel, kind = config.parallel, config.cluster.kind
    if kind == "local" and config.nodes != 1:
        refuse(config, "nodes", "cluster=local runs on one machine: nodes=1")
    if kind == "debug" and config.world_size != 1:
        refuse(config, "tasks_per_node", "cluster=debug runs one rank: nodes=1 tasks_per_node=1")
    if config.world_size % (parallel.tensor * parallel.pipeline):
        refuse(
            config,
            "tasks_per_node",
            f"with nodes={config.nodes} these are {config.world_size} ranks, not divisible by "
            f"parallel.tensor={parallel.tensor} x parallel.pipeline={parallel.pipeline}",
        )


def _batch(config: Config) -> None:
    train, copies = config.train, config.data_parallel
    divides(config, "train.global_batch", "train.accumulate")
    share = train.global_batch // train.accumulate
    if share % copies:
        refuse(
            config,
            "train.global_batch",
            f"with train.accumulate={train.accumulate} a micro-step has {share} samples, not divisible by the "
            f"{copies} model copies (ranks / (tensor x pipeline))",
        )
    if config.data.pack_tokens is not None and share != copies:
        refuse(
            config,
            "train.global_batch",
            f"counts packs where data.pack_tokens is set, one a micro-step and model copy: must be "
            f"{train.accumulate * copies} (train.accumulate={train.accumulate} x {copies} copies)",
        )
    if train.warmup_steps > train.steps:
        refuse(config, "train.warmup_steps", f"must be at most train.steps={train.steps}")


def _data(config: Config) -> None:
    VisionOptions.from_config(config.data, config.model)  # refuses what cannot be used, and names its key
    budget, text = config.data.pack_tokens, config.data.pack_text_tokens
    if text is not None and (budget is None or text >= budget):
        refuse(config, "data.pack_text_tokens", f"a part of data.pack_tokens={budget}; must be smaller, or null")


def _device(config: Config) -> None:
    if config.device == "cpu" and config.layers == "te":
        refuse(config, "layers", "Transformer Engine needs device=cuda; or layers=local")
    if config.precision.fp8 is not None:
        if config.device != "cuda":
            refuse(config, "precision.fp8", "needs device=cuda; or precision=bf16")
        if config.layers == "local":
            refuse(config, "precision.fp8", "needs Transformer Engine: layers=te or auto")
        if config.precision.dtype != "bf16":
            refuse(config, "precision.dtype", "must be bf16 with precision.fp8")
        _fp8_sizes(config)
    if config.layers == "te" and config.model.attention_mask != "causal":
        refuse(config, "model.attention_mask", "must be causal with layers=te; or layers=local")


def _fp8_sizes(config: Config) -> None:
    """FP8 products are over multiples of 16 in every dimension; the tokens are padded to one."""
    model, tensor = config.model, config.parallel.tensor
    widths = {
        "model.hidden": model.hidden,
        "model.ffn_hidden": model.ffn_hidden // tensor,
        "model.heads": model.heads * model.head_dim // tensor,
        "model.kv_heads": (model.heads + 2 * model.kv_heads) * model.head_dim // tensor,
    }
    for key, width in widths.items():
        if width % 16:
            why = f"gives products of width {width} a tensor rank; FP8 needs a multiple of 16, or precision=bf16"
            refuse(config, key, why)


def _sources(config: Config) -> None:
    for name, source in config.data.sources.items():
        if source.task not in _TASKS:
            hint = did_you_mean(source.task, _TASKS)
            raise ConfigError(f"data.sources.{name}.task={source.task}: allowed: {', '.join(_TASKS)}{hint}")
        if not source.shards:
            raise ConfigError(f"data.sources.{name}.shards=[]: needs at least one path or glob")
    if not config.stage.blend:
        refuse(config, "stage.blend", "needs at least one source with a weight above 0")
    for name, weight in config.stage.blend.items():
        if name not in config.data.sources:
            known = ", ".join(config.data.sources)
            raise ConfigError(
                f"stage.blend.{name}={weight}: no such source in data={config.data.name}; it has {known} "
                f"(stage.blend.{name}=0 takes it out)"
            )
        if weight <= 0:
            raise ConfigError(f"stage.blend.{name}={weight}: a weight must be above 0")


def _losses(config: Config) -> None:
    for loss in config.stage.losses:
        if loss not in _LOSSES:
            refuse(config, "stage.losses", f"allowed: {', '.join(_LOSSES)}{did_you_mean(loss, _LOSSES)}")
    if config.stage.losses != ["gen"]:
        refuse(config, "stage.losses", "guidance is not built yet: stage.losses=[gen]")


def check_merging(config: Config) -> None:
    """Refuse merge schedules that cannot be carried out, or of which a part would be ignored."""
    merging = config.merging
    if merging.kind == "pooling" and merging.pooling.window < 2:
        refuse(config, "merging.pooling.window", "must be at least 2 with merging.kind=pooling; or merging=none")
    if config.debug.dump_merge_index and merging.kind != "hierarchical":
        refuse(config, "debug.dump_merge_index", f"needs merging.kind=hierarchical; it is {merging.kind}")
    if merging.kind != "hierarchical":
        if merging.points:
            number = len(merging.points)
            refuse(
                config,
                "merging.kind",
                f"must be hierarchical with merging.points ({number} given); or merging.points=[]",
            )
        return
    if not merging.points:
        refuse(config, "merging.points", "merging.kind=hierarchical needs at least one point")
    if config.model.layers < 2:
        refuse(config, "model.layers", "must be at least 2 with merging.kind=hierarchical; or merging=none")
    for i, point in enumerate(merging.points):
        why = _point_problem(point, config.model.layers) or _order_problem(merging.points[:i], point, config)
        if why:
            raise ConfigError(f"merging.points[{i}].{why}")


def _point_problem(point: MergePoint, layers: int) -> str:
    """What is wrong with a merge point by itself, or an empty text."""
    if point.rule not in _RULES:
        return f"rule={point.rule}: allowed: {', '.join(_RULES)}{did_you_mean(point.rule, _RULES)}"
    layer = layer_of(point.after, layers)
    share = 0 < point.after < 1
    if not (share or (point.after >= 1 and point.after.is_integer())) or layer >= layers:
        rounded = f" (layer {layer})" if share else ""
        allowed = f"a layer from 1 to {layers - 1}, or a share of the depth between 0 and 1 that rounds to one of these"
        return f"after={point.after:g}{rounded}: must be {allowed}"
    if point.rule == "threshold":
        if point.tau is None or not -1 <= point.tau <= 1:
            return f"tau={shown(point.tau)}: must be a similarity from -1 to 1"
        return "" if point.keep is None else f"keep={shown(point.keep)}: must be left out with rule=threshold"
    if point.keep is None or not 0 < point.keep <= 1:
        return f"keep={shown(point.keep)}: must be a share above 0 and up to 1"
    return "" if point.tau is None else f"tau={shown(point.tau)}: must be left out with rule=budget"


def _order_problem(earlier: Sequence[MergePoint], point: MergePoint, config: Config) -> str:
    """What is wrong with a merge point behind those before it, or an empty text."""
    layers = config.model.layers
    before = max((layer_of(other.after, layers) for other in earlier), default=1)
    if (layer := layer_of(point.after, layers)) < before:
        return f"after={point.after:g} (layer {layer}): must be layer {before} or later, as the point before it"
    least = min((other.keep for other in earlier if other.keep is not None), default=1.0)
    if point.keep is not None and point.keep > least:
        return f"keep={shown(point.keep)}: must be at most the {least:g} of an earlier point; merged tokens stay merged"
    return ""


def _faults(config: Config) -> None:
    """Limits that would cancel each other."""
    fault, cluster = config.fault, config.cluster
    if fault.step_timeout_s is not None and fault.step_timeout_s >= fault.collective_timeout_s:
        why = f"must be below fault.collective_timeout_s={fault.collective_timeout_s:g}, which ends a hang unexplained"
        refuse(config, "fault.step_timeout_s", why)
    if cluster.kind == "slurm" and cluster.requeue and cluster.signal_s >= 60 * cluster.time_min:
        why = f"must be below cluster.time_min={cluster.time_min} (minutes), or the job would only ever save"
        refuse(config, "cluster.signal_s", why)
    if config.tracking.answers_every % config.train.checkpoint_every:
        why = f"must be a multiple of train.checkpoint_every={config.train.checkpoint_every}: a checkpoint is asked"
        refuse(config, "tracking.answers_every", why)


def _not_built(config: Config) -> None:
    if config.model.positions != "1d":
        refuse(config, "model.positions", "not built yet: model.positions=1d")


RULES: tuple[Callable[[Config], None], ...] = (
    check_choices,
    check_ranges,
    _model_sizes,
    _tensor_split,
    _pipeline_split,
    _exchange,
    _ranks,
    _batch,
    _data,
    _device,
    _sources,
    _losses,
    check_merging,
    _faults,
    _not_built,
)
"""All rules in the order in which they are checked; a later one may rely on the earlier."""
