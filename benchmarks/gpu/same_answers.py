"""The same answers from the same weights: this device in its precision against local layers in fp32 on the CPU.

``python -m benchmarks.gpu.same_answers``. Two processes, as CPU mode stands in for CUDA in the whole of one. The
first draws weights, rounds them to bf16, so that both can hold them, and computes in fp32; the second loads them by
their global names. Compared: logits, loss, gradients of a training step through the real engine, the merge index, and
a pack of three samples with the three alone.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu import answers_report, common
from benchmarks.packs import video_pack
from megatron_elva.config.merge_schedule import ResolvedPoint, resolve
from megatron_elva.config.schema import Config
from megatron_elva.layout import Pack, PackState, initial_state
from megatron_elva.model.decoder import MergeSchedule
from megatron_elva.model.elva import ElvaModel
from megatron_elva.model.inputs import prepare
from megatron_elva.model.merging import merge
from megatron_elva.model.weights import load_full, named_global_parameters
from megatron_elva.parallel.engine import Engine, build_chunks, layers_of
from megatron_elva.parallel.ranks import start, stop

NAME = "same_answers"
SHAPES = ((1.0, 0), (0.6, 1), (0.3, 2))
"""Of each sample: share of ``--frames``, and what is taken off the rows and columns of ``--grid``."""


@dataclass
class Choices:
    """What each merge point chose: recorded in one pass, repeated in another one.

    Attributes:
        made: ``[L]`` bool by merge point, on the host.
        replay: repeat them, and do not record.
    """

    made: dict[int, Tensor] = field(default_factory=dict)
    replay: bool = False

    def at(self, point: ResolvedPoint) -> Any:
        """Recorder or repeater of one point, in the form of `merging.Agree`."""

        def agree(chosen: Tensor) -> Tensor:
            if self.replay:
                return self.made[point.index].to(chosen.device)
            self.made[point.index] = chosen.cpu()
            return chosen

        return agree


@contextmanager
def merging_by(model: ElvaModel, config: Config, merging: str, choices: Choices) -> Iterator[list[PackState]]:
    """The model with a shipped merging, and what it chooses recorded or repeated; gives the state after each point."""
    decoder, before = model.decoder, model.decoder.schedule
    schedule = common.compose([f"merging={merging}"]).merging
    points = resolve(schedule, config.model.layers)
    decoder.schedule = MergeSchedule(points, schedule.survivor, config.pad_multiple)
    states: list[PackState] = []

    def merge_here(hidden: Tensor, state: PackState, point: ResolvedPoint) -> tuple[Tensor, PackState]:
        multiple = decoder.schedule.multiple
        merged, state = merge(hidden[:, 0], state, point, schedule.survivor, multiple, choices.at(point))
        states.append(state)
        return merged[:, None], state

    decoder.__dict__["_merge"] = merge_here
    try:
        yield states
    finally:
        del decoder.__dict__["_merge"]
        decoder.schedule = before


def samples(a: argparse.Namespace, config: Config) -> list[Pack]:
    """Three packs of one sample each, of different lengths, not padded."""
    return [
        video_pack(config.model, 1, max(2, round(share * a.frames)), max(2, a.grid - less), a.text, a.vocab, seed)
        for seed, (share, less) in enumerate(SHAPES)
    ]


def logits_of(model: ElvaModel, config: Config, pack: Pack, states: list[PackState]) -> dict[str, Tensor]:
    """Logits ``[K, V]`` fp32 of the tokens that are left, and where each was in the pack ``[K]``; on the host."""
    states.clear()
    device = next(model.parameters()).device
    with torch.no_grad():
        out = model(prepare(pack, config, device), with_loss=False)
    origin = (states[-1] if states else initial_state(pack.spec)).layout.origin.cpu()
    kept = origin >= 0
    return {"logits": out.float().cpu()[kept], "origin": origin[kept]}


def gradients_of(engine: Engine, config: Config, pack: Pack) -> dict[str, Tensor]:
    """Gradients of a training step by global name, fp32 on the host."""
    got = engine.gradients([prepare(pack, config, engine.ranks.device)])
    return {name: gradient.float().cpu() for name, gradient in got.items()}


def loss_of(model: ElvaModel, config: Config, pack: Pack) -> float:
    """Mean loss over the pack's targets."""
    inputs = prepare(pack, config, next(model.parameters()).device)
    assert inputs.loss is not None
    with torch.no_grad():
        return float((model(inputs) * inputs.loss.weights).sum() / inputs.loss.weights.sum())


def answers(a: argparse.Namespace, config: Config, reference: dict[str, Any] | None) -> dict[str, Any]:
    """All that is compared, from one process.

    Args:
        a: sizes.
        config: of this process, without merging.
        reference: what the first process gave; None: this is the first.
    """
    ranks = start(config.parallel, config.device, config.seed)
    (model,) = build_chunks(config, a.vocab, ranks)
    with torch.no_grad():
        if reference is None:
            for parameter in model.parameters():
                parameter.copy_(parameter.bfloat16())
            weights = {name: p.detach().clone() for name, p in named_global_parameters([model])}
        else:
            weights = reference["weights"]
            load_full([model], lambda name, shape: weights[name], 0, 1)
    engine = Engine(config, [model], ranks)
    singles = samples(a, config)
    pack = common.joined(singles, config.pad_multiple)
    out: dict[str, Any] = {"weights": weights if reference is None else None, "variants": {}}
    for merging in a.merging:
        choices = Choices()
        with merging_by(model, config, merging, choices) as states:
            found: dict[str, Any] = {"own": logits_of(model, config, pack, states)}
            found["index"] = [state.alive.cpu() for state in states]
            choices.made = reference["variants"][merging]["choices"] if reference else choices.made
            choices.replay = True  # from here on both merge the same tokens
            found["same"] = logits_of(model, config, pack, states) if choices.made else found["own"]
            found["loss"] = loss_of(model, config, pack)
            found["gradients"] = gradients_of(engine, config, pack)
            found["choices"] = choices.made
        out["variants"][merging] = found
    with merging_by(model, config, "none", Choices()) as states:
        alone = [logits_of(model, config, common.joined([single], config.pad_multiple), states) for single in singles]
        out["alone"] = torch.cat([one["logits"] for one in alone])
        out["together"] = logits_of(model, config, pack, states)["logits"]
    stop()
    return out


def _arguments(argv: Sequence[str]) -> argparse.Namespace:
    parser = common.options(
        NAME,
        __doc__,
        model="elva_1_5b",
        set=["model.layers=4"],
        frames=16,
        grid=12,
        text=64,
        vocab=8192,
        part_limit=400,
    )
    parser.add_argument("--precision", default="bf16", help="option of configs/precision on the device")
    parser.add_argument("--merging", nargs="+", default=["none", "fast"], help="options of configs/merging")
    parser.add_argument("--limit", type=float, default=2e-2, help="of relative differences of logits and of the loss")
    parser.add_argument("--gradient-limit", type=float, default=2e-2, help="of the whole gradient's")
    parser.add_argument("--exact-limit", type=float, default=1e-4, help="of fp32 with itself, three samples and alone")
    return parser.parse_args(argv)


def main(argv: Sequence[str]) -> int:
    """Compare and report; 1 where a limit is exceeded or a process failed."""
    a = _arguments(argv)
    if a.part:
        return _part(a)
    with tempfile.TemporaryDirectory() as scratch:
        where = [*argv, "--out", scratch]
        files = {part: Path(scratch, f"{part}.pt") for part in ("reference", "candidate")}
        # CPU mode stands in for a GPU that is not there, and libraries ask whether one is
        rows = {part: common.one_part(NAME, where, part, a.part_limit, part == "reference") for part in files}
        result = {**common.head(NAME, argv, a.device), "device_kind": a.device, "parts": rows}
        result |= {name: getattr(a, name) for name in ("model", "set", "precision", "merging", "vocab")}
        if any("failed" in row for row in rows.values()):
            result |= {"status": "failed", "checks": []}
        else:
            found = [torch.load(file) for file in files.values()]
            checks = answers_report.compared(found[0], found[1], a.limit, a.gradient_limit, a.exact_limit)
            passed = all(check["passed"] is not False for check in checks)
            result |= {"status": "ok" if passed else "failed", "checks": checks}
    return common.finish(NAME, a, result, answers_report.text(result))


def _part(a: argparse.Namespace) -> int:
    if a.part == "reference":
        config = common.configured(argparse.Namespace(**{**vars(a), "device": "cpu", "layers": "local"}), "fp32")
        out = answers(a, config, None)
    else:
        config = common.configured(a, a.precision)
        out = answers(a, config, torch.load(Path(a.out, "reference.pt")))
    torch.save(out, Path(a.out, f"{a.part}.pt"))
    about = {"layers": layers_of(config), "precision": config.precision.name, "device": config.device}
    return common.write_part(a, {**about, "depth": config.model.layers, "hidden": config.model.hidden})


if __name__ == "__main__":
    raise SystemExit(main(sys.argv[1:]))
