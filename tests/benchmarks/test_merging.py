"""The comparison of times: a tiny run, and the parts that its figures rest on."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks import merging_report, packs
from benchmarks.merging import Shape, configured, expectation, variants
from benchmarks.timing import Clock, Probe
from megatron_elva.layout import IGNORE, Kind, build_layout
from tests.builders import small_model

TINY = ["--model", "tiny", "--frames", "4", "--grid", "3", "--text", "8", "--vocab", "64", "--steps", "2"]
NAMES = ["none", "pooling", "hierarchical", "paper", "fast"]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of the command: its figures and its text."""
    folder = tmp_path_factory.mktemp("merging")
    files = {kind: folder / f"out.{kind}" for kind in ("json", "md")}
    command = [sys.executable, "-m", "benchmarks.merging", *TINY]
    command += [word for kind, file in files.items() for word in (f"--{kind}", str(file))]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == files["md"].read_text()
    return json.loads(files["json"].read_text()), done


def test_what_merging_leaves(run):
    (shape,) = run[0]["shapes"]
    found = shape["variants"]
    assert list(found) == NAMES
    other = 4 * (1 + 3) + 8
    assert {name: found[name]["tokens_in"] for name in NAMES} == {
        name: 2 * 13 + 8 if name == "pooling" else 36 + other for name in NAMES
    }
    assert [found[n]["cells_kept"] for n in ("none", "pooling", "hierarchical")] == [1, 0.5, 0.5]
    # 40% of 36 is 15 cells; 20% would be 8, but each of the 9 places keeps one
    assert [p["kept"] for p in found["fast"]["cells_kept_by_point"]] == [15 / 36, 9 / 36]
    threshold, budget = found["paper"]["cells_kept_by_point"]
    assert 9 / 36 <= threshold["kept"] < 1
    assert budget["kept"] == min(threshold["kept"], 0.5)
    for name in ("hierarchical", "paper", "fast"):
        variant = found[name]
        assert variant["tokens_out"] - other == pytest.approx(36 * variant["cells_kept"])
        assert [layers for layers, _ in variant["groups"]] == [1, 3]


def test_times_fit_together(run):
    (shape,) = run[0]["shapes"]
    for name, variant in shape["variants"].items():
        seconds, ratio = variant["seconds"], variant["ratio"]
        assert all(len(values) == 2 for values in seconds.values())
        for i in range(2):
            part = {key: values[i] for key, values in seconds.items()}
            assert 0 <= part["merge"] < part["decoder"] < part["step"]
            assert part["prefill_merge"] < part["prefill_decoder"] < part["prefill"]
            merges = ("merge_forward", "merge_backward", "merge_sequence")
            assert part["merge"] == pytest.approx(sum(part[m] for m in merges))
            assert all((part[m] > 0) == (name not in ("none", "pooling")) for m in merges)
        assert all(0 < ratio[key]["min"] <= ratio[key]["median"] <= ratio[key]["max"] for key in ratio)
        assert (ratio["step"]["median"] == 1) == (name == "none")


def test_what_was_expected_is_said_before_it_is_measured(run):
    result, done = run
    lines = done.stderr.splitlines()
    expected = [i for i, line in enumerate(lines) if "expected of" in line]
    measured = [i for i, line in enumerate(lines) if " round " in line]
    assert len(expected) == 5
    assert len(measured) == 10
    assert max(expected) < min(measured)
    for variant in result["shapes"][0]["variants"].values():
        bounds = variant["expected"]["decoder_flops_share"]
        assert bounds[0] - 1e-9 <= variant["decoder_flops_share"] <= bounds[-1] + 1e-9


def test_targets_are_shown_whether_met_or_not(run):
    result, done = run
    targets = result["shapes"][0]["targets"]
    assert [t["limit"] for t in targets] == [0.7, 0.03, 0.03, 0.03]
    assert all(t["met"] == (t["found"] <= t["limit"]) for t in targets)
    verdicts = ["met" if t["met"] else "NOT MET" for t in targets]
    shown = [
        line.rsplit("|", 2)[1].strip()
        for line in done.stdout.splitlines()
        if line.endswith("met |") or line.endswith("NOT MET |")
    ]
    assert shown == verdicts


def test_a_slow_merge_misses_its_target():
    def variant(merge, decoder):
        seconds = {"step": [1.0], "decoder": [decoder], "prefill": [1.0], "prefill_decoder": [1.0], "merge": [merge]}
        return {"seconds": seconds, "expected": {"decoder_flops_share": [0.6], "merge_share": 0.01}}

    measured = {"variants": {"none": variant(0.0, 0.8), "hierarchical": variant(0.04, 0.6)}}
    targets = merging_report.summarised(measured)["targets"]
    assert [(t["found"], t["met"]) for t in targets] == [(pytest.approx(0.75), False), (0.04, False)]


def test_the_expected_share_of_the_full_shape():
    # by hand: 46,792,704 weights a layer; 5,088 tokens, and 2,784 behind the point after layer 1 of 4
    shape = Shape("video", "elva_1_5b", 4, 1, 32, 12, 64, 512)
    config = configured(shape, "cpu", "fp32")
    pack = packs.video_pack(config.model, 1, 32, 12, 64, 512, 0)

    def layer(n):
        return 2 * 46_792_704 * n + 2 * n * n * 1536

    (share,) = expectation(config, variants()["hierarchical"], pack)["decoder_flops_share"]
    assert share == pytest.approx((layer(5088) + 3 * layer(2784)) / (4 * layer(5088)))
    low, high = expectation(config, variants()["paper"], pack)["decoder_flops_share"]
    assert low < high == share


def test_parts_are_timed_where_they_run():
    """A part that sleeps in both directions takes that long in both, and its surroundings are not in it."""

    class Sleeps(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, seconds):
            ctx.seconds = seconds
            time.sleep(seconds)
            return x * 2

        @staticmethod
        def backward(ctx, grad):
            time.sleep(ctx.seconds)
            return grad * 2, None

    probe = Probe(Clock(torch.device("cpu")))
    part = probe.timed("part", lambda x: (Sleeps.apply(x, 0.05), None), tensors=True)
    x = torch.ones(3, requires_grad=True)
    out, _ = part(Sleeps.apply(x, 0.2))
    Sleeps.apply(out, 0.2).sum().backward()
    assert x.grad.tolist() == [8, 8, 8]
    for direction in ("forward", "backward"):
        assert 0.05 <= probe.total(f"part_{direction}") < 0.2
    assert probe.total("part_forward", skip=1) == 0


def test_pixels_stand_still_at_the_top_and_drift_at_the_bottom():
    model = small_model(cell_reduction=2)
    pack = packs.video_pack(model, samples=2, frames=5, grid=6, text=7, vocab=50, seed=1)
    assert pack.spec.tokens == 2 * (5 * 43 + 7)
    pixels = pack.patches.view(2, 5, 6, 6, -1).float() - 127.5
    step = (pixels[:, 1:] - pixels[:, :-1]).abs().mean((0, 1, 3, 4))
    assert step[0] < 10 < step[-1]
    kind = build_layout(pack.spec).kind
    assert (pack.tokens[kind != Kind.TEXT] == 0).all()
    # every text token is predicted, from the position in front of it
    assert int((pack.labels != IGNORE).sum()) == 2 * 7
    assert (pack.labels[:-1][kind[1:] == Kind.TEXT] == pack.tokens[1:][kind[1:] == Kind.TEXT]).all()


def test_the_stored_figures_have_their_origin():
    stored = json.loads((Path(merging_report.__file__).parent / "results" / "merging_cpu.json").read_text())
    assert {"command", "date", "device", "cores", "versions", "dtype"} <= set(stored)
    for shape in stored["shapes"]:
        assert merging_report.summarised(shape)["targets"] == shape["targets"]
