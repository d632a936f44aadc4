"""What the tracking server is to hold of a trial or a stage run, made from manifests alone. Knows nothing of MLflow's calls."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from fffsweep.pipeline.execute import read_curve
from fffsweep.pipeline.secrets import mask_all
from fffsweep.pipeline.settings import canonical_json
from fffsweep.pipeline.store import Manifest, Store

Status = Literal["RUNNING", "FINISHED", "FAILED", "KILLED"]
TRIAL, LABEL, KEY = "fffsweep.trial", "fffsweep.label", "fffsweep.key"
_PARAM_LENGTH, _TAG_LENGTH = 6000, 5000


@dataclass(frozen=True)
class Point:
    """One value of a metric."""

    name: str
    value: float
    time_ms: int
    step: int = 0


@dataclass(frozen=True)
class TrackedRun:
    """One run as it is to stand there. `label` is None for the run of a trial itself, whose children are its stage runs.

    key: of the result that backs it, empty as long as there is none.
    """

    trial: str
    label: str | None
    key: str
    status: Status
    started_ms: int
    ended_ms: int | None = None
    tags: dict[str, str] = field(default_factory=dict)
    params: dict[str, str] = field(default_factory=dict)
    metrics: tuple[Point, ...] = ()

    @property
    def name(self) -> str:
        return self.label or self.trial

    @property
    def all_tags(self) -> dict[str, str]:
        """Its tags, those it is found again by among them, none longer than a server takes."""
        found = {TRIAL: self.trial, KEY: self.key, **({} if self.label is None else {LABEL: self.label}), **self.tags}
        return {name: value[:_TAG_LENGTH] for name, value in mask_all(found).items()}

    def after(self, before: TrackedRun) -> TrackedRun:
        """One run for what would be written twice."""
        tags, params = {**before.tags, **self.tags}, {**before.params, **self.params}
        return replace(self, key=self.key or before.key, started_ms=before.started_ms, tags=tags, params=params)


@dataclass(frozen=True)
class Known:
    """A run as it stands on the server."""

    run_id: str
    trial: str
    label: str | None
    key: str
    status: str


def open_trial(trial: str, config: Mapping[str, Any], tags: Mapping[str, str]) -> TrackedRun:
    """The run of a trial that is under way, with its whole resolved config."""
    return TrackedRun(trial, None, "", "RUNNING", _now_ms(), tags=dict(tags), params=flatten(config))


def ended_trial(trial: str, status: Status, metrics: Mapping[str, float], key: str) -> TrackedRun:
    """The run of a trial that has ended; `key` is the key of the result that holds its metrics."""
    now_ms = _now_ms()
    return TrackedRun(trial, None, key, status, now_ms, now_ms, metrics=tuple(Point(n, v, now_ms) for n, v in metrics.items()))


def finished_stage(trial: str, label: str, manifest: Manifest, store: Store) -> TrackedRun:
    """Child run of a finished stage run: config, metrics, curve, and everything that tells where it came from.

    Raises DamagedArtifact if the curve is.
    """
    started_ms, where = int(manifest.started_at * 1000), manifest.provenance
    tags = {
        "seed": str(manifest.run.seed),
        "commit": str(where.get("commit")),
        "dirty": str(where.get("dirty")),
        "versions": canonical_json(where.get("versions", {})),
        "device": str(where.get("device")),
        "machine": canonical_json(where.get("machine", {})),
        "data": str(where.get("data")),
        "mlflow.note.content": f"Stage {manifest.run.stage} of trial {trial}, seed {manifest.run.seed}; its result is {manifest.key}",
    }
    has_curve = "curve.jsonl" in manifest.artifacts and not manifest.artifacts["curve.jsonl"].absent
    curve = read_curve(store.read(manifest, "curve.jsonl")) if has_curve else []
    points = {(name, 0): Point(name, value, started_ms) for name, value in manifest.metrics.items()}
    for row in curve:
        step = int(row["step"])
        for name, value in row.items():
            if name != "step" and value is not None:
                points[f"curve/{name}", step] = Point(f"curve/{name}", value, started_ms, step)
    ended_ms = started_ms + int(manifest.duration_s * 1000)
    params = flatten(manifest.run.config)
    return TrackedRun(trial, label, manifest.key, "FINISHED", started_ms, ended_ms, tags, params, tuple(points.values()))


def failed_stage(trial: str, label: str, key: str, message: str) -> TrackedRun:
    """Child run of a stage run that failed for good, with the end of the reason."""
    return TrackedRun(trial, label, key, "FAILED", _now_ms(), _now_ms(), {"error": message[-_TAG_LENGTH:]})


def flatten(config: Mapping[str, Any]) -> dict[str, str]:
    """Nested config as `a.b.c` -> text, passwords masked, cut to what a server takes; lists stay whole."""
    return {name: value[:_PARAM_LENGTH] for name, value in mask_all(dict(_leaves(config))).items()}


def _leaves(value: Any, prefix: str = "") -> Iterator[tuple[str, str]]:
    if isinstance(value, Mapping):
        for name, entry in value.items():
            yield from _leaves(entry, f"{prefix}.{name}" if prefix else str(name))
    else:
        yield prefix, canonical_json(value) if isinstance(value, list | tuple) else str(value)


def _now_ms() -> int:
    return int(time.time() * 1000)
