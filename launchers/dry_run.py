"""What ``dry_run=true`` prints: how a run would be laid out, before anything starts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import isqrt
from pathlib import Path

from launchers import checks, slurm_script, snapshot
from launchers.executors import sbatch_script
from launchers.tokenizer import tokenizer_size
from megatron_elva.config import merge_schedule
from megatron_elva.config.schema import Config
from megatron_elva.config.validate import file_problems, notes
from megatron_elva.training import estimate


def report(configs: Sequence[Config]) -> str:
    """The layout of all stages, and the batch script where Slurm gets one."""
    coming = [config.run_dir for config in configs]
    problems = checks.problems(configs)
    blocks = [_stage(config, coming, found) for config, found in zip(configs, problems, strict=True)]
    if configs[0].cluster.kind == "slurm":
        more = " (stages 2 and 3 follow, each afterok of the one before)" if len(configs) > 1 else ""
        blocks.append(f"sbatch script{more}:\n" + _indented(sbatch_script(configs[0])))
    return "\n\n".join([*blocks, "dry run: nothing was submitted"])


def _stage(config: Config, coming: Sequence[str], problems: Sequence[str]) -> str:
    vocab = estimate.vocabulary(config.model, tokenizer_size(config.data.tokenizer or config.init_from))
    remarks = [*notes(config), *_slurm_notes(config), *file_problems(config, coming), *problems]
    if vocab is None:
        vocab = 0
        remarks.append("no tokenizer yet: parameters and memory are without the word embedding")
    memory = estimate.memory_estimate(config, vocab)
    rows = [
        ("model", ", ".join([config.model.name, f"data {config.data.name}", config.precision.name, config.device])),
        ("ranks", _ranks(config)),
        ("layers", _layers(config)),
        *([("carrier", _carrier(config))] if config.parallel.pipeline > 1 else []),
        ("parameters", _parameters(config, vocab)),
        ("memory", _memory(memory)),
        *zip(("tokens", ""), _tokens(config), strict=True),
        *zip(("merging", ""), _merging(config), strict=False),
        ("batch", _batch(config)),
        ("blend", ", ".join(f"{name} {weight:.0%}" for name, weight in _shares(config).items())),
        ("weights", f"from {config.init_from}" if config.init_from else "random"),
        ("run_dir", config.run_dir),
        *(("note", remark) for remark in remarks),
    ]
    title = f"stage {config.stage.id}: {config.stage.name} (cluster={config.cluster.kind})"
    return "\n".join([title, *(f"  {name:<11}{text}" for name, text in rows)])


def _ranks(config: Config) -> str:
    parallel = config.parallel
    sequence = ", sequence parallel" if parallel.sequence and parallel.tensor > 1 else ""
    return (
        f"{config.world_size} ranks = nodes {config.nodes} x tasks {config.tasks_per_node} = "
        f"tensor {parallel.tensor} x pipeline {parallel.pipeline} x data {config.data_parallel}{sequence}"
    )


def _layers(config: Config) -> str:
    parallel, chunks = config.parallel, config.parallel.virtual_pipeline or 1
    each = config.model.layers // parallel.pipeline
    virtual = f" in {chunks} chunks of {each // chunks}" if chunks > 1 else ""
    return f"{config.model.layers}, {each} per pipeline rank{virtual}"


def _parameters(config: Config, vocab: int) -> str:
    model = config.model
    language = estimate.language_model_parameters(model, vocab)
    patches, projector = estimate.patch_embedding_parameters(model), estimate.projector_parameters(model)
    ranks = estimate.rank_parameters(config, vocab)
    return (
        f"{language + patches + projector:,} = language model {language:,} + patch embedding {patches:,} + projector "
        f"{projector:,}; per rank {' or '.join(f'{size:,}' for size in dict.fromkeys(ranks))}"
    )


def _memory(memory: estimate.MemoryEstimate) -> str:
    parts = [(name, getattr(memory, name)) for name in ("weights", "gradients", "optimizer", "activations", "total")]
    unit, size = ("GiB", 2**30) if memory.total >= 2**30 else ("MiB", 2**20)
    text = ", ".join(f"{name} {value / size:.1f}" for name, value in parts)
    return f"{text} {unit} (estimate: fullest rank, largest pack)"


def _tokens(config: Config) -> list[str]:
    pack, frame = estimate.pack_estimate(config), estimate.frame_tokens(config)
    bound = "at most" if config.data.max_pixels else "at 336 x 336 (no bound is set)"
    samples = "" if pack.samples is None else f" of {_count(pack.samples, 'sample')}"
    packs = config.train.accumulate * config.data_parallel
    return [
        f"{frame} a frame {bound}, up to {config.data.frames} frames and {config.data.max_text_tokens} text tokens a "
        f"sample; a pack{samples} has {pack.tokens:,} at most",
        f"a step has {packs * pack.tokens:,} at most, in {_count(packs, 'pack')} (train.accumulate "
        f"{config.train.accumulate} x data {config.data_parallel})",
    ]


def _slurm_notes(config: Config) -> list[str]:
    """What a cluster's defaults may make of a job."""
    cluster, out = config.cluster, list[str]()
    if cluster.kind != "slurm":
        return out
    if cluster.cpus_per_task is None:
        out.append("cluster.cpus_per_task=null: the cluster's default, which may be one core for a rank and its "
                   f"{config.data.workers} data workers")  # fmt: skip
    if cluster.container_image is not None and Path(config.data.root).is_absolute():
        seen = slurm_script.seen_in_container(config, snapshot.ROOT)
        if not any(Path(config.data.root).is_relative_to(folder) for folder in seen):
            out.append(f"data.root={config.data.root}: in no cluster.container_mounts, so the container has not got it")
    return out


def _merging(config: Config) -> list[str]:
    """Merge points, and what they leave of the largest video."""
    return merge_schedule.describe(config.merging, config.model.layers, config.data.frames, _frame_cells(config))


def _frame_cells(config: Config) -> int:
    """Cells of the frame that `estimate.frame_tokens` counts: without FRAME, and without LINE after each row."""
    cells = (config.data.max_pixels or estimate.ASSUMED_PIXELS) // config.model.cell_pixels**2
    return estimate.frame_tokens(config) - 1 - max(1, isqrt(cells))


def _carrier(config: Config) -> str:
    parallel = config.parallel
    if parallel.carrier == "rows":
        return "rows: messages between pipeline ranks are as long as their packs, lengths are exchanged first"
    from megatron_elva.parallel.carrier import message_tokens  # loads torch, which takes seconds

    free = replace(config, parallel=replace(parallel, carrier_tokens=None))
    length, largest = message_tokens(config) or 0, message_tokens(free) or 0
    source = "the largest pack" if parallel.carrier_tokens is None else "parallel.carrier_tokens"
    if length < largest:
        source += f"; the largest pack may need {largest:,}"
    split = f" over {config.sequence_shards} tensor ranks" if config.sequence_shards > 1 else ""
    return f"fixed: every message between pipeline ranks has {length:,} tokens{split} ({source})"


def _count(number: int, unit: str) -> str:
    return f"{number:,} {unit}{'' if number == 1 else 's'}"


def _batch(config: Config) -> str:
    train, unit = config.train, "sample" if config.data.pack_tokens is None else "pack"
    return (
        f"{_count(train.global_batch, unit)} a step in {_count(train.accumulate, 'micro-step')}; "
        f"{_count(train.steps, 'step')} = {_count(train.steps * train.global_batch, unit)}"
    )


def _shares(config: Config) -> dict[str, float]:
    total = sum(config.stage.blend.values())
    return {name: weight / total for name, weight in config.stage.blend.items()}


def _indented(text: str) -> str:
    return "\n".join(f"  {line}".rstrip() for line in text.strip().splitlines())
