"""The training loop.

Run by every rank: from the launcher's job, or under torchrun on one node:

torchrun --nproc-per-node 4 -m megatron_elva.training.train stage=2 cluster=local run_dir=runs/mine
"""

from __future__ import annotations

import math
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dali_pipelines.from_config import tokenizer_folder
from dali_pipelines.report import BadQuota
from dali_pipelines.tokenizer import load_tokenizer
from megatron_elva.config.build import load, save
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.merge_schedule import describe
from megatron_elva.config.schema import Config, ModelConfig
from megatron_elva.layout import Pack
from megatron_elva.model.inputs import ModelInputs, prepare
from megatron_elva.parallel.collectives import barrier, sum_over_ranks
from megatron_elva.parallel.engine import Engine, StepResult, build_chunks
from megatron_elva.parallel.ranks import Ranks, start, stop
from megatron_elva.training import checkpoint
from megatron_elva.training.data import StepCounts, StepReader
from megatron_elva.training.flops import CONVENTION, layer_groups_flops, peak_tflops
from megatron_elva.training.merge_dump import dump_merge_index
from megatron_elva.training.metrics import MetricsWriter, StepMetrics, progress_line
from megatron_elva.training.runs import METRICS, RunLock, check_resumable
from megatron_elva.training.schedule import is_frozen, learning_rate_share

EMPTY_STEPS = 100
"""Steps in a row without one usable sample that end a run."""


def run_stages(config_paths: Sequence[str]) -> None:
    """Train the stages of the given resolved configs: what the launcher's job runs in each task."""
    run([load(path) for path in config_paths])


def run(configs: Sequence[Config]) -> None:
    """Train the given stages one after another in this process group.

    Args:
        configs: one for each stage, on the same parallel layout.
    """
    first = configs[0]
    ranks = start(first.parallel, first.device, first.seed)
    if ranks.device.type == "cpu" and ranks.world > 1:
        torch.set_num_threads(1)
    try:
        for config in configs:
            train(config, ranks)
    finally:
        stop()


def train(config: Config, ranks: Ranks) -> None:
    """Train one stage to its last step, from the run's newest complete checkpoint if there is one."""
    lock = RunLock(Path(config.run_dir)) if ranks.rank == 0 else None
    try:
        _train(config, ranks)
    finally:
        if lock is not None:
            lock.release()


def _train(config: Config, ranks: Ranks) -> None:
    tokenizer = load_tokenizer(tokenizer_folder(config))
    vocab = vocabulary_rows(config, len(tokenizer))
    engine = Engine(config, build_chunks(config, vocab, ranks), ranks)
    step, samples, saved = _begin(engine, config, ranks)
    own = Path(config.run_dir, "tokenizer")
    if step and own.is_dir() and load_tokenizer(str(own)).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer}: run_dir={config.run_dir} was trained with another one"
        )
    barrier()
    if ranks.rank == 0:
        tokenizer.save_pretrained(str(Path(config.run_dir, "tokenizer")))
    if step >= config.train.steps:
        _say(ranks, f"stage {config.stage.id}: all {config.train.steps} steps are done ({config.run_dir})")
        return
    reader = StepReader(config, ranks, vocab, step, saved)
    for line in reader.about:
        _say(ranks, f"stage {config.stage.id}: {line}")
    _say(
        ranks, f"stage {config.stage.id}: layers=local on {ranks.device}, {config.precision.name}, {ranks.world} ranks"
    )
    _say(
        ranks,
        f"stage {config.stage.id}: merging: {describe(config.merging, config.model.layers, config.data.frames, 1)[0]}",
    )
    try:
        _loop(engine, config, ranks, reader, vocab, step, samples)
    finally:
        reader.close()
    if ranks.pipeline_size > 1:
        _say(ranks, f"stage {config.stage.id}: {engine.traffic.line()}")


def _begin(engine: Engine, config: Config, ranks: Ranks) -> tuple[int, int, dict[str, Any] | None]:
    """Resume, or take the starting weights. Returns the steps done, the samples drawn and the data's own state."""
    resumed = checkpoint.resume(engine, config)
    if resumed is not None:
        _say(ranks, f"stage {config.stage.id}: resumed from {resumed.path}")
        if resumed.meta.get("merging", asdict(config.merging)) != asdict(config.merging):
            _say(ranks, f"stage {config.stage.id}: note: up to step {resumed.step} this run merged in another way")
        changed = [k for k, v in checkpoint.order_of(config).items() if resumed.meta.get("order", {}).get(k, v) != v]
        if changed:
            _say(
                ranks,
                f"stage {config.stage.id}: note: {' and '.join(changed)} changed at step {resumed.step}; samples now "
                "come in another order, some of them again",
            )
        return resumed.step, int(resumed.meta["samples"]), checkpoint.data_state(resumed.path)
    if config.init_from is not None:
        line = checkpoint.initialise_from(engine, config.init_from, config, ranks)
        _say(ranks, f"stage {config.stage.id}: {line}")
    return 0, 0, None


def _loop(
    engine: Engine, config: Config, ranks: Ranks, reader: StepReader, vocab: int, step: int, samples: int
) -> None:
    train_config = config.train
    empty = 0
    quota = BadQuota(config.data.max_bad_share)
    if config.debug.dump_merge_index:
        engine.keep_merge_states()
    with MetricsWriter(Path(config.run_dir, METRICS) if ranks.rank == 0 else Path("/dev/null")) as writer:
        while step < train_config.steps:
            began = time.perf_counter()
            packs, counts, waited = reader.next_step(step + 1)
            share = learning_rate_share(step, train_config)
            engine.set_learning_rate(share, is_frozen(step, config.stage, train_config))
            result = engine.train_step([_inputs(pack, config, ranks) for pack in packs])
            totals = _totals(result, counts, waited, config.model, ranks)
            if config.debug.dump_merge_index:
                dump_merge_index(engine, packs, Path(config.run_dir, "merge_index", f"step_{step + 1}.npz"))
            empty = 0 if totals["loss_tokens"] else empty + 1
            if empty == EMPTY_STEPS:
                raise InputError(
                    f"{empty} steps in a row without a usable sample; {config.run_dir}/logs/skipped_*.jsonl says why"
                )
            bad = int(totals["skipped"] - totals["listed"])
            quota.count(int(totals["samples"]), bad, f"{config.run_dir}/logs/skipped_*.jsonl")
            step += 1
            samples += int(totals["samples"])
            seconds = time.perf_counter() - began
            metrics = _metrics(config, ranks, totals, result.grad_norm, step, samples, share, seconds)
            writer.write(metrics)
            if step % train_config.log_every == 0 or step == train_config.steps:
                _say(ranks, progress_line(metrics, train_config.steps))
            if step % train_config.checkpoint_every == 0 or step == train_config.steps:
                path, took = checkpoint.save(engine, config, vocab, step, samples, reader.state, ranks.data)
                _say(ranks, f"stage {config.stage.id}  saved {path} in {took:.1f} s")
    barrier()


def _inputs(pack: Pack | None, config: Config, ranks: Ranks) -> ModelInputs | None:
    return None if pack is None else prepare(pack, config, ranks.device, first=ranks.is_first, last=ranks.is_last)


def _totals(
    result: StepResult, counts: StepCounts, waited: float, model: ModelConfig, ranks: Ranks
) -> dict[str, float]:
    """Sums over all ranks in one collective; the wait for data is the mean over the replicas' readers."""
    layers = 3 * layer_groups_flops(model, result.layers) if ranks.tensor == 0 else 0.0
    values = {
        "loss_sum": result.loss_sum,
        "loss_tokens": result.loss_tokens,
        "samples": counts.samples,
        "skipped": counts.skipped,
        "tokens": counts.tokens,
        "visual": counts.visual_tokens,
        "visual_left": result.visual_tokens,
        "flops": counts.flops + layers,
        "packs": counts.packs,
        "listed": counts.listed,
        "wait": waited / ranks.data_size if ranks.is_reader else 0.0,
    }
    return dict(zip(values, sum_over_ranks(list(values.values()), ranks), strict=True))


def _metrics(
    config: Config,
    ranks: Ranks,
    totals: dict[str, float],
    grad_norm: float,
    step: int,
    samples: int,
    share: float,
    seconds: float,
) -> StepMetrics:
    loss = totals["loss_sum"] / totals["loss_tokens"] if totals["loss_tokens"] else math.nan
    tflops = totals["flops"] / seconds / ranks.world / 1e12
    name = torch.cuda.get_device_name() if ranks.device.type == "cuda" else "cpu"
    peak = peak_tflops(name, config.precision.fp8 is not None)
    return StepMetrics(
        step=step,
        stage=config.stage.id,
        samples=samples,
        loss=loss,
        loss_gen=loss,
        loss_mse=None,
        loss_con=None,
        grad_norm=grad_norm,
        lr=share * config.train.lr,
        visual_tokens_in=int(totals["visual"]),
        visual_tokens_out=int(totals["visual_left"]),
        tokens_per_s=totals["tokens"] / seconds,
        tflops_per_gpu=tflops,
        mfu=None if peak is None else tflops / peak,
        data_wait_s=totals["wait"],
        step_s=seconds,
        skipped_samples=int(totals["skipped"]),
        pack_fill=totals["tokens"] / (budget * totals["packs"]) if (budget := config.data.pack_tokens) else None,
    )


def vocabulary_rows(config: Config, tokens: int) -> int:
    """Rows of the word embedding: the config's, or the tokenizer's size rounded up to whole shards of 64.

    Raises:
        ConfigError: the tokenizer has more tokens than the config gives rows.
    """
    if config.model.vocab_size is None:
        multiple = math.lcm(64, config.parallel.tensor)  # the same at every layout with up to 64 tensor ranks
        return -(-tokens // multiple) * multiple
    if tokens > config.model.vocab_size:
        raise ConfigError(
            f"model.vocab_size={config.model.vocab_size}: the tokenizer has {tokens} tokens; "
            f"allowed: at least {tokens}, or null"
        )
    return config.model.vocab_size


def _say(ranks: Ranks, line: str) -> None:
    if ranks.rank == 0:
        print(line, flush=True)


def main(overrides: list[str]) -> int:
    """Train from Hydra overrides under torchrun (or alone). Returns the exit code."""
    first = os.environ.get("RANK", "0") == "0"
    try:
        configs = _prepare(overrides, first)
    except (ConfigError, InputError) as error:
        if first:  # every rank finds the same
            print(f"error: {error}", file=sys.stderr)
        return 2
    try:
        run(configs)
    except (ConfigError, InputError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


def _prepare(overrides: list[str], first: bool) -> list[Config]:
    """Check everything that can be checked before ranks meet; the first rank writes the configs."""
    from megatron_elva.config.compose import compose_all
    from megatron_elva.config.validate import check_files, validate_all

    configs = compose_all(overrides)
    validate_all(configs)
    if configs[0].dry_run:
        raise ConfigError(
            "dry_run=true: it belongs to launchers/submit.py, which prints the layout of the same overrides"
        )
    if int(os.environ.get("WORLD_SIZE", "1")) > 1 and not any(o.startswith("run_dir=") for o in overrides):
        raise ConfigError("run_dir: under torchrun give one, so that all ranks agree on it: run_dir=runs/NAME")
    for config in configs:
        check_files(config, [c.run_dir for c in configs])
        check_resumable(config)
    if first:
        for config in configs:
            save(config, Path(config.run_dir, "config.yaml"))
        print(f"operations are counted with {CONVENTION}", flush=True)
    return configs


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
