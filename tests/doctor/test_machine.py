"""What the programs and files of a machine say, with programs and files that the test writes."""

from __future__ import annotations

import pytest

from megatron_elva.doctor import machine, slurm
from megatron_elva.doctor.machine import Shown
from megatron_elva.doctor.snapshot import Gpu, Slurm
from tests.doctor.machines import write_program


@pytest.fixture
def programs(tmp_path, monkeypatch):
    """The only folder with programs."""
    monkeypatch.setenv("PATH", str(tmp_path / "bin"))
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    (tmp_path / "bin").mkdir()
    return tmp_path / "bin"


def test_without_its_programs_there_is_nothing(programs):
    assert machine.ask_smi(30) == Shown()
    assert slurm.read(30) == Slurm()
    assert machine.compiler({}) is None


def test_nvidia_smi_is_read(programs):
    write_program(programs, "nvidia-smi", """
        print("NVIDIA H100 80GB HBM3, 580.95.05, 81559, Default, 9.0")
        print("NVIDIA H100 80GB HBM3, 580.95.05, 81559, Exclusive_Process, 9.0")
        print("NVIDIA GB10, 580.95.05, [N/A], Default, 12.1")
        """)  # fmt: skip
    shown = machine.ask_smi(30)
    h100 = Gpu("NVIDIA H100 80GB HBM3", (9, 0), pytest.approx(85.52, abs=0.01))
    assert shown.driver == "580.95.05" and shown.trouble is None
    assert shown.gpus[0] == h100
    assert [gpu.exclusive for gpu in shown.gpus] == [False, True, False]
    assert shown.gpus[2] == Gpu("NVIDIA GB10", (12, 1), None)


def test_an_old_nvidia_smi_is_asked_for_less(programs):
    write_program(programs, "nvidia-smi", """
        import sys
        if "compute_cap" in " ".join(sys.argv):
            sys.exit('Field "compute_cap" is not a valid field to query.')
        print("Tesla V100-SXM2-32GB, 450.80.02, 32510, Default")
        """)  # fmt: skip
    (gpu,) = machine.ask_smi(30).gpus
    assert (gpu.name, gpu.capability) == ("Tesla V100-SXM2-32GB", None)


def test_an_nvidia_smi_that_fails_or_hangs_is_told(programs):
    write_program(programs, "nvidia-smi", """
        print("Failed to initialize NVML: Driver/library version mismatch")
        raise SystemExit(18)
        """)  # fmt: skip
    assert machine.ask_smi(30) == Shown(trouble="Failed to initialize NVML: Driver/library version mismatch")
    write_program(programs, "nvidia-smi", "import time; time.sleep(600)")
    assert machine.ask_smi(1) == Shown(trouble="no answer within 1 s")
    write_program(programs, "nvidia-smi", "print('No devices were found')")
    assert machine.ask_smi(30) == Shown(trouble="No devices were found")


def test_slurm_is_read(programs, monkeypatch):
    write_program(programs, "sinfo", """
        import sys
        if "--version" in sys.argv:
            print("slurm 23.11.4")
        else:
            print("gpu*|16|2-00:00:00|gpu:h100:8(S:0-1)")
            print("debug|2|30:00|(null)")
        """)  # fmt: skip
    for name in ("sbatch", "srun", "squeue", "scontrol"):
        write_program(programs, name, "")
    monkeypatch.setenv("SLURM_JOB_ID", "4711")
    partitions = (("gpu*", "16", "2-00:00:00", "gpu:h100:8(S:0-1)"), ("debug", "2", "30:00", "(null)"))
    assert slurm.read(30) == Slurm("slurm 23.11.4", partitions, None, ("sacct",), "4711")


def test_a_slurm_without_its_controller_is_told(programs):
    write_program(programs, "sinfo", """
        import sys
        if "--version" in sys.argv:
            print("slurm 23.11.4")
        else:
            sys.exit("slurm_load_partitions: Unable to contact slurm controller (connect failure)")
        """)  # fmt: skip
    found = slurm.read(30)
    assert found.version == "slurm 23.11.4"
    assert "Unable to contact slurm controller" in found.trouble


def test_the_cudnn_that_transformer_engine_finds_first(tmp_path):
    site, toolkit = tmp_path / "site", tmp_path / "cuda-12.9"
    own = site / "nvidia" / "cudnn" / "lib"
    own.mkdir(parents=True)
    (own / "libcudnn.so.9").touch()
    other = toolkit / "targets" / "x86_64-linux" / "lib"
    other.mkdir(parents=True)
    (other / "libcudnn.so.9.10.2").touch()
    (other / "libcudnn.so.9").symlink_to("libcudnn.so.9.10.2")
    environ = {"CUDA_HOME": str(toolkit)}
    assert machine.first_cudnn(environ, str(site)) == (str((other / "libcudnn.so.9.10.2").resolve()), "9.10.2")
    remedied = {**environ, "CUDNN_HOME": str(own.parent)}
    assert machine.first_cudnn(remedied, str(site)) is None


def test_the_cuda_headers_that_transformer_engine_finds(tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "_TOOLKIT", str(tmp_path / "none"))
    headers = tmp_path / "site" / "nvidia" / "cu13" / "include"
    headers.mkdir(parents=True)
    (headers / "cuda_runtime.h").touch()
    site = str(tmp_path / "site")
    assert machine.cuda_headers({}, site) is None  # it does not look there by itself
    assert machine.cuda_headers({"NVTE_CUDA_INCLUDE_DIR": str(headers)}, site) == str(headers)
    assert machine.cuda_headers({"CUDA_HOME": str(headers.parent)}, site) == str(headers)
