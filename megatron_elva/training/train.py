"""A stage from its start to its end: what it begins with, the loop, and what it leaves behind.

Run by every rank: from the launcher's job, or under torchrun on one node:

torchrun --nproc-per-node 4 -m megatron_elva.training.train stage=2 cluster=local run_dir=runs/mine
"""

from __future__ import annotations

import math
import os
import shutil
import socket
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from dali_pipelines.from_config import tokenizer_folder
from dali_pipelines.tokenizer import load_tokenizer
from megatron_elva.config.build import load, save
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.merge_schedule import describe
from megatron_elva.config.schema import Config
from megatron_elva.parallel.collectives import barrier, from_first
from megatron_elva.parallel.engine import Engine, build_chunks, layers_of
from megatron_elva.parallel.ranks import Ranks, start, stop
from megatron_elva.training import attempts, checkpoint, runs
from megatron_elva.training.data import StepReader
from megatron_elva.training.flops import CONVENTION
from megatron_elva.training.loop import Loop, Stopped
from megatron_elva.training.runs import RunLock, check_resumable
from megatron_elva.training.saver import Saver
from megatron_elva.training.stop import StopSignals
from megatron_elva.training.tracking import Tracker
from megatron_elva.training.watchdog import Watchdog

REQUEUE = 75
"""Exit code of a job that saved and is to go on later (EX_TEMPFAIL)."""
ENDED = 143
"""Exit code of a job that saved because it was told to end (128 + SIGTERM)."""
_FAILED_FLUSH_S = 5.0
"""How long a failure waits for the tracking: the job is to start again."""


def run_stages(config_paths: Sequence[str]) -> None:
    """Train the stages of the given resolved configs: what the launcher's job runs in each task."""
    run([load(path) for path in config_paths])


def run(configs: Sequence[Config]) -> None:
    """Train the given stages one after another in this process group.

    Args:
        configs: one for each stage, on the same parallel layout.

    Raises:
        SystemExit: a signal ended it and everything is saved; the code is `REQUEUE` or `ENDED`.
    """
    first = configs[0]
    with StopSignals() as signals:
        timeout = timedelta(seconds=first.fault.collective_timeout_s)
        ranks = start(first.parallel, first.device, first.seed, timeout)
        if ranks.device.type == "cpu" and ranks.world > 1:
            torch.set_num_threads(1)
        try:
            for config in configs:
                train(config, ranks, signals)
        finally:
            stop()


def train(config: Config, ranks: Ranks, signals: StopSignals) -> None:
    """Train one stage to its last step, from the run's newest complete checkpoint if there is one.

    Raises:
        SystemExit: as `run`.
    """
    folder = Path(config.run_dir)
    with ExitStack() as stack:
        if ranks.rank == 0:
            stack.callback(RunLock(folder).release)
            done = runs.checkpoints(folder)
            attempts.begin(folder, done[-1].step if done else 0)
        attempt = from_first(f"{socket.gethostname()}_{os.getpid()}_{time.time_ns()}")  # there is no other of that name
        watchdog = Watchdog(folder, ranks.rank, ranks.world, config.fault, attempt)
        stack.callback(watchdog.close)
        local = int(os.environ.get("LOCAL_RANK", "0"))
        tracker = Tracker(config, ranks.rank, local, ranks.rank // config.tasks_per_node, ranks.world)
        tracker.start()
        try:
            stopped = _train(config, ranks, signals, watchdog)
        except Exception as error:
            outcome = "refused" if isinstance(error, ConfigError | InputError) else "failed"
            tracker.finish(outcome, _FAILED_FLUSH_S)
            raise
        outcome = "done" if stopped is None else "requeue" if stopped.requeue else "stopped"
        if ranks.rank == 0:
            step = config.train.steps if stopped is None else stopped.step
            attempts.end(folder, outcome, _reason(stopped), step)
        watchdog.phase("end", config.train.steps)
        tracker.finish(outcome)
        barrier()  # the first rank that leaves with a code other than 0 may take the others along
    if stopped is not None:
        raise SystemExit(REQUEUE if stopped.requeue else ENDED)


def _reason(stopped: Stopped | None) -> str:
    if stopped is None:
        return "all steps are done"
    why = "time limit or preemption (USR2)" if stopped.requeue else "told to end (TERM)"
    after = "" if stopped.seconds is None else f", {stopped.seconds:.1f} s after the signal"
    return f"{why}; saved at step {stopped.step}{after}"


def _train(config: Config, ranks: Ranks, signals: StopSignals, watchdog: Watchdog) -> Stopped | None:
    tokenizer = load_tokenizer(tokenizer_folder(config))
    vocab = vocabulary_rows(config, len(tokenizer))
    engine = Engine(config, build_chunks(config, vocab, ranks), ranks)
    stopped = _train_engine(engine, config, ranks, signals, watchdog, tokenizer, vocab)
    engine.release()  # another stage may follow in this process
    return stopped


def _train_engine(
    engine: Engine,
    config: Config,
    ranks: Ranks,
    signals: StopSignals,
    watchdog: Watchdog,
    tokenizer: Any,
    vocab: int,
) -> Stopped | None:
    step, samples, saved = _begin(engine, config, ranks)
    own = Path(config.run_dir, "tokenizer")
    if step and own.is_dir() and load_tokenizer(str(own)).get_vocab() != tokenizer.get_vocab():
        raise ConfigError(
            f"data.tokenizer={config.data.tokenizer}: run_dir={config.run_dir} was trained with another one"
        )
    barrier()
    if ranks.rank == 0 and not (step and own.is_dir()):
        _keep_tokenizer(tokenizer, own)
    if step >= config.train.steps:
        _say(ranks, f"stage {config.stage.id}: all {config.train.steps} steps are done ({config.run_dir})")
        return None
    reader = StepReader(config, ranks, vocab, step, saved)
    saver = Saver(engine, config, vocab, ranks)
    for line in [*reader.about, *_about(config, ranks)]:
        _say(ranks, f"stage {config.stage.id}: {line}")
    try:
        loop = Loop(engine, config, ranks, reader, saver, signals, watchdog, step, samples)
        stopped = loop.train()
    finally:
        reader.close()
        saver.close(wait=False)
    if ranks.pipeline_size > 1:
        _say(ranks, f"stage {config.stage.id}: {engine.traffic.line()}")
    if stopped is not None:
        _say(ranks, f"stage {config.stage.id}: {_reason(stopped)}")
    return stopped


def _keep_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Save it beside the checkpoints, whole or not at all: a torn one would keep every later attempt from starting."""
    part = folder.with_name(f".{folder.name}.part")
    shutil.rmtree(part, ignore_errors=True)
    tokenizer.save_pretrained(str(part))
    shutil.rmtree(folder, ignore_errors=True)
    part.rename(folder)


def _about(config: Config, ranks: Ranks) -> list[str]:
    """What runs, in lines for people."""
    merging = describe(config.merging, config.model.layers, config.data.frames, 1)[0]
    return [
        f"layers={layers_of(config)} on {ranks.device}, {config.precision.name}, {ranks.world} ranks",
        f"merging: {merging}",
    ]


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
        _end(configs, "refused", str(error))
        print(f"error: {error}", file=sys.stderr)
        return 2
    except Exception as error:
        _end(configs, "failed", f"rank {os.environ.get('RANK', '0')}: {type(error).__name__}: {error}")
        raise
    return 0


def _end(configs: Sequence[Config], outcome: str, reason: str) -> None:
    """Record how the stage that was at work ended; those that are done have their end."""
    for config in configs:
        attempts.end(Path(config.run_dir), outcome, " ".join(reason.split()))


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
        if first:  # before anything is written there, also that the attempt of another job ended
            runs.check_unlocked(Path(config.run_dir))
    if first:
        for config in configs:
            save(config, Path(config.run_dir, "config.yaml"))
        print(f"operations are counted with {CONVENTION}", flush=True)
    return configs


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # megatron-core keeps its models, and so the groups' threads, to the end: one that lets go of a tensor while Python
    # is taken down aborts the process, and a run whose steps are all done would count as failed
    os._exit(code)
