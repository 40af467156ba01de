"""Checkpoints of a fused Adam, which counts its steps for each group, and of torch's, which does for each parameter.

Transformer Engine's and apex's need a GPU. Here stands an Adam that keeps its state where theirs does, as megatron-core
expects it of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.distributed import run_distributed
from tests.training.test_checkpoint import (
    ALONE,
    PP2,
    VOCAB,
    build,
    config_of,
    resume_and_go_on,
    same_weights,
    save_and_go_on,
    whole,
)


class GroupAdam(torch.optim.Optimizer):
    """AdamW with an int `step` in each group, made in the first step as the moments are; no tensor may be one."""

    def __init__(self, params: Any, adam_w_mode: bool, capturable: bool = False, **settings: Any) -> None:
        assert adam_w_mode and not capturable
        super().__init__(params, {"bias_correction": True, **settings})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            if not group["params"]:
                continue
            group["step"] = group.get("step", 0) + 1
            assert type(group["step"]) is int  # a fused kernel refuses other numbers
            for p in group["params"]:
                state = self.state[p]
                if not state:
                    state.update(exp_avg=torch.zeros_like(p), exp_avg_sq=torch.zeros_like(p))
                if p.grad is not None:
                    self._move(p, group, state)

    @staticmethod
    def _move(p: torch.Tensor, group: dict[str, Any], state: dict[str, torch.Tensor]) -> None:
        assert p.grad is not None
        (b1, b2), lr, t = group["betas"], group["lr"], group["step"]
        mean = state["exp_avg"].lerp_(p.grad, 1 - b1) / (1 - b1**t)
        square = state["exp_avg_sq"].mul_(b2).addcmul_(p.grad, p.grad, value=1 - b2) / (1 - b2**t)
        p.sub_(lr * (mean / (square.sqrt() + group["eps"]) + group["weight_decay"] * p))


def use_group_adam() -> None:
    """What megatron-core does where it finds a fused Adam, after CPU mode has undone it."""
    from megatron.core import optimizer as building
    from megatron.core.optimizer import distrib_optimizer

    from megatron_elva.parallel import cpu

    cpu.install()
    building.Adam, building.USING_PYTORCH_OPTIMIZER = GroupAdam, False
    distrib_optimizer.Adam, distrib_optimizer.HAVE_APEX_OR_TE = GroupAdam, True
    distrib_optimizer.USING_TE_OPTIMIZER = True


def fused(function: Any, *args: Any) -> Any:
    """Call a function of a rank with the fused Adam."""
    use_group_adam()
    return function(*args)


def save_before_any_step(config: Any) -> dict[str, Any]:
    from megatron_elva.training.saver import Saver

    engine, ranks = build(config)
    Saver(engine, config, VOCAB, ranks).save(2, 8, None, wait=True)
    return {"kinds": sorted({type(part.optimizer).__name__ for part in engine.optimizer.chained_optimizers})}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[dict[str, Any]]]:
    """A run directory written with the fused Adam, two steps done."""
    folder = tmp_path_factory.mktemp("run")
    return folder, run_distributed(fused, 2, save_and_go_on, config_of(folder, PP2))


def test_resume_is_exact_to_the_last_bit(run: tuple[Path, list[dict[str, Any]]]) -> None:
    folder, results = run
    for before, after in zip(results, run_distributed(fused, 2, resume_and_go_on, config_of(folder, PP2)), strict=True):
        assert after["found"] == ("step_2", 2, 8, VOCAB) and after["rest"] == before["rest"]
        same_weights({n: s[2] for n, s in after["end"].items()}, {n: s[2] for n, s in before["end"].items()})


@pytest.mark.parametrize("fused_first", [True, False])
def test_one_kind_of_adam_reads_what_the_other_wrote(
    run: tuple[Path, list[dict[str, Any]]], tmp_path: Path, fused_first: bool
) -> None:
    folder, results = run
    if fused_first:
        resumed = run_distributed(resume_and_go_on, 1, config_of(folder, ALONE))
    else:
        results = run_distributed(save_and_go_on, 2, config_of(tmp_path, PP2))
        resumed = run_distributed(fused, 1, resume_and_go_on, config_of(tmp_path, ALONE))
    torch.testing.assert_close(resumed[0]["rest"], results[0]["rest"], rtol=1e-5, atol=1e-5)
    end, expected = whole([r["end"] for r in resumed]), whole([r["end"] for r in results])
    for name in expected:
        torch.testing.assert_close(end[name], expected[name], rtol=1e-4, atol=2e-5, msg=name)


@pytest.mark.parametrize("readers", ["fused", "torch"])
def test_a_checkpoint_from_before_the_first_step_can_be_written_and_read(tmp_path: Path, readers: str) -> None:
    config = config_of(tmp_path, ALONE)
    (written,) = run_distributed(fused, 1, save_before_any_step, config)
    assert written["kinds"] == ["GroupAdam"]
    ways = {"fused": (fused, 1, resume_and_go_on, config), "torch": (resume_and_go_on, 1, config)}
    (resumed,) = run_distributed(*ways[readers])
    assert resumed["found"] == ("step_2", 2, 8, VOCAB) and len(resumed["rest"]) == 2
