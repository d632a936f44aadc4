"""How long stage runs took and how much they stored, to tell what those to come will."""

from __future__ import annotations

import contextlib
import itertools
import json
from collections import defaultdict
from pathlib import Path
from statistics import fmean, median

from fffsweep.pipeline.settings import canonical_json
from fffsweep.pipeline.stage import StageRun
from fffsweep.pipeline.store import Manifest, Store

_MOST_MANIFESTS = 500  # their file names are hashes, so any 500 are a fair sample


class History:
    """Durations and sizes of earlier runs in a store, by stage and settings. Read once, asked for every run to come.

    machine: fingerprint of the one machine whose runs count; None for all.
    """

    def __init__(self, store: Store, machine: str | None = None) -> None:
        self._earlier: dict[tuple[str, str | None], list[Manifest]] = defaultdict(list)
        self._medians: dict[tuple[str, str | None], tuple[float, float]] = {}
        for key in itertools.islice(store.keys(), _MOST_MANIFESTS):
            manifest = store.find(key)
            if manifest is None:
                continue
            if machine is not None and manifest.provenance.get("machine_fingerprint") != machine:
                continue
            for settings in (None, _settings(manifest.run)):
                self._earlier[manifest.run.stage, settings].append(manifest)

    def median(self, run: StageRun) -> tuple[float, float, str] | None:
        """Seconds and bytes that `run` will take, from runs with equal settings, else from all of its stage; None without any."""
        if (run.stage, None) not in self._earlier:
            return None
        place: tuple[str, str | None] = run.stage, _settings(run)
        if place not in self._earlier:
            place = run.stage, None
        chosen = self._earlier[place]
        if place not in self._medians:
            seconds = median(manifest.duration_s / _amount(manifest.run) for manifest in chosen)
            num_bytes = median(sum(artifact.num_bytes for artifact in manifest.artifacts.values()) for manifest in chosen)
            self._medians[place] = seconds, num_bytes
        seconds, num_bytes = self._medians[place]
        return seconds * _amount(run), num_bytes, f"{len(chosen)} earlier runs" if len(chosen) > 1 else "1 earlier run"


def _settings(run: StageRun) -> str:
    return canonical_json(run.config)


def _amount(run: StageRun) -> float:
    """What a run's time grows with, as far as its config says: the budget of pretraining."""
    budgets = [run.config.get(name) for name in ("tokens", "steps", "wall_clock_s", "distinct_tokens")]
    if run.stage not in ("pretrain", "rung", "convert", "activations"):
        return 1.0
    return float(next(filter(None, budgets), 1.0)) * float(run.config.get("share", 1.0))  # of which a rung has a share


def start_cost_s(results: Path) -> float:
    """Mean seconds between a driver's word to begin a run and its result that the stage did not take: how long a run took to be started
    and heard of, in the newest study of a results folder that was driven on Ray; 0 without one."""
    for history in sorted(results.glob("studies/*/events.jsonl"), key=lambda path: -path.stat().st_mtime):
        on_ray, begun, costs = False, dict[str, float](), list[float]()
        for line in history.read_text().splitlines():
            with contextlib.suppress(ValueError):  # a line that a killed driver left half-written
                event = json.loads(line)
                if event["event"] == "started":
                    on_ray = event["executor"] == "ray"
                elif event["event"] == "submitted":
                    begun[event["key"]] = event["time"]
                elif event["event"] == "finished" and event["key"] in begun and on_ray:
                    costs.append(event["time"] - begun[event["key"]] - event["duration_s"])
        if costs:
            return max(0.0, fmean(costs))
    return 0.0
