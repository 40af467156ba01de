"""What came out: numbers over all samples of the shards, and how many tokens they will be."""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from dali_pipelines.chat_format import encode_sample
from dali_pipelines.geometry import plan as geometry
from dali_pipelines.options import Hybrid, Limits, Sampling, VisionOptions
from dali_pipelines.prepare.media import Fact, read_journals
from dali_pipelines.prepare.plan import Plan
from dali_pipelines.prepare.progress import progress
from dali_pipelines.prepare.scan import Sample, samples
from dali_pipelines.prepare.settings import Room, Settings, read_json
from dali_pipelines.tokenizer import load_tokenizer, texts_of
from megatron_elva.config.errors import InputError

_PERCENTILES = (5, 50, 95)
_ANY_LENGTH = 1 << 40


@dataclass(frozen=True)
class View:
    """As what the model would see the samples: for the statistics alone, the shards do not depend on it.

    Attributes:
        frames: frames of a video at most, spread over it.
        max_pixels: area of a frame at most; None: no bound.
        patch: side of a patch in pixels.
        cell_reduction: patches per side of a cell.
        fit: ``crop`` or ``pad``.
        hybrid: two resolution classes, as in ``data.hybrid``; None: one.
        tokenizer: folder of a tokenizer; None: text is counted in characters.
        caption_prompt: the user's turn that a caption answers.
    """

    frames: int = 16
    max_pixels: int | None = 336 * 336
    patch: int = 14
    cell_reduction: int = 2
    fit: str = "crop"
    hybrid: str | None = None
    tokenizer: str | None = None
    caption_prompt: str = "Describe the video in detail."

    def options(self) -> VisionOptions:
        """As the decoders take them.

        Raises:
            ConfigError: a value cannot be used.
        """
        return VisionOptions(
            Sampling("uniform", self.frames), self.patch, self.cell_reduction, self.fit, self.max_pixels,
            None if self.hybrid is None else Hybrid.parse(self.hybrid), Limits(1 << 29, 1 << 30, 1 << 40, 1e9),
        )  # fmt: skip


@dataclass
class Statistics:
    """Numbers of all samples that are in the shards; one entry a file or a sample.

    Attributes:
        seconds: of each video.
        frames: of each video.
        heights: shorter side of each file, in pixels.
        aspects: width by height of each file.
        megabytes: of each file as stored.
        visual: visual tokens of each sample with files.
        text: tokens of each sample's text, or characters without a tokenizer.
        codecs: files by codec as stored, images included.
        kinds: samples by what they hold: ``1 video``, ``2 images``, ``text``.
        tasks: samples by their texts; a sample may have several.
        splits: samples by split.
        left_out: samples and rows by stage and reason.
        refused: samples that training would refuse for their text, by reason.
    """

    seconds: list[float] = field(default_factory=list)
    frames: list[int] = field(default_factory=list)
    heights: list[int] = field(default_factory=list)
    aspects: list[float] = field(default_factory=list)
    megabytes: list[float] = field(default_factory=list)
    visual: list[int] = field(default_factory=list)
    text: list[int] = field(default_factory=list)
    codecs: Counter[str] = field(default_factory=Counter)
    kinds: Counter[str] = field(default_factory=Counter)
    tasks: Counter[str] = field(default_factory=Counter)
    splits: Counter[str] = field(default_factory=Counter)
    left_out: Counter[str] = field(default_factory=Counter)
    refused: Counter[str] = field(default_factory=Counter)

    def summary(self) -> dict[str, Any]:
        """Each list as a few numbers, each count as it is."""
        return {
            name: dict(value.most_common()) if isinstance(value, Counter) else summary_of(value)
            for name, value in vars(self).items()
        }


def summary_of(values: list[Any]) -> dict[str, float]:
    """Count, sum, extremes, mean and some percentiles."""
    if not values:
        return {"count": 0}
    array = np.array(values, np.float64)
    found = {"count": len(values), "sum": array.sum(), "min": array.min(), "mean": array.mean(), "max": array.max()}
    found |= {f"p{p}": np.percentile(array, p) for p in _PERCENTILES}
    return {name: round(float(value), 3) for name, value in found.items()}


def gather(room: Room, plan: Plan, view: View) -> Statistics:
    """Go through the samples of all shards.

    Raises:
        InputError: the tokenizer cannot be loaded.
        ConfigError: a value of the view cannot be used.
    """
    tokenizer = load_tokenizer(view.tokenizer) if view.tokenizer else None
    options, facts, found = view.options(), read_journals(room), Statistics()
    report = left_out(room, plan)
    lost = {line["key"] for line in report}
    split_of = {number: shard.split for shard in plan.shards for number in shard.samples}
    with progress(len(split_of), "statistics", "sample") as bar:
        for number, sample in enumerate(samples(room)):
            if number not in split_of or sample.key in lost:
                continue
            found.splits[split_of[number]] += 1
            _add_media(found, [fact for i in sample.files if isinstance(fact := facts[i], Fact)], options)
            _add_text(found, sample, tokenizer, view)
            bar.update()
    for line in report:
        found.left_out[f"{line['stage']}: {kind_of(line['reason'])}"] += 1
    return found


def left_out(room: Room, plan: Plan) -> list[dict[str, str]]:
    """All lines of the report: of the plan, and what could no longer be read when the shards were written."""
    states = (read_json(room.shard_state(shard.name)) or {} for shard in plan.shards)
    return plan.left_out + [line for state in states for line in state.get("left_out", [])]


def kind_of(reason: str) -> str:
    """A reason without what is particular to one file: its path and numbers."""
    reason = re.sub(r"same files and text as \S+", "same files and text as another sample", reason)
    reason = re.sub(r"\S*[/\\]\S*?(?=[:;,]?(\s|$))", "PATH", reason)
    return re.sub(r"\d+(\.\d+)?(x\d+)?", "N", reason)[:100]


def _add_media(found: Statistics, facts: list[Fact], options: VisionOptions) -> None:
    videos = sum(fact.frames > 1 for fact in facts)
    counted = [(videos, "video"), (len(facts) - videos, "image")]
    found.kinds[", ".join(f"{n} {word}{'s' * (n > 1)}" for n, word in counted if n) or "text"] += 1
    for fact in facts:
        found.heights.append(min(fact.height, fact.width))
        found.aspects.append(fact.width / fact.height)
        found.megabytes.append(fact.bytes / 1e6)
        found.codecs[fact.codec] += 1
        if fact.frames > 1:
            found.seconds.append(fact.seconds)
            found.frames.append(fact.frames)
    if facts:
        found.visual.append(sum(visual_tokens(fact, options) for fact in facts))


def visual_tokens(fact: Fact, options: VisionOptions) -> int:
    """The visual span of a file."""
    frames = min(fact.frames, options.sampling.frames)
    return geometry((fact.height, fact.width), 0, frames, options).video.tokens


def _add_text(found: Statistics, sample: Sample, tokenizer: Any, view: View) -> None:
    has = [("caption", "caption"), ("conversation", "messages"), ("conversation", "qa"), ("text", "text")]
    tasks = list(dict.fromkeys(task for task, key in has if key in sample.meta))
    if "text" in tasks and (len(tasks) > 1 or sample.files):
        tasks.remove("text")  # it stands beside what the sample is for
    found.tasks.update(tasks)
    if tokenizer is None:
        found.text.append(sum(len(text) for text in texts_of(sample.meta)))
        return
    lengths = []
    for task in tasks:
        try:
            encoded = encode_sample(
                tokenizer, sample.meta, len(sample.files), task, view.caption_prompt, _ANY_LENGTH, None
            )
            lengths.append(encoded.text_tokens)
        except InputError as error:
            found.refused[f"{task}: {kind_of(str(error))}"] += 1
    if lengths:
        found.text.append(max(lengths))


def manifest(room: Room, settings: Settings, view: View, plan: Plan, found: Statistics) -> dict[str, Any]:
    """What the preparation made, for programs."""
    shards = [read_json(room.shard_state(shard.name)) or {} for shard in plan.shards]
    kept = [{key: shard.get(key) for key in ("name", "split", "samples", "bytes", "sha256")} for shard in shards]
    splits = {
        name: {
            "shards": sum(shard["split"] == name for shard in kept),
            "samples": sum(shard["samples"] for shard in kept if shard["split"] == name),
            "bytes": sum(shard["bytes"] for shard in kept if shard["split"] == name),
        }
        for name in dict.fromkeys(shard["split"] for shard in kept)
    }
    return {
        "format": 1,
        "settings": json.loads(json.dumps(asdict(settings))),
        "view": asdict(view),
        "samples": sum(split["samples"] for split in splits.values()),
        "splits": splits,
        "left_out": len(left_out(room, plan)),
        "duplicates": plan.duplicates,
        "samples_that_share_files": plan.shared,
        "statistics": found.summary(),
        "shards": kept,
    }
