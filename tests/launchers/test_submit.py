"""The command line up to the point where something runs: dry run, refusals, help, the Slurm script."""

from __future__ import annotations

import json
import os
import re
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from launchers import executors
from launchers.submit import main
from launchers.tokenizer import tokenizer_size
from megatron_elva.config.build import load
from megatron_elva.config.compose import compose
from megatron_elva.parallel.carrier import message_tokens

SUBMIT = Path(__file__).resolve().parents[2] / "launchers" / "submit.py"


def test_dry_run_from_the_shell(tmp_path):
    command = [sys.executable, str(SUBMIT), "stage=2", "nodes=16", "dry_run=true"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert "128 ranks = nodes 16 x tasks 8 = tensor 4 x pipeline 2 x data 16, sequence parallel" in done.stdout
    assert "language model 7,615,616,512 + patch embedding 9,003,008 + projector 3,673,600" in done.stdout
    assert "28, 14 per pipeline rank" in done.stdout
    assert "157 a frame" in done.stdout
    assert "images 20%, videos 80%" in done.stdout
    assert re.search(
        r"weights [\d.]+, gradients [\d.]+, optimizer [\d.]+, activations [\d.]+, total [\d.]+ GiB", done.stdout
    )
    assert "#SBATCH --nodes=16" in done.stdout
    assert "note       data.sources.videos.shards" in done.stdout
    assert "a step has 905,216 at most, in 256 packs (train.accumulate 16 x data 16)" in done.stdout
    assert len(done.stdout.splitlines()) < 90
    assert list(tmp_path.iterdir()) == []


def test_dry_run_of_all_stages_fits_a_screen(capsys):
    assert main(["stage=all", "cluster=local", "dry_run=true", "run_dir=D"]) == 0
    text = capsys.readouterr().out
    assert text.count("4 ranks") == 3
    assert "from D/stage_2" in text
    assert "init_from=D/stage_1" not in text  # the stage before makes it, so it is not missing
    assert "sbatch" not in text
    assert len(text.splitlines()) < 60


def _rows(capsys, *arguments):
    """The rows of a dry run by name; the lines under a row belong to it."""
    assert main([*arguments, "dry_run=true"]) == 0
    rows, name = {}, ""
    for line in capsys.readouterr().out.splitlines():
        if line.startswith("  "):
            name = line[2:13].strip() or name
            rows.setdefault(name, []).append(line[13:])
    return rows


@pytest.mark.parametrize(
    ("arguments", "lines"),
    [
        ([], ["none"]),
        (["merging=pooling"], ["average of 2 frames at the input"]),
        (["merging=paper", "stage=1"], ["one frame: nothing merges"]),
        (
            ["merging=fast"],
            [
                "after layer 2 of 28: keep 40% of the cells; after layer 5: keep 20% of the cells; the first token "
                "of a run stays",
                "a video of 16 frames of 144 cells: 461 of 2,304 cell tokens left (20%), 27.9% of cell tokens x "
                "layers, without FRAME, LINE and text (counts known beforehand)",
            ],
        ),
        (
            ["merging=paper", "stage=3", "merging.survivor=last"],
            [
                "after layer 2 of 28: similarity above 0.6 merges; after layer 7: keep 50% of the cells; the last "
                "token of a run stays",
                "a video of 32 frames of 144 cells: at most 2,304 of 4,608 cell tokens left (50%), at most 62.5% of "
                "cell tokens x layers, without FRAME, LINE and text (a threshold's counts depend on the video)",
            ],
        ),
    ],
)
def test_dry_run_shows_merging(arguments, lines, capsys):
    assert _rows(capsys, *arguments)["merging"] == lines


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ([], "rows: messages between pipeline ranks are as long as their packs, lengths are exchanged first"),
        (
            ["parallel.carrier=fixed"],
            "fixed: every message between pipeline ranks has {largest:,} tokens over 4 tensor ranks (the largest pack)",
        ),
        (
            ["parallel.carrier=fixed", "parallel.carrier_tokens=600001", "parallel.sequence=false"],
            "fixed: every message between pipeline ranks has 600,001 tokens (parallel.carrier_tokens)",
        ),
        (
            ["parallel.carrier=fixed", "parallel.carrier_tokens=3999"],
            "fixed: every message between pipeline ranks has 4,000 tokens over 4 tensor ranks "
            "(parallel.carrier_tokens; the largest pack may need {largest:,})",
        ),
    ],
)
def test_dry_run_shows_the_carrier(arguments, text, capsys):
    largest = message_tokens(compose(["parallel.carrier=fixed"]))
    assert _rows(capsys, *arguments)["carrier"] == [text.format(largest=largest)]


def test_dry_run_without_a_pipeline_has_no_carrier(capsys):
    rows = _rows(capsys, "parallel.pipeline=1", "parallel.carrier=fixed")
    assert "carrier" not in rows
    assert "parallel.carrier=fixed: no effect with parallel.pipeline=1" in rows["note"]


def test_dry_run_counts_the_tokenizer(tmp_path, capsys):
    tokenizer = {"model": {"vocab": {"a": 0, "b": 1}}, "added_tokens": [{"id": 99, "content": "<x>"}]}
    (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert tokenizer_size(str(tmp_path)) == 100
    assert tokenizer_size(None) is None
    assert main(["cluster=local", f"data.tokenizer={tmp_path}", "dry_run=true"]) == 0
    text = capsys.readouterr().out
    assert "no tokenizer yet" not in text
    assert f"language model {592_000 + 128 * 128:,}" in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["stag=2"], "unknown key 'stag' (did you mean 'stage'?)"),
        (["cluster=local", "train.steps=0"], "train.steps=0: must be above 0"),
        (["merging=paper", "merging.kind=none", "dry_run=true"], "merging.kind=none: must be hierarchical with"),
        (["cluster=local", "data.root=/nowhere"], "/nowhere/images/train-*.tar: no such file (and 2 more"),
    ],
)
def test_refusals_are_one_line_and_exit_2(arguments, message, capsys):
    assert main(arguments) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ")
    assert message in err
    assert err.count("\n") == 1


def test_help(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"stage= +1 \| 2 \| 3 \| all", text)
    assert "cluster=" in text


def _data(folder):
    for kind in ("images", "videos"):
        (folder / kind).mkdir(parents=True)
        (folder / kind / "train-0.tar").touch()
    (folder / "tokenizer").mkdir()
    return f"data.root={folder}"


def test_slurm_chain(tmp_path, monkeypatch, capsys):
    tools = tmp_path / "bin"
    tools.mkdir()
    sbatch = tools / "sbatch"
    # keeps each script and the environment, and counts up from 100
    sbatch.write_text(
        f'#!/bin/bash\nn=$(ls {tmp_path}/kept.* 2>/dev/null | wc -l)\ncp "$1" {tmp_path}/kept.$n\n'
        f"env > {tmp_path}/env\necho Submitted batch job $((100 + n))\n"
    )
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    for name in ("sinfo", "squeue"):  # a real one would look for the cluster for a while
        (tools / name).write_text("#!/bin/sh\nexit 1\n")
        (tools / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tools}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("SLURM_CONF", "/etc/lab.conf")
    monkeypatch.setenv("SLURM_CPU_BIND", "mask")
    monkeypatch.setenv("SBATCH_ACCOUNT", "mine")
    monkeypatch.setenv("RANK", "3")
    run = tmp_path / "run"
    assert main(["stage=all", "model=tiny", "data=demo", _data(tmp_path / "corpus"), f"run_dir={run}"]) == 0
    scripts = [(tmp_path / f"kept.{i}").read_text() for i in range(3)]
    assert "--dependency" not in scripts[0]
    assert "#SBATCH --dependency=afterok:100" in scripts[1]
    assert "#SBATCH --dependency=afterok:101" in scripts[2]
    assert "#SBATCH --kill-on-invalid-dep=yes" in scripts[2]
    environment = (tmp_path / "env").read_text()
    assert "SLURM_CONF=/etc/lab.conf" in environment
    assert "SBATCH_ACCOUNT=mine" in environment
    assert "SLURM_CPU_BIND" not in environment
    assert "\nRANK=" not in environment
    assert os.environ["RANK"] == "3"
    assert load(run / "stage_2" / "config.yaml").init_from == str(run / "stage_1")
    assert (run / "stage_3" / "logs" / "102_submitted.pkl").is_file()
    assert "100, 101, 102 (slurm, 8 ranks, each after the one before)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("says", "perhaps_taken"),
    [("invalid partition specified: x", False), ("Batch job submission failed: Socket timed out on send/recv", True)],
)
def test_sbatch_that_refuses_ends_with_one_line_and_exit_1(tmp_path, monkeypatch, capsys, says, perhaps_taken):
    sbatch = tmp_path / "sbatch"
    sbatch.write_text(f"#!/bin/bash\necho 'sbatch: error: {says}' >&2\nexit 1\n")
    sbatch.chmod(sbatch.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    arguments = ["model=tiny", "data=demo", _data(tmp_path / "corpus"), f"run_dir={tmp_path}/run"]
    assert main(arguments) == 1
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith(f"error: sbatch refused the job: sbatch: error: {says}")
    assert ("look with `squeue --me`" in line) is perhaps_taken


def test_no_slurm_on_this_machine(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(executors.shutil, "which", lambda name: None)
    assert main(["model=tiny", "data=demo", _data(tmp_path / "corpus"), f"run_dir={tmp_path}/run"]) == 2
    assert "no sbatch on this machine" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_gpus_that_are_not_there(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    arguments = ["cluster=local", "device=cuda", _data(tmp_path / "corpus"), f"run_dir={tmp_path}/run"]
    assert main(arguments) == 2
    assert "CUDA_VISIBLE_DEVICES=1: must be numbers of at least tasks_per_node=4 GPUs" in capsys.readouterr().err
