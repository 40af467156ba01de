"""The command of the front page, on as many real nodes: ``nodes=16``, one task each."""

from __future__ import annotations

import pytest

from tests.slurm.jobs import PacedJob
from tests.slurm.runs import Run, overrides

pytestmark = [pytest.mark.slow, pytest.mark.alone]

STEPS = 20


def test_sixteen_nodes_train_as_one_does(slurm, clips, tmp_path):
    one = ("nodes=1", "tasks_per_node=4", "parallel.tensor=2", "parallel.pipeline=2", "train.accumulate=2")
    many = ("nodes=16", "tasks_per_node=1", "parallel.tensor=2", "parallel.pipeline=2", "train.accumulate=2")
    same = (
        f"train.steps={STEPS}",
        "train.checkpoint_every=20",
        "train.global_batch=8",
        "cluster.cpus_per_task=1",
        "train.checkpoint_async=false",
    )
    runs = [Run(slurm, overrides(clips, tmp_path / name, *layout, *same), PacedJob)
            for name, layout in (("one", one), ("many", many))]  # fmt: skip
    for run in runs:
        assert run.submit().until_ended(300) == "COMPLETED", run.account()
    assert len(slurm.nodes_of(runs[1].job)) == 16 and "16 ranks" in runs[1].said
    expected, got = runs[0].steps(), runs[1].steps()
    assert sorted(got) == list(range(1, STEPS + 1))
    for step, line in expected.items():
        assert got[step]["loss"] == pytest.approx(line["loss"], rel=1e-4), step
        for key in ("samples", "visual_tokens_in", "skipped_samples"):
            assert got[step][key] == line[key], (step, key)
    assert got[STEPS]["loss"] < got[1]["loss"] - 0.5
