"""Each known clash is found in a snapshot that has it and nothing else, and none in a healthy machine."""

from __future__ import annotations

from dataclasses import replace

import pytest

from megatron_elva.doctor import pairs
from megatron_elva.doctor.snapshot import Gpu
from tests.doctor.machines import H100, HEALTHY, REQUIRES, TORCH, VERSIONS, probes

L40 = Gpu("NVIDIA L40S", (8, 9), 48.0)
A100 = Gpu("NVIDIA A100-SXM4-80GB", (8, 0), 85.0)
BROKEN_TE = {"imported": False, "runs": None, "error": "OSError: undefined symbol"}
TE_215 = {**VERSIONS, **dict.fromkeys(
    ("transformer-engine", "transformer-engine-torch", "transformer-engine-cu13"), "2.15.0")}  # fmt: skip
CUDNN = "/usr/local/cuda/lib64/libcudnn.so.9.10.2"


def versions(**changed: str) -> dict[str, str]:
    return {**VERSIONS, **{name.replace("_", "-"): version for name, version in changed.items()}}


def without(*names: str) -> dict[str, str]:
    return {name: version for name, version in VERSIONS.items() if name not in names}


CLASHES = [
    ("packages", "bad", {"versions": without("transformers")}, "transformers", "pip install 'transformers<6,>=5.0'"),
    ("packages", "bad", {"versions": versions(numpy="3.0.1")}, "numpy 3.0.1", "pip install 'numpy<3,>=1.26'"),
    ("packages", "bad", {"versions": versions(transformers="4.57.0")}, "4.57.0 (wanted", "transformers<6,>=5.0"),
    ("GPU packages", "warning", {"versions": versions(nvidia_dali_cuda130="2.1.0")}, "2.1.0", "cuda130==2.4.0"),
    ("Python version", "bad",
     {"versions": versions(megatron_core="0.17.0"), "requires_python": {"megatron-core": ">=3.12"}},
     "megatron-core 0.17.0 wants >=3.12", "environment"),
    ("Python version", "bad",
     {"python": "3.13.1", "requires_python": HEALTHY.requires_python}, "megatron-elva", "environment"),
    ("torch build", "bad", {"probes": probes(torch={"version": "2.11.0+cpu", "cuda": None, "gpus": 0})},
     "without CUDA", "whl/cu130"),
    ("torch build", "bad", {"probes": probes(torch={"version": "2.11.0+cpu", "cuda": None, "gpus": 0},
                                             driver={"cuda": [12, 8]}), "versions": without("nvidia-dali-cuda130")},
     "without CUDA", "whl/cu126"),
    ("torch and driver", "bad", {"probes": probes(torch={"gpus": 0}, driver={"cuda": [12, 8]}),
                                 "versions": without("nvidia-dali-cuda130")},
     "CUDA 13.0, the driver supports 12.8", "update the NVIDIA driver"),
    ("visible GPUs", "warning", {"environ": {"CUDA_VISIBLE_DEVICES": "0,1"}, "probes": probes(torch={"gpus": 2})},
     "2 of 8 GPUs: CUDA_VISIBLE_DEVICES=0,1", "unset"),
    ("torch and GPU", "bad", {"probes": probes(torch={"archs": ["sm_80", "sm_90a"]}),
                              "gpus": (Gpu("NVIDIA B200", (10, 0), 180.0),) * 8}, "sm_100", "built for this GPU"),
    ("TE and cuBLAS", "bad", {"versions": TE_215, "probes": probes(te=BROKEN_TE)}, "13.1.0.3", ">=2.17"),
    ("TE and cuBLAS", "bad", {"versions": TE_215, "probes": probes(te=BROKEN_TE, torch={"grouped": None})},
     "Transformer Engine 2.15.0", ">=2.17"),
    ("TE and LD_BIND_NOW", "bad", {"environ": {"LD_BIND_NOW": "1"}}, "LD_BIND_NOW=1", "unset LD_BIND_NOW"),
    ("two copies", "bad", {"probes": probes(te={"libraries": {"libcudnn.so.9": ["/a/libcudnn.so.9", CUDNN]}})},
     f"libcudnn.so.9 from /a/libcudnn.so.9 and {CUDNN}", "export CUDNN_HOME=/site/nvidia/cudnn"),
    ("two copies", "warning", {"probes": probes(te={"libraries": {"libnvrtc.so.13": ["/a/nvrtc", "/b/nvrtc"]}})},
     "libnvrtc.so.13", "LD_LIBRARY_PATH"),
    ("TE and cuDNN", "bad", {"probes": probes(te=BROKEN_TE), "cudnn_first": (CUDNN, "9.10.2")},
     f"cuDNN 9.10.2 at {CUDNN}, torch brings 9.19.0", "export CUDNN_HOME=/site/nvidia/cudnn"),
    ("TE and CUDA headers", "warning", {"cuda_headers": None}, "cuda_runtime.h",
     "export NVTE_CUDA_INCLUDE_DIR=/site/nvidia/cu13/include"),
    ("parts of TE", "bad", {"versions": versions(transformer_engine_cu13="2.16.0")}, "transformer-engine-cu13 2.16.0",
     "transformer-engine[core_cu13,pytorch]>=2.14"),
    ("TE and torch", "bad", {"versions": {**without("transformer-engine-cu13"), "transformer-engine-cu12": "2.17.1"}},
     "transformer-engine-cu12 with a torch of CUDA 13.0", "core_cu13"),
    ("FP8", "warning", {"gpus": (A100,) * 8}, "compute capability 8.0", "precision=bf16"),
    ("FP8 blockwise", "warning", {"gpus": (H100,) * 7 + (L40,)}, "compute capability 8.9", "fp8_current"),
    ("FP8 blockwise", "warning", {"probes": probes(torch={"cuda": "12.8", "cublas": [12, 8, 4]}),
                                  "versions": without("transformer-engine-cu13")}, "CUDA 12.8", "12.9"),
    ("DALI and driver", "bad", {"probes": probes(driver={"cuda": [12, 8]})}, "nvidia-dali-cuda130", "cuda120"),
    ("DALI twice", "bad", {"versions": versions(nvidia_dali_cuda120="2.4.0")}, "cuda120 and nvidia-dali-cuda130",
     "pip uninstall nvidia-dali-cuda120 nvidia-dali-cuda130"),
    ("Triton and compiler", "bad", {"compiler": None}, "no C compiler", "python3.11-dev"),
    ("Triton and compiler", "bad", {"python_header": False}, "no Python.h", "python3.11-dev"),
]  # fmt: skip


def test_a_healthy_machine_has_no_clash():
    assert list(pairs.findings(HEALTHY)) == []


@pytest.mark.parametrize(("topic", "state", "changed", "said", "remedy"), CLASHES, ids=[c[0] for c in CLASHES])
def test_a_clash_is_told_with_its_remedy(topic, state, changed, said, remedy):
    (found,) = pairs.findings(replace(HEALTHY, **changed))
    assert (found.topic, found.state) == (topic, state)
    assert said in found.there and remedy in found.remedy
    assert "\n" not in found.there + found.remedy


def test_every_rule_has_such_a_machine():
    assert {rule.name for rule in pairs.RULES} == {clash[0] for clash in CLASHES}


@pytest.mark.parametrize(
    "changed",
    [
        {"versions": TE_215},  # it was imported, so the symbol is there
        {"versions": TE_215, "probes": probes(te=BROKEN_TE, torch={"grouped": True})},
        {"probes": probes(te=BROKEN_TE)},  # 2.17 and later open it lazily
        {"probes": probes(te=BROKEN_TE), "cudnn_first": ("/usr/lib/libcudnn.so.9.19.0", "9.19.0")},
        {"probes": probes(te=BROKEN_TE), "cudnn_first": ("/site/nvidia/cudnn/lib/libcudnn.so.9", None)},
        {"cuda_headers": None, "environ": {"NVTE_DISABLE_NVRTC": "1"}},
        {"probes": probes(driver={"cuda": [13, 1]})},
        {"probes": probes(torch={"cuda": "13.2"})},  # a minor version of CUDA works with any driver of its major one
        {"probes": probes(driver={"cuda": [12, 8]}), "versions": without("nvidia-dali-cuda130")},  # compat package
        {"versions": {**versions(nvidia_dali_cuda130="9"), "megatron-elva": "1"}, "requires": REQUIRES[:4]},
        {"gpus": (), "compiler": None, "cuda_headers": None, "probes": probes(torch={**TORCH, "cuda": None})},
        {"gpus": (Gpu("NVIDIA RTX PRO 6000", (12, 0), 96.0),) * 8},
    ],
)
def test_what_only_looks_like_a_clash_is_none(changed):
    assert list(pairs.findings(replace(HEALTHY, **changed))) == []


def test_an_old_driver_speaks_against_torch_and_dali():
    old = replace(HEALTHY, probes=probes(torch={"gpus": 0}, driver={"cuda": [12, 2]}))
    assert [found.topic for found in pairs.findings(old)] == ["torch and driver", "DALI and driver"]
