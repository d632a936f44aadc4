"""Which trials a sweep has and how far each may go: known at once for a grid, found out as results come for a search.

The driver asks for the first trials, tells what became of them, and is answered in `Changes`. What does not follow from the config
and the results alone is a decision, on disk before it is acted on: started again, a sweep goes on with the trials that it had.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, Protocol

from fffsweep.pipeline.stage import Metrics
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.constraints import best_reference, constraint_values
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.graph import Graph, TrialPlan
from fffsweep.sweeps.replicates import Replicated, undecided
from fffsweep.sweeps.rungs import LOSS, Racer, cost_of, decide
from fffsweep.sweeps.search import FIXED_IN_ADVANCE, Dimension, Point
from fffsweep.sweeps.space import REFERENCE, Stratum, TrialSpec, expand, searched_trial, strata


@dataclass
class Changes:
    """What the driver is to do.

    plans: new trials, and longer plans of trials that it has. pruned: trials that go no further, with the reason.
    tell: finished trials whose values Optuna may learn, with their constraints (met at 0 and below).
    kept: trials of which a further seed failed, with the number of seeds that they were whole with and keep; their plans are among `plans`.
    """

    plans: list[TrialPlan] = field(default_factory=list)
    pruned: dict[str, str] = field(default_factory=dict)
    tell: dict[str, dict[str, float]] = field(default_factory=dict)
    kept: dict[str, int] = field(default_factory=dict)


class Strategy(Protocol):
    """Decides for one driver, on its thread."""

    def start(self) -> Changes:
        """The trials to begin with, those of an earlier driver as far as they had come."""
        ...

    def finished(self, trial: str) -> Changes:
        """All stage runs of a trial's present plan have their results."""
        ...

    def failed(self, trial: str) -> Changes:
        """A trial cannot be finished as it is planned; it may be `kept` as it was."""
        ...

    def more(self, num_slots: int) -> Changes:
        """Further trials, if there are to be any while `num_slots` searched ones can go on side by side."""
        ...


class FixedTrials:
    """A strategy that changes nothing: these trials and no others."""

    def __init__(self, plans: list[TrialPlan]) -> None:
        self._plans = plans

    def start(self) -> Changes:
        return Changes(list(self._plans))

    def finished(self, trial: str) -> Changes:
        return Changes(tell={trial: {}})

    def failed(self, trial: str) -> Changes:
        return Changes()

    def more(self, num_slots: int) -> Changes:
        return Changes()


class Sampling(Protocol):
    """Draws points for a sampler that learns from results."""

    def draw(self, name: str, budget: int, space: Mapping[str, Dimension], fixed: Mapping[str, int]) -> Point:
        """The point of the new trial `name`; asked again, the same."""
        ...


@dataclass
class _Trial:
    """racer: its place among the rungs, None if it passes none. num_whole: replicates that it has been whole with.

    most: replicates that it may come to, as far as it is found out. cap: those that it will not come beyond, since the next one failed,
    in this driver or an earlier one: what was decided before that is decided again without knowing it.
    """

    spec: TrialSpec
    plan: TrialPlan
    num_replicates: int
    most: int
    cap: int
    num_whole: int = 0
    racer: Racer | None = None
    state: Literal["live", "complete", "pruned", "failed"] = "live"


class SearchTrials:
    """The strategy of every sweep: the config's own trials, and those of its search.

    metrics_of: metrics of a finished stage run by its key, None if it has none. sampling: gives what draws for a stratum; asked
    only for samplers that learn.
    """

    def __init__(
        self,
        config: SweepConfig,
        folder: Path,
        metrics_of: Callable[[str], Metrics | None],
        sampling: Callable[[Stratum], Sampling] | None = None,
        decisions: Decisions | None = None,
    ) -> None:
        self._config, self._metrics_of, self._sampling = config, metrics_of, sampling
        self._decisions = decisions or Decisions(folder)
        self._strata = {stratum.name: stratum for stratum in strata(config)}
        self._learns = config.sampler not in FIXED_IN_ADVANCE
        self._num_drawn = dict.fromkeys(self._strata, 0)
        self._num_rungs = config.early_stopping.rungs if config.early_stopping is not None else 0
        self._trials: dict[str, _Trial] = {}
        self._references: list[_Trial] = []
        self._at_work: set[str] = set()  # searched trials with something to do
        self._untold: list[str] = []
        self._graph: Graph | None = None

    def start(self) -> Changes:
        before = list(self._decisions.read())
        specs = expand(self._config)
        if not self._learns and self._config.sampler != "grid":  # a grid's are there already
            known = {spec.id for spec in specs}
            specs += [spec for stratum in self._strata.values() for spec in in_advance(self._config, stratum) if spec.id not in known]
        elif self._learns:
            specs += [spec for each in before if "drawn" in each and (spec := self._drawn(each)) is not None]
        plans = [self._add(spec) for spec in specs]
        for each in before:
            trial = self._trials.get(each.get("trial", ""))
            if trial is not None and "seeds" in each:
                trial.cap = max(each["seeds"], trial.num_replicates)
            if trial is None or trial.racer is None:
                continue
            if "promoted" in each:
                trial.racer.granted = each["promoted"]
            elif "stopped" in each:
                trial.racer.state, trial.state = "stopped", "pruned"
        for trial in self._trials.values():
            if trial.racer is not None:
                self._replan(trial)
                self._see(trial, trial.racer)
                self._note(trial)
        stopped = {each["trial"]: each["stopped"] for each in before if "stopped" in each and each["trial"] in self._trials}
        return Changes([self._trials[plan.spec.id].plan for plan in plans], stopped)

    def finished(self, name: str) -> Changes:
        trial, changes = self._trials[name], Changes()
        if trial.plan.is_whole:
            trial.state, trial.num_whole = "complete", trial.num_replicates
            self._untold.append(name)
        elif trial.racer is not None:
            self._see(trial, trial.racer)
        self._note(trial)
        return self._go_on(changes)

    def failed(self, name: str) -> Changes:
        trial = self._trials[name]
        if 0 < trial.num_whole < trial.num_replicates:
            trial.num_replicates = trial.most = trial.cap = trial.num_whole
            self._decisions.write(trial=name, seeds=trial.cap)
            return Changes([self._replan(trial)], kept={name: trial.cap})
        trial.state = "failed"
        if trial.racer is not None:
            trial.racer.state = "failed"
        self._note(trial)
        return self._go_on(Changes())

    def more(self, num_slots: int) -> Changes:
        changes = Changes()
        if self._is_drawn:
            return changes
        while len(self._at_work) < num_slots and (stratum := self._next_stratum()) is not None:
            plan = self._draw(stratum)
            if plan is not None:
                changes.plans.append(plan)
        return self._go_on(changes) if self._is_drawn else changes

    @property
    def racers(self) -> list[Racer]:
        """Every trial that passes rungs."""
        return [trial.racer for trial in self._trials.values() if trial.racer is not None]

    def granted(self, name: str, rung: int) -> TrialPlan:
        """Plan of a trial that may go to `rung`."""
        trial = self._trials[name]
        assert trial.racer is not None
        trial.racer.granted = max(rung, trial.racer.granted)
        return self._replan(trial)

    def _note(self, trial: _Trial) -> None:
        waits = trial.racer is not None and trial.racer.waits
        if trial.spec.stratum is not None and trial.state == "live" and not waits:
            self._at_work.add(trial.spec.id)
        else:
            self._at_work.discard(trial.spec.id)

    def _next_stratum(self) -> Stratum | None:
        """The reference first, since constraints look at it; then whichever has the fewest trials."""
        left = [s for s in self._strata.values() if s.num_trials is not None and self._num_drawn[s.name] < s.num_trials]
        return min(left, key=lambda stratum: (stratum.name != REFERENCE, self._num_drawn[stratum.name]), default=None)

    @property
    def _is_drawn(self) -> bool:
        return not self._learns or self._next_stratum() is None

    def _draw(self, stratum: Stratum) -> TrialPlan | None:
        search, index = self._config.search, self._num_drawn[stratum.name]
        assert search is not None
        assert self._sampling is not None
        assert stratum.num_trials is not None
        budget = sum(s.num_trials or 0 for s in self._strata.values() if (s.name == REFERENCE) == (stratum.name == REFERENCE))
        fixed = {} if stratum.shape is None else {"trees": stratum.shape.trees, "depth": stratum.shape.depth}
        space = {path: search.space[path] for path in stratum.paths}
        point = self._sampling(stratum).draw(f"{stratum.name}-t{index}", budget, space, fixed)
        decision = {"drawn": stratum.name, "index": index, "point": point}
        self._decisions.write(**decision)
        spec = self._drawn(decision)
        return None if spec is None else self._add(spec)

    def _drawn(self, decision: Mapping[str, object]) -> TrialSpec | None:
        """The trial of a draw; None where the drawn values do not go together, which costs the stratum one of its trials."""
        stratum, index = self._strata.get(str(decision["drawn"])), int(str(decision["index"]))
        if stratum is None:
            return None
        self._num_drawn[stratum.name] = max(self._num_drawn[stratum.name], index + 1)
        point = decision["point"]
        assert isinstance(point, dict)
        try:
            return searched_trial(self._config, stratum, index, point)
        except ValueError:
            return None

    def _add(self, spec: TrialSpec) -> TrialPlan:
        if self._graph is None:
            self._graph = Graph(self._config, spec)
        racer = None
        if self._num_rungs and spec.stratum is not None:
            is_reference = spec.stratum == REFERENCE
            racer = Racer(spec.id, REFERENCE if is_reference else str(spec.layout), cost_of(spec.model), not is_reference)
        elif self._num_rungs and spec.in_study and REFERENCE not in spec.controls:
            racer = Racer(spec.id, str(spec.layout), cost_of(spec.model))
        num_replicates, most = self._config.seeds.fewest, self._config.seeds.most
        plan = self._graph.plan(spec, num_replicates, None if racer is None else 0)
        trial = self._trials[spec.id] = _Trial(spec, plan, num_replicates, most, most, racer=racer)
        if REFERENCE in spec.controls:
            self._references.append(trial)
        self._note(trial)
        return plan

    def _replan(self, trial: _Trial) -> TrialPlan:
        assert self._graph is not None
        racer = trial.racer
        trial.plan = self._graph.plan(trial.spec, trial.num_replicates, None if racer is None else racer.granted)
        return trial.plan

    def _see(self, trial: _Trial, racer: Racer) -> None:
        """Take up the losses at every rung that all replicates have reached."""
        by_rung: dict[int, list[float | None]] = {}
        for stage in trial.plan.stages:
            if stage.rung is not None:
                metrics = self._metrics_of(stage.run.key)
                by_rung.setdefault(stage.rung, []).append(None if metrics is None else metrics[LOSS])
        racer.losses = []
        for _, losses in sorted(by_rung.items()):
            if None in losses:
                break
            racer.losses.append([loss for loss in losses if loss is not None])

    def _go_on(self, changes: Changes) -> Changes:
        """Everything that follows from the results so far."""
        if self._num_rungs:
            self._judge(changes)
        self._release(changes)
        is_adaptive = self._config.seeds.most > self._config.seeds.fewest
        if is_adaptive and self._is_drawn and not changes.plans and all(trial.state != "live" for trial in self._trials.values()):
            self._replicate(changes)
        return changes

    def _judge(self, changes: Changes) -> None:
        """Promote and stop until nothing more follows."""
        assert self._config.early_stopping is not None
        racers = self.racers
        while True:
            verdicts = decide(racers, self._config.early_stopping.eta, self._num_rungs, lambda group: self._is_drawn)
            for name, reason in verdicts.stopped.items():
                self._decisions.write(trial=name, stopped=reason)
                trial = self._trials[name]
                assert trial.racer is not None
                trial.racer.state, trial.state = "stopped", "pruned"
                changes.pruned[name] = reason
                self._note(trial)
            for name in verdicts.promoted:
                trial = self._trials[name]
                assert trial.racer is not None
                trial.racer.granted += 1
                self._decisions.write(trial=name, promoted=trial.racer.granted)
                changes.plans.append(self._replan(trial))
                self._see(trial, trial.racer)
                self._note(trial)
            if not verdicts.promoted and not verdicts.stopped:
                return

    def _release(self, changes: Changes) -> None:
        """Let Optuna learn of finished trials; where constraints look at the reference, once that is settled."""
        if not self._untold:
            return
        needs_reference = any("quality_retention" in text for text in self._config.constraints)
        num_left = sum(s.num_trials or 0 for s in self._strata.values() if s.name == REFERENCE) - self._num_drawn.get(REFERENCE, 0)
        is_settled = all(trial.state != "live" for trial in self._references) and not (self._learns and num_left > 0)
        reference = self._best_reference() if needs_reference else None
        waiting = []
        for name in self._untold:
            trial = self._trials[name]
            constraints: dict[str, float] = {}
            if trial.spec.in_study:
                if needs_reference and not is_settled:
                    waiting.append(name)
                    continue
                constraints = constraint_values(self._config, self._collected(trial), reference)
            changes.tell[name] = constraints
        self._untold = waiting

    def _best_reference(self) -> Metrics | None:
        return best_reference(self._collected(trial) for trial in self._references if trial.state == "complete")

    def _collected(self, trial: _Trial) -> Metrics:
        metrics = self._metrics_of(trial.plan.stages[-1].run.key)
        assert metrics is not None  # the trial is complete
        return metrics

    def _replicate(self, changes: Changes) -> None:
        """One more seed for whoever near the front is not yet told apart, and for the reference as many as anybody has."""
        while True:
            complete = [trial for trial in self._trials.values() if trial.state == "complete"]
            competing = [self._replicated(trial) for trial in complete if trial.spec.in_study]
            chosen = [self._trials[name] for name in undecided(competing, self._config.objectives)]
            wanted = {trial.spec.id: trial.num_replicates + 1 for trial in chosen}
            playing = [trial for trial in self._references if trial.state == "complete"]
            if playing and chosen:
                highest, best = max(wanted.values()), max(playing, key=lambda trial: self._collected(trial)["quality/avg"])
                for trial in (playing[0], best):  # the first is what times are relative to
                    if trial.num_replicates < min(highest, trial.most):
                        wanted[trial.spec.id] = highest
            for name, number in wanted.items():
                trial = self._trials[name]
                if not self._can_grow(trial, number):
                    trial.most = trial.num_replicates
                    continue
                trial.num_replicates, trial.state = number, "live"
                self._note(trial)
                changes.plans.append(self._replan(trial))
            if changes.plans or not wanted:
                return

    def _can_grow(self, trial: _Trial, number: int) -> bool:
        """Whether so many replicates are not known to fail. Times are relative to the first trial, which has to have as many, unless
        all there is to be run was run before it turned out to have fewer; one that failed gets no more than it has."""
        assert self._graph is not None
        first = next(iter(self._trials.values()))
        there = first.num_replicates if first.state == "failed" else first.cap
        if number > trial.cap or number <= there or not self._config.stages.benchmarks:
            return number <= trial.cap
        plan = self._graph.plan(trial.spec, number, None if trial.racer is None else trial.racer.granted)
        return all(self._metrics_of(stage.run.key) is not None for stage in plan.stages)

    def _replicated(self, trial: _Trial) -> Replicated:
        metrics, objectives = self._collected(trial), self._config.objectives
        values = [{number: metrics[f"{name}/{number}"] for number in range(trial.num_replicates)} for name in objectives]
        return Replicated(trial.spec.id, [metrics[name] for name in objectives], values, trial.most)


def in_advance(config: SweepConfig, stratum: Stratum) -> Iterator[TrialSpec]:
    """Trials of a stratum by a sampler that learns nothing: the same points in every layout, which then differ in nothing else."""
    search = config.search
    assert search is not None
    from fffsweep.sweeps.optuna_study import draw_in_advance

    for index in range(stratum.num_trials or 0):
        point = draw_in_advance(config.sampler, search.seed, "", index, {path: search.space[path] for path in stratum.paths})
        with contextlib.suppress(ValueError):  # values that do not go together cost the stratum one of its trials
            yield searched_trial(config, stratum, index, point)
