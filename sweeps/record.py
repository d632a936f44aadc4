"""The study record: which trials a study has, which stage runs they need, and how far each is. Written by its driver alone."""

from __future__ import annotations

import errno
import json
import os
import re
import time
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

from fffsweep.pipeline import lease
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.stage import Resources, StageRun
from fffsweep.pipeline.store import one_component
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.graph import PlannedStage, TrialPlan
from fffsweep.sweeps.space import TrialSpec

SCHEMA = "fffsweep.study/1"
EXTENDS = (
    "layouts",
    "depth",
    "width",
    "controls",
    "seeds",
    "search.num_trials",
)  # what may differ when a study is run again under its name
_KEY = re.compile(r"[0-9a-f]{40}")
_IRRELEVANT = ("description", "resources", "retries")  # what cannot change a result

State = Literal["waiting", "running", "complete", "reused", "failed"]
TrialStateName = Literal["waiting", "running", "paused", "complete", "failed", "pruned"]  # paused: at a rung, it may be called on


@dataclass(frozen=True)
class RecordedRun(StageRun):
    """A stage run of which only the record is left: its name and its key, not what makes the key."""

    recorded_key: str = ""

    @property
    def key(self) -> str:  # type: ignore[override]
        return self.recorded_key


@dataclass
class StageState:
    """How far one stage run of one trial is."""

    planned: PlannedStage
    state: State = "waiting"
    attempts: int = 0
    progress: dict[str, Any] | None = None
    worker: str | None = None
    duration_s: float | None = None
    error: str | None = None

    @property
    def live(self) -> tuple[Any, ...]:
        """All of it that changes, for comparing."""
        return self.state, self.attempts, self.progress, self.worker, self.duration_s, self.error

    def to_json(self) -> dict[str, Any]:
        run = self.planned.run
        live = {name: getattr(self, name) for name in ("state", "attempts", "progress", "worker", "duration_s", "error")}
        return {"name": run.stage, "label": self.planned.label, "key": run.key, "replicate": self.planned.replicate, **live}

    @staticmethod
    def from_json(value: dict[str, Any]) -> StageState:
        """The stage run as it was recorded, wherever and by whichever machine it was planned. Raises ConfigError if its key is none."""
        if not _KEY.fullmatch(value["key"]):
            raise ConfigError(f"key {value['key']!r} of stage run {value['label']}: expected 40 lower-case hexadecimal digits")
        run = RecordedRun(value["name"], 0, {}, 0, recorded_key=value["key"])
        live = {name: value[name] for name in ("state", "attempts", "progress", "worker", "duration_s", "error")}
        return StageState(PlannedStage(value["label"], run, Resources(), value["replicate"]), **live)


@dataclass
class TrialState:
    """How far one trial is."""

    plan: TrialPlan
    stages: list[StageState]
    state: TrialStateName = "waiting"
    number: int | None = None
    error: str | None = None

    def to_json(self) -> dict[str, Any]:
        spec = self.plan.spec
        collect = self.stages[-1]
        return {
            "id": spec.id,
            "layout": spec.layout,
            "controls": list(spec.controls),
            "in_study": spec.in_study,
            "number": self.number,
            "params": spec.params,
            "point": spec.point,
            "stratum": spec.stratum,
            "model": spec.model.resolved(),
            "state": self.state,
            "error": self.error,
            "collect_key": collect.planned.run.key if self.plan.is_whole and collect.state in ("complete", "reused") else None,
            "stages": [stage.to_json() for stage in self.stages],
        }

    @staticmethod
    def from_json(value: dict[str, Any]) -> TrialState:
        """The trial as it was recorded."""
        model = ModelSettings.model_validate(value["model"])
        spec = TrialSpec(value["id"], value["layout"], tuple(value["controls"]), value["in_study"], model, value["params"])
        spec = replace(spec, point=value.get("point", {}), stratum=value.get("stratum"))
        stages = [StageState.from_json(stage) for stage in value["stages"]]
        plan = TrialPlan(spec, tuple(stage.planned for stage in stages))
        return TrialState(plan, stages, value["state"], value["number"], value["error"])


def study_folder(results: Path, name: str) -> Path:
    """Folder of a study's record. Whatever a name holds, it is one path component and stays below `studies`."""
    return results / "studies" / one_component(name)


def load(folder: Path) -> dict[str, Any] | None:
    """The record in `folder`, None if there is none. Raises ConfigError if another version wrote it or it cannot be read."""
    path = folder / "study.json"
    try:
        text = path.read_text(errors="replace")
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ENAMETOOLONG):
            raise
        return None
    try:
        record: dict[str, Any] = json.loads(text)
    except ValueError as error:
        raise ConfigError(
            f"{path}: damaged ({error}), cut off or overwritten; move it away and run the sweep's config again, which writes it "
            "anew from the results and decisions that are there"
        ) from None
    if record.get("schema") != SCHEMA:
        raise ConfigError(
            f"{path}: schema {record.get('schema')!r}, expected {SCHEMA!r}; use the fffsweep that wrote it or another --results"
        )
    return record


def durations(stored: Mapping[str, Any] | None) -> dict[str, float]:
    """Seconds of every finished stage run of a record, by key; empty without one."""
    stages = [stage for trial in stored["trials"] for stage in trial["stages"]] if stored else []
    return {stage["key"]: stage["duration_s"] for stage in stages if stage["state"] in ("complete", "reused")}


def check_extends(config: SweepConfig, stored: dict[str, Any] | None) -> None:
    """Accept a config that equals the stored one or extends it. Raises ConfigError that shows the first differences."""
    if stored is None:
        return
    ours, theirs = _flat(config.identity()), _flat(stored["identity"])
    different = [
        name
        for name in sorted(ours.keys() | theirs.keys())
        if ours.get(name) != theirs.get(name) and not {name, name.split(".")[0]} & {*EXTENDS, *_IRRELEVANT}
    ]
    if different:
        shown = "; ".join(f"{name}: {theirs.get(name, 'absent')!r} there, {ours.get(name, 'absent')!r} here" for name in different[:4])
        more = f" and {len(different) - 4} more" if len(different) > 4 else ""
        raise ConfigError(
            f"study {config.name!r} exists with another config ({shown}{more}); a study may only grow in {', '.join(EXTENDS)}: "
            f"choose another --name, such as --name {config.name}-2"
        )


def left_out(config: SweepConfig, stored: dict[str, Any] | None, keys: Iterable[str]) -> str | None:
    """What to say if the record has finished stage runs that a grid no longer asks for: it got smaller, or its stages another version."""
    grows = config.search is not None or config.early_stopping is not None or config.seeds.most > config.seeds.fewest
    if stored is None or grows:  # what such a sweep asks for shows in its course
        return None
    asked = set(keys)
    gone = {
        trial["id"]: sum(stage["key"] not in asked for stage in trial["stages"] if stage["state"] in ("complete", "reused"))
        for trial in stored["trials"]
    }
    if not any(gone.values()):
        return None
    of = [f"{trial} ({number})" for trial, number in gone.items() if number]
    return (
        f"no longer in the study: {sum(gone.values())} finished stage runs, of {', '.join(of[:8])}{', ...' if len(of) > 8 else ''}; "
        "they stay in the store, and a config that asks for them again finds them"
    )


def check_writable(results: Path) -> None:
    """Raises ConfigError if nothing can be written below `results`."""
    try:
        results.mkdir(parents=True, exist_ok=True)
        probe = results / ".writable"
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"results folder {results}: cannot be written ({error.strerror}); choose another with --results") from None


class Lease:
    """The right to drive a study, on all hosts that share its folder."""

    def __init__(self, folder: Path) -> None:
        try:
            self._lease = lease.Lease(folder / "driver")
        except lease.LeaseHeld as error:
            raise ConfigError(f"study folder {folder} is driven by {error}; wait for it, or stop it first") from None
        self.epoch = self._lease.epoch  # grows with every driver of the study

    def require(self) -> None:
        """Raises ConfigError if another driver took this one for dead and the study over."""
        try:
            self._lease.require()
        except lease.LeaseLost as error:
            raise ConfigError(f"this driver was cut off for too long: {error}; it ends, the other one goes on") from None

    def release(self) -> None:
        self._lease.release()


@dataclass
class Record:
    """A study's record in memory, saved by replacing its file whole.

    Only what changed is turned into JSON again, and a save waits until its cost is a small part of the time since the last one:
    a study of thousands of trials costs its driver no more than a small one.
    """

    folder: Path
    config: SweepConfig
    trials: list[TrialState]
    state: str = "running"
    created_at: float = field(default_factory=time.time)
    _next_save: float = 0.0
    _written: dict[int, tuple[tuple[Any, ...], str]] = field(default_factory=dict)

    def save(self, force: bool = False) -> None:
        """Write the record; unless forced, at most once a second and in at most a twentieth of the time."""
        start = time.monotonic()
        if not force and start < self._next_save:
            return
        header = {
            "schema": SCHEMA,
            "name": self.config.name,
            "config": self._constant[0],
            "identity": self._constant[1],
            "objectives": dict(self.config.objectives),
            "created_at": self.created_at,
            "updated_at": time.time(),
            "state": self.state,
            "driver": {"pid": os.getpid(), "host": os.uname().nodename},
        }
        aside = self.folder / f".study.{uuid.uuid4().hex}"
        try:
            with aside.open("w") as file:
                file.write(json.dumps(header)[:-1] + ', "trials": [')
                for number, trial in enumerate(self.trials):
                    file.write((", " if number else "") + self._text(trial))
                file.write("]}")
            aside.replace(self.folder / "study.json")
        except OSError:  # a full disk: what was begun takes no room
            aside.unlink(missing_ok=True)
            raise
        end = time.monotonic()
        self._next_save = end + max(1.0, 20 * (end - start))

    @cached_property
    def _constant(self) -> tuple[dict[str, Any], dict[str, Any]]:
        return self.config.resolved(), self.config.identity()

    def _text(self, trial: TrialState) -> str:
        """JSON of a trial, made anew only if it is not as it was."""
        live = (trial.state, trial.number, trial.error, *(stage.live for stage in trial.stages))
        before = self._written.get(id(trial))
        if before is None or before[0] != live:
            before = self._written[id(trial)] = live, json.dumps(trial.to_json())
        return before[1]

    def event(self, kind: str, **facts: Any) -> None:
        """Append one line to the study's history."""
        with (self.folder / "events.jsonl").open("a") as file:
            file.write(json.dumps({"time": time.time(), "event": kind, **facts}) + "\n")


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    if isinstance(value, dict) and value:
        return {path: leaf for name, entry in value.items() for path, leaf in _flat(entry, f"{prefix}.{name}" if prefix else name).items()}
    return {prefix: value}
