"""The packs of each step on every rank: read by one rank of the replica, shared with the others."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from dali_pipelines.loader import PackLoader, build_dataset
from megatron_elva.config.schema import Config
from megatron_elva.layout import IGNORE, Pack
from megatron_elva.model.inputs import pooling_window
from megatron_elva.parallel.ranks import Ranks
from megatron_elva.parallel.share import share_packs
from megatron_elva.training.flops import ends_flops


@dataclass(frozen=True)
class StepCounts:
    """What one replica's packs of a step hold; only the reading rank counts, so that a sum over ranks is right.

    `flops` are those outside the decoder layers.
    """

    samples: int = 0
    skipped: int = 0
    tokens: int = 0
    visual_tokens: int = 0
    flops: float = 0.0


def count(packs: Sequence[Pack], config: Config, vocab: int) -> StepCounts:
    """Count a replica's packs."""
    return StepCounts(
        samples=sum(p.samples for p in packs),
        skipped=sum(len(p.skipped) for p in packs),
        tokens=sum(p.spec.tokens - p.spec.padding for p in packs),
        visual_tokens=sum(v.tokens for p in packs for v in p.spec.videos),
        flops=sum(3 * _ends_flops(p, config, vocab) for p in packs),
    )


def _ends_flops(pack: Pack, config: Config, vocab: int) -> float:
    spec = pack.spec.pooled(pooling_window(config.merging))
    return ends_flops(config.model, vocab, spec, int((pack.labels != IGNORE).sum()))


class StepReader:
    """Gives every rank the packs of the next step.

    Args:
        config: the stage's config.
        ranks: this rank.
        vocab: rows of the word embedding, to count operations.
        step: steps already done; the stream goes on behind them.
    """

    def __init__(self, config: Config, ranks: Ranks, vocab: int, step: int) -> None:
        self.config, self.ranks, self.vocab = config, ranks, vocab
        self.loader: PackLoader | None = None
        self.about = ""
        if ranks.is_reader:
            dataset = build_dataset(config, ranks.data, ranks.data_size, config.pad_multiple)
            self.about = describe(config, {name: len(source) for name, source in dataset.sources.items()})
            start = step * config.train.accumulate
            self.loader = PackLoader(dataset, start, config.data.workers, config.data.prefetch)
        self._skipped = Path(config.run_dir, "logs", f"skipped_{ranks.data}.jsonl")

    def next_step(self, step: int) -> tuple[list[Pack | None], StepCounts, float]:
        """The packs of the next step (None where a rank needs none), their counts, and the seconds spent waiting."""
        began = time.perf_counter()
        own: list[Pack] | None = None
        if self.loader is not None:
            own = [next(self.loader) for _ in range(self.config.train.accumulate)]
        waited = time.perf_counter() - began
        packs = share_packs(own, self.ranks, self.config.train.accumulate)
        if own is None:
            return packs, StepCounts(), waited
        self._report(own, step)
        return packs, count(own, self.config, self.vocab), waited

    def _report(self, packs: Sequence[Pack], step: int) -> None:
        lines = [
            json.dumps({"stage": self.config.stage.id, "step": step, **asdict(s)}) for p in packs for s in p.skipped
        ]
        if lines:
            with self._skipped.open("a") as f:
                f.write("\n".join(lines) + "\n")

    def close(self) -> None:
        """End the loading processes."""
        if self.loader is not None:
            self.loader.close()


def describe(config: Config, sizes: dict[str, int]) -> str:
    """One line that says what is read and how frames become cells."""
    data, model = config.data, config.model
    total = sum(config.stage.blend[name] for name in sizes)
    mix = ", ".join(f"{config.stage.blend[name] / total:.0%} {name} ({size} samples)" for name, size in sizes.items())
    bound = "native size" if data.max_pixels is None else f"at most {data.max_pixels} pixels"
    done = {"crop": "cropped", "pad": "padded"}[data.fit]
    return f"{mix}; up to {data.frames} frames of {bound}, {done} to whole cells of {model.cell_pixels} pixels"
