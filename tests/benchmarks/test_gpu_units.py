"""What the figures of one GPU are computed from: comparisons, packs, traces, utilisation, parts that fail."""

from __future__ import annotations

import argparse
import math
import traceback
from types import SimpleNamespace

import pytest
import torch
from torch.autograd import DeviceType

from benchmarks import report
from benchmarks.gpu import answers_report, build, common, fp8_curves, install, prefill, state, trace
from benchmarks.gpu.training_speed import utilisation
from benchmarks.packs import video_pack
from megatron_elva.config.errors import ConfigError
from megatron_elva.layout import IGNORE, Kind, build_layout
from tests.builders import small_config, small_model
from tests.distributed import run_distributed


def answers(scale=1.0, index=(True, True, False)):
    """What one process of the comparison gives, its numbers scaled."""
    logits = scale * torch.arange(1.0, 7.0).view(3, 2)
    variant = {
        "own": {"logits": logits, "origin": torch.tensor([0, 1, 4])},
        "same": {"logits": logits},
        "index": [torch.tensor(index)],
        "loss": 2.0 * scale,
        "gradients": {"a": scale * torch.ones(2), "b": torch.ones(3)},
    }
    return {"variants": {"fast": variant}, "together": logits, "alone": logits}


def verdicts(found, expected, limit=0.02):
    checks = answers_report.compared(expected, found, limit, limit, 1e-4)
    return {check["name"]: check for check in checks}


def test_equal_answers_pass_and_others_do_not():
    same = verdicts(answers(), answers())
    assert all(check["passed"] is not False for check in same.values())
    off = verdicts(answers(1.05, (True, False, False)), answers())
    name = "fast: logits, same tokens merged"
    assert (off[name]["value"], off[name]["passed"]) == (pytest.approx(0.05), False)
    assert off["fast: loss, same tokens merged"]["passed"] is False
    gradients = off["fast: gradients, same tokens merged"]
    assert gradients["value"] == pytest.approx(0.05 * math.sqrt(2 / 5))
    assert off["fast: gradients, same tokens merged, worst parameter"]["note"] == "a"
    assert off["fast: merge index agreement behind point 1"]["value"] == pytest.approx(2 / 3)


def test_what_is_not_a_number_never_passes():
    checks = verdicts(answers(math.nan), answers())
    assert all(check["passed"] is False for check in checks.values() if check["limit"] == 0.02)


def test_logits_of_different_choices_are_compared_where_both_have_a_token():
    found, expected = answers(), answers()
    found["variants"]["fast"]["own"] = {
        "logits": torch.tensor([[1.0, 2.0], [9.0, 9.0], [5.0, 6.0]]),
        "origin": torch.tensor([0, 2, 4]),
    }
    check = verdicts(found, expected)["fast: logits, each with its own choice"]
    assert (check["value"], check["note"]) == (0, "2 tokens that both kept")


def test_joined_packs_keep_their_samples_and_are_padded():
    model = small_model()
    packs = [video_pack(model, 1, frames, 2, 5, 50, frames) for frames in (2, 3)]
    pack = common.joined(packs, 16)
    assert pack.spec.samples == tuple(p.spec.samples[0] for p in packs)
    assert pack.spec.tokens % 16 == 0 and pack.spec.padding > 0
    assert len(pack.tokens) == len(pack.labels) == pack.spec.tokens
    real = pack.spec.tokens - pack.spec.padding
    assert torch.equal(pack.tokens[:real], torch.cat([p.tokens for p in packs]))
    assert torch.equal(pack.labels[:real], torch.cat([p.labels for p in packs]))
    assert (pack.labels[real:] == IGNORE).all()
    again = common.joined([pack], 16)
    assert again.spec == pack.spec and torch.equal(again.labels, pack.labels)


def sizes(**changes):
    usual = {"frames": 2, "grid": 2, "text": 4, "vocab": 50, "videos": 16, "samples": 3, "steps": 11}
    return argparse.Namespace(**{**usual, **changes})


def test_the_text_follows_from_the_class_and_the_pixels_do_not_repeat():
    videos = fp8_curves.corpus(sizes(), small_config())
    for i in range(fp8_curves.CLASSES):
        again = videos[i + fp8_curves.CLASSES]
        assert torch.equal(videos[i].labels, again.labels)
        assert not torch.equal(videos[i].patches, again.patches)
    kind = build_layout(videos[0].spec).kind
    assert len({tuple(v.tokens[kind == Kind.TEXT].tolist()) for v in videos}) == fp8_curves.CLASSES


def test_every_run_sees_the_same_videos_in_the_same_order():
    batches = fp8_curves.batches(sizes())
    assert batches == fp8_curves.batches(sizes())
    assert [len(batch) for batch in batches] == [3] * 11
    assert sorted(v for batch in batches for v in batch)[:16] != list(range(16))
    assert sorted([v for batch in batches for v in batch][:16]) == list(range(16))


def test_curves_are_compared_with_the_first_bf16_run():
    runs = {
        "bf16": {"losses": [4.0] * 10 + [1.0] * 10},
        "fp8_delayed": {"losses": [4.5] * 10 + [1.5] * 10},
        "fp8_current": {"failed": "RuntimeError: no"},
        "fp8_blockwise": {"losses": [4.0] * 19 + [math.nan]},
    }
    rows = fp8_curves.compared(runs)
    assert set(rows) == {"bf16", "fp8_delayed", "fp8_blockwise"}
    assert rows["bf16"]["gap"] is None
    expected = {"first": 4.5, "last": 1.5, "last_over": 2, "fell": True, "gap": 0.5, "mean_distance": 0.5}
    assert rows["fp8_delayed"] == expected
    assert not rows["fp8_blockwise"]["fell"]


@pytest.mark.parametrize(("fp8", "peak"), [(False, 989.0), (True, 1978.0)])
def test_utilisation_is_of_the_peak_of_the_format(monkeypatch, fp8, peak):
    monkeypatch.setattr(report, "machine", lambda device: {"device": "NVIDIA H100 80GB HBM3"})
    row = utilisation({"fp8": fp8, "tflops_causal": 400.0, "tflops_full": 450.0}, "cuda")
    assert row["mfu_causal"] == pytest.approx(400 / peak)
    assert row["mfu_full"] == pytest.approx(450 / peak)
    assert row["mfu_causal_of_bf16_peak"] == pytest.approx(400 / 989)


def test_syncs_are_counted_by_their_kind():
    names = [
        "cudaStreamSynchronize",
        "Memcpy DtoH (Device -> Pageable)",
        "cudaStreamSynchronize",
        "Memcpy HtoD",
        "aten::mm",
    ]
    assert trace.count_syncs(names) == {
        "cudaStreamSynchronize": 2, "cudaDeviceSynchronize": 0, "cudaEventSynchronize": 0, "Memcpy DtoH": 1,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "group"),
    [
        (["nvjet_hsh_128x256_64x4_1x2_h_bz_coopA_NTT"], "GEMM"),
        (["cudnn_generated_fort_native_sdpa_sm90_flash_fprop_wgmma_f16"], "attention"),
        (["void at::native::vectorized_elementwise_kernel<4>", "aten::mul", "elva.merge"], "merge points"),
        (["indexSelectLargeIndex", "autograd::engine::evaluate_function: _MergeBackward"], "merge points"),
        (["void multi_tensor_apply_kernel", "elva.optimizer"], "optimizer"),
        (["void transformer_engine::cast_transpose_general_kernel"], "FP8 casts"),
        (["rmsnorm_bwd_finalize_tuned_kernel"], "norms"),
        (["something_else"], "other"),
    ],
)
def test_operations_are_grouped_by_name_and_by_what_called_them(names, group):
    assert trace.group_of(names) == group


def event(name, device, parent=None, kernels=(), microseconds=0.0, cpu=0.0):
    """An event as torch's profiler gives it."""
    return SimpleNamespace(
        name=name, device_type=device, cpu_parent=parent, kernels=list(kernels), self_cpu_time_total=cpu,
        time_range=SimpleNamespace(elapsed_us=lambda: microseconds), is_user_annotation=name.startswith("elva."),
    )  # fmt: skip


def test_device_time_is_summed_once_and_ranges_are_no_kernels():
    def kernel(name, microseconds):
        return SimpleNamespace(name=name, duration=microseconds)

    merge = event("elva.merge", DeviceType.CPU, kernels=[kernel("elva.merge", 900.0)])
    select = event("aten::index_select", DeviceType.CPU, merge, [kernel("indexSelect", 300.0)])
    other = event("aten::index_select", DeviceType.CPU, None, [kernel("indexSelect", 100.0)])
    device = [
        event("elva.merge", DeviceType.CUDA, microseconds=900.0),
        event("indexSelect", DeviceType.CUDA, microseconds=300.0),
        event("indexSelect", DeviceType.CUDA, microseconds=100.0),
        event("nvjet_gemm", DeviceType.CUDA, microseconds=500.0),  # launched by a library, so nobody called it
        event(
            "void elementwise_kernel<silu_kernel(TensorIteratorBase&)::{lambda()#1}>", DeviceType.CUDA, None, (), 50.0
        ),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, microseconds=700.0),
        event("Optimizer.step#AdamW.step", DeviceType.CPU),
    ]
    costs = trace.costs([merge, select, other, *device], on_gpu=True)
    expected = {"GEMM": 500e-6, "merge points": 300e-6, "indexing and sorting": 100e-6, "element-wise and sums": 50e-6}
    assert list(costs) == list(expected)
    assert costs == pytest.approx(expected)


def test_a_sync_is_placed_at_the_line_of_this_project():
    def frame(file, line, name):
        return traceback.FrameSummary(file, line, name, lookup_line=False)

    own = frame(str(state.ROOT / "megatron_elva" / "parallel" / "engine.py"), 7, "step")
    bench = frame(str(state.ROOT / "benchmarks" / "gpu" / "trace.py"), 9, "note")
    torch_line = frame("/lib/torch/_tensor.py", 3, "__float__")
    assert trace.place([bench, own]) == "megatron_elva/parallel/engine.py:7 step"
    assert trace.place([own, torch_line]) == "megatron_elva/parallel/engine.py:7 step -> _tensor.py:3 __float__"
    assert trace.place([bench, torch_line]) == "_tensor.py:3 __float__"


def spreads(config):
    """Mean and standard deviation of each weight, as a run draws it and as it is drawn on the device."""
    from megatron_elva.model.weights import named_global_parameters
    from megatron_elva.parallel.engine import build_chunks
    from megatron_elva.parallel.ranks import start

    ranks = start(config.parallel, "cpu", config.seed)
    models = [*build_chunks(config, config.model.vocab_size, ranks), build.model_on_device(config, ranks)]
    return [
        {name: (p.numel(), float(p.mean()), float(p.std())) for name, p in named_global_parameters([model])}
        for model in models
    ]


def test_weights_drawn_on_the_device_are_spread_as_those_of_a_run():
    ((drawn, on_device),) = run_distributed(spreads, 1, small_config(small_model(hidden=64, ffn_hidden=128)))
    assert drawn.keys() == on_device.keys()
    for name, (count, mean, std) in drawn.items():
        near = {"abs": 1e-6} if std == 0 else {"abs": 6 * std / math.sqrt(count)}
        assert on_device[name][1:] == (pytest.approx(mean, **near), pytest.approx(std, **near)), name


@pytest.mark.parametrize(
    ("log", "why"),
    [
        (["[rank0]:   File x", "[rank0]: torch.OutOfMemoryError: CUDA out of memory. Tried", "[rank0]: for debugging"],
         "torch.OutOfMemoryError: CUDA out of memory. Tried"),
        (["ValueError: a", "  raise", "megatron_elva.config.errors.ConfigError: b", "W: closing"],
         "megatron_elva.config.errors.ConfigError: b"),
        (["one", "Killed", ""], "Killed"),
        ([], None),
    ],
)  # fmt: skip
def test_the_reason_of_a_failure_is_its_last_error(log, why):
    assert common.reason(log) == why


def test_a_part_that_hangs_is_ended():
    found = common.one_part("state", ["cpu"], "any", limit=0)
    assert found["failed"] == "took more than 0 s"


def test_fp8_with_local_layers_is_refused():
    a = common.options("prefill", "", model="tiny", vocab=64).parse_args(["--device", "cpu", "--layers", "local"])
    with pytest.raises(ConfigError, match="local layers do not compute in FP8"):
        common.configured(a, "fp8_current")
    assert common.configured(a, "bf16").layers == "local"


def test_a_threshold_is_refused_where_weights_are_random(capsys):
    with pytest.raises(SystemExit):
        prefill.main(["--device", "cpu", "--merging", "paper"])
    assert "threshold" in capsys.readouterr().err


def test_what_is_missing_is_a_line_and_not_a_crash():
    passed, said = install.tried(lambda: str(1 / 0))
    assert (passed, said) == (False, "ZeroDivisionError: division by zero")
    checks = install.checks("cpu")
    assert checks["megatron-core"]["passed"] and checks["the model"]["passed"]
    assert not any(check["needed"] for name, check in checks.items() if name in ("DALI", "NVDEC", "Transformer Engine"))


def test_two_copies_of_a_library_are_found(monkeypatch):
    loaded = {"libcudnn.so.9": ["/a/libcudnn.so.9"], "libcudart.so.13": ["/a/x", "/b/x"]}
    monkeypatch.setattr(install, "cuda_libraries", lambda: loaded)
    assert install.one_copy() == "libcudnn.so.9 /a/libcudnn.so.9"
    loaded["libcudnn.so.9"].append("/b/libcudnn.so.9")
    with pytest.raises(RuntimeError, match=r"libcudnn\.so\.9 from /a/libcudnn\.so\.9 and /b/"):
        install.one_copy()


def test_the_version_of_the_code_changes_with_a_source(tmp_path, monkeypatch):
    (tmp_path / "benchmarks").mkdir()
    source = tmp_path / "benchmarks" / "a.py"
    monkeypatch.setattr(state, "ROOT", tmp_path)
    versions = []
    for text in ("x = 1", "x = 2", "x = 1"):
        source.write_text(text)
        state.code_version.cache_clear()
        versions.append(state.code_version())
    state.code_version.cache_clear()
    assert versions[0] == versions[2] != versions[1]
    assert state.commit() == "unknown"
    monkeypatch.setenv("COMMIT", "abc")
    assert state.commit() == "abc"
