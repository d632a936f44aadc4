"""MLflow as a projection of the result store: experiment = sweep, parent run = trial, child runs = stages. The one importer of mlflow.

Written by one process, the driver, from manifests alone; whatever is missing can be written again from them at any time.
"""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "1")  # whoever writes here tries again by itself
os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")

import sqlalchemy
from mlflow.entities import Metric, Param, RunTag
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import INVALID_PARAMETER_VALUE, ErrorCode
from mlflow.store.tracking.dbmodels.models import SqlLatestMetric, SqlMetric, SqlParam, SqlRun, SqlTag
from mlflow.tracking import MlflowClient

from fffsweep.pipeline.store import Store, create_whole, one_component
from fffsweep.pipeline.tracked_run import KEY, LABEL, TRIAL, Known, Point, TrackedRun

_PARENT, _NAME, _NOTE, _MADE_OF = "mlflow.parentRunId", "mlflow.runName", "mlflow.note.content", "fffsweep.made_of"
_BATCH, _PARAMS = 1000, 100  # metrics and params that one log_batch call may hold
_DATABASE_RUNS, _SERVER_RUNS = 400, 20  # to write at once: statements take many rows, while a server wants three calls for each run
_SQLITE, _LARGEST = "sqlite:///", 1.7976931348623157e308  # the latter is what MLflow writes for infinity


class Tracker:
    """One sweep's experiment. Writing a run again changes nothing: what is there already is left as it is."""

    def __init__(self, uri: str, experiment: str, artifact_root: Path | None = None) -> None:
        for chatty in ("mlflow.store.db.utils", "alembic"):
            logging.getLogger(chatty).setLevel(logging.WARNING)
        if (path := uri.removeprefix(_SQLITE)) != uri and not Path(path).exists():
            create_whole(Path(path), _lay_out)
        client = MlflowClient(tracking_uri=uri)
        found = client.get_experiment_by_name(experiment)
        location = (artifact_root / one_component(experiment)).resolve().as_uri() if artifact_root else None
        identity = found.experiment_id if found else client.create_experiment(experiment, location)
        store = client._tracking_client.store
        self._runs: _Runs = _Database(store, identity) if hasattr(store, "ManagedSessionMaker") else _Server(client, identity)
        self.batch = _DATABASE_RUNS if isinstance(self._runs, _Database) else _SERVER_RUNS
        self._trials: dict[str, Known] = {}
        self._stages: dict[tuple[str, str, str], Known] = {}
        self._is_current = False
        self._read()

    def write(self, runs: Iterable[TrackedRun]) -> None:
        """Write runs, a trial's own before its children; many at once are much cheaper than one by one.

        If it raises, some of them may have been written: writing all of them again is right.
        """
        if not self._is_current:
            self._read()
        self._is_current = False
        fresh: dict[str, tuple[TrackedRun, str | None]] = {}
        changed: dict[str, TrackedRun] = {}
        for run in runs:
            known = self._known(run)
            if known is not None and known.status == run.status and (known.key == run.key or run.status == "RUNNING"):
                continue
            if known is None or (run.label is not None and known.status in ("FAILED", "KILLED") and known.run_id not in fresh):
                run_id = uuid.uuid4().hex
                fresh[run_id] = run, None if run.label is None else self._trials[run.trial].run_id
            elif known.run_id in fresh:
                run_id, before, parent = known.run_id, *fresh[known.run_id]
                fresh[run_id] = run.after(before), parent
            elif run.label is None and run.status == "RUNNING" and known.status == "FINISHED":
                continue  # it stays as it is until its trial has new values
            else:
                run_id = known.run_id
                changed[run_id] = run.after(changed[run_id]) if run_id in changed else run
            self._remember(Known(run_id, run.trial, run.label, run.key or (known.key if known else ""), run.status))
        given = self._runs.insert(fresh)
        self._runs.update(changed)
        for run_id, (run, _) in fresh.items():
            self._remember(Known(given[run_id], run.trial, run.label, run.key, run.status))
        self._is_current = True

    def holds(self, trial: str, label: str, key: str) -> bool:
        """Whether it is known that a stage run's finished result is there: writing it again would change nothing."""
        return self._is_current and (known := self._stages.get((trial, label, key))) is not None and known.status == "FINISHED"

    def close(self) -> None:
        """Leave no run RUNNING: those that are still open are marked KILLED; a resumed sweep finishes them."""
        self._kill(run for run in (*self._trials.values(), *self._stages.values()) if run.status == "RUNNING")

    def audit(self, expected: Mapping[tuple[str, str], str], store: Store, repair: bool = False) -> list[str]:
        """What MLflow holds otherwise than it should, a line each, given the key of every (trial, label) that is finished.

        With `repair`, runs that no result backs are deleted and runs left RUNNING are marked KILLED; what is missing is for
        `write`.
        """
        problems, open_runs, unbacked = [], [], []
        seen: set[tuple[str, str]] = set()
        for run in list(self._runs.all()):
            if run.status == "RUNNING":
                problems.append(f"MLflow run {run.label or run.trial} of {run.trial} is left RUNNING")
                open_runs.append(run)
            if run.label is None or run.status != "FINISHED":
                continue
            place = run.trial, run.label
            if expected.get(place) != run.key and store.has(run.key):
                continue  # of an earlier, smaller extent of the study
            if expected.get(place) != run.key or place in seen:
                problems.append(f"MLflow run {run.label} of {run.trial} has no result of its own")
                unbacked.append(run)
            else:
                seen.add(place)
        if repair:
            self._kill(open_runs)
            self._runs.delete([run.run_id for run in unbacked])
            self._read()
        return problems + [f"MLflow has no run {label} of {trial}" for trial, label in expected if (trial, label) not in seen]

    def _kill(self, runs: Iterable[Known]) -> None:
        now_ms = int(time.time() * 1000)
        killed = {run.run_id: (run, TrackedRun(run.trial, run.label, run.key, "KILLED", now_ms, now_ms)) for run in runs}
        self._runs.update({run_id: after for run_id, (_, after) in killed.items()})
        for run, after in killed.values():
            self._remember(Known(run.run_id, run.trial, run.label, run.key, after.status))

    def _known(self, run: TrackedRun) -> Known | None:
        return self._trials.get(run.trial) if run.label is None else self._stages.get((run.trial, run.label, run.key))

    def _remember(self, run: Known) -> None:
        if run.label is None:
            self._trials[run.trial] = run
        else:
            self._stages[run.trial, run.label, run.key] = run

    def _read(self) -> None:
        """Read what is there. Of several runs of one stage run a finished one counts."""
        self._trials, self._stages = {}, {}
        for run in sorted(self._runs.all(), key=lambda run: run.status == "FINISHED"):
            self._remember(run)
        self._is_current = True


def _lay_out(path: Path) -> None:
    """MLflow's empty tables in a file: dozens of migrations, of which no half can be mended afterwards."""
    MlflowClient(tracking_uri=f"{_SQLITE}{path.resolve()}")._tracking_client.store.engine.dispose()


def is_refused(error: Exception) -> bool:
    """Whether MLflow will never take what it was given, however often it is tried."""
    return isinstance(error, MlflowException) and error.error_code == ErrorCode.Name(INVALID_PARAMETER_VALUE)


def is_outside(error: Exception) -> bool:
    """Whether MLflow, its database or the way to them is at fault, and not this program."""
    return isinstance(error, MlflowException | sqlalchemy.exc.SQLAlchemyError | OSError)


class _Runs(Protocol):
    """The runs of one experiment's trials and stages, wherever they are kept; those of picks and reports are not its own."""

    def all(self) -> Iterator[Known]: ...
    def insert(self, runs: Mapping[str, tuple[TrackedRun, str | None]]) -> dict[str, str]:
        """New runs by a proposed run id, each with its parent's. Returns the ids that they got."""
        ...

    def update(self, runs: Mapping[str, TrackedRun]) -> None:
        """Replace status, end, tags and metrics."""
        ...

    def delete(self, run_ids: Sequence[str]) -> None: ...


class _Database:
    """MLflow's own tables, written many rows a statement: its calls for one run cost several commits and 20 times the time."""

    def __init__(self, store: Any, experiment: str) -> None:
        self._store, self._experiment = store, experiment
        self._root = store.get_experiment(experiment).artifact_location

    def all(self) -> Iterator[Known]:
        columns = [
            sqlalchemy.select(SqlTag.value).where(SqlTag.run_uuid == SqlRun.run_uuid, SqlTag.key == tag).scalar_subquery()
            for tag in (TRIAL, LABEL, KEY)
        ]
        query = sqlalchemy.select(SqlRun.run_uuid, SqlRun.status, *columns).where(
            SqlRun.experiment_id == int(self._experiment), SqlRun.lifecycle_stage == "active"
        )
        with self._store.ManagedSessionMaker() as session:
            found = session.execute(query).all()
        yield from (Known(run_id, trial, label, key or "", status) for run_id, status, trial, label, key in found if trial)

    def insert(self, runs: Mapping[str, tuple[TrackedRun, str | None]]) -> dict[str, str]:
        if not runs:
            return {}
        rows: list[dict[str, Any]] = []
        tags: list[dict[str, Any]] = []
        params: list[dict[str, Any]] = []
        for run_id, (run, parent) in runs.items():
            rows.append(
                {
                    "run_uuid": run_id,
                    "name": run.name,
                    "source_type": "UNKNOWN",
                    **dict.fromkeys(("source_name", "entry_point_name", "source_version"), ""),
                    "user_id": "unknown",
                    "status": run.status,
                    "start_time": run.started_ms,
                    "end_time": run.ended_ms,
                    "lifecycle_stage": "active",
                    "artifact_uri": f"{self._root}/{run_id}/artifacts",
                    "experiment_id": int(self._experiment),
                }
            )
            named = {_NAME: run.name, **({} if parent is None else {_PARENT: parent}), **run.all_tags}
            tags += [{"run_uuid": run_id, "key": name, "value": value} for name, value in named.items()]
            params += [{"run_uuid": run_id, "key": name, "value": value} for name, value in run.params.items()]
        with self._store.ManagedSessionMaker(read_only=False) as session:
            _add(session, SqlRun, rows)
            _add(session, SqlTag, tags)
            _add(session, SqlParam, params)
            _add_points(session, {run_id: run.metrics for run_id, (run, _) in runs.items()})
        return {run_id: run_id for run_id in runs}

    def update(self, runs: Mapping[str, TrackedRun]) -> None:
        if not runs:
            return
        with self._store.ManagedSessionMaker(read_only=False) as session:
            for run_id, run in runs.items():
                change = sqlalchemy.update(SqlRun).where(SqlRun.run_uuid == run_id).values(status=run.status, end_time=run.ended_ms)
                session.execute(change, execution_options={"synchronize_session": False})
                tags = run.tags if not run.key else {KEY: run.key, **run.tags}
                for table, entries in ((SqlTag, tags), (SqlParam, run.params)):
                    _drop(session, table, run_id, list(entries))
                    _add(session, table, [{"run_uuid": run_id, "key": name, "value": value} for name, value in entries.items()])
                _drop(session, SqlLatestMetric, run_id, [point.name for point in run.metrics])
            _add_points(session, {run_id: run.metrics for run_id, run in runs.items()})

    def delete(self, run_ids: Sequence[str]) -> None:
        for run_id in run_ids:
            self._store.delete_run(run_id)


class _Server:
    """An MLflow server, by its public calls: three for a run."""

    def __init__(self, client: MlflowClient, experiment: str) -> None:
        self._client, self._experiment = client, experiment

    def all(self) -> Iterator[Known]:
        token = None
        while True:
            page = self._client.search_runs([self._experiment], max_results=_BATCH, page_token=token)
            for info, tags in ((run.info, run.data.tags) for run in page if run.data.tags.get(TRIAL)):
                yield Known(info.run_id, tags[TRIAL], tags.get(LABEL), tags.get(KEY, ""), info.status)
            token = page.token
            if not token:
                return

    def insert(self, runs: Mapping[str, tuple[TrackedRun, str | None]]) -> dict[str, str]:
        given: dict[str, str] = {}
        for run_id, (run, parent) in runs.items():
            named = {**run.all_tags, **({} if parent is None else {_PARENT: given.get(parent, parent)})}
            created = self._client.create_run(self._experiment, run.started_ms, named, run.name).info.run_id
            given[run_id] = created
            self._log(created, run)
        return given

    def update(self, runs: Mapping[str, TrackedRun]) -> None:
        for run_id, run in runs.items():
            self._log(run_id, run, run.tags if not run.key else {KEY: run.key, **run.tags})

    def delete(self, run_ids: Sequence[str]) -> None:
        for run_id in run_ids:
            self._client.delete_run(run_id)

    def _log(self, run_id: str, run: TrackedRun, tags: Mapping[str, str] | None = None) -> None:
        metrics = [Metric(point.name, point.value, point.time_ms, point.step) for point in run.metrics]
        params = [Param(name, value) for name, value in run.params.items()]
        marks = [RunTag(name, value) for name, value in (tags or {}).items()]
        num_calls = max(-(-len(metrics) // (_BATCH - 2 * _PARAMS)), -(-len(params) // _PARAMS), 1 if marks else 0)
        for call in range(num_calls):
            some = metrics[call * (_BATCH - 2 * _PARAMS) : (call + 1) * (_BATCH - 2 * _PARAMS)]
            self._client.log_batch(run_id, some, params[call * _PARAMS : (call + 1) * _PARAMS], marks if call == 0 else [])
        if run.status == "RUNNING":
            self._client.update_run(run_id, "RUNNING")
        else:
            self._client.set_terminated(run_id, run.status, run.ended_ms)


def _add(session: Any, table: Any, rows: list[dict[str, Any]]) -> None:
    if rows:
        session.execute(sqlalchemy.insert(table.__table__), rows)


def _drop(session: Any, table: Any, run_id: str, names: list[str]) -> None:
    if names:
        gone = sqlalchemy.delete(table).where(table.run_uuid == run_id, table.key.in_(names))
        session.execute(gone, execution_options={"synchronize_session": False})


def _add_points(session: Any, points: Mapping[str, Sequence[Point]]) -> None:
    """All values, and of each metric the last one, which is what MLflow shows."""
    rows: list[dict[str, Any]] = []
    latest: dict[tuple[str, str], dict[str, Any]] = {}
    for run_id, of_run in points.items():
        for point in of_run:
            value = 0.0 if math.isnan(point.value) else min(max(point.value, -_LARGEST), _LARGEST)
            row = {"run_uuid": run_id, "key": point.name, "value": value, "timestamp": point.time_ms, "step": point.step}
            row["is_nan"] = math.isnan(point.value)
            rows.append(row)
            before = latest.get((run_id, point.name))
            if before is None or (row["step"], row["timestamp"]) >= (before["step"], before["timestamp"]):
                latest[run_id, point.name] = row
    _add(session, SqlMetric, rows)
    _add(session, SqlLatestMetric, list(latest.values()))


def register_model(
    uri: str, experiment: str, name: str, alias: str, folder: Path, description: str, tags: Mapping[str, str], files: Mapping[str, Any]
) -> str:
    """Register an exported model as the next version of `name`, under `alias`; that version.

    `folder` is what `fffsweep.pipeline.export` wrote; `mlflow.pyfunc.load_model(f"models:/{name}@{alias}")` reads texts with it. The run
    it belongs to lies beside the trials' and holds `files` (name -> JSON) too.
    """
    import mlflow.pyfunc

    client = MlflowClient(tracking_uri=uri, registry_uri=uri)
    noted = {"fffsweep.pick": alias, _NOTE: description, **tags}
    run = client.create_run(_experiment(client, experiment), tags=noted, run_name=f"pick {alias}")
    ended = "FAILED"
    try:
        with tempfile.TemporaryDirectory() as made:
            mlflow.pyfunc.save_model(made, loader_module="fffsweep.pipeline.predict", data_path=str(folder), pip_requirements=["fffsweep"])
            client.log_artifacts(run.info.run_id, made, "model")
        for file, content in files.items():
            client.log_dict(run.info.run_id, content, file)
        if not client.search_registered_models(f"name = '{name}'"):
            client.create_registered_model(name, description=f"Models picked from sweep {experiment}")
        source = f"{run.info.artifact_uri}/model"
        version = client.create_model_version(name, source, run.info.run_id, tags=dict(tags), description=description)
        client.set_registered_model_alias(name, alias, version.version)
        ended = "FINISHED"
    finally:
        client.set_terminated(run.info.run_id, ended)
    return str(version.version)


def replace_files(uri: str, experiment: str, name: str, about: str, made_of: str, write: Callable[[Path], None]) -> str:
    """Files of the one run `name` beside the trials', as `write` leaves them in a folder, and the experiment's description; the run's id.

    A finished run that was made of the same stays; any other goes when the new one is whole.
    """
    client = MlflowClient(tracking_uri=uri)
    identity = _experiment(client, experiment)
    client.set_experiment_tag(identity, _NOTE, about)
    before = list(client.search_runs([identity], f"attributes.run_name = '{name}' AND tags.\"{_MADE_OF}\" LIKE '%'"))
    for run in before:
        if run.data.tags[_MADE_OF] == made_of and run.info.status == "FINISHED":
            return str(run.info.run_id)
    run_id = client.create_run(identity, tags={_MADE_OF: made_of, _NOTE: about}, run_name=name).info.run_id
    with tempfile.TemporaryDirectory() as folder:
        write(Path(folder))
        client.log_artifacts(run_id, folder)
    client.set_terminated(run_id, "FINISHED")
    for run in before:
        client.delete_run(run.info.run_id)
    return str(run_id)


def _experiment(client: MlflowClient, name: str) -> str:
    if (found := client.get_experiment_by_name(name)) is None:
        raise MlflowException(f"MLflow has no experiment {name!r}: run `fffsweep verify {name} --repair` to write it again")
    return str(found.experiment_id)


def find_run(uri: str, experiment: str, trial: str, label: str = "") -> tuple[str, str]:
    """Ids of the experiment and of a trial's newest run, or that of its stage run `label`. Raises ValueError if there is none."""
    client = MlflowClient(tracking_uri=uri)
    found = client.get_experiment_by_name(experiment)
    wanted, newest = f"tags.\"{TRIAL}\" = '{trial}'", ["attributes.start_time DESC"]
    for run in client.search_runs([found.experiment_id], wanted, order_by=newest, max_results=_BATCH) if found else []:
        if run.data.tags.get(LABEL, "") == label:
            return str(run.info.experiment_id), str(run.info.run_id)
    raise ValueError(
        f"MLflow has no run {label or 'of its own'} of trial {trial!r} in {experiment!r}: `fffsweep verify` with --repair writes it"
    )
