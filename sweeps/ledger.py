"""What a sweep tells MLflow and Optuna. Both are projections of the store: everything here may be told again after a crash."""

from __future__ import annotations

from pathlib import Path

from fffsweep.pipeline.machine import provenance
from fffsweep.pipeline.settings import canonical_json
from fffsweep.pipeline.store import Store
from fffsweep.pipeline.tracking import Tracker
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.optuna_study import OptunaStudy, sqlite_url
from fffsweep.sweeps.record import StageState, TrialState


class Ledger:
    """MLflow experiment and Optuna study of one sweep, under `results`."""

    def __init__(self, config: SweepConfig, results: Path, store: Store) -> None:
        self._config, self._store = config, store
        self._tracker = Tracker(sqlite_url(results / "mlflow.db"), config.name, results / "mlartifacts")
        self._study = OptunaStudy(sqlite_url(results / "optuna.db"), config.name, config.objectives)

    def open_trial(self, trial: TrialState) -> None:
        """Ask Optuna for a trial's number, open its parent run."""
        spec = trial.plan.spec
        if spec.in_study and spec.model.feedforward.shape is not None:
            shape = spec.model.feedforward.shape
            trial.number = self._study.ask(spec.id, trial.stages[-1].planned.run.key, shape.trees, shape.depth, {"layout": spec.layout})
        where = provenance()
        tags = {
            "layout": str(spec.layout),
            "controls": ", ".join(spec.controls),
            "commit": str(where["commit"]),
            "dirty": str(where["dirty"]),
            "versions": canonical_json(where["versions"]),
            "optuna.trial": str(trial.number),
            "mlflow.note.content": f"Trial {spec.id} of sweep {self._config.name}: {self._config.description}",
        }
        config = {**self._config.resolved(), "trial": {"id": spec.id, "layout": spec.layout, "model": spec.model.resolved()}}
        self._tracker.start_trial(spec.id, config, tags)

    def stage_finished(self, trial: TrialState, stage: StageState) -> None:
        manifest = self._store.get(stage.planned.run.key)
        self._tracker.log_stage(trial.plan.spec.id, stage.planned.label, manifest, self._store)

    def stage_failed(self, trial: TrialState, stage: StageState) -> None:
        self._tracker.log_failure(trial.plan.spec.id, stage.planned.label, stage.planned.run.key, stage.error or "")

    def trial_finished(self, trial: TrialState) -> None:
        """Tell the objective values, close the parent run."""
        metrics = self._store.get(trial.stages[-1].planned.run.key).metrics
        if trial.number is not None:
            self._study.tell(trial.plan.spec.id, [metrics[name] for name in self._config.objectives])
        self._tracker.finish_trial(trial.plan.spec.id, metrics, trial.stages[-1].planned.run.key)

    def trial_failed(self, trial: TrialState) -> None:
        if trial.number is not None:
            self._study.fail(trial.plan.spec.id)
        self._tracker.fail_trial(trial.plan.spec.id)

    def audit(self, finished: list[tuple[TrialState, StageState]], repair: bool) -> list[str]:
        """What MLflow or Optuna hold otherwise than the finished stage runs would have it, a line each."""
        expected = {(trial.plan.spec.id, stage.planned.label): stage.planned.run.key for trial, stage in finished}
        problems = self._tracker.audit(expected, self._store, repair)
        for trial, stage in finished:
            if stage is trial.stages[-1] and trial.plan.spec.in_study:
                metrics = self._store.get(stage.planned.run.key).metrics
                values, told = [metrics[name] for name in self._config.objectives], self._study.values_of(trial.plan.spec.id)
                if told != values:
                    problems.append(f"Optuna holds {told} for trial {trial.plan.spec.id}, its result is {values}")
        return problems

    def close(self) -> None:
        self._tracker.close()
