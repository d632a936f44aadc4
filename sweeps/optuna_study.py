"""The Optuna side of a sweep: asks, tells, and finds its own trials again after a restart. The one importer of optuna."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import optuna
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState

# Trees and depth as integers: a categorical "layout" could not grow when a study is extended.
_SPACE: dict[str, BaseDistribution] = {"trees": IntDistribution(1, 2**24), "depth": IntDistribution(0, 30)}
_TRIAL, _KEY = "fffsweep.trial", "fffsweep.key"


class OptunaStudy:
    """An Optuna study with one trial for each fffsweep trial. Only the driver that holds the study's lease writes it."""

    def __init__(self, storage: str, name: str, objectives: Mapping[str, Literal["maximize", "minimize"]]) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        self._study = optuna.create_study(
            storage=storage,
            study_name=name,
            directions=list(objectives.values()),
            load_if_exists=True,
            sampler=optuna.samplers.RandomSampler(seed=0),
        )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            self._study.set_metric_names(list(objectives))
        self._frozen: dict[str, FrozenTrial] = {
            trial.user_attrs[_TRIAL]: trial for trial in self._study.trials if _TRIAL in trial.user_attrs
        }

    def ask(self, trial: str, key: str, trees: int, depth: int, attributes: Mapping[str, Any]) -> int:
        """Number of the Optuna trial for `trial`, an earlier driver's if it asked for the same.

        `key` is the key of the trial's result: a study extended by seeds gives its trials new values, hence new Optuna trials.
        """
        known = self._frozen.get(trial)
        if known is not None and known.user_attrs[_KEY] == key and known.state in (TrialState.RUNNING, TrialState.COMPLETE):
            return known.number
        if known is not None and known.state == TrialState.RUNNING:
            self.fail(trial)
        self._study.enqueue_trial({"trees": trees, "depth": depth}, user_attrs={_TRIAL: trial, _KEY: key, **attributes})
        asked = self._study.ask(_SPACE)
        self._frozen[trial] = self._study.trials[asked.number]
        return asked.number

    def tell(self, trial: str, values: Sequence[float]) -> None:
        """Record the objective values of a finished trial; told twice, the first stands."""
        self._frozen[trial] = self._study.tell(self._frozen[trial].number, list(values), skip_if_finished=True)

    def fail(self, trial: str) -> None:
        """Record that a trial failed."""
        self._frozen[trial] = self._study.tell(self._frozen[trial].number, state=TrialState.FAIL, skip_if_finished=True)

    def values_of(self, trial: str) -> list[float] | None:
        """Objective values told for a trial, None if there are none."""
        frozen = self._frozen.get(trial)
        return frozen.values if frozen is not None and frozen.state == TrialState.COMPLETE else None


def sqlite_url(path: Path) -> str:
    """Storage address of a local SQLite file."""
    return f"sqlite:///{path.resolve()}"


def study_id(storage: str, name: str) -> int:
    """Number of a study in its storage, by which optuna-dashboard knows it. Raises ValueError if it is not there."""
    try:
        return int(optuna.load_study(storage=storage, study_name=name)._study_id)
    except KeyError:
        raise ValueError(f"Optuna has no study {name!r}: `fffsweep verify` with --repair writes it again") from None
