"""The comparison of answers: paired differences, intervals, and refusal of what cannot be compared."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.merging_accuracy import KINDS, Plan, compare, interval, kept_share, table
from megatron_elva.config.compose import compose
from megatron_elva.config.merge_schedule import resolve
from megatron_elva.config.validate import validate


def plan(folder: Path, kinds: tuple[str, ...] = ("none", "pooling")) -> Plan:
    return Plan(folder, folder / "corpus", (1, 2), kinds, 10)


def write(run: Path, right: str, out: int = 80) -> None:
    """A run that answers question i right where `right` has an x; four of type a, then four of type b."""
    run.mkdir(parents=True)
    lines = [
        {
            "key": f"video{i // 2}",
            "type": "a" if i < 4 else "b",
            "answer": "Seven." if mark == "x" else "one",
            "expected": "seven",
        }
        for i, mark in enumerate(right)
    ]
    (run / "answers.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    steps = [{"visual_tokens_in": 100, "visual_tokens_out": 10 if i < 50 else out} for i in range(100)]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in steps))


def test_differences_are_paired_by_question_and_averaged_over_seeds(tmp_path):
    own = plan(tmp_path)
    write(own.run(1, "none"), "xxxx----", 100)
    write(own.run(2, "none"), "xx--x---", 100)
    write(own.run(1, "pooling"), "xxxx---x")
    write(own.run(2, "pooling"), "xx---x--")
    result = compare(own)
    a, b, whole = (result["pooling"]["types"][name] for name in ("a", "b", "all"))
    assert (a["questions"], b["questions"], whole["questions"]) == (4, 4, 8)
    assert a["accuracy"] == 0.75 and a["difference"] == 0 and a["difference_half"] == 0
    assert b["difference"] == pytest.approx((-0.5 + 0.5 + 0 + 0.5) / 4)
    assert b["seed_differences"] == [0.25, 0.0]
    assert b["difference_half"] > 12.706 * 0.125  # t with one degree of freedom
    assert whole["seeds"] == [5 / 8, 3 / 8]
    text = table(own, result)
    assert (
        "| b | 4 | 12.5% | 25.0% (+12.5 ± " in text
        and "; +25, +0)" in text
        and "| visual tokens left |  | 100% | 80% |" in text
    )
    assert kept_share(own.run(1, "pooling")) == 0.8  # the last 50 steps alone


def test_an_interval_covers_other_seeds_and_other_videos():
    videos = [f"v{i}" for i in range(100)]
    mean, half = interval([[0.0, 1.0] * 50], videos)  # one seed: the choice of videos alone
    assert mean == 0.5 and half == pytest.approx(1.96 * (0.25 / 99) ** 0.5, rel=1e-3)
    _, wider = interval([[0.0, 1.0] * 50], [f"v{i // 2 * 2 % 100}" for i in range(100)])
    assert wider < half  # questions of one video that cancel out
    mean, half = interval([[0.0] * 100, [0.5] * 100, [1.0] * 100], videos)
    assert mean == 0.5 and half == pytest.approx(4.303 * 0.5 / 3**0.5, rel=1e-3)  # seeds alone


def test_other_questions_are_not_compared(tmp_path):
    own = plan(tmp_path)
    for kind, right in (("none", "xxxxxxxx"), ("pooling", "xxxx")):
        for seed in (1, 2):
            write(own.run(seed, kind), right)
    with pytest.raises(SystemExit, match="pooling: was asked other questions"):
        compare(own)


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_is_a_config_that_runs(kind):
    config = compose(["stage=3", "cluster=debug", *KINDS[kind]])
    validate(config)
    points = resolve(config.merging, config.model.layers)
    assert bool(points) == (kind in ("hierarchical", "paper"))
    if kind == "hierarchical":
        assert [(p.layer, p.rule, p.keep) for p in points] == [(1, "budget", 0.5)]
