"""Runs that are struck by failures, several of them at a time, and what each failure cost.

``python -m tests.slurm.table FILE`` prints what was measured into FILE (see `RECORD`) as the table of docs/failures.md.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from tests.slurm.cluster import Slurm
from tests.slurm.jobs import PacedJob
from tests.slurm.runs import ENDED, Run, overrides, same_run

RECORD = "ELVA_RECOVERIES"
"""The variable that names a file for what was measured."""
AT_ONCE = 4
"""Runs at a time: each is four ranks."""


@dataclass(frozen=True)
class Recovery:
    """What a failure cost; times in seconds, those of Slurm in whole ones.

    Attributes:
        failure: its name.
        outcome: what the product says of the attempt that it ended.
        recovered_s: from the last step of the attempt before to the first new one, as the product prints it.
        noticed_s: from the failure until Slurm had the job in its queue again.
        held_s: from there until it was started.
        begun_s: from there to the end of the first new step.
        again: steps that were done a second time.
    """

    failure: str
    outcome: str
    recovered_s: float
    noticed_s: float
    held_s: float
    begun_s: float
    again: int


class Table:
    """Chains of failures, each a function of this table; they start when the table is made.

    Args:
        slurm: the cluster.
        clips: the corpus.
        folder: for the run directories.
        chains: by name.
    """

    def __init__(self, slurm: Slurm, clips: Path, folder: Path, chains: dict[str, Callable[[Table], None]]) -> None:
        self.slurm, self.clips, self.folder = slurm, clips, folder
        self.recoveries: dict[str, Recovery] = {}
        self._unbroken: dict[tuple[str, ...], Run] = {}
        self._struck: dict[str, Run] = {}
        self._numbers = itertools.count()
        self._lock = threading.Lock()
        self._pool = ThreadPoolExecutor(AT_ONCE)
        self._chains = chains
        self._tries: Counter[str] = Counter(list(chains))
        self._results: dict[str, Future[None]] = {name: self._pool.submit(run, self) for name, run in chains.items()}

    def wait(self, chain: str, tries: int = 1, seconds: float = 900) -> None:
        """Wait for a chain's end and raise what it raised.

        Args:
            chain: its name.
            tries: which one; one that has not begun starts now, with a run directory of its own.
            seconds: how long.
        """
        if tries > self._tries[chain]:
            self._tries[chain] = tries
            self.slurm.run("scancel", self._struck[chain].job, check=False)
            self._results[chain] = self._pool.submit(self._chains[chain], self)
        self._results[chain].result(timeout=seconds)

    def close(self) -> None:
        """Show what was measured, and put it down where the environment says."""
        self._pool.shutdown(cancel_futures=True)
        for entry in self.recoveries.values():
            print(json.dumps(asdict(entry)))
        if os.environ.get(RECORD):
            lines = [json.dumps(asdict(entry)) for entry in self.recoveries.values()]
            Path(os.environ[RECORD]).write_text("\n".join(lines) + "\n")

    def run(self, name: str, *more: str, pause_s: float = 0.15, folder: Path | None = None, **fault: Any) -> Run:
        """A run that is not submitted yet."""
        tries = self._tries.get(name, 1)
        command = overrides(self.clips, (folder or self.folder) / (name if tries == 1 else f"{name}_{tries}"), *more)
        self._struck[name] = Run(self.slurm, command, partial(PacedJob, pause_s=pause_s, **fault))
        return self._struck[name]

    def unbroken(self, *layout: str, steps: int) -> Run:
        """A run of the same layout that nothing happens to; one for all who ask for as many steps."""
        with self._lock:
            key = (*layout, str(steps))
            known = self._unbroken.get(key)
            if known is None or known.state() in ENDED[1:]:
                name = f"unbroken_{next(self._numbers)}"
                self._unbroken[key] = self.run(name, *layout, f"train.steps={steps}", pause_s=0).submit()
        return self._unbroken[key]

    def finish(self, run: Run, *layout: str, steps: int) -> None:
        """The run ends well, and every step of it is that of an unbroken run, bit for bit."""
        other = self.unbroken(*layout, steps=steps)
        assert run.until_ended() == "COMPLETED", run.account()
        assert other.until_ended() == "COMPLETED", other.account()
        same_run(run, other)
        assert len(run.steps()) == steps

    def strike(self, run: Run, failure: str, act: Callable[[], Any], resubmit: bool = False) -> Recovery:
        """Let the run get to a new checkpoint, strike, and wait until it goes on.

        Args:
            run: the run.
            failure: name of what happens.
            act: makes it happen.
            resubmit: the job ends of it, and the same command is submitted again.
        """
        # else strikes that follow each other would end attempts at one step, which is another failure
        run.until("a checkpoint of this attempt", run.advanced)
        starts, breaks, struck = run.starts(), len(run.lines("logs/recoveries.jsonl")), time.time()
        act()
        if resubmit:
            run.until_ended()
            run.submit()
        else:
            run.until(f"{failure}: another start", lambda: run.starts() > starts and run.state() == "RUNNING")
        run.until(f"{failure}: a new step", lambda: len(run.lines("logs/recoveries.jsonl")) > breaks)
        return self._record(run, failure, struck)

    def _record(self, run: Run, failure: str, struck: float) -> Recovery:
        known = run.slurm.job(run.job)
        queued, started = (datetime.fromisoformat(known[k]).timestamp() for k in ("SubmitTime", "StartTime"))
        line = run.lines("logs/recoveries.jsonl")[-1]
        self.recoveries[failure] = Recovery(
            failure, run.ends()[-1]["outcome"], round(line["seconds"], 1), round(queued - struck, 1),
            started - queued, round(line["time"] - started, 1), line["done_again"],
        )  # fmt: skip
        return self.recoveries[failure]


def chosen(names: Sequence[str], items: Sequence[Any]) -> set[str]:
    """Those chains that a test of this session asks for."""
    wanted = {item.callspec.params.get("chain") for item in items if hasattr(item, "callspec")}
    return wanted & set(names)


def main(path: Path) -> None:
    """Print a file of recoveries as Markdown."""
    print("| failure | recovered | noticed | held back | begun | steps done again |")
    print("|---|---|---|---|---|---|")
    for line in path.read_text().splitlines():
        entry = Recovery(**json.loads(line))
        times = (entry.recovered_s, entry.noticed_s, entry.held_s, entry.begun_s)
        print(f"| {entry.failure} | {' | '.join(f'{seconds:.0f} s' for seconds in times)} | {entry.again} |")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
