"""The packs of each step on every rank: read by one rank of the replica, shared with the others."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dali_pipelines.from_config import open_stream
from dali_pipelines.loader import PackLoader
from dali_pipelines.report import report_lines
from megatron_elva.config.schema import Config
from megatron_elva.layout import IGNORE, Pack
from megatron_elva.model.inputs import pooling_window
from megatron_elva.parallel.ranks import Ranks
from megatron_elva.parallel.share import share_packs
from megatron_elva.training.flops import ends_flops


@dataclass(frozen=True)
class StepCounts:
    """What one replica's packs of a step hold; only the reading rank counts, so that a sum over ranks is right.

    Attributes:
        samples: drawn from the stream, the skipped ones included.
        packed: samples that are in the packs.
        skipped: samples that are in none.
        listed: skipped samples that stood on a list from the start.
        tokens: without padding, before pooling and merging.
        visual_tokens: those of videos.
        frames: of videos, before pooling.
        video_bytes: of the encoded videos that the packs were made of.
        flops: operations outside the decoder layers.
        packs: how many.
    """

    samples: int = 0
    packed: int = 0
    skipped: int = 0
    listed: int = 0
    tokens: int = 0
    visual_tokens: int = 0
    frames: int = 0
    video_bytes: int = 0
    flops: float = 0.0
    packs: int = 0


def count(packs: Sequence[Pack], config: Config, vocab: int) -> StepCounts:
    """Count a replica's packs."""
    return StepCounts(
        samples=sum(p.samples for p in packs),
        packed=sum(len(p.keys) for p in packs),
        skipped=sum(len(p.skipped) for p in packs),
        listed=sum(s.stage == "quarantine" for p in packs for s in p.skipped),
        tokens=sum(p.spec.tokens - p.spec.padding for p in packs),
        visual_tokens=sum(v.tokens for p in packs for v in p.spec.videos),
        frames=sum(v.frames for p in packs for v in p.spec.videos),
        video_bytes=sum(p.video_bytes for p in packs),
        flops=sum(3 * _ends_flops(p, config, vocab) for p in packs),
        packs=len(packs),
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
        saved: the data state that a checkpoint of that step holds, None where it holds none.
    """

    def __init__(
        self, config: Config, ranks: Ranks, vocab: int, step: int, saved: dict[str, Any] | None = None
    ) -> None:
        self.config, self.ranks, self.vocab = config, ranks, vocab
        self.loader: PackLoader | None = None
        self.about: list[str] = []
        if ranks.is_reader:
            data = config.data
            stream = open_stream(config, ranks.data, ranks.data_size, str(ranks.device))
            sizes = {name: len(source) for name, source in stream.builder.sources.items()}
            self.about = [describe(config, sizes), stream.route]
            state = stream.share.start(step, config.train.accumulate) if saved is None else saved
            self.loader = stream.loader(state, data.workers, data.prefetch, data.decode_timeout_s)
        self._skipped = Path(config.run_dir, "logs", f"skipped_{ranks.data}.jsonl")

    def next_step(self, step: int) -> tuple[list[Pack | None], StepCounts]:
        """The packs of the next step (None where a rank needs none), and their counts on the rank that reads."""
        own: list[Pack] | None = None
        if self.loader is not None:
            own = [next(self.loader) for _ in range(self.config.train.accumulate)]
        packs = share_packs(own, self.ranks, self.config.train.accumulate)
        if own is None:
            return packs, StepCounts()
        self._report(own, step)
        return packs, count(own, self.config, self.vocab)

    @property
    def state(self) -> dict[str, Any] | None:
        """What a checkpoint must hold to go on behind the last step, where the number of steps does not say it."""
        if self.loader is None or self.config.data.pack_tokens is None:
            return None
        return self.loader.state

    def _report(self, packs: Sequence[Pack], step: int) -> None:
        lines = report_lines([s for p in packs for s in p.skipped], training_stage=self.config.stage.id, step=step)
        if not lines:
            return
        try:
            with self._skipped.open("a") as f:
                f.write(lines)
        except OSError as error:  # a full disk is the checkpoint's to refuse, on all ranks alike
            print(f"warning: {self._skipped}: {error}", flush=True)

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
    frames = f"{mix}; up to {data.frames} frames of {bound}, {done} to whole cells of {model.cell_pixels} pixels"
    return frames if data.pack_tokens is None else f"{frames}; packs of up to {data.pack_tokens:,} tokens"
