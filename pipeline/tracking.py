"""MLflow as a projection of the result store: experiment = sweep, parent run = trial, child runs = stages. The one importer of mlflow.

Written by one process, the driver, from manifests alone; whatever is missing can be written again from them at any time.
"""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")

from mlflow.entities import Metric, Param, Run
from mlflow.tracking import MlflowClient

from fffsweep.pipeline.execute import read_curve
from fffsweep.pipeline.settings import canonical_json
from fffsweep.pipeline.store import Manifest, Store

_BATCH = 1000  # metrics that one log_batch call may hold
_PARAM_LENGTH = 6000
_TRIAL, _LABEL, _KEY = "fffsweep.trial", "fffsweep.label", "fffsweep.key"


class Tracker:
    """One sweep's experiment. Every method may be called again with the same arguments: what is there already is left as it is."""

    def __init__(self, uri: str, experiment: str, artifact_root: Path | None = None, tags: Mapping[str, str] | None = None) -> None:
        logging.getLogger("mlflow.store.db.utils").setLevel(logging.WARNING)
        self._client = MlflowClient(tracking_uri=uri)
        found = self._client.get_experiment_by_name(experiment)
        location = (artifact_root / experiment).resolve().as_uri() if artifact_root else None
        self._experiment = found.experiment_id if found else self._client.create_experiment(experiment, location, dict(tags or {}))
        self._trials: dict[str, Run] = {}
        self._stages: dict[tuple[str, str, str], str] = {}
        for run in self._all_runs():
            trial, label = run.data.tags.get(_TRIAL, ""), run.data.tags.get(_LABEL)
            if label is None:
                self._trials[trial] = run
            else:
                self._stages[trial, label, run.data.tags.get(_KEY, "")] = run.info.status

    def start_trial(self, trial: str, config: Mapping[str, Any], tags: Mapping[str, str]) -> None:
        """Open the parent run of a trial, with its whole resolved config."""
        if trial in self._trials:
            return
        run = self._client.create_run(self._experiment, tags={_TRIAL: trial, **tags}, run_name=trial)
        self._trials[trial] = run
        self._log(run.info.run_id, params=dict(_flatten(config)))
        self._client.log_dict(run.info.run_id, dict(config), "config.json")

    def log_stage(self, trial: str, label: str, manifest: Manifest, store: Store) -> None:
        """Child run of a finished stage run: config, metrics, curve, and everything that tells where it came from."""
        if self._stages.get((trial, label, manifest.key)) == "FINISHED":
            return
        started_ms = int(manifest.started_at * 1000)
        where = manifest.provenance
        tags = {
            "seed": str(manifest.run.seed),
            "commit": str(where.get("commit")),
            "dirty": str(where.get("dirty")),
            "versions": canonical_json(where.get("versions", {})),
            "device": str(where.get("device")),
            "machine": canonical_json(where.get("machine", {})),
            "data": str(where.get("data")),
        }
        run_id = self._child(trial, label, manifest.key, tags, started_ms)
        curve = read_curve(store.read(manifest, "curve.jsonl")) if "curve.jsonl" in manifest.artifacts else []
        metrics = [Metric(name, value, started_ms, 0) for name, value in manifest.metrics.items()]
        for row in curve:
            step = int(row["step"])
            metrics += [
                Metric(f"curve/{name}", value, started_ms, step) for name, value in row.items() if name != "step" and value is not None
            ]
        self._log(run_id, dict(_flatten(manifest.run.config)), metrics)
        self._client.log_dict(run_id, manifest.to_json(), "manifest.json")
        self._client.set_terminated(run_id, "FINISHED", started_ms + int(manifest.duration_s * 1000))
        self._stages[trial, label, manifest.key] = "FINISHED"

    def log_failure(self, trial: str, label: str, key: str, message: str) -> None:
        """Child run of a stage run that failed for good, with the reason."""
        run_id = self._child(trial, label, key, {"error": message[-5000:]}, None)
        self._client.set_terminated(run_id, "FAILED")

    def finish_trial(self, trial: str, metrics: Mapping[str, float], key: str) -> None:
        """Close a trial's parent run with the values it amounts to; `key` is the key of the result that holds them."""
        run = self._trials[trial]
        if run.info.status == "FINISHED" and run.data.tags.get(_KEY) == key:
            return
        now_ms = int(time.time() * 1000)
        self._log(run.info.run_id, metrics=[Metric(name, value, now_ms, 0) for name, value in metrics.items()])
        self._client.set_tag(run.info.run_id, _KEY, key)
        self._end(trial, "FINISHED")

    def fail_trial(self, trial: str) -> None:
        """Close the parent run of a trial that cannot be finished."""
        self._end(trial, "FAILED")

    def close(self) -> None:
        """Leave no run RUNNING: parents that are still open are marked KILLED; a resumed sweep finishes them."""
        for run in self._trials.values():
            if self._client.get_run(run.info.run_id).info.status == "RUNNING":
                self._client.set_terminated(run.info.run_id, "KILLED")

    def audit(self, expected: Mapping[tuple[str, str], str], store: Store, repair: bool = False) -> list[str]:
        """What MLflow holds otherwise than it should, a line each, given the key of every (trial, label) that is finished.

        With `repair`, runs that no result backs are deleted and runs left RUNNING are marked KILLED; what is missing is for
        `log_stage` to write.
        """
        problems, seen = [], set()
        for run in self._all_runs():
            trial, label, key = (run.data.tags.get(tag) for tag in (_TRIAL, _LABEL, _KEY))
            if run.info.status == "RUNNING":
                problems.append(f"MLflow run {run.info.run_name} of {trial} is left RUNNING")
                if repair:
                    self._client.set_terminated(run.info.run_id, "KILLED")
            if label is None or run.info.status != "FINISHED":
                continue
            if expected.get((str(trial), label)) != key and store.has(str(key)):
                continue  # of an earlier, smaller extent of the study
            if expected.get((str(trial), label)) != key or (trial, label) in seen:
                problems.append(f"MLflow run {label} of {trial} has no result of its own")
                if repair:
                    self._client.delete_run(run.info.run_id)
            else:
                seen.add((trial, label))
        return problems + [f"MLflow has no run {label} of {trial}" for trial, label in expected if (trial, label) not in seen]

    def _end(self, trial: str, status: str) -> None:
        run_id = self._trials[trial].info.run_id
        self._client.set_terminated(run_id, status)
        self._trials[trial] = self._client.get_run(run_id)

    def _child(self, trial: str, label: str, key: str, tags: Mapping[str, str], started_ms: int | None) -> str:
        parent = self._trials[trial].info.run_id
        named = {"mlflow.parentRunId": parent, _TRIAL: trial, _LABEL: label, _KEY: key, **tags}
        run_id: str = self._client.create_run(self._experiment, started_ms, named, label).info.run_id
        return run_id

    def _log(self, run_id: str, params: Mapping[str, str] | None = None, metrics: list[Metric] | None = None) -> None:
        entries = [Param(name, value[:_PARAM_LENGTH]) for name, value in (params or {}).items()]
        for start in range(0, len(entries), 100):
            self._client.log_batch(run_id, params=entries[start : start + 100])
        for start in range(0, len(metrics or []), _BATCH):
            self._client.log_batch(run_id, metrics=(metrics or [])[start : start + _BATCH])

    def _all_runs(self) -> Iterator[Run]:
        token = None
        while True:
            page = self._client.search_runs([self._experiment], max_results=_BATCH, page_token=token)
            yield from page
            token = page.token
            if not token:
                return


def _flatten(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    """Nested config as `a.b.c` -> text; lists stay whole."""
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _flatten(entry, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, canonical_json(value) if isinstance(value, list | tuple) else str(value)
