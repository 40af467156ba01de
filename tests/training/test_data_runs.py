"""Runs with a token budget, and with bad samples, through the launcher on real files."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_elva.training.runs import checkpoints
from tests.training.test_train import ROOT, corpus, metrics, overrides, submit  # noqa: F401 - corpus is a fixture

pytestmark = pytest.mark.slow

STEPS = 6
BUDGET = ("data.pack_tokens=700", "data.pack_buffer=12", "train.global_batch=4", f"train.steps={STEPS}",
          "train.checkpoint_every=3", "parallel.tensor=1", "parallel.pipeline=1", "data.workers=1")  # fmt: skip
COUNTS = ("samples", "visual_tokens_in", "skipped_samples", "tokens", "tokens_out", "frames", "video_bytes")
SAME = ("loss", "grad_norm", "pack_fill", *COUNTS)


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):  # noqa: F811
    folder = tmp_path_factory.mktemp("budget") / "run"
    submit(*overrides(corpus, folder, *BUDGET, "train.accumulate=4"))
    return folder


def broken_off(run: Path, into: Path) -> Path:
    """The run as it stood after half of its steps."""
    shutil.copytree(run, into)
    shutil.rmtree(into / "checkpoints" / f"step_{STEPS}")
    lines = (into / "metrics.jsonl").read_text().splitlines()[: STEPS // 2]
    (into / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    return into


def test_packs_keep_the_budget_and_replace_bad_samples(unbroken):
    lines = metrics(unbroken)
    assert all(0.8 < line["pack_fill"] <= 1 for line in lines.values())
    assert all(
        line["tokens_out"] == line["tokens"] > line["visual_tokens_in"] > line["frames"] > 0 for line in lines.values()
    )
    for line in lines.values():
        parts = sum(line[key] for key in ("data_wait_s", "compute_s", "checkpoint_s", "other_s"))
        assert parts == pytest.approx(line["step_s"], rel=1e-9) and line["compute_s"] > 0
        assert line["video_bytes"] == pytest.approx(line["bytes_per_s"] * line["step_s"], rel=1e-9)
    before, behind = range(1, STEPS // 2 + 1), STEPS // 2 + 1  # a save's time is in the next line
    assert lines[behind]["checkpoint_s"] > max(lines[step]["checkpoint_s"] for step in before)


def test_a_resumed_run_repeats_an_unbroken_one(corpus, unbroken, tmp_path):  # noqa: F811
    run = broken_off(unbroken, tmp_path / "run")
    state = json.loads((run / "checkpoints" / "step_3" / "data_0.json").read_text())
    assert set(state["lanes"]) == {"0", "1", "2", "3"}
    submit(*overrides(corpus, run, *BUDGET, "train.accumulate=4"))
    expected, got = metrics(unbroken), metrics(run)
    for step in range(1, STEPS + 1):
        assert {k: got[step][k] for k in SAME} == {k: expected[step][k] for k in SAME}, step


def test_another_data_parallel_size_goes_on_with_the_same_samples(corpus, unbroken, tmp_path):  # noqa: F811
    run = broken_off(unbroken, tmp_path / "run")
    submit(*overrides(corpus, run, *BUDGET, "train.accumulate=2", "tasks_per_node=2"))
    expected, got = metrics(unbroken), metrics(run)
    for step in range(STEPS // 2 + 1, STEPS + 1):
        assert got[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)
        for key in (*COUNTS, "pack_fill"):
            assert got[step][key] == pytest.approx(expected[step][key], rel=1e-12), (step, key)
        assert 2 * got[step]["flops_per_gpu"] == pytest.approx(expected[step]["flops_per_gpu"], rel=1e-12)
    assert (run / "checkpoints" / f"step_{STEPS}" / "data_1.json").is_file()
    assert checkpoints(run)[-1].step == STEPS


def test_tensor_and_pipeline_ranks_get_the_samples_that_were_read(corpus, unbroken, tmp_path):  # noqa: F811
    """Bad samples are replaced on the reading rank; the last pipeline rank has the labels of the replacements."""
    layout = ("parallel.tensor=2", "parallel.pipeline=2", "parallel.sequence=true", "train.accumulate=4")
    submit(*overrides(corpus, tmp_path / "run", *BUDGET, *layout))
    expected, got = metrics(unbroken), metrics(tmp_path / "run")
    for step in range(1, STEPS + 1):
        assert got[step]["loss"] == pytest.approx(expected[step]["loss"], rel=1e-4)
        for key in COUNTS:
            assert got[step][key] == expected[step][key]
        assert 4 * got[step]["flops_per_gpu"] == pytest.approx(expected[step]["flops_per_gpu"], rel=1e-12)


def test_too_many_bad_samples_end_the_run(corpus, tmp_path):  # noqa: F811
    run = tmp_path / "run"
    command = overrides(corpus, run, *BUDGET, "train.accumulate=4", "train.steps=200", "data.max_bad_share=0.002")
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "submit.py"), *command, "follow=true"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    said = done.stdout + done.stderr
    assert (
        "data.max_bad_share=0.002: " in said
        and " samples were bad; " in said
        and f"{run}/logs/skipped_*.jsonl says why" in said
    )
    assert len((run / "logs" / "skipped_0.jsonl").read_text().splitlines()) >= 3
