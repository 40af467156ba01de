"""Steps that are not finite: nothing changes, and the samples are named; on every layout."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config, FaultConfig, MergePoint, MergingConfig, ParallelConfig
from megatron_elva.model.inputs import ModelInputs, prepare
from megatron_elva.training.nonfinite import Nonfinite
from tests.builders import random_pack, small_config
from tests.distributed import run_distributed

LAYOUTS = {
    "one": (ParallelConfig(tensor=1, pipeline=1, sequence=False), 1),
    "tp2dp2": (ParallelConfig(tensor=2, pipeline=1, sequence=True), 2),
    "pp2dp2": (ParallelConfig(tensor=1, pipeline=2, sequence=False), 2),
    "tp2pp2": (ParallelConfig(tensor=2, pipeline=2, sequence=True), 1),
    "pp2vp2": (ParallelConfig(tensor=1, pipeline=2, virtual_pipeline=2, sequence=False), 1),
}
MICRO_STEPS = 2


def keys_of(replica: int, micro_step: int) -> list[str]:
    return [f"r{replica}m{micro_step}/{i}" for i in range(2)]


def with_value(inputs: ModelInputs, value: float) -> ModelInputs:
    """One pixel of the last video has another value, on the ranks that read pixels."""
    if inputs.visual is None:
        return inputs
    patches = inputs.visual.patches.float()
    patches[-1, 0] = value
    return replace(inputs, visual=replace(inputs.visual, patches=patches))


def overflow(gradient: torch.Tensor) -> torch.Tensor:
    """The gradient has a value too large for fp32."""
    return gradient * 1e30 * 1e30


class Run:
    """An engine with its packs, and a step in which something goes wrong."""

    def __init__(self, config: Config) -> None:
        from tests.parallel.test_engine import engine_of

        self.engine, self.ranks = engine_of(config)
        self.config = config
        packs = [random_pack(config.model, 2 * self.ranks.data + m, (1, 2)) for m in range(MICRO_STEPS)]
        for micro_step, pack in enumerate(packs):
            pack.keys = keys_of(self.ranks.data, micro_step) if self.ranks.is_reader else []
        self.packs = packs
        self.nonfinite = Nonfinite(config, self.ranks)

    def step(self, number: int, value: float | None = None, at: tuple[int, int] = (0, 0)) -> float:
        """One step; `value` is a pixel of the pack of this replica and micro-step. Returns the gradient norm."""
        self.engine.set_learning_rate(1.0, False)
        inputs = [prepare(pack, self.config, "cpu", self.ranks.is_first, self.ranks.is_last) for pack in self.packs]
        if value is not None and at[0] == self.ranks.data:
            inputs[at[1]] = with_value(inputs[at[1]], value)
        result = self.engine.train_step(inputs)
        self.nonfinite.check(number, result, self.packs, result.grad_norm)
        return result.grad_norm

    def state(self) -> list[torch.Tensor]:
        """Weights, main weights and moments, and step counts."""
        out = [p.detach().clone() for p in self.engine.names]
        for optimizer in self.engine.optimizer.chained_optimizers:
            for parameter, state in optimizer.optimizer.state.items():
                out += [parameter.detach().clone(), *(torch.as_tensor(v).clone() for v in state.values())]
            out += [torch.tensor(float(g.get("step", 0))) for g in optimizer.optimizer.param_groups]
        return out


def same(before: list[torch.Tensor], after: list[torch.Tensor]) -> bool:
    return len(before) == len(after) and all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


def steps_with_a_bad_pixel(config: Config, places: list[tuple[int, int]]) -> list[tuple[str, bool]]:
    """Fine steps and bad ones by turns. Returns what went wrong."""
    run = Run(config)
    wrong = []
    for number, place in enumerate(places):
        before = run.state()
        norm = run.step(2 * number + 1)
        if not math.isfinite(norm) or same(before, run.state()):
            wrong.append((f"fine step before {place}: norm {norm}", False))
        before = run.state()
        norm = run.step(2 * number + 2, [math.nan, math.inf][number % 2], place)
        if math.isfinite(norm) or not same(before, run.state()):
            wrong.append((f"bad step {place}: norm {norm}", same(before, run.state())))
    return wrong


@pytest.mark.parametrize(
    "layout", ["tp2dp2", "pp2dp2", *(pytest.param(n, marks=pytest.mark.slow) for n in ("one", "tp2pp2", "pp2vp2"))]
)
def test_a_bad_pixel_changes_nothing_and_its_pack_is_named(layout, tmp_path):
    parallel, data = LAYOUTS[layout]
    places = [(0, 1), (data - 1, 0)]
    config = small_config(parallel=parallel, run_dir=str(tmp_path))
    world = data * parallel.tensor * parallel.pipeline
    assert not any(run_distributed(steps_with_a_bad_pixel, world, config, places))
    lines = [json.loads(line) for line in (tmp_path / "logs" / "nonfinite.jsonl").read_text().splitlines()]
    assert [(line["step"], line["what"]) for line in lines] == [(2, "loss"), (4, "loss")]
    for line, (replica, micro_step) in zip(lines, places, strict=True):
        named = {"replica": replica, "micro_step": micro_step, "keys": keys_of(replica, micro_step)}
        assert line["packs"] == [named]


@pytest.mark.slow
def test_merging_passes_what_is_not_finite_on(tmp_path):
    """Ranks must go on to agree on the shapes."""
    merging = MergingConfig(kind="hierarchical", points=[MergePoint(after=2, rule="budget", keep=0.5)])
    config = small_config(parallel=LAYOUTS["tp2pp2"][0], run_dir=str(tmp_path), merging=merging)
    assert not any(run_distributed(steps_with_a_bad_pixel, 4, config, [(0, 0), (0, 1)]))


def test_a_gradient_alone_names_the_whole_step(tmp_path):
    config = small_config(parallel=LAYOUTS["pp2dp2"][0], run_dir=str(tmp_path))
    results = run_distributed(overflowing_step, 4, config)
    assert all(unchanged and not math.isfinite(norm) for unchanged, norm in results)
    (line,) = [json.loads(line) for line in (tmp_path / "logs" / "nonfinite.jsonl").read_text().splitlines()]
    assert line["what"] == "gradient"
    found = [(p["replica"], p["micro_step"], p["keys"]) for p in line["packs"]]
    assert found == [(r, m, keys_of(r, m)) for r in range(2) for m in range(MICRO_STEPS)]


class _Overflow(torch.autograd.Function):
    """Nothing forward, overflow backward."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return overflow(gradient)


def overflowing_step(config: Config) -> tuple[bool, float]:
    """A step whose gradient overflows in the first pipeline rank of replica 1, with a fine loss."""
    run = Run(config)
    run.step(1)
    before = run.state()
    if run.ranks.data == 1 and run.ranks.is_first:
        run.engine.chunks[0].patch_embedding.register_forward_hook(
            lambda module, args, out: tuple(_Overflow.apply(part) for part in out)
        )
    norm = run.step(2)
    return same(before, run.state()), norm


def loss_alone(config: Config) -> tuple[bool, float]:
    """A step whose loss is not finite in one place while every gradient is."""
    from megatron_elva.parallel import engine

    run = Run(config)
    run.step(1)
    before = run.state()
    original, calls = engine.loss_sums, []

    def loss_sums(loss, losses):
        total, count, told = original(loss, losses)
        calls.append(1)
        if run.ranks.data == 1 and len(calls) == 2:
            told = {**told, "loss_sum": told["loss_sum"] + math.inf}
        return total, count, told

    engine.loss_sums = loss_sums
    norm = run.step(2)
    engine.loss_sums = original
    return same(before, run.state()), norm


@pytest.mark.parametrize("layout", [pytest.param("tp2dp2", marks=pytest.mark.slow), "pp2dp2"])
def test_a_loss_alone_changes_nothing(layout, tmp_path):
    config = small_config(parallel=LAYOUTS[layout][0], run_dir=str(tmp_path))
    results = run_distributed(loss_alone, 4, config)
    assert all(unchanged and not math.isfinite(norm) for unchanged, norm in results)
    (line,) = [json.loads(line) for line in (tmp_path / "logs" / "nonfinite.jsonl").read_text().splitlines()]
    assert [(p["replica"], p["micro_step"]) for p in line["packs"]] == [(1, 1)]


@pytest.mark.slow
def test_a_frozen_model_does_not_hide_the_loss(tmp_path):
    """All that the last pipeline rank holds is frozen, and its gradients are zeroed."""
    config = small_config(parallel=LAYOUTS["pp2dp2"][0], run_dir=str(tmp_path))
    stage = replace(config.stage, frozen=["decoder.*", "embedding.*"], frozen_share=1.0)
    results = run_distributed(loss_alone, 4, replace(config, stage=stage))
    assert all(unchanged and not math.isfinite(norm) for unchanged, norm in results)


def errors(config: Config, bad: list[bool]) -> list[str]:
    """The error of each step, or nothing."""
    run = Run(config)
    out = []
    for number, is_bad in enumerate(bad, 1):
        try:
            run.step(number, math.nan if is_bad else None, (1, 0))
            out.append("")
        except InputError as error:
            out.append(str(error))
    return out


def test_stop_names_the_samples_on_all_ranks(tmp_path):
    config = small_config(parallel=LAYOUTS["pp2dp2"][0], run_dir=str(tmp_path), fault=FaultConfig(nonfinite="stop"))
    for fine, error in run_distributed(errors, 4, config, [False, True]):
        assert not fine
        assert error.startswith("step 2: the loss is not finite, no weight changed; micro-step 0 of replica 1: samples")
        assert ", ".join(keys_of(1, 0)) in error and "\n" not in error


@pytest.mark.slow
def test_too_many_in_a_row_end_the_run(tmp_path):
    config = small_config(parallel=LAYOUTS["tp2dp2"][0], run_dir=str(tmp_path), fault=FaultConfig(max_nonfinite=2))
    for found in run_distributed(errors, 4, config, [True, False, True, True]):
        assert found[:3] == ["", "", ""]
        assert "the last of 2 in a row" in found[3] and "fault.max_nonfinite=2" in found[3]


def test_a_full_disk_does_not_end_the_run(tmp_path):
    Path(tmp_path, "logs").mkdir()
    Path(tmp_path, "logs", "nonfinite.jsonl").symlink_to("/dev/full")
    config = small_config(run_dir=str(tmp_path))
    assert not any(run_distributed(steps_with_a_bad_pixel, 1, config, [(0, 0)]))
