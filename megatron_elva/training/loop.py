"""The loop over the steps of a stage, with what happens beside them: metrics, checkpoints, signals, watching."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from pathlib import Path

import torch

from dali_pipelines.report import BadQuota
from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config
from megatron_elva.layout import Pack
from megatron_elva.model.inputs import ModelInputs, prepare
from megatron_elva.parallel.collectives import barrier, sum_over_ranks
from megatron_elva.parallel.engine import Engine, StepResult
from megatron_elva.parallel.ranks import Ranks
from megatron_elva.training import recovery, stragglers
from megatron_elva.training.data import StepReader
from megatron_elva.training.merge_dump import dump_merge_index
from megatron_elva.training.metrics import MetricsWriter, progress_line
from megatron_elva.training.nonfinite import Nonfinite
from megatron_elva.training.runs import METRICS
from megatron_elva.training.saver import Saver, SaveReport
from megatron_elva.training.schedule import is_frozen, learning_rate_share
from megatron_elva.training.stop import StopSignals
from megatron_elva.training.throughput import StepClock, collect, step_metrics, write_meta
from megatron_elva.training.watchdog import Watchdog

EMPTY_STEPS = 100
"""Steps in a row without one usable sample that end a run."""


@dataclass(frozen=True)
class Stopped:
    """Training was asked to leave off; all ranks saved behind the same step.

    Attributes:
        requeue: by the time limit or a preemption, so that the job is to go on later; else it is to end.
        step: steps done.
        seconds: from the signal to the complete checkpoint; None on a rank that had no signal itself.
    """

    requeue: bool
    step: int
    seconds: float | None


@dataclass
class Loop:
    """Trains one stage.

    Attributes:
        engine: what is trained.
        config: the stage's config.
        ranks: this rank.
        reader: gives the packs.
        saver: writes the checkpoints.
        stop: signals that this process got.
        watchdog: knows when a step hangs.
        step: steps done.
        samples: samples drawn.
    """

    engine: Engine
    config: Config
    ranks: Ranks
    reader: StepReader
    saver: Saver
    stop: StopSignals
    watchdog: Watchdog
    step: int
    samples: int
    empty: int = 0
    clock: StepClock = field(default_factory=StepClock)

    def __post_init__(self) -> None:
        config = self.config
        self.run = Path(config.run_dir)
        self.quota = BadQuota(config.data.max_bad_share)
        self.nonfinite = Nonfinite(config, self.ranks)
        self.device = torch.cuda.get_device_name() if self.ranks.device.type == "cuda" else "cpu"
        self.compared_at, self.compared_step = time.perf_counter(), self.step
        if config.debug.dump_merge_index:
            self.engine.keep_merge_states()

    def train(self) -> Stopped | None:
        """Train to the last step.

        Returns:
            None when all steps are done, else how a signal ended it.

        Raises:
            InputError: the data gives no more usable samples, the disk is full, or a step is not finite where the
                config stops at that.
        """
        broken = recovery.Break.of(self.run) if self.ranks.rank == 0 else None
        stopped = None
        path = self.run / METRICS if self.ranks.rank == 0 else Path("/dev/null")
        with MetricsWriter(path) as writer:
            if self.ranks.rank == 0:
                write_meta(self.run, self.config, self.ranks.world, self.device, self.step)
            self.clock.begin()
            self.watchdog.own_seconds()  # what came before the first step is not compared
            while self.step < self.config.train.steps and stopped is None:
                stopped = self._step(writer)
                if broken is not None:
                    self.say(broken.ended(self.run, self.step))
                    broken = None
        self.watchdog.phase("checkpoint", self.step)
        self._saved(self.saver.close(wait=True))
        while (report := self.saver.settle(0, 0)) is not None:
            self._saved(report)
        barrier()
        return stopped

    def _step(self, writer: MetricsWriter) -> Stopped | None:
        """One step and what follows it; every decision is the same on all ranks, from one sum over them."""
        config, step, clock = self.config, self.step, self.clock
        self.watchdog.phase("data", step + 1)
        with clock.part("data"):
            packs, counts = self.reader.next_step(step + 1)
        share = learning_rate_share(step, config.train)
        self.engine.set_learning_rate(share, is_frozen(step, config.stage, config.train))
        self.watchdog.phase("step", step + 1)
        with clock.part("compute"):
            result = self.engine.train_step([self._inputs(pack) for pack in packs])
            self.watchdog.phase("sums", step + 1)
            totals = self._sums(collect(result, counts, clock.spent("data"), config, self.ranks))
        if config.debug.dump_merge_index:
            dump_merge_index(self.engine, packs, self.run / "merge_index" / f"step_{step + 1}.npz")
        self.step += 1
        self.samples += int(totals["samples"])
        try:
            self._judge(result, packs, totals)
        except InputError:
            self._saved(self.saver.close(wait=True))  # all ranks found the same, and a save may be under way
            raise
        world, norm = self.ranks.world, result.grad_norm
        metrics = step_metrics(config, world, self.device, totals, clock.end(), self.step, self.samples, share, norm)
        writer.write(metrics)
        if self.step % config.train.log_every == 0 or self.step == config.train.steps:
            self.say(progress_line(metrics, config.train.steps, writer.pace_s))
        self._compare()
        stopping = totals["requeue"] + totals["end"] > 0 and self.step < config.train.steps
        with clock.part("checkpoint"):  # counts in the next line
            self._save(totals, stopping)
        if not stopping:
            return None
        since = self.stop.since
        return Stopped(totals["requeue"] > 0, self.step, None if since is None else time.monotonic() - since)

    def _sums(self, own: dict[str, float]) -> dict[str, float]:
        """Sum a step's numbers over all ranks in one collective; signals and the state of a save travel along."""
        writing, failed = self.saver.progress()
        own |= {"requeue": self.stop.requeue, "end": self.stop.end, "writing": writing, "save_failed": failed}
        return dict(zip(own, sum_over_ranks(list(own.values()), self.ranks), strict=True))

    def _judge(self, result: StepResult, packs: list[Pack | None], totals: dict[str, float]) -> None:
        """End the run where going on makes no sense."""
        logs = f"{self.run}/logs/skipped_*.jsonl"
        self.nonfinite.check(self.step, result, packs, result.grad_norm)
        self.empty = 0 if totals["loss_tokens"] else self.empty + 1
        if self.empty == EMPTY_STEPS:
            raise InputError(f"{self.empty} steps in a row without a usable sample; {logs} says why")
        self.quota.count(int(totals["samples"]), int(totals["skipped"] - totals["listed"]), logs)

    def _save(self, totals: dict[str, float], stopping: bool) -> None:
        """Complete the checkpoint that was being written, and begin one where it is due."""
        train = self.config.train
        if self.saver.is_pending:
            self.watchdog.phase("checkpoint", self.step)  # a slow disk is not the step's fault
        self._saved(self.saver.settle(totals["writing"], totals["save_failed"]))
        last = stopping or self.step == train.steps
        if last or self.step % train.checkpoint_every == 0:
            self.watchdog.phase("checkpoint", self.step)
            self.saver.save(self.step, self.samples, self.reader.state, wait=last)

    def _saved(self, report: SaveReport | None) -> None:
        if report is not None:
            self.say(f"saved {report.path} in {report.seconds:.1f} s, training waited {report.held_s:.2f} s")

    def _compare(self) -> None:
        """Name the rank that the others wait for."""
        every = self.config.fault.straggler_every
        if not every or self.step % every or self.ranks.world == 1:
            return
        steps, now = self.step - self.compared_step, time.perf_counter()
        wall, self.compared_at, self.compared_step = (now - self.compared_at) / steps, now, self.step
        ratio = self.config.fault.straggler_ratio
        own = self.watchdog.own_seconds() / steps
        line = stragglers.compare(own, wall, self.ranks, self.run, self.step, ratio, steps)
        if line is not None:
            self.say(line)

    def _inputs(self, pack: Pack | None) -> ModelInputs | None:
        ranks = self.ranks
        return None if pack is None else prepare(pack, self.config, ranks.device, ranks.is_first, ranks.is_last)

    def say(self, line: str) -> None:
        """Print a line on the first rank."""
        if self.ranks.rank == 0:
            begins = f"stage {self.config.stage.id}"
            print(line if line.startswith(begins) else f"{begins}  {line}", flush=True)
