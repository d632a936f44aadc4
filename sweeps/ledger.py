"""What a sweep tells MLflow and Optuna. Both are projections of the store: everything here may be told again after a crash."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fffsweep.pipeline.machine import provenance
from fffsweep.pipeline.secrets import mask
from fffsweep.pipeline.settings import canonical_json
from fffsweep.pipeline.store import Store
from fffsweep.pipeline.tracked_run import TrackedRun, ended_trial, failed_stage, finished_stage, open_trial
from fffsweep.sweeps.backends import OPTUNA, artifact_root, is_installed, mlflow_uri, optuna_url
from fffsweep.sweeps.backlog import Backlog
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.record import StageState, TrialState
from fffsweep.sweeps.space import Stratum
from fffsweep.sweeps.studies import Studies

if TYPE_CHECKING:
    from fffsweep.pipeline.tracking import Tracker
    from fffsweep.sweeps.optuna_study import OptunaStudy


class Ledger:
    """MLflow experiment and Optuna study of one sweep, under `results` or on the servers that the environment names.

    Optuna is told at once, MLflow by a thread that gathers what there is to tell and tries again if the server is gone; `say` hears
    of that. `num_untold` after `close`: what MLflow was never told, for `fffsweep verify --repair`.
    """

    def __init__(self, config: SweepConfig, results: Path, store: Store, say: Callable[[str], None] = lambda _: None) -> None:
        self._config, self._store = config, store
        self._make_tracker = partial(_open_tracker, mlflow_uri(results), config.name, artifact_root(results))
        self._studies = _open_studies(optuna_url(results), config, say)
        self._say = say
        self._told: set[tuple[str, str, str]] = set()
        self._tracker: Tracker | None = None
        self.num_untold = 0
        if missing := _missing():
            say(f"{missing} not installed here: results are whole without; fffsweep import tells of them elsewhere")

    def open_trial(self, trial: TrialState) -> None:
        """Ask Optuna for a trial's number, open its parent run."""
        spec = trial.plan.spec
        trial.number = self._studies.open(spec)
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
        self._put(lambda: open_trial(spec.id, {**self._resolved, "trial": self._described(trial)}, tags))

    def stage_finished(self, trial: TrialState, stage: StageState) -> None:
        place = trial.plan.spec.id, stage.planned.label, stage.planned.run.key
        if place not in self._told:
            self._told.add(place)
            self._put(lambda: self._finished(*place))

    def _finished(self, trial: str, label: str, key: str) -> TrackedRun | None:
        """None if there is nothing to tell. Called on the backlog's thread, which has the tracker."""
        if self._tracker is not None and self._tracker.holds(trial, label, key):
            return None
        try:
            return finished_stage(trial, label, self._store.get(key), self._store)
        except KeyError:  # withdrawn since it finished; it is told when it has been made again
            return None

    def withdrawn(self, key: str) -> None:
        """A damaged result was withdrawn: once it has been made again, it is told again."""
        self._told = {place for place in self._told if place[2] != key}

    def stage_failed(self, trial: TrialState, stage: StageState) -> None:
        self._put(partial(failed_stage, trial.plan.spec.id, stage.planned.label, stage.planned.run.key, stage.error or "no message"))

    def trial_finished(self, trial: TrialState) -> None:
        """Close the parent run with the metrics that a trial amounts to."""
        key = trial.stages[-1].planned.run.key
        metrics = self._store.get(key).metrics
        self._put(partial(ended_trial, trial.plan.spec.id, "FINISHED", metrics, key))

    def tell(self, trial: TrialState, constraints: Mapping[str, float]) -> None:
        """Tell Optuna the objective values of a finished trial, and how far it is beyond each constraint."""
        metrics = self._store.get(trial.stages[-1].planned.run.key).metrics
        self._studies.tell(trial.plan.spec, metrics, constraints)

    def trial_pruned(self, trial: TrialState) -> None:
        """Record that a trial was stopped early, for good; MLflow has no word for it but KILLED, so a tag says more."""
        self._studies.prune(trial.plan.spec)
        ended = ended_trial(trial.plan.spec.id, "KILLED", {}, "")
        self._put(lambda: replace(ended, tags={"fffsweep.state": "PRUNED", "fffsweep.reason": trial.error or ""}))

    def trial_failed(self, trial: TrialState) -> None:
        self._studies.fail(trial.plan.spec)
        self._put(partial(ended_trial, trial.plan.spec.id, "FAILED", {}, ""))

    def audit(self, finished: list[tuple[TrialState, StageState]], repair: bool, is_withheld: bool = False) -> list[str]:
        """What MLflow or Optuna hold otherwise than the finished stage runs would have it, a line each.

        is_withheld: whether Optuna is yet to learn of trials, as their constraints are not known.
        """
        if missing := _missing():
            raise ConfigError(f"MLflow and Optuna are compared with the results: {missing} not installed here; pip install both")
        expected = {(trial.plan.spec.id, stage.planned.label): stage.planned.run.key for trial, stage in finished}
        problems = self._make_tracker().audit(expected, self._store, repair)
        for trial, stage in finished:
            if stage is trial.stages[-1] and trial.plan.is_whole and trial.plan.spec.in_study:
                metrics = self._store.get(stage.planned.run.key).metrics
                values, told = [metrics[name] for name in self._config.objectives], self._studies.values_of(trial.plan.spec)
                if not self._studies.has_told(trial.plan.spec, values) and not (told is None and is_withheld):
                    problems.append(f"Optuna holds {told} for trial {trial.plan.spec.id}, its result is {values}")
        return problems

    def sampling(self, stratum: Stratum) -> OptunaStudy:
        """What draws the points of a stratum."""
        return self._studies.of_stratum(stratum.name)

    def close(self) -> None:
        if is_installed("mlflow"):
            self.num_untold = self._backlog.close()

    def _put(self, item: Callable[[], TrackedRun | None]) -> None:
        if is_installed("mlflow"):
            self._backlog.put(item)

    @cached_property
    def _backlog(self) -> Backlog[TrackedRun]:
        return Backlog("MLflow", self._open, _is_refused, self._say)

    def _open(self) -> Tracker:
        self._tracker = self._make_tracker()
        return self._tracker

    @cached_property
    def _resolved(self) -> dict[str, Any]:
        return self._config.resolved()

    @staticmethod
    def _described(trial: TrialState) -> dict[str, Any]:
        spec = trial.plan.spec
        return {"id": spec.id, "layout": spec.layout, "model": spec.model.resolved()}


def _open_studies(url: str, config: SweepConfig, say: Callable[[str], None]) -> Studies:
    """Raises ConfigError if its database cannot be used: better before a sweep than in it."""
    try:
        studies = Studies(config, url, say)
        studies.connect()
        return studies
    except Exception as error:
        from fffsweep.sweeps.optuna_study import of_database

        if url.startswith("sqlite:") or not of_database(error):
            raise
        reason = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(mask(f"{OPTUNA}={url}: {reason}; start that server, or mend the address")) from None


def _missing() -> str:
    """Which of MLflow and Optuna are not installed, with the verb; empty if both are."""
    missing = [module for module in ("mlflow", "optuna") if not is_installed(module)]
    return " and ".join(missing) + (" are" if len(missing) > 1 else " is") if missing else ""


def _open_tracker(uri: str, experiment: str, artifact_root: Path | None) -> Tracker:
    """Imports MLflow where it is first needed: on the thread that writes to it."""
    from fffsweep.pipeline.tracking import Tracker

    return Tracker(uri, experiment, artifact_root)


def _is_refused(error: Exception) -> bool:
    from fffsweep.pipeline.tracking import is_refused

    return is_refused(error)
