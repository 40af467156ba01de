"""The whole loop through the launcher and under torchrun, on real files with bad ones among them."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

from dali_pipelines.tokenizer import train_tokenizer
from megatron_elva.training.metrics import StepMetrics
from megatron_elva.training.runs import checkpoints
from tests.dali_pipelines.make_samples import encode, encode_audio, image, textured_frames, write_shard

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow

GOOD = 20
LONG = "word " * 900


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    """Good videos and images of several sizes, and one of every kind of bad sample."""
    folder = tmp_path_factory.mktemp("corpus")
    clip = encode(textured_frames(6, 56, 56))
    samples = [
        (f"good{i:02d}", {"json": {"caption": f"Clip {i}."}, "mp4": encode(textured_frames(1 + i % 7, 40 + 3 * i, 57))})
        for i in range(GOOD)
    ]
    samples += [
        (f"image{i}", {"json": {"caption": f"Picture {i}."}, "png": image(textured_frames(1)[0])}) for i in "ab"
    ]
    bad = {
        "empty": b"",
        "truncated": clip[: len(clip) // 2],
        "audio": encode_audio(),
        "unreadable": bytes(range(256)) * 9,
    }
    samples += [(name, {"json": {"caption": "Bad."}, "mp4": data}) for name, data in bad.items()]
    samples += [
        ("nocaption", {"json": {"caption": "  "}, "mp4": clip}),
        ("longcaption", {"json": {"caption": LONG}, "mp4": clip}),
    ]
    write_shard(folder / "videos-0.tar", samples)
    train_tokenizer(["Clip 0 1 2 3 4 5 6 7 8 9. Picture a b. Describe the video. word"] * 30, 320, folder / "tokenizer")
    return folder


def overrides(corpus: Path, run_dir: Path, *more: str) -> list[str]:
    return [
        "stage=2", "cluster=local", "data=clips", f"data.root={corpus}", f"run_dir={run_dir}", "train.steps=8",
        "train.checkpoint_every=4", "train.global_batch=8", "train.warmup_steps=2", "model.hidden=64",
        "tracking.mlflow=false", *more,
    ]  # fmt: skip


def submit(*command: str) -> None:
    done = subprocess.run(
        [sys.executable, str(ROOT / "launchers" / "submit.py"), *command, "follow=true"],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def metrics(run_dir: Path) -> dict[int, dict]:
    """The last line of each step."""
    return {m["step"]: m for m in map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())}


@pytest.fixture(scope="module")
def unbroken(corpus, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "unbroken"
    submit(*overrides(corpus, folder))
    return folder


def test_a_run_directory_has_what_the_contract_says(unbroken):
    lines = metrics(unbroken)
    assert sorted(lines) == list(range(1, 9))
    assert all(set(m) == {f.name for f in fields(StepMetrics)} for m in lines.values())
    assert [c.step for c in checkpoints(unbroken)] == [4, 8]
    assert (unbroken / "config.yaml").is_file() and (unbroken / "tokenizer" / "tokenizer.json").is_file()
    assert lines[8]["loss"] < lines[1]["loss"] - 1
    assert all(m["loss_mse"] is None and m["loss_con"] is None for m in lines.values())


def test_bad_samples_are_skipped_counted_and_named(unbroken):
    lines = metrics(unbroken)
    named = [json.loads(x) for x in (unbroken / "logs" / "skipped_0.jsonl").read_text().splitlines()]
    assert sum(m["skipped_samples"] for m in lines.values()) == len(named) > 0
    assert [m["samples"] for m in lines.values()] == [8 * s for s in lines]
    reasons = {x["key"].rsplit("/", 1)[-1]: x["reason"] for x in named}
    # 64 samples are drawn from 28, so every bad one came up
    assert set(reasons) == {"empty", "truncated", "audio", "unreadable", "nocaption", "longcaption"}
    assert "audio" in reasons["audio"] or "video" in reasons["audio"]
    assert "data.max_text_tokens" in reasons["longcaption"]


def same_steps(a: dict[int, dict], b: dict[int, dict], steps: range) -> None:
    for step in steps:
        for key in ("loss", "grad_norm", "lr", "samples", "visual_tokens_in", "skipped_samples"):
            assert a[step][key] == b[step][key], f"step {step}: {key}"


def test_k_steps_and_resume_equal_an_unbroken_run_bit_for_bit(corpus, unbroken, tmp_path):
    broken = tmp_path / "broken"
    shutil.copytree(unbroken, broken)
    shutil.rmtree(broken / "checkpoints" / "step_8")
    half_written = broken / "checkpoints" / "step_6"
    shutil.copytree(broken / "checkpoints" / "step_4", half_written)
    (half_written / "complete.json").unlink()
    (broken / "metrics.jsonl").unlink()
    submit(*overrides(corpus, broken))
    again = metrics(broken)
    assert sorted(again) == [5, 6, 7, 8]
    same_steps(again, metrics(unbroken), range(5, 9))


def test_torchrun_at_another_layout_sees_the_same_samples_and_losses(corpus, unbroken, tmp_path):
    command = ["-m", "torch.distributed.run", "--nproc-per-node=2", "-m", "megatron_elva.training.train"]
    layout = ["parallel.tensor=1", "parallel.pipeline=1", "tasks_per_node=2"]  # two replicas
    done = subprocess.run(
        [sys.executable, *command, *overrides(corpus, tmp_path / "run", *layout)],
        cwd=ROOT, capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    ours, theirs = metrics(tmp_path / "run"), metrics(unbroken)
    for step in range(1, 9):
        assert ours[step]["visual_tokens_in"] == theirs[step]["visual_tokens_in"]
        assert ours[step]["loss"] == pytest.approx(theirs[step]["loss"], rel=2e-4)


def test_bad_input_ends_with_code_2_and_one_line(corpus, tmp_path):
    for wrong, words in {
        "train.stepz=3": ("train.stepz", "train.steps"),
        "parallel.tensor=3": ("parallel.tensor", "heads"),
        "data.root=/nowhere": ("data.sources.videos.shards", "/nowhere"),
    }.items():
        done = subprocess.run(
            [sys.executable, str(ROOT / "launchers" / "submit.py"), *overrides(corpus, tmp_path / "none", wrong)],
            cwd=ROOT, capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 2, done.stderr
        assert done.stderr.count("\n") == 1 and all(w in done.stderr for w in words), done.stderr
    assert not (tmp_path / "none").exists()
