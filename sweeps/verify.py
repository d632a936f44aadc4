"""Is a study what its record says? The manifests are the truth; MLflow and Optuna must agree with them, or are rebuilt from them."""

from __future__ import annotations

import functools
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ValidationError

from fffsweep.pipeline.remote_store import open_store
from fffsweep.pipeline.stage import Metrics
from fffsweep.pipeline.store import DamagedArtifact, ForeignManifest, Manifest, Store
from fffsweep.sweeps.book import ENDED
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.constraints import RETENTION, best_reference, constraint_values
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.ledger import Ledger
from fffsweep.sweeps.record import Lease, Record, StageState, TrialState, load, study_folder
from fffsweep.sweeps.search import FIXED_IN_ADVANCE
from fffsweep.sweeps.space import REFERENCE, strata

DONE = ("complete", "reused")


@dataclass(frozen=True)
class Findings:
    """What was found: problems, a line each; whether they were mended; how much was looked at.

    num_stage_runs: those with a result. num_artifacts: those whose bytes should be here; num_absent were left behind elsewhere.
    num_left: problems that no repair mends: results of another version, or that could not be reached.
    """

    problems: tuple[str, ...]
    repaired: bool
    num_stage_runs: int
    num_artifacts: int
    num_absent: int = 0
    num_left: int = 0

    @property
    def sound(self) -> str:
        """What is said where there are no problems."""
        absent = f"; {self.num_absent} artifacts were left behind where they were made" if self.num_absent else ""
        return f"{self.num_stage_runs} finished stage runs, {self.num_artifacts} artifacts: all sound{absent}"


class Examined(NamedTuple):
    """A result and what is wrong with it, a line each. is_damaged: whether it has to be withdrawn and made again."""

    manifest: Manifest | None
    problems: list[str]
    is_damaged: bool


def verify(name: str, results: Path, repair: bool = False) -> Findings:
    """Check a study's record and every artifact of it, and MLflow and Optuna against the manifests.

    With `repair`, results that are damaged or not what their key says are withdrawn, the record says what is left of the study
    (running the sweep again makes the rest anew), and MLflow and Optuna are mended or built from nothing. Results of another version
    stay as they are.
    Raises ConfigError if there is no such study, another version wrote it, or a driver is at work on it.
    """
    folder = study_folder(results, name)
    stored = load(folder)
    if stored is None:
        raise ConfigError(f"study {name!r}: there is none under {results / 'studies'}")
    config = config_of(stored, folder)
    lease = Lease(folder)
    try:
        store = open_store(results / "store")
        trials = [TrialState.from_json(trial) for trial in stored["trials"]]
        keys = list(dict.fromkeys(stage.planned.run.key for trial in trials for stage in trial.stages))
        problems, counts = _check_store(store, keys, repair)
        problems += _check_record(trials, store, over=stored["state"] != "running")
        problems += _check_projections(config, trials, results, store, repair)
        if repair and problems:
            write_record(config, folder, trials, store, stored["created_at"])
    finally:
        lease.release()
    return Findings(tuple(problems), repair, counts["runs"], counts["artifacts"], counts["absent"], counts["left"])


def config_of(stored: dict[str, Any], folder: Path) -> SweepConfig:
    """The config in a study's record. Raises ConfigError if this version does not understand it."""
    try:
        return SweepConfig.model_validate(stored["config"])
    except ValidationError:
        raise ConfigError(
            f"{folder / 'study.json'}: its config is of another version of fffsweep; use that version for this study"
        ) from None


def write_record(config: SweepConfig, folder: Path, trials: list[TrialState], store: Store, created_at: float) -> None:
    """Write a study's record anew: every stage run is done or not as the store has it, every trial as its stage runs have it."""
    for trial in trials:
        for stage in trial.stages:
            if not store.has(stage.planned.run.key):
                if stage.state != "failed":
                    stage.state, stage.duration_s, stage.progress = "waiting", None, None
            elif stage.state not in DONE and (manifest := store.find(stage.planned.run.key)) is not None:
                stage.state, stage.error, stage.progress = "reused", None, None
                stage.duration_s = manifest.duration_s
        if trial.plan.is_whole and all(stage.state in DONE for stage in trial.stages):
            trial.state, trial.error = "complete", None
        elif trial.state not in ("failed", "pruned", "paused"):
            trial.state = "waiting"
    states = {trial.state for trial in trials}
    state = "stopped" if states & {"waiting", "paused"} else "failed" if states == {"failed"} else "complete"
    folder.mkdir(parents=True, exist_ok=True)
    Record(folder, config, trials, state, created_at).save(force=True)


def project(config: SweepConfig, trials: list[TrialState], results: Path, store: Store) -> int:
    """Tell MLflow and Optuna everything that can be read of these trials. Returns how much MLflow was not told."""
    metrics_of = functools.partial(_collected, store)
    references = [metrics_of(trial) for trial in trials if REFERENCE in trial.plan.spec.controls]
    reference = best_reference(metrics for metrics in references if metrics is not None)
    is_withheld = _is_withheld(config, trials, results, store)
    ledger = Ledger(config, results, store)
    for trial in trials:
        ledger.open_trial(trial)
        for stage in trial.stages:
            if store.find(stage.planned.run.key) is not None:
                ledger.stage_finished(trial, stage)
            elif stage.state == "failed":
                ledger.stage_failed(trial, stage)
        if trial.state == "pruned":
            ledger.trial_pruned(trial)
        elif (metrics := metrics_of(trial)) is not None:
            ledger.trial_finished(trial)
            if not trial.plan.spec.in_study:
                ledger.tell(trial, {})
            elif not is_withheld:
                ledger.tell(trial, constraint_values(config, metrics, reference))
        elif trial.state == "failed":
            ledger.trial_failed(trial)
    ledger.close()
    return ledger.num_untold


def _collected(store: Store, trial: TrialState) -> Metrics | None:
    """What a trial amounts to, None if it is not known."""
    manifest = store.find(trial.stages[-1].planned.run.key) if trial.plan.is_whole else None
    return None if manifest is None else manifest.metrics


def _is_withheld(config: SweepConfig, trials: list[TrialState], results: Path, store: Store) -> bool:
    """Whether Optuna may not learn of finished trials yet: their constraints look at a reference that is still to come."""
    if not any(RETENTION in text for text in config.constraints):
        return False
    references = [trial for trial in trials if REFERENCE in trial.plan.spec.controls]
    if any(trial.state not in ENDED or (trial.state == "complete" and _collected(store, trial) is None) for trial in references):
        return True
    if config.sampler in FIXED_IN_ADVANCE:
        return False
    drawn = {each["index"] for each in Decisions(study_folder(results, config.name)).read() if each.get("drawn") == REFERENCE}
    return len(drawn) < sum(stratum.num_trials or 0 for stratum in strata(config) if stratum.name == REFERENCE)


def examine(store: Store, key: str) -> Examined:
    """A result must be readable, be what its key says, and have all of its bytes.

    Raises ConnectionError if a remote store cannot be reached.
    """
    try:
        manifest = store.get(key)
    except DamagedArtifact as error:
        return Examined(None, [str(error)], True)
    except KeyError:
        return Examined(None, [f"manifest {key} is missing"], True)
    except ForeignManifest as error:
        return Examined(None, [str(error)], False)
    except ConnectionError:  # of a store that refuses nothing is known
        raise
    except OSError as error:
        return Examined(None, [f"manifest {store.manifest_path(key)} cannot be read: {error}; try again when it can"], False)
    if manifest.key != key or manifest.run.key != key:
        return Examined(manifest, [f"manifest {key} holds the result of {manifest.run.key}"], True)
    problems = []
    for name, artifact in manifest.artifacts.items():
        if not artifact.absent:
            try:
                store.read(manifest, name)
            except DamagedArtifact as error:
                problems.append(str(error))
    return Examined(manifest, problems, bool(problems))


def _check_store(store: Store, keys: list[str], repair: bool) -> tuple[list[str], Counter[str]]:
    """Problems; and how many results there are, how many artifacts here and absent, how many results no repair mends."""
    problems: list[str] = []
    counts = Counter[str]()
    for key in filter(store.has, keys):
        found = examine(store, key)
        problems += found.problems
        artifacts = list(found.manifest.artifacts.values()) if found.manifest else []
        num_absent = sum(artifact.absent for artifact in artifacts)
        counts.update(runs=1, absent=num_absent, artifacts=len(artifacts) - num_absent)
        if found.problems and not found.is_damaged:
            counts["left"] += 1
        elif found.problems and repair:
            store.forget(key)
    return problems, counts


def _check_record(trials: list[TrialState], store: Store, over: bool) -> list[str]:
    """Every trial is there once, and has exactly the results that the record says."""
    problems = [
        f"trial {name} is {count} times in the record" for name, count in Counter(t.plan.spec.id for t in trials).items() if count > 1
    ]
    for trial in trials:
        labels = Counter(stage.planned.label for stage in trial.stages)
        problems += [f"trial {trial.plan.spec.id} has {count} stage runs {label}" for label, count in labels.items() if count > 1]
        missing = [stage.planned.label for stage in trial.stages if stage.state in DONE and not store.has(stage.planned.run.key)]
        problems += [f"{label} of trial {trial.plan.spec.id} is recorded as done and has no result" for label in missing]
        if trial.state == "complete" and not (trial.plan.is_whole and trial.stages[-1].state in DONE):
            problems.append(f"trial {trial.plan.spec.id} is recorded as complete and has no result")
        if over and (trial.state == "running" or any(stage.state == "running" for stage in trial.stages)):
            problems.append(f"trial {trial.plan.spec.id} is recorded as running, and no driver is at work")
    return problems


def _check_projections(config: SweepConfig, trials: list[TrialState], results: Path, store: Store, repair: bool) -> list[str]:
    finished: list[tuple[TrialState, StageState]] = [
        (trial, stage) for trial in trials for stage in trial.stages if store.find(stage.planned.run.key) is not None
    ]
    problems = Ledger(config, results, store).audit(finished, repair, _is_withheld(config, trials, results, store))
    if repair and problems:
        untold = project(config, trials, results, store)
        if untold:
            raise ConfigError(f"MLflow could not be told of {untold} runs; try again when it can be reached")
    return problems
