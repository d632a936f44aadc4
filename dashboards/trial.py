"""One trial as the record and the store's manifests have it."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

from fffsweep.kernels.shape import TreeShape
from fffsweep.pipeline.model_settings import FeedForward
from fffsweep.pipeline.remote_store import open_store
from fffsweep.pipeline.store import DamagedArtifact, Manifest, Store
from fffsweep.sweeps import statistics as stats
from fffsweep.sweeps.statistics import Interval

FINISHED = ("complete", "reused")


@dataclass(frozen=True)
class Estimate:
    """A figure and how sure it is; `interval` is None where one replicate gives none."""

    value: float
    interval: Interval | None = None


class TrialView:
    """One trial of a study: its place in the space, how far it is, and what it measured."""

    def __init__(self, record: dict[str, Any], store: Store) -> None:
        self._store = store
        self.id: str = record["id"]
        self.layout: str | None = record["layout"]
        self.controls: tuple[str, ...] = tuple(record["controls"])
        self.in_study: bool = record["in_study"]
        self.number: int | None = record["number"]
        self.params: dict[str, Any] = record["params"]
        self.model: dict[str, Any] = record["model"]
        self.state: str = record["state"]
        self.error: str | None = record["error"]
        self.stages: list[dict[str, Any]] = record["stages"]
        self.collect_key: str | None = record["collect_key"]
        self._estimates = _estimates(store.root, self.collect_key)

    @cached_property
    def metrics(self) -> dict[str, float]:
        """Metrics of the trial's `collect` run; empty until it has one."""
        if self.collect_key is None:
            return {}
        try:
            return read_manifest(self._store.root, self.collect_key).metrics
        except (KeyError, DamagedArtifact):
            return {}

    @property
    def is_overlay(self) -> bool:
        """Drawn beside the front instead of competing for it."""
        return not self.in_study

    @property
    def variant(self) -> str:
        """`dense`, `fff`, `none` or `random_routing`."""
        return str(self.model["feedforward"]["variant"])

    @cached_property
    def shape(self) -> TreeShape | None:
        """Trees and depth; None without a feedforward layer."""
        layer = self.model["feedforward"]
        return None if layer["variant"] == "none" else TreeShape(int(layer["trees"]), int(layer["depth"]))

    @cached_property
    def _layer(self) -> FeedForward:
        return _feedforward(json.dumps(self.model["feedforward"]))

    @cached_property
    def width(self) -> int:
        """Neurons stored in a layer; 0 without one."""
        return self._layer.width

    @cached_property
    def active_width(self) -> int:
        """Neurons used for one token; 0 without a layer."""
        return self._layer.active_width

    @property
    def finished_at(self) -> float:
        """When the trial's last stage run ended, in seconds since 1970; infinity before that."""
        manifest = self.stage_manifest("collect")
        return float("inf") if manifest is None else manifest.started_at + manifest.duration_s

    def has_role(self, kind: str, layout: str | None = None) -> bool:
        """Whether the trial is the control `kind`, of `layout` if one is given."""
        return kind in self.controls or (f"{kind}({layout})" in self.controls if layout else False)

    def value(self, metric: str) -> float | None:
        """Mean over the replicates; None if the trial has no such metric yet."""
        return self.metrics.get(metric)

    def replicates(self, metric: str) -> dict[int, float]:
        """Replicate -> value."""
        found, number = {}, 0
        while (name := f"{metric}/{number}") in self.metrics:
            found[number] = self.metrics[name]
            number += 1
        return found

    def estimate(self, metric: str) -> Estimate | None:
        """Value of a metric with its bootstrap interval over the replicates; None if the trial has no such metric."""
        if metric not in self._estimates and metric in self.metrics:
            values = list(self.replicates(metric).values())
            self._estimates[metric] = Estimate(self.metrics[metric], stats.mean_interval(values))
        return self._estimates.get(metric)

    @cached_property
    def averages(self) -> dict[str, float]:
        """Metrics without the values of single replicates."""
        return _averages(self._store.root, self.collect_key) if self.metrics and self.collect_key else {}

    def stage_manifest(self, label: str) -> Manifest | None:
        """Manifest of a finished stage run by its label, such as `pretrain/0`; None if it has none."""
        for stage in self.stages:
            if stage["label"] == label and stage["state"] in FINISHED:
                try:
                    return read_manifest(self._store.root, stage["key"])
                except (KeyError, DamagedArtifact):
                    return None
        return None

    @cached_property
    def num_replicates(self) -> int:
        """Pretraining seeds that the trial has: a search may have given it more than the config says."""
        return max(1, sum(str(stage["label"]).startswith(("pretrain/", "convert/")) for stage in self.stages))

    def training_label(self, replicate: int) -> str:
        """Label of the stage run that a replicate's model comes from."""
        labels = {stage["label"] for stage in self.stages}
        return f"convert/{replicate}" if f"convert/{replicate}" in labels else f"pretrain/{replicate}"

    def training(self, replicate: int) -> Manifest | None:
        """Its manifest; None before it has finished."""
        return self.stage_manifest(self.training_label(replicate))

    def artifact(self, label: str, name: str) -> Path | None:
        """Path of an artifact of a finished stage run, checksum verified; None if it has none or it is damaged."""
        manifest = self.stage_manifest(label)
        if manifest is None or name not in manifest.artifacts:
            return None
        try:
            return self._store.read(manifest, name)
        except DamagedArtifact:
            return None

    def curve(self, replicate: int) -> list[dict[str, Any]]:
        """Logged steps of a replicate's pretraining."""
        path = self.artifact(self.training_label(replicate), "curve.jsonl")
        return [] if path is None else [json.loads(line) for line in path.read_text().splitlines()]

    def tree_health(self, replicate: int) -> dict[str, Any] | None:
        """Left turns, leaf usage and dead nodes of a replicate's trained trees; None without trees."""
        path = self.artifact(self.training_label(replicate), "tree_health.json")
        return None if path is None else json.loads(path.read_text())

    @property
    def num_finished(self) -> int:
        return sum(stage["state"] in FINISHED for stage in self.stages)


@lru_cache(maxsize=50_000)
def _feedforward(settings: str) -> FeedForward:
    return FeedForward.model_validate_json(settings)


@lru_cache(maxsize=50_000)
def read_manifest(root: Path, key: str) -> Manifest:
    """Manifests never change, so one that was read stays read."""
    return open_store(root).get(key)


@lru_cache(maxsize=50_000)
def _averages(root: Path, collect_key: str) -> dict[str, float]:
    metrics = read_manifest(root, collect_key).metrics
    return {name: value for name, value in metrics.items() if name.rpartition("/")[0] not in metrics}


@lru_cache(maxsize=50_000)
def _estimates(root: Path, collect_key: str | None) -> dict[str, Estimate]:
    """Estimates made so far of a collected result, by metric: they outlive the view that asked, since results never change."""
    return {}
