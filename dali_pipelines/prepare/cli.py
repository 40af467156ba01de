"""Videos, images and their annotations -> shards for training.

python -m dali_pipelines.prepare --input clips --out corpus
python -m dali_pipelines.prepare --input train.json --media videos --out corpus --split val=0.01 --reencode gop=30

An interrupted run goes on where it was when the same command is given again. docs/data.md has all of it.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

from dali_pipelines.prepare.arguments import parser, settings_of, view_of
from dali_pipelines.prepare.run import cores, finish, restart, retry, start, work
from dali_pipelines.prepare.settings import Room, one_line
from dali_pipelines.prepare.stats import kind_of
from megatron_elva.config.errors import ConfigError, InputError

_SHOWN = 5  # reasons on the screen


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line. Exit code 2 and one line for bad arguments or where no sample can be used."""
    try:
        given = parser(__doc__ or "").parse_args(arguments)
        settings, view = settings_of(given), view_of(given)
        room = Room(given.out)
        if room.out.exists() and not room.out.is_dir():
            raise InputError(f"--out {room.out}: is a file; name a folder")
        if given.restart:
            restart(room)
        start(settings, room)
        if given.retry_bad:
            retry(room)
        if given.slurm is not None:
            from dali_pipelines.prepare.cluster import submit_job  # what it needs is of no use to a run here

            return submit_job(room, view, given.workers, given.slurm)
        work(room, given.workers or cores())
        made = finish(room, view)
    except (ConfigError, InputError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
        return 2
    except OSError as error:
        print(f"error: {one_line(error)}; once that is mended the same command goes on", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        return 130
    _tell(room, made)
    return 0


def _tell(room: Room, made: dict[str, Any]) -> None:
    """The end of a run in a few lines."""
    for reason, count in list(made["statistics"]["left_out"].items())[:_SHOWN]:
        print(f"left out: {count:,} x {reason}", file=sys.stderr)
    for reason, count in list(made["statistics"]["refused"].items())[:_SHOWN]:
        print(f"training will refuse: {count:,} x {kind_of(reason)}", file=sys.stderr)
    size = sum(split["bytes"] for split in made["splits"].values())
    splits = ", ".join(f"{name} {split['samples']:,}" for name, split in made["splits"].items())
    out = f"{room.out}: {made['samples']:,} samples ({splits}) in {len(made['shards']):,} shards, {size / 1e6:,.1f} MB"
    print(f"{out}; {made['left_out']:,} left out; stats.html shows them")
