"""Saving beside training: what is saved is the state at the save, it counts when it is whole, and failures are told."""

from __future__ import annotations

import errno
import math
import os
import random
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import torch

from megatron_elva.config.errors import InputError
from megatron_elva.config.schema import Config, ParallelConfig
from megatron_elva.training.runs import MARKER, checkpoints
from tests.distributed import run_distributed
from tests.training.test_checkpoint import (
    BF16,
    TP2PP2SP,
    VOCAB,
    build,
    config_of,
    resume_and_go_on,
    same_weights,
    shards,
    train,
    whole,
)

DP2 = ParallelConfig(tensor=1, pipeline=1, sequence=False)


def saver_of(engine, ranks, config: Config):
    from megatron_elva.training.saver import Saver

    return Saver(engine, config, VOCAB, ranks)


def pause(saver) -> psutil.Process:
    """Stop this rank's writing process where it is; it has only begun."""
    process = psutil.Process(saver._writer.pid)
    process.suspend()
    return process


def poll(saver, ranks):
    """What the loop does after each step."""
    from megatron_elva.parallel.collectives import sum_over_ranks

    return saver.settle(*sum_over_ranks(saver.progress(), ranks))


def finish(saver, ranks):
    while (report := poll(saver, ranks)) is None:
        time.sleep(0.01)
    return report


def save_beside_training(config: Config) -> dict:
    """Two steps, a checkpoint that is being written during two more, and a second that has to wait for the first."""
    engine, ranks = build(config)
    first = train(engine, ranks, range(2))
    saver = saver_of(engine, ranks, config)
    at = shards(engine, ranks)
    saver.save(2, 8, {"lanes": {str(ranks.data): 1}} if ranks.is_reader else None, wait=False)
    process = pause(saver)
    rest = train(engine, ranks, range(2, 4))
    assert poll(saver, ranks) is None and not checkpoints(Path(config.run_dir))
    process.resume()
    held = saver.save(4, 16, None, wait=False)
    pause(saver).resume()
    report = poll(saver, ranks)
    assert (report.step, report.path.name) == (2, "step_2") and 0 < report.held_s < report.seconds and held > 0
    last = saver.close(wait=True)
    assert last.step == 4 and not psutil.Process().children()
    return {"weights": at, "first": first, "rest": rest, "end": shards(engine, ranks)}


@pytest.mark.parametrize(
    ("parallel", "world", "precision"),
    [(TP2PP2SP, 4, None), (DP2, 2, None), (DP2, 2, BF16)],
    ids=["tp2pp2", "dp2", "dp2-bf16"],
)
def test_what_is_written_beside_training_is_the_state_at_the_save(tmp_path, parallel, world, precision):
    config = config_of(tmp_path, parallel, **({"precision": precision} if precision else {}))
    before = run_distributed(save_beside_training, world, config)
    assert {p.name for p in (tmp_path / "checkpoints" / "step_2").glob("data_*")} == {
        f"data_{i}.json" for i in range(world // (parallel.tensor * parallel.pipeline))
    }
    sizes = [(tmp_path / "checkpoints" / "step_2" / f"__{r}_0.distcp").stat().st_size for r in range(world)]
    assert min(sizes) > max(sizes) / 3, sizes  # each data rank writes its own share
    shutil.move(tmp_path / "checkpoints" / "step_4", tmp_path / "step_4")
    after = run_distributed(resume_and_go_on, world, config)
    for a, b in zip(before, after, strict=True):  # the further steps are as exact only with the optimizer's state
        assert b["found"] == ("step_2", 2, 8, VOCAB) and b["rest"] == a["rest"]
        for key in ("weights", "end"):
            same_weights({n: s[2] for n, s in b[key].items()}, {n: s[2] for n, s in a[key].items()})
    if precision is None:  # another layout
        other, ranks = (TP2PP2SP, 4) if parallel is DP2 else (DP2, 2)
        moved = run_distributed(resume_and_go_on, ranks, replace(config, parallel=other))
        same_weights(whole([r["weights"] for r in moved]), whole([r["weights"] for r in before]))
        for result in moved:
            torch.testing.assert_close(result["rest"], before[0]["rest"], rtol=1e-5, atol=1e-5)


def save_at_each_step(config: Config, asynchronous: bool) -> list[set[str]]:
    """Names in the folder of checkpoints after each of six saves, and what a step saved again does."""
    engine, ranks = build(replace(config, train=replace(config.train, checkpoint_async=asynchronous)))
    saver = saver_of(engine, ranks, engine.config)
    seen = []
    folder = Path(config.run_dir, "checkpoints")
    for step in range(1, 7):
        known = {c.step for c in checkpoints(Path(config.run_dir))}
        saver.save(step, step, None, wait=False)
        if asynchronous and known:
            assert max(known) in {c.step for c in checkpoints(Path(config.run_dir))}
        finish(saver, ranks)
        saver._join()
        seen.append({p.name for p in folder.iterdir()})
    written = (folder / "step_6" / MARKER).stat().st_mtime_ns
    saver.save(6, 6, None, wait=True)
    assert (folder / "step_6" / MARKER).stat().st_mtime_ns == written and poll(saver, ranks) is None
    saver.close(wait=True)
    return seen


@pytest.mark.parametrize("asynchronous", [True, False])
def test_the_newest_and_every_mth_are_kept(tmp_path, asynchronous):
    (tmp_path / "checkpoints" / "step_0").mkdir(parents=True)  # what a killed run left
    config = config_of(tmp_path)
    config = replace(config, train=replace(config.train, keep_checkpoints=1, keep_every=3))
    (seen,) = run_distributed(save_at_each_step, 1, config, asynchronous)
    assert [sorted(int(n.removeprefix("step_")) for n in names) for names in seen] == [
        [1], [2], [3], [3, 4], [3, 5], [3, 6],
    ]  # fmt: skip


def order_on_disk(config: Config) -> list[str]:
    """Names relative to the run in the order in which they were synced, and when the marker came."""
    from megatron_elva.training import runs

    engine, ranks = build(config)
    events: list[str] = []
    sync, marker = os.fsync, runs.write_marker

    def fsync(handle: int) -> None:
        sync(handle)
        events.append(os.path.relpath(Path(f"/proc/self/fd/{handle}").readlink(), config.run_dir))

    def write_marker(*args) -> None:
        events.append("MARKER")
        marker(*args)

    os.fsync, runs.write_marker = fsync, write_marker
    saver_of(engine, ranks, config).save(3, 3, {"lanes": {}}, wait=True)
    return events


def test_everything_is_on_disk_before_the_marker_and_then_the_marker(tmp_path):
    (events,) = run_distributed(order_on_disk, 1, config_of(tmp_path))
    before, after = events[: events.index("MARKER")], events[events.index("MARKER") + 1 :]
    folder = "checkpoints/step_3"
    names = {f"{folder}/{p.name}" for p in (tmp_path / folder).iterdir()} - {f"{folder}/{MARKER}"}
    assert {e.replace("/.", "/").removesuffix(".part").removesuffix(".tmp").replace("/metadata", "/.metadata")
            for e in before} >= {n.replace("/metadata", "/.metadata") for n in names}  # fmt: skip
    assert {folder, "checkpoints", "."} <= set(before)
    assert before.index(".") > max(before.index(e) for e in before if e.endswith(".distcp"))
    assert after == [f"{folder}/.{MARKER}.part", folder]


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of 4 MB."""
    path = tmp_path / "disk"
    path.mkdir()
    if os.geteuid() or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "none", path], check=False).returncode:
        pytest.skip("a file system of its own needs root")
    yield path
    subprocess.run(["umount", "-l", path], check=True)


def fill(run: Path) -> None:
    with (run / "ballast").open("wb", buffering=0) as f:
        try:
            while True:
                f.write(b"x" * 4096)
        except OSError:
            pass


def read_only(run: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", run], check=True)


def in_the_way(run: Path) -> None:
    """Something that only the second rank meets."""
    (run / "checkpoints" / "step_2" / "__1_0.distcp").mkdir()


def fail(config: Config, harm: Callable[[Path], None], when: str) -> dict:
    """A good checkpoint, then one that cannot be written, and what the run has then."""
    from megatron_elva.parallel.collectives import barrier
    from megatron_elva.training import checkpoint

    engine, ranks = build(config)
    saver = saver_of(engine, ranks, config)
    saver.save(1, 4, None, wait=True)
    good = shards(engine, ranks)
    poll(saver, ranks)
    run = Path(config.run_dir)

    def harmed() -> None:
        barrier()
        if ranks.rank == 0:
            harm(run)
        barrier()

    message = ""
    try:
        if when == "before":
            harmed()
            saver.save(2, 8, None, wait=False)
        else:
            saver.save(2, 8, None, wait=False)
            process = pause(saver)
            harmed()
            process.resume()
        finish(saver, ranks)
    except (InputError, RuntimeError) as error:
        message = f"{type(error).__name__}: {error}"
    saver.close(wait=False)
    if harm is read_only and ranks.rank == 0:
        subprocess.run(["mount", "-o", "remount,rw", run], check=True)
    names = {p.name for p in (run / "checkpoints").iterdir()}
    train(engine, ranks, range(1))
    found = checkpoint.resume(engine, config)
    same_weights({n: s[2] for n, s in shards(engine, ranks).items()}, {n: s[2] for n, s in good.items()})
    return {"message": message, "found": found.step, "names": names, "children": len(psutil.Process().children())}


@pytest.mark.parametrize(
    ("harm", "when", "why"),
    [
        (fill, "before", errno.ENOSPC),
        (fill, "while", errno.ENOSPC),
        (read_only, "before", errno.EROFS),
        (in_the_way, "while", errno.EISDIR),
    ],
    ids=["full", "filled-while-writing", "read-only", "one-rank-alone"],
)
def test_a_disk_that_takes_no_more_is_one_line_on_all_ranks(small_disk, harm, when, why):
    results = run_distributed(fail, 2, config_of(small_disk, DP2), harm, when)
    assert results[0] == results[1] and results[0]["found"] == 1 and results[0]["children"] == 0
    message = results[0]["message"]
    assert message.startswith(f"InputError: {small_disk}/checkpoints/step_2: cannot be saved: {os.strerror(why)}")
    assert "\n" not in message and f"the last good checkpoint is {small_disk}/checkpoints/step_1;" in message
    assert ("lower train.keep_checkpoints" in message) == (why == errno.ENOSPC)
    needed, free = (int(w) for w in message.replace(";", "").split() if w.isdecimal())
    assert 100_000 < needed < 4_000_000 and (free < needed if why == errno.ENOSPC else free > needed)
    assert results[0]["names"] == {"step_1"} and ("(rank " in message) == (when == "while")


def killed_writer(config: Config) -> str:
    engine, ranks = build(config)
    saver = saver_of(engine, ranks, config)
    saver.save(1, 4, None, wait=False)
    process = pause(saver)
    if ranks.rank == 1:
        process.kill()
    else:
        process.resume()
    try:
        finish(saver, ranks)
    except RuntimeError as error:
        return str(error)
    return ""


def test_a_killed_writing_process_of_one_rank_fails_all(tmp_path):
    first, second = run_distributed(killed_writer, 2, config_of(tmp_path, DP2))
    why = "its writing process was killed by signal 9 (rank 1)"
    assert first == second == f"{tmp_path}/checkpoints/step_1: cannot be saved: {why}; there is no good checkpoint yet"
    assert not list((tmp_path / "checkpoints").iterdir())


def save_until_killed(config: Config, seconds: float, whom: str) -> None:
    """Go on from the newest checkpoint, save each step beside training, and be killed in the middle of it.

    The weights of each step are kept beside, to compare with.
    """
    from megatron_elva.training import checkpoint

    engine, ranks = build(config)
    found = checkpoint.resume(engine, config)
    step = 0 if found is None else found.step
    if found is not None:
        kept = torch.load(Path(config.run_dir, f"weights_{step}_{ranks.rank}.pt"))
        same_weights({n: s[2] for n, s in shards(engine, ranks).items()}, kept)
    saver = saver_of(engine, ranks, config)
    end = math.inf
    while seconds:
        train(engine, ranks, range(step, step + 1))
        step += 1
        torch.save({n: s[2] for n, s in shards(engine, ranks).items()},
                   Path(config.run_dir, f"weights_{step}_{ranks.rank}.pt"))  # fmt: skip
        saver.save(step, step, None, wait=False)
        Path(config.run_dir, f"writer_{ranks.rank}").write_text(str(saver._writer.pid))
        while saver._pending is not None:
            if time.monotonic() > end and whom in ("all", str(ranks.rank)):
                os.kill(os.getpid(), 9)
            if poll(saver, ranks) is not None:
                end = min(end, time.monotonic() + seconds)


def kill_and_look(folder: Path, config: Config, seconds: float, whom: str) -> int:
    """One life of a run. Returns the step of the newest checkpoint that is left; it loads and is what was saved."""
    with pytest.raises(AssertionError, match="ranks failed"):
        run_distributed(save_until_killed, 2, config, seconds, whom)
    pids = [int((folder / f"writer_{rank}").read_text()) for rank in range(2)]
    end = time.monotonic() + 10
    while any(psutil.pid_exists(p) and psutil.Process(p).status() != psutil.STATUS_ZOMBIE for p in pids):
        assert time.monotonic() < end, "a writing process outlives its trainer"
        time.sleep(0.02)
    run_distributed(save_until_killed, 2, config, 0.0, whom)
    return checkpoints(folder)[-1].step


def lives(folder: Path, number: int, seed: int) -> list[int]:
    draw, config, steps = random.Random(seed), config_of(folder, DP2), []
    for life in range(number):
        whom = ["all", "0", "1"][life % 3]
        steps.append(kill_and_look(folder, config, 0.1 + draw.random(), whom))
    return steps


def test_a_run_killed_while_it_writes_goes_on_from_the_newest_whole_checkpoint(tmp_path):
    assert lives(tmp_path, 1, seed=1)[0] >= 1


@pytest.mark.slow
def test_a_run_killed_again_and_again_loses_nothing(tmp_path):
    steps = lives(tmp_path, 12, seed=2)
    assert steps == sorted(set(steps)), steps


def stop_before_the_marker(config: Config) -> None:
    """All files of the second checkpoint on disk, and killed before it is completed."""
    engine, ranks = build(config)
    saver = saver_of(engine, ranks, config)
    saver.save(1, 4, None, wait=True)
    saver.save(2, 8, None, wait=False)
    while saver.progress() != (0, 0):
        time.sleep(0.01)
    from megatron_elva.parallel.collectives import barrier

    barrier()
    os.kill(os.getpid(), 9)


def test_files_without_a_marker_are_none(tmp_path):
    config = config_of(tmp_path, DP2)
    with pytest.raises(AssertionError, match="ranks failed"):
        run_distributed(stop_before_the_marker, 2, config)
    assert (tmp_path / "checkpoints" / "step_2" / "__1_0.distcp").is_file()
    assert [c.step for c in checkpoints(tmp_path)] == [1]
    assert run_distributed(resume_and_go_on, 2, config)[0]["found"][0] == "step_1"
