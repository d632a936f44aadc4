"""Is a study what its record says? The manifests are the truth; MLflow and Optuna must agree with them, or are rebuilt from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from fffsweep.pipeline.store import DamagedArtifact, Store
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.graph import TrialPlan, build
from fffsweep.sweeps.ledger import Ledger
from fffsweep.sweeps.record import Lease, StageState, TrialState, load, study_folder
from fffsweep.sweeps.space import expand


@dataclass(frozen=True)
class Findings:
    """What was found: problems, a line each; what was mended of them; how much was looked at."""

    problems: tuple[str, ...]
    repaired: bool
    num_stage_runs: int
    num_artifacts: int


def verify(name: str, results: Path, repair: bool = False) -> Findings:
    """Check every artifact of a study against its checksum, and MLflow and Optuna against the manifests.

    With `repair`, damaged results are withdrawn (running the sweep again makes them anew) and MLflow and Optuna are mended.
    Raises ConfigError if there is no such study or a driver is at work on it.
    """
    folder = study_folder(results, name)
    stored = load(folder)
    if stored is None:
        raise ConfigError(f"study {name!r}: there is none under {results / 'studies'}")
    try:
        config = SweepConfig.model_validate(stored["config"])
    except ValidationError:
        raise ConfigError(f"{folder / 'study.json'}: its config is of another version of fffsweep; verify it with that one") from None
    lease = Lease(folder)
    try:
        store = Store(results / "store")
        plans = build(config, expand(config))
        problems, num_artifacts = _check_store(store, plans, repair)
        problems += _check_projections(config, plans, results, store, repair)
    finally:
        lease.release()
    return Findings(tuple(problems), repair, len({stage.run.key for plan in plans for stage in plan.stages}), num_artifacts)


def _check_store(store: Store, plans: list[TrialPlan], repair: bool) -> tuple[list[str], int]:
    problems, num_artifacts = [], 0
    for key in dict.fromkeys(stage.run.key for plan in plans for stage in plan.stages):
        if not store.has(key):
            continue
        manifest = store.get(key)
        if manifest.run.key != key:
            problems.append(f"manifest {key} holds the result of {manifest.run.key}")
        for artifact in manifest.artifacts:
            num_artifacts += 1
            try:
                store.read(manifest, artifact)
            except DamagedArtifact as error:
                problems.append(str(error))
                if repair:
                    store.forget(key)
    return problems, num_artifacts


def _check_projections(config: SweepConfig, plans: list[TrialPlan], results: Path, store: Store, repair: bool) -> list[str]:
    ledger = Ledger(config, results, store)
    trials = [TrialState(plan, [StageState(planned) for planned in plan.stages]) for plan in plans]
    finished = [(trial, stage) for trial in trials for stage in trial.stages if store.has(stage.planned.run.key)]
    problems = ledger.audit(finished, repair)
    if repair and problems:
        ledger = Ledger(config, results, store)
        for trial in trials:
            ledger.open_trial(trial)
        for trial, stage in finished:
            ledger.stage_finished(trial, stage)
        for trial, stage in finished:
            if stage is trial.stages[-1]:
                ledger.trial_finished(trial)
        ledger.close()
    return problems
