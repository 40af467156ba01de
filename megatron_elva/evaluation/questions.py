"""Accuracy on short-answer questions, measured by generating text: one question at a time, exact match.

python -m megatron_elva.evaluation.questions --run runs/demo --shards "runs/demo/corpus/heldout/*.tar"
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from tqdm import tqdm

from dali_pipelines.shards import RawSample, ShardIndex, find_shards
from megatron_elva.config.errors import ConfigError, InputError
from megatron_elva.inference.model import Assistant

Z95 = 1.959963984540054


@dataclass(frozen=True)
class Answered:
    """One question and what the model said."""

    key: str
    type: str
    question: str
    expected: str
    answer: str

    @property
    def right(self) -> bool:
        """Whether the answer is the expected one, but for case, spaces and a full stop."""
        return normal(self.answer) == normal(self.expected)


@dataclass(frozen=True)
class Score:
    """Accuracy over a set of questions.

    Attributes:
        questions: how many.
        accuracy: share answered right.
        low: lower end of the 95% Wilson interval.
        high: its upper end.
        chance: accuracy of the best constant answer for each question type.
    """

    questions: int
    accuracy: float
    low: float
    high: float
    chance: float


def normal(text: str) -> str:
    """Text as it is compared."""
    return " ".join(text.lower().split()).rstrip(".")


def wilson(right: int, n: int) -> tuple[float, float]:
    """95% Wilson score interval of a share (Wilson 1927)."""
    p, z2 = right / n, Z95**2
    centre = (p + z2 / (2 * n)) / (1 + z2 / n)
    half = Z95 / (1 + z2 / n) * math.sqrt(p * (1 - p) / n + z2 / (4 * n * n))
    return centre - half, centre + half


def score(answered: Sequence[Answered]) -> Score:
    """Score a set of answers.

    Raises:
        InputError: it is empty.
    """
    if not answered:
        raise InputError("no questions were asked")
    by_type: dict[str, Counter[str]] = defaultdict(Counter)
    for a in answered:
        by_type[a.type][normal(a.expected)] += 1
    constant = sum(max(counts.values()) for counts in by_type.values())
    right = sum(a.right for a in answered)
    low, high = wilson(right, len(answered))
    return Score(len(answered), right / len(answered), low, high, constant / len(answered))


def by_type(answered: Sequence[Answered]) -> dict[str, Score]:
    """A score for each question type."""
    return {t: score([a for a in answered if a.type == t]) for t in sorted({a.type for a in answered})}


def questions(shards: Sequence[str], limit: int | None = None) -> Iterator[tuple[RawSample, dict[str, str]]]:
    """Samples with a video and their questions in order, `limit` at most. What is no question is passed over."""
    found = (
        (sample, qa)
        for path in find_shards(list(shards), "--shards")
        for sample in _samples(ShardIndex(path))
        for qa in sample.meta.get("qa") or []
        if isinstance(qa, dict) and isinstance(qa.get("question"), str) and isinstance(qa.get("answer"), str)
    )
    return itertools.islice(found, limit)


def _samples(index: ShardIndex) -> Iterator[RawSample]:
    for i in range(len(index)):
        try:
            sample = index.read(i)
        except InputError as error:
            print(f"passed over: {index.name_of(i)}: {error}", file=sys.stderr)
            continue
        if sample.media:
            yield sample


def ask(assistant: Assistant, shards: Sequence[str], limit: int | None = None) -> list[Answered]:
    """Ask every question of the shards, each in a conversation of its own; a video that cannot be decoded is named."""
    out = []
    key, videos = "", []
    total = sum(1 for _ in questions(shards, limit))
    for sample, qa in tqdm(questions(shards, limit), total=total, desc="asking", unit="question", mininterval=2):
        if sample.key != key:
            key = sample.key
            try:
                videos = [assistant.watch(medium) for medium in sample.media]
            except InputError as error:
                videos = []
                print(f"passed over: {key}: {error}", file=sys.stderr)
        if videos:
            answer = assistant.answer([{"role": "user", "content": qa["question"]}], videos, max_new_tokens=16)
            out.append(Answered(key, str(qa.get("type", "all")), qa["question"], qa["answer"], answer))
    return out


def table(answered: Sequence[Answered]) -> str:
    """Scores by question type, for people."""
    rows = [*by_type(answered).items(), ("all", score(answered))]
    head = f"{'type':<12}{'questions':>10}{'accuracy':>10}{'95% interval':>16}{'chance':>9}"
    lines = [
        f"{t:<12}{s.questions:>10}{s.accuracy:>10.1%}{f'{s.low:.1%} - {s.high:.1%}':>16}{s.chance:>9.1%}"
        for t, s in rows
    ]
    return "\n".join([head, *lines])


def evaluate(run: str | Path, shards: Sequence[str], limit: int | None = None) -> tuple[Assistant, list[Answered]]:
    """Load a run, ask, and write `evaluation.json` and `answers.jsonl` into the run directory."""
    assistant = Assistant(run)
    answered = ask(assistant, shards, limit)
    folder = assistant.checkpoint.run
    result = {"all": asdict(score(answered)), "by_type": {t: asdict(s) for t, s in by_type(answered).items()}}
    (folder / "evaluation.json").write_text(json.dumps(result, indent=1))
    (folder / "answers.jsonl").write_text("".join(json.dumps(asdict(a)) + "\n" for a in answered))
    return assistant, answered


def main(argv: Sequence[str] | None = None) -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="questions", description="Ask a run the questions of shards.")
    parser.add_argument("--run", required=True)
    parser.add_argument("--shards", nargs="+", required=True, help="paths or globs")
    parser.add_argument("--limit", type=int, help="ask so many questions at most")
    given = parser.parse_args(argv)
    try:
        _, answered = evaluate(given.run, given.shards, given.limit)
    except (InputError, ConfigError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(table(answered))
    return 0


if __name__ == "__main__":
    sys.exit(main())
