"""The figures of one GPU, at tiny sizes on a CPU: every module as a user runs it, and what its figures rest on."""

from __future__ import annotations

import json
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from importlib import import_module

import pytest

from megatron_elva.config.compose import compose
from megatron_elva.layout import PackSpec, SampleSpec, VideoSpec
from megatron_elva.training.flops import training_flops

SHAPE = ["--device", "cpu", "--model", "tiny", "--frames", "4", "--grid", "4", "--text", "12", "--vocab", "64"]
TIMED = ["--warmup", "1", "--repeats", "3"]
STEPS = 16
COMMANDS = {
    "same_answers": ["--gradient-limit", "0.05"],
    "fp8_curves": ["--samples", "4", "--videos", "8", "--steps", str(STEPS)],
    "training_speed": ["--micro", "2", "--precision", "bf16", "fp8_current", *TIMED],
    "prefill": TIMED,
    "profile_step": TIMED,
}


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Exit status, figures, text and folder of each module; what they measure runs in processes of its own."""
    folder = tmp_path_factory.mktemp("gpu")

    def run(name):
        status = import_module(f"benchmarks.gpu.{name}").main([*SHAPE, *COMMANDS[name], "--out", str(folder)])
        figures, text = (folder / f"gpu_{name}.{kind}" for kind in ("json", "md"))
        return name, (status, json.loads(figures.read_text()), text.read_text(), folder)

    with pytest.MonkeyPatch.context() as patched, ThreadPoolExecutor(2) as pool:
        patched.setenv("OMP_NUM_THREADS", "1")
        return dict(pool.map(run, COMMANDS))


@pytest.mark.parametrize("name", COMMANDS)
def test_every_result_has_its_origin_and_calls_a_cpu_a_rehearsal(runs, name):
    _, result, text, _ = runs[name]
    assert {"command", "date", "commit", "code", "device", "versions", "status"} <= set(result)
    assert result["command"].endswith(" ".join([f"benchmarks.gpu.{name}", *SHAPE, *COMMANDS[name]]))
    assert "A rehearsal on a CPU" in text


def test_bf16_gives_the_answers_of_fp32_within_limits(runs):
    status, result, text, _ = runs["same_answers"]
    checks = {check["name"]: check for check in result["checks"]}
    assert (status, result["status"]) == (0, "ok")
    judged = [name for name, check in checks.items() if check["limit"] is not None]
    assert len(judged) == 8
    assert all(checks[name]["passed"] and 0 < checks[name]["value"] < checks[name]["limit"] for name in judged)
    # bf16 has 8 bits, so logits closer than this would not have been computed in it
    assert checks["none: logits"]["value"] > 1e-3
    assert checks["pack of three against the three alone, logits, fp32 on CPU"]["value"] < 1e-5
    for point in (1, 2):
        assert 0.5 < checks[f"fast: merge index agreement behind point {point}"]["value"] <= 1
    assert text.count(" met |") == 8


def test_both_seeds_learn_and_are_told_apart(runs):
    status, result, text, folder = runs["fp8_curves"]
    assert status == 0
    assert list(result["runs"]) == ["bf16", "bf16, other seed"]
    for name, run in result["runs"].items():
        assert len(run["losses"]) == len(run["seconds"]) == STEPS
        assert run["losses"][-1] < 0.5 * run["losses"][0]
        assert result["compared"][name]["fell"]
    assert result["runs"]["bf16"]["losses"][0] != result["runs"]["bf16, other seed"]["losses"][0]
    assert result["compared"]["bf16, other seed"]["mean_distance"] > 0
    assert (folder / "gpu_fp8_curves.png").read_bytes().startswith(b"\x89PNG")
    assert "gpu_fp8_curves.png" in text


def test_figures_of_training_fit_together(runs):
    _, result, text, _ = runs["training_speed"]
    rows = result["rows"]
    spec = PackSpec((SampleSpec((VideoSpec.uniform(4, 4, 4), 12)),) * 3)
    model = compose(["model=tiny"]).model
    for name, left in (("bf16, none", 64), ("bf16, fast", 16)):
        row = rows[name]
        median = sorted(row["seconds"]["step"])[1]
        assert row["tokens"] == 2 * 3 * (4 * (1 + 4 * 5) + 12)
        assert row["tokens"] - row["tokens_out"] == 2 * 3 * (64 - left)
        assert row["tokens_per_s"] * median == pytest.approx(row["tokens"])
        assert row["tflops_causal"] * median * 1e12 == pytest.approx(row["flops_causal"])
        assert row["flops_causal"] < row["flops_full"]
        assert 0 < row["optimizer_share"] < 1
        assert row["loss_tokens"] == 2 * 3 * 12
        assert row["peak_gib"] is row["mfu_causal"] is row["mfu_full"] is None
        assert f"{row['tokens_per_s']:,.0f}" in text
    assert rows["bf16, none"]["flops_causal"] == pytest.approx(2 * training_flops(model, 64, spec, 36))
    assert rows["bf16, fast"]["flops_causal"] < rows["bf16, none"]["flops_causal"]


def test_a_precision_that_cannot_run_fails_alone(runs):
    status, result, text, _ = runs["training_speed"]
    assert (status, result["status"]) == (1, "failed")
    assert set(result["rows"]) == {"bf16, none", "bf16, fast", "fp8_current"}
    why = result["rows"]["fp8_current"]["failed"]
    assert "Transformer Engine" in why
    assert why in text


def test_a_prefill_says_what_merging_left(runs):
    status, result, _, _ = runs["prefill"]
    assert status == 0
    none, fast = result["rows"]["bf16, none"], result["rows"]["bf16, fast"]
    # 20% of 64 cells is fewer than the 16 places, each of which keeps one
    assert [none["cells_kept"], fast["cells_kept"]] == [1, 0.25]
    assert fast["tokens_out"] == none["tokens_out"] - 48 == none["tokens"] - 48
    assert fast["flops_causal"] < none["flops_causal"] < none["flops_full"]
    for row in (none, fast):
        assert row["tokens_per_s"] * sorted(row["seconds"]["prefill"])[1] == pytest.approx(row["tokens"])
        assert row["mfu_causal"] is None
    assert "keep 40%" in fast["schedule"]


def test_a_profile_names_the_largest_costs(runs):
    status, result, text, _ = runs["profile_step"]
    assert status == 0
    for name, row in result["rows"].items():
        shares = list(row["costs"].values())
        assert shares == sorted(shares, reverse=True)
        assert row["largest"] == list(row["costs"])[:3]
        assert sum(shares) == pytest.approx(row["profiled_s"])
        assert {"GEMM", "attention", "optimizer"} <= set(row["costs"])
        assert ("merge points" in row["costs"]) == (name == "fast")
        assert set(row["syncs"].values()) == {0}
        assert f"Largest costs: {row['largest'][0]}" in text


@pytest.mark.slow
def test_both_decoders_give_the_frames_that_were_asked_for(tmp_path):
    words = (
        "--sizes 360p --codec libvpx-vp9 --seconds 1 --rate 8 --frames 4 --files 1 --batch 2 --processes 1 --rounds 1"
    )
    command = [sys.executable, "-m", "benchmarks.gpu.decode", "--device", "cpu", *words.split(), "--out", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    rows = json.loads((tmp_path / "gpu_decode.json").read_text())["rows"]
    assert list(rows) == ["360p, PyAV, all cores", "360p, PyAV, one core", "360p, DALI on the device"]
    for row in rows.values():
        (seconds,) = row["seconds"]
        assert row["frames_per_s"]["median"] * seconds == pytest.approx(row["frames"])
    assert rows["360p, DALI on the device"]["frames"] == 2 * 2 * 4
