"""The stages in order, here or as one of several tasks of a job."""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dali_pipelines.prepare.charts import to_picture
from dali_pipelines.prepare.media import look_at_files, read_journals
from dali_pipelines.prepare.page import charts_of, page
from dali_pipelines.prepare.plan import Plan, load_plan, make_plan
from dali_pipelines.prepare.scan import files, scan
from dali_pipelines.prepare.settings import Room, Settings, begin, read_json, write_json, write_text
from dali_pipelines.prepare.stats import View, gather, left_out, manifest
from dali_pipelines.prepare.write import is_written, remove_encoded, write_shards
from megatron_elva.config.errors import InputError

POLL_S = 1.0
SILENCE_S = 1800.0
"""A task that waits for others gives up when none of them has written anything for so long."""


def cores() -> int:
    """Cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def start(settings: Settings, room: Room) -> None:
    """Scan the annotations and mark the folder.

    Raises:
        InputError: nothing can be used, or the folder was begun otherwise.
    """
    if not (room.state / "settings.json").is_file():
        _refuse_other_shards(room)
    room.state.mkdir(parents=True, exist_ok=True)
    # what a preparation goes on from is replaced only once it is known to be the same
    draft = Room(room.state / "scan")
    with _alone(room, 0):
        try:
            digest = scan(settings, draft)
            begin(room, settings, digest)
            for one, other in ((draft.work, room.work), (draft.files, room.files)):
                one.replace(other)
            (draft.state / "faults.jsonl").replace(room.state / "faults.jsonl")
        finally:
            shutil.rmtree(draft.out, ignore_errors=True)


def _refuse_other_shards(room: Room) -> None:
    """Training reads all shards of a folder: those of two preparations must not stand in one."""
    if (room.out / "manifest.json").is_file() or any(room.out.glob("train-*.tar")):
        raise InputError(
            f"--out {room.out}: holds shards of a preparation whose .prepare folder is gone; name another folder, or "
            "give --restart, which removes the shards that manifest.json names"
        )


def restart(room: Room) -> None:
    """Remove what was prepared in a folder, and nothing else."""
    if room.state.is_dir() or (room.out / "manifest.json").is_file():
        room.state.mkdir(parents=True, exist_ok=True)
        with _alone(room, 0):
            _remove_shards(room)
            shutil.rmtree(room.state)


def _remove_shards(room: Room) -> None:
    plan = load_plan(room)
    made = read_json(room.out / "manifest.json") or {}
    names = [shard.name for shard in plan.shards] if plan else [shard["name"] for shard in made.get("shards", [])]
    for name in names:
        path = room.shard(name)
        for old in (path, path.with_name(f"{path.name}.index.json"), path.with_name(f"{path.name}.part")):
            old.unlink(missing_ok=True)
    for name in ("manifest.json", "report.jsonl", "stats.html", "stats.png"):
        (room.out / name).unlink(missing_ok=True)


def retry(room: Room) -> None:
    """Forget which files were bad, and with that the plan and its shards; what is known of the good ones stays."""
    with _alone(room, 0):
        _remove_shards(room)
        for path in (room.state / "journal").glob("*.jsonl"):
            kept = [line for line in path.read_text().splitlines() if '"reason"' not in line]
            write_text(path, "".join(f"{line}\n" for line in kept))
        for path in (room.plan, *(room.state / "done").glob("*"), *(room.state / "shards").glob("*")):
            path.unlink(missing_ok=True)


def work(room: Room, workers: int, task: int = 0, tasks: int = 1) -> Plan:
    """This task's share of all work on a folder that `start` has marked.

    Args:
        room: the preparation.
        workers: processes of this task.
        task: its number.
        tasks: tasks that share the work; each waits for the others where it needs what they do.

    Raises:
        InputError: no sample can be used, or the other tasks have stopped.
    """
    settings = room.settings()
    with _alone(room, task):
        if load_plan(room) is None:
            look_at_files(room, settings, workers, task, tasks)
            _meet(room, "files", task, tasks)
            count = sum(1 for _ in files(room))
            _until(room, lambda: len(read_journals(room)) == count, "journals")  # network file systems may lag behind
        plan = make_plan(room, settings)
        write_shards(room, settings, plan, workers, task, tasks)
        return plan


def finish(room: Room, view: View) -> dict[str, Any]:
    """Statistics and manifest of a preparation whose shards are all written, or will soon be by other tasks.

    Returns:
        The manifest.
    """
    settings, plan = room.settings(), load_plan(room)
    assert plan is not None
    _until(room, lambda: all(is_written(room, shard) for shard in plan.shards), "shards")
    found, report = gather(room, plan, view), left_out(room, plan)
    made = manifest(room, settings, view, plan, found)
    charts = charts_of(found, view)
    write_text(room.out / "report.jsonl", "".join(json.dumps(line) + "\n" for line in report))
    write_text(room.out / "stats.html", page(f"{room.out.name}: {made['samples']:,} samples", made, charts, report))
    draft = room.state / "stats.png"
    to_picture(charts).save(draft)
    draft.replace(room.out / "stats.png")
    write_json(room.out / "manifest.json", made, indent=1)  # last: it says that all the rest is there
    remove_encoded(room)
    for path in room.state.rglob("*.part"):
        path.unlink(missing_ok=True)  # of runs that were killed
    return made


@contextmanager
def _alone(room: Room, task: int) -> Iterator[None]:
    """Keep a second run of the same command from the same folder."""
    with (room.state / f"lock.{task}").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"--out {room.out}: another run prepares it right now") from error
        except OSError:
            pass  # some network file systems know no locks
        yield


def _meet(room: Room, what: str, task: int, tasks: int) -> None:
    """Say that this task's share is done, and wait for the others'. What is done stays done in the next run."""
    write_json(room.state / "done" / f"{what}.{task}.of.{tasks}.json", {})
    _until(room, lambda: all(
        (room.state / "done" / f"{what}.{i}.of.{tasks}.json").is_file() for i in range(tasks)), what)  # fmt: skip


def _until(room: Room, done: Any, what: str) -> None:
    began = time.time()
    while not done():
        newest = max((path.stat().st_mtime for path in _written(room)), default=began)
        if time.time() - max(newest, began) > SILENCE_S:
            raise InputError(
                f"{room.out}: the other tasks have written nothing for {SILENCE_S / 60:g} minutes ({what})"
            )
        time.sleep(POLL_S)


def _written(room: Room) -> Iterator[Path]:
    for folder in ("journal", "done", "shards"):
        yield from (room.state / folder).glob("*")
