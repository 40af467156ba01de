"""`metrics.jsonl`: its keys are a contract."""

from __future__ import annotations

import json
import resource
from dataclasses import replace

from megatron_elva.training.metrics import MetricsWriter, StepMetrics, progress_line

KEYS = [
    "step", "stage", "samples", "loss", "loss_gen", "loss_mse", "loss_con", "grad_norm", "lr", "visual_tokens_in",
    "visual_tokens_out", "tokens_per_s", "tflops_per_gpu", "mfu", "data_wait_s", "step_s", "skipped_samples",
    "pack_fill", "time", "tokens", "tokens_out", "tokens_out_per_s", "samples_per_s", "frames", "frames_per_s",
    "video_bytes", "bytes_per_s", "flops_per_gpu", "compute_s", "checkpoint_s", "other_s",
]  # fmt: skip
LINE = StepMetrics(
    step=3, stage=2, samples=96, loss=1.5, loss_gen=1.25, loss_mse=None, loss_con=0.25, grad_norm=0.5, lr=1e-4,
    visual_tokens_in=1000, visual_tokens_out=500, tokens_per_s=12345.6, tflops_per_gpu=3.5, mfu=None, data_wait_s=0.01,
    step_s=2.0, skipped_samples=0, pack_fill=None, time=1.8e9, tokens=24691, tokens_out=24191, tokens_out_per_s=12095.5,
    samples_per_s=16.0, frames=64, frames_per_s=32.0, video_bytes=10**6, bytes_per_s=5e5, flops_per_gpu=7e12,
    compute_s=1.5, checkpoint_s=0.25, other_s=0.24,
)  # fmt: skip


def test_a_line_has_exactly_the_keys_of_the_contract_and_null_where_nothing_applies(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(LINE)
    (text,) = path.read_text().splitlines()
    line = json.loads(text)
    assert list(line) == KEYS
    assert line["loss_mse"] is None and line["mfu"] is None
    assert (line["step"], line["stage"], line["samples"], line["loss"]) == (3, 2, 96, 1.5)


def test_each_line_is_on_disk_before_the_next_step(tmp_path):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        for step in (1, 2):
            writer.write(replace(LINE, step=step))
            text = path.read_text()
            assert text.endswith("\n") and json.loads(text.splitlines()[-1])["step"] == step


def test_a_resumed_run_appends(tmp_path):
    path = tmp_path / "metrics.jsonl"
    for steps in ((1, 2, 3), (3, 4)):
        with MetricsWriter(path) as writer:
            for step in steps:
                writer.write(replace(LINE, step=step))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [1, 2, 3, 3, 4]


def test_what_a_killed_run_left_of_a_line_does_not_spoil_the_next(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st')
    with MetricsWriter(path) as writer:
        writer.write(LINE)
    whole, torn, last = path.read_text().splitlines()
    assert json.loads(whole) == {"step": 1} and torn == '{"st' and json.loads(last)["step"] == 3


def test_the_pace_is_that_of_the_last_steps_without_the_slow_first_one(tmp_path):
    with MetricsWriter(tmp_path / "metrics.jsonl") as writer:
        assert writer.pace_s == 0
        writer.write(replace(LINE, step_s=60.0))
        assert writer.pace_s == 60  # better than nothing
        for seconds in (1.0, 3.0):
            writer.write(replace(LINE, step_s=seconds))
        assert writer.pace_s == 2
        for _ in range(50):
            writer.write(replace(LINE, step_s=4.0))
        assert writer.pace_s == 4


def test_the_progress_line_says_how_much_is_left():
    line = progress_line(replace(LINE, skipped_samples=4), steps=100, pace_s=2.0)
    assert "step 3/100" in line and "loss 1.500" in line and "12,346 tokens/s  16.0 samples/s" in line
    assert "2.00 s/step" in line and "left 3:14" in line  # 97 steps of 2 s
    assert "skipped 4" in line and "skipped" not in progress_line(LINE, 100, 2.0)
    assert "left 5:23:20" in progress_line(LINE, 100, 200.0)
    assert "\n" not in line


def test_the_progress_line_tells_the_utilisation_where_it_is_known():
    assert "MFU" not in progress_line(LINE, 100, 2.0)
    assert "MFU 41.3%" in progress_line(replace(LINE, mfu=0.4131), 100, 2.0)


def test_lines_that_a_full_disk_does_not_take_are_written_when_it_has_room(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    with MetricsWriter(path) as writer:
        writer.write(LINE)
        size = path.stat().st_size
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size + 10, hard))  # a part of the next line fits
        try:
            for step in (4, 5):
                writer.write(replace(LINE, step=step))
            assert path.stat().st_size == size + 10
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert capsys.readouterr().out.count("its lines are kept") == 1
        writer.write(replace(LINE, step=6))
    assert [json.loads(line)["step"] for line in path.read_text().splitlines()] == [3, 4, 5, 6]
