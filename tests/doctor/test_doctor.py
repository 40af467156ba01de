"""The command as a user runs it: on this machine, on one with nothing, on pretended ones; and what it says of each."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_elva import cli
from megatron_elva.doctor import hardware, libraries
from megatron_elva.doctor.report import as_json, as_text, say
from megatron_elva.doctor.snapshot import Gpu, Limits, Snapshot
from tests.doctor.machines import (
    HEALTHY,
    REQUIRES,
    ROOT,
    VERSIONS,
    by_topic,
    probes,
    run_doctor,
    write_distribution,
    write_package,
    write_program,
)  # fmt: skip

ANYTHING = """
class Anything:
    def __getattr__(self, name): return self
    def __call__(self, *args, **kwargs): return self
    def __enter__(self): return self
    def __exit__(self, *error): return False
"""
TORCH = (
    ANYTHING
    + """
__version__ = "2.11.0+cu130"
class version: cuda = "13.0"
class backends:
    class cudnn: version = staticmethod(lambda: 91900)
class cuda:
    is_available = staticmethod(lambda: True)
    device_count = staticmethod(lambda: 8)
    get_arch_list = staticmethod(lambda: ["sm_80", "sm_90"])
    synchronize = staticmethod(lambda: None)
    class nccl: version = staticmethod(lambda: (2, 28, 9))
def __getattr__(name): return Anything()
"""
)
TE = (
    ANYTHING
    + """
def autocast(enabled, recipe):
    if recipe == "blockwise": raise RuntimeError("no such product")
    return Anything()
def __getattr__(name): return Anything()
"""
)
RECIPES = "\n".join(
    f"def {kind}(): return {name!r}"
    for name, kind in (("delayed", "DelayedScaling"), ("current", "Float8CurrentScaling"),
                       ("blockwise", "Float8BlockScaling"))
)  # fmt: skip
SMI = "for _ in range(8): print('NVIDIA H100 80GB HBM3, 580.95.05, 81559, Exclusive_Process, 9.0')"


@pytest.fixture(scope="module")
def python(tmp_path_factory) -> Path:
    """An interpreter without any package."""
    folder = tmp_path_factory.mktemp("bare")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(folder)], check=True)
    return folder / "bin" / "python"


@pytest.fixture
def checkout(tmp_path) -> Path:
    """The code alone, as in a fresh clone that nobody has installed."""
    folder = tmp_path / "checkout"
    folder.mkdir()
    for name in ("megatron_elva", "dali_pipelines"):
        (folder / name).symlink_to(ROOT / name)
    return folder


@pytest.fixture
def empty(tmp_path) -> Path:
    """A folder for programs."""
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def test_on_this_machine():
    done = subprocess.run(
        [sys.executable, "-m", "megatron_elva", "doctor", "--json"], capture_output=True, text=True, timeout=120,
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    found, report = by_topic(done), json.loads(done.stdout)
    assert found["torch"]["there"].startswith(torch.__version__)
    assert found["megatron-core"]["state"] == found["video"]["state"] == "ok"
    assert {"GPU", "driver", "NVDEC", "Transformer Engine", "apex", "Triton", "DALI", "Slurm"} <= set(found)
    assert all(f["remedy"] for f in report["findings"] if f["state"] != "ok")
    if not torch.cuda.is_available():
        assert "layers=local on CPU" in report["runs"]["line"]
        assert report["runs"]["layers"] == "local" and report["runs"]["fp8"] == []
        assert "PyAV" in report["runs"]["video"]
    if not Path("/dev/nvidiactl").exists():
        assert done.returncode == 0 and report["bad"] == 0, "what is missing on a CPU machine is not bad"


def test_on_a_machine_with_nothing(python, checkout, empty):
    done = run_doctor(python, path=empty, packages=(checkout,))
    assert done.stderr == ""
    lines = done.stdout.splitlines()
    assert done.returncode == 1
    assert lines[-1] == "training here: nothing until this is mended: torch, megatron-core"
    assert lines[-2] == "3 bad: torch, megatron-core, video"
    assert any(line.startswith("Python") and "megatron-elva is not installed" in line for line in lines)


def test_on_a_machine_that_knows_what_it_lacks(python, checkout, empty, tmp_path):
    site = tmp_path / "site"
    site.mkdir()
    write_distribution(site, "megatron-elva", "0.1.0", REQUIRES)
    found = by_topic(run_doctor(python, "--json", path=empty, packages=(checkout, site)))
    assert found["packages"]["there"] == "not installed: torch, megatron-core, transformers, numpy"
    assert found["torch"]["remedy"] == "pip install 'torch>=2.11,<2.14'"
    assert found["GPU"]["state"] in ("missing", "warning")
    assert found["Slurm"]["state"] == "missing" and "cluster=local" in found["Slurm"]["remedy"]


@pytest.fixture
def node(tmp_path, empty) -> Path:
    """Packages of a node with eight GPUs, of which each takes one process at a time."""
    site = tmp_path / "site"
    write_package(site, "torch", TORCH)
    write_package(site, "transformer_engine", "__version__ = '2.17.1'")
    write_package(site, "transformer_engine.pytorch", TE)
    write_package(site, "transformer_engine.common")
    write_package(site, "transformer_engine.common.recipe", RECIPES)
    write_package(site, "megatron.core", "__version__ = '0.16.1'")
    write_package(site, "megatron.core.transformer")
    write_package(site, "megatron.core.transformer.transformer_layer")
    for name in ("torch", "megatron-core", "transformers", "numpy", "transformer-engine"):
        write_distribution(site, name, VERSIONS[name])
    write_distribution(site, "megatron-elva", "0.1.0", REQUIRES)
    write_program(empty, "nvidia-smi", SMI)
    return site


def test_on_a_node_of_eight_gpus(python, checkout, empty, node):
    done = run_doctor(python, "--json", path=empty, packages=(checkout, node))
    found, report = by_topic(done), json.loads(done.stdout)
    assert found["GPU"]["there"] == "8 x NVIDIA H100 80GB HBM3 (compute capability 9.0, 86 GB each)"
    assert found["torch"]["there"] == "2.11.0+cu130, CUDA 13.0, cuDNN 9.19.0, NCCL 2.28.9; sees 8 GPUs"
    assert found["Transformer Engine"]["state"] == "ok"
    assert "blockwise fails: RuntimeError: no such product" in found["Transformer Engine"]["there"]
    assert report["runs"]["line"].startswith(
        "training here: layers=te on 8 x NVIDIA H100 80GB HBM3; FP8: precision=fp8_delayed, precision=fp8_current; "
    )
    assert report["runs"]["fp8"] == ["delayed", "current"]


def test_libraries_that_crash_and_hang_are_findings(python, checkout, empty, node):
    write_package(node, "transformer_engine.pytorch", "import os; os.kill(os.getpid(), 11)")
    write_package(node, "nvidia.dali", "import time; time.sleep(600)")
    write_distribution(node, "nvidia-dali-cuda130", "2.4.0")
    done = run_doctor(python, "--json", "--timeout", "4", path=empty, packages=(checkout, node))
    found = by_topic(done)
    assert found["Transformer Engine"]["state"] == "bad" and "killed by SIGSEGV" in found["Transformer Engine"]["there"]
    assert found["DALI"]["state"] == "bad" and "no answer within 4 s" in found["DALI"]["there"]
    assert "--timeout" in found["DALI"]["remedy"]
    assert done.returncode == 1
    assert json.loads(done.stdout)["runs"]["layers"] == "local"


def topics(snapshot: Snapshot, part) -> dict:
    return {finding.topic: finding for finding in part.findings(snapshot)}


def test_a_healthy_node_has_nothing_to_mend():
    report = say(HEALTHY)
    assert report.bad == 0 and {f.topic for f in report.findings if f.state != "ok"} == {"apex"}
    assert report.verdict.line == (
        "training here: layers=te on 8 x NVIDIA H100 80GB HBM3; FP8: precision=fp8_delayed, precision=fp8_current, "
        "precision=fp8_blockwise; video: DALI on cuda:0 for h264 (yuv420p); PyAV for the rest"
    )


def test_text_and_json_say_the_same():
    report = say(replace(HEALTHY, environ={"LD_BIND_NOW": "1"}, limits=Limits(64 << 20, 1024, 4096, 8 << 20)))
    text, read = as_text(report), json.loads(as_json(report))
    lines = text.splitlines()
    for finding in read["findings"]:
        (at,) = [i for i, line in enumerate(lines) if line.split()[0:1] == finding["topic"].split()[0:1]
                 and finding["there"] in line]  # fmt: skip
        assert finding["state"] in lines[at]
        assert not finding["remedy"] or lines[at + 1].strip() == f"-> {finding['remedy']}"
    assert lines[-2] == "1 bad: TE and LD_BIND_NOW" and lines[-1] == read["runs"]["line"]
    assert read["bad"] == 1


def test_small_limits_are_told_with_what_to_do():
    found = topics(replace(HEALTHY, limits=Limits(64 << 20, 1024, 65536, 8 << 20)), hardware)
    assert [found[t].state for t in ("/dev/shm", "open files", "InfiniBand")] == ["warning"] * 3
    assert "--shm-size" in found["/dev/shm"].remedy and found["open files"].remedy.startswith("`ulimit -n 65536`")
    assert "memlock" in found["InfiniBand"].remedy
    hard = topics(replace(HEALTHY, limits=Limits(None, 1024, 2048, None)), hardware)
    assert "administrator" in hard["open files"].remedy
    assert (
        topics(replace(HEALTHY, gpus=(), limits=Limits(None, 1024, 4096, None)), hardware)["open files"].state == "ok"
    )


@pytest.mark.parametrize(
    ("changed", "topic", "state", "said"),
    [
        ({"gpus": (), "smi_trouble": "Failed to initialize NVML: Driver/library version mismatch", "on_the_bus": 8},
         "GPU", "bad", "version mismatch"),
        ({"gpus": (), "smi_trouble": "No devices were found"}, "GPU", "missing", "none"),
        ({"gpus": (), "on_the_bus": 8}, "GPU", "warning", "8 NVIDIA GPUs on the PCI bus"),
        ({"probes": probes(driver={"error": "OSError: libcuda.so.1: cannot open"})}, "driver", "bad", "libcuda.so.1"),
        ({"probes": probes(nvdec={"error": "OSError: libnvcuvid.so.1"})}, "NVDEC", "warning", "libnvcuvid.so.1"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_the_hardware(changed, topic, state, said):
    found = topics(replace(HEALTHY, **changed), hardware)[topic]
    assert found.state == state and said in found.there and found.remedy


@pytest.mark.parametrize(
    ("changed", "topic", "state", "said"),
    [
        ({"versions": {**VERSIONS, "apex": "0.9.10.dev0"},
          "probes": probes(apex={"nvidia": False, "import_error": ["ImportError", "ImportError: x"], "guarded": True})},
         "apex", "warning", "PyPI's, a web toolkit, not NVIDIA's"),
        ({"probes": probes(apex={"nvidia": False, "import_error": ["SyntaxError", "x"], "guarded": False})},
         "apex", "bad", "not NVIDIA's"),
        ({"versions": {**VERSIONS, "apex": "0.1"}, "probes": probes(apex={"nvidia": True, "extensions": ["amp_C"]})},
         "apex", "ok", "NVIDIA's 0.1, with amp_C"),
        ({"probes": probes(torch={"refused": "cuda:3: no kernel image"})}, "torch", "bad", "cuda:3: no kernel image"),
        ({"probes": probes(te={"runs": {"bf16": "RuntimeError: no kernel image"}})},
         "Transformer Engine", "bad", "a layer does not run: RuntimeError: no kernel image"),
        ({"gpus": (), "probes": probes(te={"runs": None, "imported": False, "error": "OSError: libcuda.so.1"})},
         "Transformer Engine", "warning", "libcuda.so.1"),
        ({"probes": probes(decoding={"error": "killed by SIGSEGV"})}, "video", "bad", "SIGSEGV"),
        ({"probes": probes(megatron={"error": "ImportError: x"})}, "megatron-core", "bad", "ImportError: x"),
    ],
)  # fmt: skip
def test_what_is_wrong_with_a_library(changed, topic, state, said):
    found = topics(replace(HEALTHY, **changed), libraries)[topic]
    assert found.state == state and said in found.there
    assert found.remedy or state == "ok"


@pytest.mark.parametrize(
    ("changed", "line"),
    [
        ({"probes": probes(torch={"gpus": 0})}, "layers=local on CPU (device=cpu); FP8: none"),
        ({"probes": probes(te=None)}, "layers=local on 8 x NVIDIA H100 80GB HBM3; FP8: none"),
        ({"probes": probes(te={"runs": None})}, "FP8: precision=fp8_delayed, precision=fp8_current, precision=fp8_bl"),
        ({"probes": probes(te={"runs": None}), "gpus": (Gpu("L40S", (8, 9)),) * 8},
         "8 x L40S; FP8: precision=fp8_delayed, precision=fp8_current;"),
        ({"probes": probes(te={"error": "killed by SIGSEGV", "runs": {**dict.fromkeys(("bf16", "delayed")),
                                                                     "current": "it crashed or hung"}})},
         "layers=te on 8 x NVIDIA H100 80GB HBM3; FP8: precision=fp8_delayed;"),
        ({"probes": probes(megatron={"error": "x"})}, "training here: nothing until this is mended: megatron-core"),
    ],
)  # fmt: skip
def test_the_last_line_says_what_runs(changed, line):
    assert line in say(replace(HEALTHY, **changed)).verdict.line


def test_the_command_explains_itself(capsys):
    for words in (["--help"], ["doctor", "--help"]):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 0 and "known clashes" in capsys.readouterr().out
    for words, said in (([], "required: COMMAND"), (["docter"], "invalid choice: 'docter'")):
        with pytest.raises(SystemExit) as ended:
            cli.main(words)
        assert ended.value.code == 2 and said in capsys.readouterr().err


def test_the_command_loads_nothing_heavy():
    heavy = {"torch", "numpy", "yaml", "megatron.core", "packaging"}
    code = f"import sys, megatron_elva.cli, megatron_elva.doctor.report; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert done.stdout == "[]\n"
