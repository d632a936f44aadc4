"""Taking a trial further: its model as a directory, or in the MLflow registry with the evidence for the choice."""

from __future__ import annotations

import json
import os
import platform
import re
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from fffsweep.dashboards import formats
from fffsweep.dashboards.queries import GPU_REL_TIME, QUALITY, QUALITY_VALIDATION, REL_TIME, StudyView, load_study
from fffsweep.dashboards.trial import Estimate, TrialView
from fffsweep.pipeline.export import check_free, export, finetuned, stored_task
from fffsweep.pipeline.settings import canonical_json
from fffsweep.pipeline.store import AbsentArtifact, Manifest
from fffsweep.pipeline.tasks import Task, nearest_first
from fffsweep.sweeps import statistics as stats
from fffsweep.sweeps.backends import mlflow_uri
from fffsweep.sweeps.confirm import confirming
from fffsweep.sweeps.controller import Listener, run_sweep
from fffsweep.sweeps.record import load

SCHEMA = "fffsweep.pick/1"
_ALIAS = re.compile(r"(?!v\d+$|latest$)[A-Za-z0-9_-]{1,80}", re.IGNORECASE)
_JUDGED = (QUALITY, QUALITY_VALIDATION, REL_TIME, GPU_REL_TIME)


class ChoiceError(ValueError):
    """The trial cannot be picked or exported as asked; the message says what to do."""


@dataclass(frozen=True)
class Picked:
    """A registered choice."""

    name: str
    version: str
    alias: str
    evidence: dict[str, Any]

    def to_lines(self) -> list[str]:
        """What a terminal is told."""
        lines = [
            f"registered {self.evidence['trial']} of {self.evidence['study']} as models:/{self.name}@{self.alias} (version {self.version})"
        ]
        return lines + [f"  {line}" for line in summary(self.evidence)]


def check_alias(alias: str) -> str:
    """`alias`. Raises ChoiceError if MLflow would not take it."""
    if not _ALIAS.fullmatch(alias):
        raise ChoiceError(f"alias {alias!r}: expected letters, digits, - and _, and neither latest nor v1, v2, ...; such as champion")
    return alias


def export_trial(view: StudyView, trial_id: str, folder: Path, task: str | None = None, replicate: int = 0) -> Path:
    """Write a trial's model to `folder` as a Hugging Face directory. Raises ChoiceError, ExportError, ValueError for an unknown trial."""
    check_free(folder)
    trial = view.trial(trial_id)
    try:
        trained, meant = _trained(view, trial, task, replicate)
        return export(view.store, trained, folder, {"study": view.name, "trial": trial.id, "replicate": replicate}, meant)
    except AbsentArtifact as error:
        raise ChoiceError(f"trial {trial.id!r}: {error}") from None


def _trained(view: StudyView, trial: TrialView, task: str | None, replicate: int) -> tuple[Manifest, Task | None]:
    """The run whose model is meant, and its task."""
    if replicate >= trial.num_replicates:
        raise ChoiceError(
            f"replicate {replicate}: trial {trial.id!r} has {trial.num_replicates}, so expected 0 to {trial.num_replicates - 1}"
        )
    if task is not None and task not in view.tasks:
        raise ChoiceError(f"task {task!r}: expected one of {nearest_first(task, view.tasks)}, the tasks of study {view.name!r}")
    label = f"training/{replicate}" if task is None else f"finetune/{replicate}/{task}/0"
    manifest = trial.training(replicate) if task is None else trial.stage_manifest(label)
    if manifest is None:
        raise ChoiceError(f"trial {trial.id!r}: {label} has not finished; run the sweep on, or choose a finished trial")
    return (manifest, None) if task is None else (finetuned(view.store, manifest), stored_task(view.store, manifest))


def pick(
    results: Path,
    study: str,
    trial_id: str,
    alias: str,
    num_fresh: int | None,
    task: str | None,
    replicate: int,
    listener: Listener,
    executor: str = "ray",
) -> Picked | None:
    """Run a trial on `num_fresh` further seeds (None: as many as the study has), then register its model and the evidence.

    None if it was stopped; called again it goes on. The choice is written to `picks/<alias>.json` in the study's folder.
    Raises ChoiceError before anything is run if the alias, the trial, the task or the replicate will not do.
    """
    check_alias(alias)
    view = load_study(results, study)
    trial = view.trial(trial_id)
    if not trial.metrics:
        raise ChoiceError(f"trial {trial.id!r} of {study!r} is {trial.state}: only a finished trial can be picked")
    if task is not None and task not in view.tasks:
        raise ChoiceError(f"task {task!r}: expected one of {nearest_first(task, view.tasks)}, the tasks of study {study!r}")
    num_fresh = trial.num_replicates if num_fresh is None else num_fresh
    note = Notebook(view.folder, alias)
    note.write("running", trial.id, message=f"on {num_fresh} fresh seeds" if num_fresh else "")
    try:
        confirmed = _confirm(view, trial, num_fresh, listener, executor) if num_fresh else None
        if num_fresh and confirmed is None:
            note.write("stopped", trial.id, message="the same command goes on from here")
            return None
        found = evidence(view, trial, confirmed, num_fresh)
        picked = _register(view, trial, alias, found, task, replicate)
    except BaseException as error:
        note.write("failed", trial.id, message=str(error) or type(error).__name__)
        raise
    note.write("complete", trial.id, evidence=found, model={"name": picked.name, "version": picked.version})
    return picked


def _confirm(view: StudyView, trial: TrialView, num_fresh: int, listener: Listener, executor: str) -> StudyView | None:
    """The study of the fresh seeds, run to its end; None if it was stopped."""
    record = load(view.folder)
    assert record is not None
    own = next(each for each in record["trials"] if each["id"] == trial.id)
    config = confirming(record, own, trial.num_replicates, num_fresh)
    outcome = run_sweep(config, view.results, listener, executor)
    if outcome.failed_trials:
        raise ChoiceError(f"on fresh seeds {', '.join(outcome.failed_trials)} failed; `fffsweep ui` shows why, in study {config.name!r}")
    return None if outcome.state == "stopped" else load_study(view.results, config.name)


def evidence(view: StudyView, trial: TrialView, confirmed: StudyView | None, num_fresh: int) -> dict[str, Any]:
    """Why this trial: the study's front, the trial's own figures, and what the fresh seeds say of it."""
    chances = view.front_chances(tuple(view.objectives), tuple(view.maximize))
    return {
        "schema": SCHEMA,
        "study": view.name,
        "trial": trial.id,
        "config": {**view.config, "trial": {"id": trial.id, "params": trial.params, "model": trial.model}},
        "values": {name: _shown(trial.estimate(name)) for name in _named(view) if trial.estimate(name)},
        "p_front": chances.get(trial.id),
        "retention": _shown(view.retention(trial)),
        "pareto": json.loads(formats.pareto_json(view)),
        "fresh": None if confirmed is None else fresh_evidence(view, trial, confirmed, num_fresh),
        "provenance": view.provenance,
    }


def fresh_evidence(view: StudyView, trial: TrialView, confirmed: StudyView, num_fresh: int) -> dict[str, Any]:
    """What the seeds that had no part in the choice say, beside what the others said."""
    again = next(each for each in confirmed.finished if each.model == trial.model)
    seeds = range(trial.num_replicates, trial.num_replicates + num_fresh)
    values = {name: _on(again, name, seeds) for name in _named(view)}
    kept = None
    if confirmed.reference is not None:
        ours, theirs = _on(again, QUALITY, seeds), _on(confirmed.reference, QUALITY, seeds)
        if ours and len(ours) == len(theirs) and sum(theirs) > 0:
            kept = Estimate(sum(ours) / sum(theirs), stats.ratio_interval(ours, theirs))
    return {
        "study": confirmed.name,
        "seeds": list(seeds),
        "values": {name: _shown(Estimate(sum(v) / len(v), stats.mean_interval(v))) for name, v in values.items() if v},
        "retention": _shown(kept),
    }


def _on(trial: TrialView, metric: str, seeds: range) -> list[float]:
    found = trial.replicates(metric)
    return [found[seed] for seed in seeds if seed in found]


def _named(view: StudyView) -> list[str]:
    return list(dict.fromkeys([*view.objectives, *_JUDGED]))


def _shown(estimate: Estimate | None) -> dict[str, Any] | None:
    return None if estimate is None else {"value": estimate.value, "interval": estimate.interval}


def summary(found: Mapping[str, Any]) -> list[str]:
    """Evidence in a few lines."""
    fresh = found["fresh"]
    lines = []
    for name, value in found["values"].items():
        line = f"{name}: {_said(value)}"
        if fresh and name in fresh["values"]:
            line += f"; on {len(fresh['seeds'])} fresh seed{'s' if len(fresh['seeds']) > 1 else ''} {_said(fresh['values'][name])}"
        lines.append(line)
    if found["retention"]:
        lines.append(
            f"dense quality kept: {_said(found['retention'], 100)} %"
            + (f"; on fresh seeds {_said(fresh['retention'], 100)} %" if fresh and fresh["retention"] else "")
        )
    chance = found["p_front"]
    lines.append("probability of being on the front: " + ("cannot be told" if chance is None else f"{chance:.2f}"))
    return lines if fresh else [*lines, "not run again on fresh seeds: the figures above are those it was chosen by, and flatter it"]


def _said(value: Mapping[str, Any], scale: float = 1.0) -> str:
    shown = f"{scale * value['value']:.4g}"
    return shown if not value["interval"] else f"{shown} [{scale * value['interval'][0]:.4g}, {scale * value['interval'][1]:.4g}]"


def _register(view: StudyView, trial: TrialView, alias: str, found: dict[str, Any], task: str | None, replicate: int) -> Picked:
    from fffsweep.pipeline.tracking import register_model

    name = quote(view.name, safe=" ()") + (f" {task}" if task else "")
    said = "\n".join(f"- {line}" for line in summary(found))
    description = (
        f"Trial {trial.id} of sweep {view.name}, {'masked-language model' if task is None else task}, replicate {replicate}.\n\n{said}"
    )
    tags = {
        "study": view.name,
        "trial": trial.id,
        "layout": str(trial.layout),
        "replicate": str(replicate),
        "collect_key": str(trial.collect_key),
    }
    with tempfile.TemporaryDirectory() as folder:
        model = export_trial(view, trial.id, Path(folder) / "model", task, replicate)
        version = register_model(mlflow_uri(view.results), view.name, name, alias, model, description, tags, {"evidence.json": found})
    return Picked(name, version, alias, found)


class Notebook:
    """`picks/<alias>.json` in a study's folder: how far a pick is, and once it is whole, what speaks for it."""

    def __init__(self, study_folder: Path, alias: str) -> None:
        self.path = study_folder / "picks" / f"{alias}.json"

    def write(self, state: str, trial: str, **facts: Any) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        content = {"schema": SCHEMA, "alias": self.path.stem, "trial": trial, "state": state, "time": time.time()}
        content |= {"pid": os.getpid(), "host": platform.node(), **facts}
        aside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        aside.write_text(canonical_json(content))
        aside.replace(self.path)
