"""The Optuna side of a sweep: draws points, is told results, and finds its trials again after a restart. The one importer of optuna."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import logging
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Concatenate, Literal, ParamSpec, TypeVar

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
    check_distribution_compatibility,
)
from optuna.samplers import (
    BaseSampler,
    GPSampler,
    NSGAIIISampler,
    NSGAIISampler,
    PartialFixedSampler,
    QMCSampler,
    RandomSampler,
    TPESampler,
)
from optuna.trial import FrozenTrial, TrialState

from fffsweep.sweeps.search import FIXED_IN_ADVANCE, Choices, Dimension, FloatRange, Point, Sampler
from fffsweep.sweeps.yaml_source import ConfigError

# Trees and depth as integers: a categorical "layout" could not grow when a study is extended.
_SHAPE: dict[str, BaseDistribution] = {"trees": IntDistribution(1, 2**24), "depth": IntDistribution(0, 30)}
_TRIAL = "fffsweep.trial"


_FIRST_WAIT_S, _LONGEST_WAIT_S, _PATIENCE_S = 0.5, 10.0, 300.0
P = ParamSpec("P")
R = TypeVar("R")


def _insisting(call: Callable[Concatenate[OptunaStudy, P], R]) -> Callable[Concatenate[OptunaStudy, P], R]:
    """Tries again, with growing waits, what the database could not be reached for.

    What was under way may have been written or not, so the study is read again first; each call finds there what it has done.
    """

    @functools.wraps(call)
    def insist(self: OptunaStudy, /, *args: P.args, **kwargs: P.kwargs) -> R:
        deadline, wait_s, lost = time.monotonic() + _PATIENCE_S, _FIRST_WAIT_S, False
        while True:
            try:
                if lost:
                    self._read()
                result = call(self, *args, **kwargs)
            except Exception as error:
                if not of_database(error) or time.monotonic() + wait_s > deadline:
                    raise
                if not lost:
                    self._say("Optuna's database cannot be reached; the sweep waits for it")
                lost = True
                time.sleep(wait_s)
                wait_s = min(2 * wait_s, _LONGEST_WAIT_S)
            else:
                if lost:
                    self._say("Optuna's database can be reached again")
                return result

    return insist


@dataclass
class _Known:
    number: int
    state: TrialState
    params: Mapping[str, Any]
    told: list[list[float]] = field(default_factory=list)  # the newest last

    def is_of(self, params: Mapping[str, Any]) -> bool:
        """Whether it is the same point."""
        return all(self.params[name] == params[name] for name in self.params.keys() & params.keys())


class OptunaStudy:
    """An Optuna study with one trial for each fffsweep trial. Only the driver that holds the study's lease writes it.

    Samplers keep nothing between two draws but what the study's storage holds: each draw makes one anew, seeded by the number of
    the draw, so that a study that was killed draws what it would have drawn. A database that goes away once the study is open is
    waited for, five minutes at most; `say` hears of that.
    """

    def __init__(
        self,
        storage: str,
        name: str,
        objectives: Mapping[str, Literal["maximize", "minimize"]],
        sampler: Sampler = "grid",
        seed: int = 0,
        say: Callable[[str], None] = lambda _: None,
    ) -> None:
        optuna.logging.set_verbosity(logging.WARNING)
        self._sampler: Sampler = sampler
        self._seed, self._say = seed, say
        self._study = optuna.create_study(
            storage=storage, study_name=name, directions=list(objectives.values()), load_if_exists=True, sampler=RandomSampler(seed=0)
        )
        self._check(objectives)
        with _quiet():
            self._study.set_metric_names(list(objectives))
        self._read()

    def _check(self, objectives: Mapping[str, str]) -> None:
        """Raises ConfigError if the storage has a study of this name that is after something else: it would be searched for that."""
        there = [direction.name.lower() for direction in self._study.directions]
        names = self._study.metric_names or list(objectives)[: len(there)]
        if (names, there) != (list(objectives), list(objectives.values())):
            shown = ", ".join(f"{name}: {direction}" for name, direction in zip(names, there, strict=False))
            raise self._is_another(f"other objectives ({shown} there)")

    def _check_space(self, distributions: Mapping[str, BaseDistribution]) -> None:
        """Raises ConfigError if the study has a parameter that was drawn in a way which Optuna does not take for the same."""
        for name in distributions.keys() & self._distributions.keys():
            try:
                check_distribution_compatibility(self._distributions[name], distributions[name])
            except ValueError as error:
                raise self._is_another(f"another range of {name} ({str(error).rstrip('.')})") from None

    def _is_another(self, difference: str) -> ConfigError:
        return ConfigError(
            f"Optuna has a study {self._study.study_name!r} with {difference}, of another sweep of that name: choose another --name, or "
            "delete that study with optuna delete-study"
        )

    def _read(self) -> None:
        """Take up what the storage holds."""
        trials = self._study.get_trials(deepcopy=False)
        self._num_trials = len(trials)
        self._known: dict[str, _Known] = {}
        self._distributions = {name: each for trial in trials for name, each in trial.distributions.items()}
        for trial in trials:
            if _TRIAL in trial.user_attrs:
                self._remember(trial.user_attrs[_TRIAL], trial.number, trial.state, trial.params, trial.values)
        for trial in trials:  # drawn by a driver that was killed before it knew
            if _TRIAL not in trial.user_attrs and not trial.state.is_finished():
                self._study.tell(trial.number, state=TrialState.FAIL)

    @_insisting
    def open(
        self,
        trial: str,
        params: Mapping[str, Any],
        space: Mapping[str, Dimension],
        attributes: Mapping[str, Any],
        drawn: str | None = None,
    ) -> int:
        """Number of the Optuna trial for `trial` with these parameters, trees and depth among them; an earlier driver's if there is one.

        A trial that failed is tried again as a new Optuna trial, and so is one whose name meant another point: drawn by a driver that was
        killed before it was decided upon, the name may come with results from elsewhere. drawn: what the trial was called when it was
        drawn, as far as that is another name.
        """
        if drawn is not None and trial not in self._known and drawn in self._known and self._known[drawn].is_of(params):
            self._known[trial] = self._known.pop(drawn)
            for name, value in {**attributes, _TRIAL: trial}.items():
                self._study._storage.set_trial_user_attr(self._id_of(self._known[trial].number), name, value)
        known = self._known.get(trial)
        if known is not None and known.state != TrialState.FAIL and known.is_of(params):
            return known.number
        if known is not None:
            self._end(trial, TrialState.FAIL)
        distributions = {name: _SHAPE.get(name) or distribution(space[name]) for name in params}
        self._check_space(distributions)
        self._add(trial, TrialState.RUNNING, dict(params), distributions, attributes)
        return self._known[trial].number

    @_insisting
    def draw(self, name: str, budget: int, space: Mapping[str, Dimension], fixed: Mapping[str, int]) -> Point:
        """The point of the new trial `name`, one of about `budget`; `fixed` are trees and depth where they are no choice.

        A sampler that learns from results takes up those told so far. The trial is RUNNING from now on. Drawn again, the point is
        the same, unless it is of an earlier sweep of this name, with another space.
        """
        if name in self._known:
            params = self._study.get_trials(deepcopy=False)[self._known[name].number].params
            if all(_lies_in(params, path, distribution(space[path])) for path in space) and fixed.items() <= params.items():
                return {path: params[path] for path in space}
            self._end(name, TrialState.FAIL)
        distributions = {**(_SHAPE if fixed else {}), **{path: distribution(dimension) for path, dimension in space.items()}}
        self._check_space(distributions)
        with _quiet():
            base = make_sampler(self._sampler, derived_seed(self._seed, name), budget)
            self._study.sampler = PartialFixedSampler(dict(fixed), base) if fixed else base
            asked = self._study.ask(distributions)
        asked.set_user_attr(_TRIAL, name)
        self._remember(name, asked.number, TrialState.RUNNING, asked.params)
        self._num_trials = asked.number + 1
        return {path: asked.params[path] for path in space}

    @_insisting
    def tell(self, trial: str, values: Sequence[float], constraints: Mapping[str, float] | None = None) -> None:
        """Record a finished trial's objective values, and its constraints, which are met at 0 and below.

        Told the same again, nothing happens; told other values, as more seeds give, they become a new Optuna trial.
        """
        known, told = self._known[trial], [float(value) for value in values]
        if told in known.told:
            return
        if known.state.is_finished():
            before = self._study.get_trials(deepcopy=False)[known.number]
            self._add(trial, TrialState.RUNNING, before.params, before.distributions, before.user_attrs)
        number = self._known[trial].number
        for name, value in (constraints or {}).items():
            self._handle(number).set_constraint(name, value)
        self._study.tell(number, told)
        self._remember(trial, number, TrialState.COMPLETE, known.params, told)

    @_insisting
    def prune(self, trial: str) -> None:
        """Record that a trial was stopped early, for good."""
        self._end(trial, TrialState.PRUNED)

    @_insisting
    def fail(self, trial: str) -> None:
        """Record that a trial failed."""
        self._end(trial, TrialState.FAIL)

    def values_of(self, trial: str) -> list[float] | None:
        """Objective values told for a trial, None if there are none."""
        known = self._known.get(trial)
        return known.told[-1] if known is not None and known.told else None

    def has_told(self, trial: str, values: list[float]) -> bool:
        """Whether these objective values were told for a trial; a study that was extended may have given it fewer seeds again."""
        return trial in self._known and values in self._known[trial].told

    def is_pruned(self, trial: str) -> bool:
        return trial in self._known and self._known[trial].state == TrialState.PRUNED

    def _add(
        self,
        trial: str,
        state: TrialState,
        params: dict[str, Any],
        distributions: dict[str, BaseDistribution],
        attributes: Mapping[str, Any],
    ) -> None:
        attrs = {**attributes, _TRIAL: trial}
        self._study.add_trial(optuna.trial.create_trial(state=state, params=params, distributions=distributions, user_attrs=attrs))
        self._remember(trial, self._num_trials, state, params)
        self._num_trials += 1

    def _remember(self, trial: str, number: int, state: TrialState, params: Mapping[str, Any], values: list[float] | None = None) -> None:
        known = self._known.get(trial)
        told = known.told if known is not None and known.is_of(params) else []
        self._known[trial] = _Known(number, state, params, [*told, *([] if values is None else [values])])

    def _end(self, trial: str, state: TrialState) -> None:
        known = self._known[trial]
        if not known.state.is_finished():
            self._study.tell(known.number, state=state)
            known.state = state

    def _handle(self, number: int) -> optuna.Trial:
        """The trial as Optuna's objective functions see it, which alone can set constraints; a restart leaves no other way to it."""
        return optuna.Trial(self._study, self._id_of(number))

    def _id_of(self, number: int) -> int:
        return self._study._storage.get_trial_id_from_study_id_trial_number(self._study._study_id, number)


def draw_in_advance(sampler: Sampler, seed: int, stratum: str, index: int, space: Mapping[str, Dimension]) -> Point:
    """Point number `index` of a stratum by a sampler that learns nothing from results."""
    assert sampler in FIXED_IN_ADVANCE
    distributions = {path: distribution(dimension) for path, dimension in space.items()}
    with _quiet():
        if sampler == "random":
            base: BaseSampler = RandomSampler(seed=derived_seed(seed, f"{stratum}-t{index}"))
        else:
            base = _Sequence(derived_seed(seed, stratum), index, distributions)
        params = optuna.create_study(sampler=base).ask(distributions).params
    return {path: params[path] for path in space}


class _Sequence(QMCSampler):
    """One point of a scrambled Sobol sequence: of all parameters from the first trial on, and without a count kept in the study."""

    def __init__(self, seed: int, index: int, space: dict[str, BaseDistribution]) -> None:
        super().__init__(qmc_type="sobol", scramble=True, seed=seed)
        self._index, self._space = index, space

    def infer_relative_search_space(self, study: optuna.Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:
        return self._space

    def _find_sample_id(self, study: optuna.Study, search_space: dict[str, BaseDistribution]) -> int:
        return self._index


def make_sampler(kind: Sampler, seed: int, budget: int) -> BaseSampler:
    """A sampler for several objectives that bears with trials under way.

    A generation of the evolutionary ones is a fifth of the budget, 4 to 50 trials.
    """
    generation = max(4, min(50, budget // 5))
    if kind == "tpe":
        return TPESampler(seed=seed, constant_liar=True)
    if kind == "nsga2":
        return NSGAIISampler(seed=seed, population_size=generation)
    if kind == "nsga3":
        return NSGAIIISampler(seed=seed, population_size=generation)
    if kind == "gp":
        return GPSampler(seed=seed)
    return RandomSampler(seed=seed)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without being told each time that samplers are experimental: the suite of tests says what is relied on."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        yield


def derived_seed(seed: int, name: str) -> int:
    """32 bits that depend on the search's seed and on a name alone."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4], "big")


def distribution(dimension: Dimension) -> BaseDistribution:
    """Optuna's form of a searched range or choice."""
    if isinstance(dimension, Choices):
        return CategoricalDistribution(dimension.choices)
    if isinstance(dimension, FloatRange):
        high = dimension.high if dimension.step is None else dimension.values()[-1]
        return FloatDistribution(dimension.low, high, log=dimension.log, step=dimension.step)
    return IntDistribution(dimension.low, dimension.values()[-1], log=dimension.log, step=dimension.step)


def _lies_in(params: Mapping[str, Any], path: str, allowed: BaseDistribution) -> bool:
    try:
        return path in params and allowed._contains(allowed.to_internal_repr(params[path]))
    except ValueError:  # of another type, or no choice
        return False


def of_database(error: Exception) -> bool:
    """Whether Optuna could not use its database, for whatever reason."""
    return isinstance(error, optuna.exceptions.StorageInternalError) or type(error).__module__.startswith(("sqlalchemy", "psycopg"))


def study_id(storage: str, name: str) -> int:
    """Number of a study in its storage, by which optuna-dashboard knows it. Raises ValueError if it is not there."""
    try:
        return int(optuna.load_study(storage=storage, study_name=name)._study_id)
    except KeyError:
        raise ValueError(f"Optuna has no study {name!r}: `fffsweep verify` with --repair writes it again") from None
