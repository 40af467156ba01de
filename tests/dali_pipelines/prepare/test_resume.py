"""Runs that are killed, and what other runs make of the same folder."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import psutil
import pytest

from dali_pipelines.prepare.cli import main
from dali_pipelines.shards import ShardIndex
from tests.dali_pipelines.prepare.conftest import shard_bytes

MORE = ["--shard-samples=3", "--reencode=gop=6,crf=30,preset=slow", "--split=val=0.2"]


def start(given):
    return subprocess.Popen(
        [sys.executable, "-m", "dali_pipelines.prepare", *given], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
        start_new_session=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )  # fmt: skip


def progress(out):
    """What a run has done so far, as one number."""
    state = out / ".prepare"
    files = sum(path.read_text().count("\n") for path in (state / "journal").glob("*.jsonl"))
    # os.walk, as folders come and go meanwhile
    encoded = sum(name.endswith(".mp4") for _, _, names in os.walk(state / "encoded") for name in names)
    return files + len(list((state / "shards").glob("*.json"))) + encoded


def kill_at(given, out, at):
    """Kill a run without warning once it has done so much; False where it ended before. Its workers must go with it."""
    process = start(given)
    family = []
    while process.poll() is None and progress(out) < at:
        family = psutil.Process(process.pid).children(recursive=True) or family
        time.sleep(0.002)
    ended = process.poll() is not None
    if not ended:
        os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    _, alive = psutil.wait_procs(family, timeout=20)
    assert not alive
    return not ended


def test_killed_runs_give_the_same_shards_as_an_unbroken_one(prepare, tmp_path):
    unbroken = prepare(*MORE, out="unbroken")
    assert len(unbroken.shards) == 5
    out = tmp_path / "killed"
    given = [word.replace(str(unbroken.out), str(out)) for word in unbroken.given]
    kills = sum(kill_at(given, out, at) for at in (1, 16, 30))
    assert kills == 3
    assert main(given) == 0
    assert shard_bytes(out) == unbroken.shards
    assert not list(out.rglob("*.part")) and not (out / ".prepare/encoded").exists()
    assert (out / "report.jsonl").read_bytes() == (unbroken.out / "report.jsonl").read_bytes()
    made = [json.loads((folder / "manifest.json").read_text()) for folder in (out, unbroken.out)]
    assert made[0]["statistics"] == made[1]["statistics"] and made[0]["shards"] == made[1]["shards"]


def test_an_interrupted_run_says_how_to_go_on_and_leaves_no_process(prepare, tmp_path):
    unbroken = prepare(*MORE, out="unbroken")
    out = tmp_path / "interrupted"
    given = [word.replace(str(unbroken.out), str(out)) for word in unbroken.given]
    process = start(given)
    while process.poll() is None and progress(out) < 3:
        time.sleep(0.01)
    family = psutil.Process(process.pid).children(recursive=True)
    os.killpg(process.pid, signal.SIGINT)
    assert process.communicate(timeout=60)[1].splitlines()[-1] == "interrupted; the same command goes on"
    assert process.returncode == 130
    assert not psutil.wait_procs(family, timeout=20)[1]
    assert main(given) == 0
    assert shard_bytes(out) == unbroken.shards


@pytest.mark.slow
def test_killed_at_any_moment(prepare, tmp_path):
    unbroken = prepare(*MORE, out="unbroken")
    draw = random.Random(0)
    for round_ in range(4):
        out = tmp_path / f"killed{round_}"
        given = [word.replace(str(unbroken.out), str(out)) for word in unbroken.given]
        for _ in range(5):
            process = start(given)
            time.sleep(draw.uniform(1.5, 5.0))
            process.kill()
            process.communicate()
        assert main(given) == 0
        assert shard_bytes(out) == unbroken.shards


def test_the_number_of_workers_changes_nothing(prepare):
    one, three = (prepare(*MORE, f"--workers={n}", out=f"w{n}") for n in (1, 3))
    assert one.shards == three.shards


def test_a_finished_run_does_nothing_more(prepare):
    run = prepare()
    shard = run.out / "train-00000.tar"
    before = shard.stat().st_mtime_ns
    prepare()
    assert shard.stat().st_mtime_ns == before


@pytest.mark.parametrize("more", [(), ("--reencode=gop=6",)])
def test_a_shard_that_was_lost_is_written_again(prepare, more):
    run = prepare("--shard-samples=4", *more)
    (run.out / "train-00001.tar").unlink()
    (run.out / "train-00002.tar").write_bytes(b"short")
    assert prepare("--shard-samples=4", *more).shards == run.shards
    assert all(len(ShardIndex(path)) for path in run.out.glob("*.tar"))


def test_other_settings_or_annotations_are_refused_until_restart(prepare, annotations, capsys):
    run = prepare("--shard-samples=4")
    (run.out / "mine.txt").touch()
    prepare("--shard-samples=5", expect=2)
    assert "shard_samples" in capsys.readouterr().err
    annotations.write_text(annotations.read_text().replace("Clip 1.", "Clip one."))
    prepare("--shard-samples=4", expect=2)
    assert "the annotations" in capsys.readouterr().err
    assert shard_bytes(run.out) == run.shards
    new = prepare("--shard-samples=8", "--restart")
    assert list(new.shards) == ["train-00000.tar", "train-00001.tar"]
    assert (run.out / "mine.txt").exists()


def test_two_runs_at_once_are_refused(prepare, capsys):
    from dali_pipelines.prepare.run import _alone

    run = prepare()
    with _alone(run.room, 0):
        for more in ((), ("--restart",), ("--retry-bad",)):
            assert prepare(*more, expect=2).shards == run.shards
    assert "right now" in capsys.readouterr().err


def test_bad_files_are_looked_at_again_where_that_is_wanted(prepare, annotations, media):
    run = prepare()
    (annotations.parent / "broken.mp4").write_bytes((media / "sub/v2.mp4").read_bytes()[:-1] + b"!")
    assert prepare().shards == run.shards
    mended = prepare("--retry-bad")
    made = json.loads((run.out / "manifest.json").read_text())
    assert made["samples"] == 16 and mended.shards != run.shards


def test_shards_of_another_preparation_are_not_mixed_in(prepare, capsys):
    run = prepare("--shard-samples=1")
    shutil.rmtree(run.out / ".prepare")
    assert main([*run.given[:-1], "--shard-samples=4"]) == 2
    assert "holds shards of a preparation whose .prepare folder is gone" in capsys.readouterr().err
    again = prepare("--shard-samples=4", "--restart")
    made = json.loads((again.out / "manifest.json").read_text())
    assert len(list(again.out.glob("*.tar"))) == len(made["shards"])


def test_what_cannot_be_written_is_one_line(prepare, tmp_path, capsys):
    (tmp_path / "file").write_text("")
    run = prepare()
    given = [word.replace(str(run.out), str(tmp_path / "file" / "x")) for word in run.given]
    assert main(given) == 1
    assert capsys.readouterr().err.splitlines()[-1].endswith("the same command goes on")
