"""The one place that talks to MLflow: which run it is, and what is written to it. Everything here may raise."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from megatron_elva.training.tracking.lines import Point
from megatron_elva.training.tracking.state import RunDeletedError, State, locked

KEY = "elva.key"
PARENT = "mlflow.parentRunId"
_KIND = {"mlflow.experimentKind": "custom_model_development"}  # or the page opens on what is for language model apps
_MANY = 100


class Store:
    """A tracking server, or the SQLite file that stands for one.

    Args:
        uri: of the server; None for the local store.
        folder: of the local store.
        experiment: its name.

    Raises:
        Exception: whatever a server that is down, slow or broken leads to in MLflow.
    """

    def __init__(self, uri: str | None, folder: Path, experiment: str) -> None:
        self.uri = uri or f"sqlite:///{folder / 'mlflow.db'}"
        artifacts = None
        if self.uri.startswith("sqlite:///"):
            database = Path(self.uri.removeprefix("sqlite:///")).absolute()
            self.uri, artifacts = f"sqlite:///{database}", database.with_name("mlflow_artifacts")
            database.parent.mkdir(parents=True, exist_ok=True)
            # two that make the tables of a new file at once would spoil it
            with locked(database.with_name(f".{database.name}.lock")):
                self._open(experiment, artifacts)
        else:
            self._open(experiment, None)

    def _open(self, experiment: str, artifacts: Path | None) -> None:
        if artifacts is not None:
            from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore

            SqlAlchemyStore(self.uri, artifacts.as_uri())  # else the default experiment's files would lie in ./mlruns
        self.client = MlflowClient(self.uri)
        found = self.client.get_experiment_by_name(experiment)
        if found is None:
            location = None if artifacts is None else (artifacts / experiment).as_uri()
            try:
                self.experiment: str = self.client.create_experiment(experiment, location, _KIND)
                return
            except MlflowException as error:
                if error.error_code != "RESOURCE_ALREADY_EXISTS":
                    raise
            found = self.client.get_experiment_by_name(experiment)
        self.experiment = found.experiment_id

    def open_run(self, state: State, name: str, parent: str | None = None) -> str:
        """The run of a run directory, made where there is none, and set to running.

        Raises:
            RunDeletedError: it was deleted.
        """
        if state.run_id is not None:
            try:
                if self.client.get_run(state.run_id).info.lifecycle_stage == "deleted":
                    raise RunDeletedError(f"run {state.run_id} was deleted on the server")
            except MlflowException as error:
                if error.error_code != "RESOURCE_DOES_NOT_EXIST":
                    raise
                state.forget()
        if state.run_id is None:
            found = self._with_key(state.key)  # made by a request whose answer never came
            if found:
                state.run_id = found[0]
            else:
                given = {KEY: state.key, **({} if parent is None else {PARENT: parent})}
                created = self.client.create_run(self.experiment, start_time=state.started, tags=given, run_name=name)
                state.run_id = created.info.run_id
            state.parent_id = parent
            state.save()
        self.client.update_run(state.run_id, status="RUNNING")
        return state.run_id

    def _with_key(self, key: str) -> list[str]:
        """Runs made for one run directory, the oldest first."""
        filter_string = f"tags.`{KEY}` = '{key}'"
        found = self.client.search_runs([self.experiment], filter_string, order_by=["attributes.start_time ASC"])
        return [run.info.run_id for run in found]

    def delete_twins(self, state: State) -> None:
        """Delete runs that a server made twice, when it answered the first request too late to be heard."""
        for run_id in self._with_key(state.key):
            if run_id != state.run_id:
                self.client.delete_run(run_id)

    def known_params(self, run_id: str) -> dict[str, str]:
        """The parameters that the server has."""
        return dict(self.client.get_run(run_id).data.params)

    def write_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Write parameters."""
        items = [Param(key, value) for key, value in params.items()]
        for begin in range(0, len(items), _MANY):
            self.client.log_batch(run_id, params=items[begin : begin + _MANY])

    def write_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Write tags, over those of the same name."""
        items = [RunTag(key, value) for key, value in tags.items()]
        for begin in range(0, len(items), _MANY):
            self.client.log_batch(run_id, tags=items[begin : begin + _MANY])

    def write_points(self, run_id: str, points: Sequence[Point]) -> None:
        """Write points of curves, `lines.BATCH` at most. What the server has already changes nothing there."""
        self.client.log_batch(run_id, metrics=[Metric(p.key, p.value, p.timestamp, p.step) for p in points])

    def write_file(self, run_id: str, path: Path, folder: str | None) -> None:
        """Upload a file."""
        self.client.log_artifact(run_id, str(path), folder)

    def end_run(self, run_id: str, status: str, end_time: int | None = None) -> None:
        """Set how the run stands; all but running count as an end."""
        if status == "RUNNING":
            self.client.update_run(run_id, status=status)
        else:
            self.client.set_terminated(run_id, status=status, end_time=end_time)
