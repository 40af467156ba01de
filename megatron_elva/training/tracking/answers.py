"""Asks a checkpoint about a few fixed training samples, on the CPU, and draws what it merges.

Writes `answers/step_N.jsonl` and, where the run merges hierarchically, `answers/step_N.png`. Training starts it every
`tracking.answers_every` steps; by hand:

python -m megatron_elva.training.tracking.answers runs/mine
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import json
import os
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch

from dali_pipelines.chat_format import Message, caption_messages, conversation
from dali_pipelines.shards import RawSample, ShardIndex, find_shards
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.config.schema import Config
from megatron_elva.inference.model import Assistant
from megatron_elva.inference.show_merging import look, write_picture
from megatron_elva.training.runs import latest, write_atomic

_LONGEST = 64
_LOOKED_AT = 1000
"""Samples of a source among which those to ask are looked for."""


@dataclass(frozen=True)
class Question:
    """What a sample of the training data asks and expects."""

    sample: RawSample
    source: str
    question: str
    expected: str


@dataclass(frozen=True)
class Answer:
    """One line of the file."""

    key: str
    source: str
    question: str
    expected: str
    answer: str


def main(argv: Sequence[str] | None = None) -> int:
    """The command line. Returns the exit code."""
    given = _arguments(argv)
    if given.parent:
        os.nice(19)  # counts from the sender's and ends at the lowest there is
        threading.Thread(target=_end_with, args=[given.parent], daemon=True).start()
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // 2))
    run = Path(given.run)
    try:
        checkpoint = latest(run / "checkpoints" / f"step_{given.step}" if given.step else run)
        print(f"asked {ask(checkpoint.path)} questions of {checkpoint.path}", flush=True)
    except (InputError, ConfigError, OSError) as error:  # it may have been pruned while it was read
        print(f"error: no sample answers: {error}", file=sys.stderr)
        return 2
    return 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="answers", description="Ask a checkpoint about a few training samples.")
    parser.add_argument("run", help="run directory of one stage")
    parser.add_argument("--step", type=int, help="which checkpoint; the newest by default")
    parser.add_argument("--parent", type=int, default=0, help="end with this process")
    return parser.parse_args(argv)


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    os._exit(1)


def ask(checkpoint: Path) -> int:
    """Ask a checkpoint and write the answers. Returns how many there are.

    Raises:
        InputError: the checkpoint is gone, or no shard of the training data is there.
    """
    assistant = Assistant(checkpoint)
    folder = assistant.checkpoint.run / "answers"
    folder.mkdir(exist_ok=True)
    name, out, drawn = f"step_{assistant.checkpoint.step}", list[Answer](), False
    for asked in questions(assistant.config):
        try:
            videos = [assistant.watch(medium) for medium in asked.sample.media]
            text = assistant.answer([{"role": "user", "content": asked.question}], videos, max_new_tokens=_LONGEST)
        except InputError:
            continue  # a bad sample, which training skips too
        out.append(Answer(asked.sample.key, asked.source, asked.question, asked.expected, text))
        if videos and videos[0].spec.frames > 1 and assistant.model.points and not drawn:
            write_picture(assistant, videos[0], look(assistant, videos[0]), asked.sample.key, folder / f"{name}.png")
            drawn = True
        if len(out) == assistant.config.tracking.answers:
            break
    write_atomic(folder / f"{name}.jsonl", "".join(json.dumps(asdict(a), ensure_ascii=False) + "\n" for a in out))
    return len(out)


def questions(config: Config) -> Iterator[Question]:
    """The first samples of each source that the stage trains on, in turn; the same ones at every step.

    Args:
        config: of the run.

    Raises:
        InputError: the shards of a source are not there.
    """
    sources = [_of_source(config, name) for name, weight in config.stage.blend.items() if weight > 0]
    turns = itertools.chain.from_iterable(itertools.zip_longest(*sources))
    return (question for question in turns if question is not None)


def _of_source(config: Config, name: str) -> Iterator[Question]:
    source = config.data.sources[name]
    if source.task == "text":
        return
    for sample in itertools.islice(_samples(config, source.shards), _LOOKED_AT):
        try:
            if source.task == "caption":
                turns = caption_messages(sample.meta, config.data.caption_prompt)
            else:
                turns = conversation(sample.meta, None)
        except InputError:
            continue  # training skips it too
        first = _first_turn(turns)
        if first is not None:
            yield Question(sample, name, *first)


def _samples(config: Config, shards: Sequence[str]) -> Iterator[RawSample]:
    for path in find_shards(shards, "data.sources", config.data.cache_dir):
        index = ShardIndex(path, config.data.cache_dir)
        for i in range(len(index)):
            with contextlib.suppress(InputError):  # an unreadable sample, which training skips too
                yield index.read(i)


def _first_turn(turns: Sequence[Message]) -> tuple[str, str] | None:
    """The first question and its answer; a system's turn before them is left out."""
    for question, answer in itertools.pairwise(turns):
        if question["role"] == "user" and answer["role"] == "assistant":
            return question["content"], answer["content"]
    return None


if __name__ == "__main__":
    sys.exit(main())
