"""Sends what a run directory holds to its MLflow run, from where sending came to."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from megatron_elva.config.schema import Config
from megatron_elva.training import attempts
from megatron_elva.training.runs import METRICS
from megatron_elva.training.tracking import about, artifacts
from megatron_elva.training.tracking.lines import BATCH, Point, read_lines, system_points, training_points
from megatron_elva.training.tracking.plot import Curves
from megatron_elva.training.tracking.state import FOLDER, State, explicit_uri, home, locked, without_password

if TYPE_CHECKING:
    from megatron_elva.training.tracking.store import Store

_FILES_EVERY_S = 30.0
_FIRST_PLOT_S = 60.0
_PLOT_EVERY_S = 300.0


class Sending:
    """What is sent of one run. Methods raise what MLflow raises; each can be called again and goes on where it was.

    Args:
        run: the run directory, absolute.
        config: its config.
        world: ranks of the job; None outside one.
    """

    def __init__(self, run: Path, config: Config, world: int | None) -> None:
        self._run = run
        self._config = config
        self._world = world
        self._uri = explicit_uri(config)
        self._state = State(run, self._uri)
        self._store: Store | None = None
        self._curves = Curves(run / METRICS)
        self._plotted = time.monotonic() - _PLOT_EVERY_S + _FIRST_PLOT_S
        self._looked = 0.0
        (run / FOLDER / "git.diff").unlink(missing_ok=True)  # of an earlier attempt, which may have had other code

    def send(self) -> None:
        """Send every new line, and the files whose turn it is."""
        self._open()
        self._send_lines()
        if time.monotonic() - self._looked >= _FILES_EVERY_S:
            self.send_files(at_work=True)

    def send_end(self, outcome: str, end_time: float | None = None) -> None:
        """Send what there is, and how the run stands.

        Args:
            outcome: of the attempt.
            end_time: when it ended, in seconds since 1970; None: now.
        """
        store, run_id = self._open()
        self._send_lines()
        self.send_files(at_work=False)
        store.write_tags(run_id, {**about.tags(self._run, self._config, self._world), "outcome": outcome})
        store.delete_twins(self._state)
        store.end_run(run_id, about.STATUS[outcome], None if end_time is None else int(1000 * end_time))
        self._end_parent(outcome)

    def _open(self) -> tuple[Store, str]:
        """Connect, and have the run with its parameters; once."""
        if self._store is not None and self._state.run_id is not None:
            return self._store, self._state.run_id
        from megatron_elva.training.tracking.store import Store  # seconds of CPU, which start-up of training also wants

        # a server that was named once stays this run's, where nothing names another
        experiment = self._config.tracking.experiment or os.environ.get("MLFLOW_EXPERIMENT_NAME") or "elva"
        store = Store(self._uri or self._state.uri, home(self._config, self._run), experiment)
        tags = about.tags(self._run, self._config, self._world)
        parent = self._open_parent(store, tags) if self._config.tracking.nested else None
        run_id = store.open_run(self._state, self._run.name, parent)
        store.write_tags(run_id, tags)
        wanted, number = about.params(self._config), len(attempts.read(self._run))
        store.write_params(run_id, about.new_params(wanted, store.known_params(run_id), number))
        print(f"{time.strftime('%F %T')} sends to run {run_id} of {without_password(store.uri)}", flush=True)
        self._store = store
        return store, run_id

    def _open_parent(self, store: Store, tags: dict[str, str]) -> str:
        root = self._run.parent
        with locked(root / FOLDER / "lock"):
            state = State(root, self._uri or self._state.uri)
            run_id = store.open_run(state, root.name)
        store.write_tags(run_id, {k: v for k, v in tags.items() if k != "stage"} | {"run_dir": str(root)})
        return run_id

    def _end_parent(self, outcome: str) -> None:
        """The run of all stages stands as its stage does; it has ended well with the last of them."""
        parent = self._state.parent_id
        if parent is None or self._store is None:
            return
        following = f"stage_{self._config.stage.id + 1}"
        goes_on = outcome == "done" and (self._run.parent / following).is_dir()
        self._store.end_run(parent, "RUNNING" if goes_on else about.STATUS[outcome])

    def _send_lines(self) -> None:
        self._send_points(self._run / METRICS, partial(training_points, started=self._state.started))
        for path in sorted((self._run / FOLDER).glob("system_*.jsonl")):
            self._send_points(path, partial(system_points, node=path.stem.removeprefix("system_")))

    def _send_points(self, path: Path, points_of: Callable[[dict[str, Any]], list[Point]]) -> None:
        name = path.name
        batch: list[Point] = []
        begin = reached = self._state.offsets.get(name, 0)
        for line, offset in read_lines(path, begin):
            points = points_of(line)
            if batch and len(batch) + len(points) > BATCH:
                self._send_batch(name, batch, reached)
                batch = []
            batch += points
            reached = offset
        if reached != begin:
            self._send_batch(name, batch, reached)

    def _send_batch(self, name: str, points: list[Point], offset: int) -> None:
        """One request, and then the note that it came through: what is sent again after a crash changes nothing."""
        store, run_id = self._open()
        if points:
            store.write_points(run_id, points)
        self._state.offsets[name] = offset
        self._state.save_sent()

    def send_files(self, at_work: bool = False) -> None:
        """Send the files that are new or have changed.

        Args:
            at_work: training goes on; see `artifacts.files`.
        """
        store, run_id = self._open()
        self._draw(at_work)
        for path, folder in artifacts.files(self._run, at_work):
            name, stamp = os.path.relpath(path, self._run), artifacts.stamp(path)
            if self._state.files.get(name) != stamp:
                store.write_file(run_id, path, folder)
                self._state.files[name] = stamp
                self._state.save_sent()
        self._looked = time.monotonic()

    def _draw(self, at_work: bool) -> None:
        if at_work and time.monotonic() - self._plotted < _PLOT_EVERY_S:
            return
        if self._curves.update():
            self._curves.draw(self._run / FOLDER / "loss.png", f"{self._run.name}, stage {self._config.stage.id}")
        self._plotted = time.monotonic()
