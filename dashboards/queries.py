"""The one way in which tables, figures, reports and pages read a study: its record and the store's manifests, never MLflow."""

from __future__ import annotations

import contextlib
import errno
import json
import math
import re
import time
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

import numpy as np

from fffsweep.dashboards.trial import FINISHED, Estimate, TrialView, read_manifest
from fffsweep.pipeline.remote_store import open_store
from fffsweep.sweeps import statistics as stats
from fffsweep.sweeps.config_errors import nearest_first
from fffsweep.sweeps.constraints import RETENTION, parse_constraint, retention
from fffsweep.sweeps.pareto import front
from fffsweep.sweeps.record import load, study_folder

QUALITY, QUALITY_VALIDATION = "quality/avg", "quality/validation_avg"
BASELINE = {QUALITY: "quality/baseline_avg", QUALITY_VALIDATION: "quality/baseline_validation_avg"}
REL_TIME, GPU_REL_TIME = "ff/cpu/rel_time", "ff/gpu/rel_time"
_POINT = re.compile(r"(?P<prefix>ff/[cg]pu/(?P<tokens>\d+)_(?P<dtype>[a-z]+\d+)(_(?P<threads>\d+)t)?_(?P<mode>[a-z]+))/rel_time")
_NO_SUCH = (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG)
T = TypeVar("T")


class StudyNotFound(ValueError):
    """No study of that name in the results folder."""


@dataclass(frozen=True)
class Point:
    """One benchmark point of the layer timings; its metrics are `prefix/...`, and `threads` is None on a GPU."""

    prefix: str
    tokens: int
    dtype: str
    threads: int | None
    mode: str

    @property
    def on_gpu(self) -> bool:
        return self.threads is None


@dataclass(frozen=True)
class FrontEntry:
    """A trial on the front; `p_front` is None where one replicate leaves it undecided."""

    trial: TrialView
    p_front: float | None


class StudyView:
    """A study as it stands: immutable; `load_study` gives another one when the record has changed."""

    def __init__(self, results: Path, record: dict[str, Any]) -> None:
        self.results = results
        self.store = open_store(results / "store")
        self.name: str = record["name"]
        self.config: dict[str, Any] = record["config"]
        self.state: str = record["state"]
        self.driver: dict[str, Any] = record.get("driver") or {}
        self.created_at: float = record["created_at"]
        self.updated_at: float = record["updated_at"]
        self.objectives: dict[str, str] = record["objectives"]
        self.trials = [TrialView(trial, self.store) for trial in record["trials"]]

    @property
    def folder(self) -> Path:
        return study_folder(self.results, self.name)

    @property
    def description(self) -> str:
        return str(self.config.get("description") or "")

    @property
    def tasks(self) -> list[str]:
        """Finetuning tasks, in the config's order."""
        return list(self.config.get("stages", {}).get("finetune", {}).get("tasks", []))

    @property
    def num_replicates(self) -> int:
        """Pretraining seeds that every trial has; a search may give more to some."""
        asked = self.config.get("seeds", {}).get("pretrain", 1)
        return int(asked["min"] if isinstance(asked, dict) else asked)

    @cached_property
    def seeds_of_trials(self) -> tuple[int, int]:
        """Fewest and most pretraining seeds of a finished trial; those asked for before there is one."""
        counts = [trial.num_replicates for trial in self.finished] or [self.num_replicates]
        return min(counts), max(counts)

    @property
    def matches_time(self) -> bool:
        """Whether all trials were pretrained for the same time; else for the same number of tokens."""
        return (self.config.get("stages", {}).get("pretrain") or {}).get("wall_clock_s") is not None

    @property
    def converts(self) -> bool:
        """Whether models are an existing encoder's with other feedforward layers; else they are pretrained."""
        return self.config.get("stages", {}).get("convert") is not None

    @property
    def maximize(self) -> list[bool]:
        return [direction == "maximize" for direction in self.objectives.values()]

    @cached_property
    def finished(self) -> list[TrialView]:
        """Trials that have their collected metrics."""
        return [trial for trial in self.trials if trial.metrics]

    @cached_property
    def reference(self) -> TrialView | None:
        """The finished trial in the role reference_dense; where a search tunes it, the best one on the rows held out for selection."""
        found = [trial for trial in self.finished if trial.has_role("reference_dense")]
        return max(found, key=lambda trial: trial.metrics.get(QUALITY, -math.inf), default=None)

    @property
    def constraints(self) -> list[str]:
        """The search's constraints, as the config has them."""
        return list(self.config.get("constraints") or [])

    def violated(self, trial: TrialView) -> list[str]:
        """Constraints that a finished trial does not keep."""
        return self.memo(("violated", trial.id), lambda: self._violated(trial))

    def _violated(self, trial: TrialView) -> list[str]:
        found = []
        for constraint in map(parse_constraint, self.constraints):
            if constraint.metric == RETENTION:
                value = retention(trial.metrics, self.reference.metrics) if self.reference and QUALITY in trial.metrics else None
            else:
                value = trial.value(constraint.metric)
            if value is not None and constraint.violation(value) > 0:
                found.append(constraint.text)
        return found

    @cached_property
    def no_feedforward(self) -> TrialView | None:
        """The finished control without feedforward layers."""
        return next((trial for trial in self.finished if trial.variant == "none"), None)

    def trial(self, trial_id: str) -> TrialView:
        """Raises ValueError with the trials there are, nearest first."""
        for trial in self.trials:
            if trial.id == trial_id:
                return trial
        known = nearest_first(trial_id, [trial.id for trial in self.trials])
        raise ValueError(f"trial {trial_id!r} of study {self.name!r}: expected one of {known}")

    @cached_property
    def _by_control(self) -> dict[str, TrialView]:
        return {role: trial for trial in reversed(self.finished) for role in trial.controls}

    def control(self, kind: str, layout: str | None) -> TrialView | None:
        """The finished trial that plays the control `kind`, for `layout` if the control is of a layout."""
        return self._by_control.get(f"{kind}({layout})") or self._by_control.get(kind)

    def competing(self, objectives: Sequence[str]) -> list[TrialView]:
        """Finished trials of the study itself that have every one of these metrics."""
        return [trial for trial in self.finished if trial.in_study and all(name in trial.metrics for name in objectives)]

    def front(
        self,
        objectives: Sequence[str] | None = None,
        maximize: Sequence[bool] | None = None,
        trials: Sequence[TrialView] | None = None,
    ) -> list[FrontEntry]:
        """Non-dominated trials in the order of the first objective, best first; by default all of the study over its objectives.

        A trial that does not keep the study's constraints is never on the front, and never keeps another from it.
        """
        names = tuple(objectives or self.objectives)
        directions = tuple(self.maximize if maximize is None else maximize)
        if trials is None:
            return self.memo(("front", names, directions), lambda: self._front(names, directions, self.competing(names)))
        return self._front(names, directions, trials)

    def _front(self, names: tuple[str, ...], directions: tuple[bool, ...], members: Sequence[TrialView]) -> list[FrontEntry]:
        members = [trial for trial in members if not self.violated(trial)]
        if not members:
            return []
        chances = self.front_chances(names, directions)
        on_front = front([[trial.metrics[name] for name in names] for trial in members], directions)
        entries = [FrontEntry(trial, chances.get(trial.id)) for trial, member in zip(members, on_front, strict=True) if member]
        sign = -1 if directions[0] else 1
        return sorted(entries, key=lambda entry: sign * entry.trial.metrics[names[0]])

    def memo(self, key: Hashable, make: Callable[[], T]) -> T:
        """What `make` gives, kept as long as this view: views never change."""
        kept: dict[Hashable, Any] = self.__dict__.setdefault("_memo", {})
        if key not in kept:
            kept[key] = make()
        found: T = kept[key]
        return found

    def front_chances(self, objectives: tuple[str, ...], maximize: tuple[bool, ...]) -> dict[str, float]:
        """Probability of being on the front, by trial that keeps the constraints; empty with fewer than two common replicates."""
        return self.memo(("chances", objectives, maximize), lambda: self._front_chances(objectives, maximize))

    def _front_chances(self, objectives: tuple[str, ...], maximize: tuple[bool, ...]) -> dict[str, float]:
        trials = [trial for trial in self.competing(objectives) if not self.violated(trial)]
        columns = [[trial.replicates(name) for name in objectives] for trial in trials]
        shared = stats.common_replicates([values for row in columns for values in row])
        if len(shared) < 2:
            return {}
        values = np.array([[[column[replicate] for column in row] for replicate in shared] for row in columns])
        chances = stats.probability_on_front(values, maximize)
        return {} if chances is None else {trial.id: float(chance) for trial, chance in zip(trials, chances, strict=True)}

    def paired(self, ours: TrialView, theirs: TrialView, metric: str) -> tuple[list[float], list[float]]:
        """Values of two trials on the replicates that both have."""
        mine, others = ours.replicates(metric), theirs.replicates(metric)
        shared = stats.common_replicates([mine, others])
        return [mine[number] for number in shared], [others[number] for number in shared]

    def difference(self, ours: TrialView, theirs: TrialView, metric: str) -> stats.Difference | None:
        """Paired difference of a metric; None if one of them lacks it."""
        pairs = self.paired(ours, theirs, metric)
        return stats.difference(*pairs) if pairs[0] else None

    def retention(self, trial: TrialView, metric: str = QUALITY) -> Estimate | None:
        """mean(trial) / mean(reference_dense) on the same seeds; None without a reference, or where its mean is not positive."""
        if self.reference is None or metric not in trial.metrics or metric not in self.reference.metrics:
            return None
        ours, theirs = self.paired(trial, self.reference, metric)
        if not ours or sum(theirs) <= 0:
            return None
        return Estimate(sum(ours) / sum(theirs), stats.ratio_interval(ours, theirs))

    def chance_kept(self, trial: TrialView, share: float, metric: str = QUALITY) -> float | None:
        """Share of the resampled replicates in which the trial keeps `share` of the reference's quality; None for one replicate."""
        ours, theirs = self.paired(trial, self.reference, metric) if self.reference else ([], [])
        if len(ours) < 2:
            return None
        weights, probabilities = stats.resamples(len(ours))
        return float(probabilities @ (weights @ np.asarray(ours) >= share * (weights @ np.asarray(theirs))))

    def flop_limit(self, trial: TrialView) -> float | None:
        """Width of the reference layer over the trial's active width: the speed-up that arithmetic alone allows."""
        return None if self.reference is None or trial.active_width == 0 else self.reference.width / trial.active_width

    @cached_property
    def points(self) -> list[Point]:
        """Benchmark points that some trial was timed at, by tokens."""
        names = set[str]().union(*(trial.averages.keys() for trial in self.finished))
        found = [match for name in names if (match := _POINT.fullmatch(name))]
        points = [
            Point(match["prefix"], int(match["tokens"]), match["dtype"], int(match["threads"]) if match["threads"] else None, match["mode"])
            for match in found
        ]
        return sorted(points, key=lambda point: (point.mode, point.dtype, point.threads or 0, point.tokens))

    @cached_property
    def rel_times(self) -> list[str]:
        """Relative times of the layer that there are, the CPU's first; the CPU's where nothing was timed."""
        return [name for name in (REL_TIME, GPU_REL_TIME) if any(name in trial.metrics for trial in self.finished)] or [REL_TIME]

    @cached_property
    def rel_time(self) -> str:
        """The relative time that trials are chosen by: an objective's, else the CPU's, or the GPU's if only that was timed."""
        return next((name for name in self.objectives if name in self.rel_times), self.rel_times[0])

    @property
    def where_timed(self) -> str:
        """What a sentence about `rel_time` ends in."""
        return " on a GPU" if self.rel_time == GPU_REL_TIME else ""

    @cached_property
    def progress(self) -> dict[str, int]:
        """Stage runs by state, each key counted once; `total` with them."""
        states = {stage["key"]: stage["state"] for trial in self.trials for stage in trial.stages}
        counts: dict[str, int] = {"total": len(states)}
        for state in states.values():
            counts[state] = counts.get(state, 0) + 1
        counts["finished"] = sum(counts.get(state, 0) for state in FINISHED)
        return counts

    @cached_property
    def compute_s(self) -> float:
        """Seconds of all finished stage runs, shared ones counted once."""
        return sum({stage["key"]: stage["duration_s"] or 0.0 for trial in self.trials for stage in trial.stages}.values())

    @cached_property
    def provenance(self) -> dict[str, Any]:
        """Where the results come from: values that differ between manifests are listed beside each other."""
        manifests = [trial.training(0) for trial in self.finished[:50]]
        found = [manifest for manifest in manifests if manifest is not None]
        prepared = next((m for trial in self.finished[:1] if (m := trial.stage_manifest("prepare"))), None)
        commits = {
            f"{m.provenance.get('commit') or 'unknown'}{' (with local changes)' if m.provenance.get('dirty') else ''}" for m in found
        }
        machines = [json.dumps(m.provenance.get("machine", {}), sort_keys=True) for m in found]
        return {
            "commits": sorted(commits),
            "versions": found[0].provenance.get("versions", {}) if found else {},
            "machines": [json.loads(text) for text in dict.fromkeys(machines)],
            "devices": sorted({str(m.provenance.get("device", "cpu")) for m in found}),
            "data": prepared.run.fingerprints.get("data") if prepared else None,
            "seeds": self.config.get("seeds", {}),
        }

    def picks(self) -> list[dict[str, Any]]:
        """What was picked or is being picked, newest first: `fffsweep.pick/1` as `fffsweep pick` writes it."""
        found = [json.loads(path.read_text()) for path in (self.folder / "picks").glob("[!.]*.json")]
        return sorted(found, key=lambda each: -each["time"])

    def events(self, last: int = 50) -> list[dict[str, Any]]:
        """The last lines of the study's history; one that a killed driver left half-written is left out."""
        try:
            lines = (self.folder / "events.jsonl").read_text().splitlines()
        except FileNotFoundError:
            return []
        found = []
        for line in lines[-last:]:
            with contextlib.suppress(json.JSONDecodeError):
                found.append(json.loads(line))
        return found


def load_study(results: Path, name: str) -> StudyView:
    """The study as its record stands now; the same object until the record changes. Raises StudyNotFound with those there are."""
    results = Path(results)
    path = study_folder(results, name) / "study.json"
    try:
        stat = path.stat()
    except OSError as error:
        if error.errno not in _NO_SUCH:
            raise
        names = list_studies(results)
        known = f"expected one of {nearest_first(name, names)}" if names else "there is none yet; `fffsweep run CONFIG` makes one"
        raise StudyNotFound(f"study {name!r} in {results}: {known}") from None
    return _load(results.resolve(), path, stat.st_mtime_ns, stat.st_size)


def stamp(results: Path, name: str) -> str:
    """Changes whenever the study's record or one of its picks does; empty if there is none."""
    folder = study_folder(Path(results), name)
    try:
        stat = (folder / "study.json").stat()
    except OSError:
        return ""
    picks = folder / "picks"
    return f"{stat.st_mtime_ns}-{stat.st_size}" + (f"-{picks.stat().st_mtime_ns}" if picks.exists() else "")


def disk_bytes(view: StudyView) -> int:
    """Bytes of the artifacts that a study's finished stage runs have, those with equal content counted once. Reads every manifest."""
    sizes: dict[str, int] = {}
    keys = {stage["key"] for trial in view.trials for stage in trial.stages if stage["state"] in FINISHED}
    for number, key in enumerate(keys):
        if number % 10 == 9:
            time.sleep(0.005)  # a thread that only counts leaves the interpreter to those that answer
        with contextlib.suppress(KeyError):
            sizes.update({artifact.sha256: artifact.num_bytes for artifact in read_manifest(view.store.root, key).artifacts.values()})
    return sum(sizes.values())


def list_studies(results: Path) -> list[str]:
    """Names of the studies in a results folder."""
    return sorted(unquote(path.parent.name) for path in (Path(results) / "studies").glob("*/study.json"))


@lru_cache(maxsize=16)
def _load(results: Path, path: Path, mtime_ns: int, num_bytes: int) -> StudyView:
    record = load(path.parent)
    if record is None:
        raise StudyNotFound(f"{path}: gone while it was being read")
    return StudyView(results, record)
