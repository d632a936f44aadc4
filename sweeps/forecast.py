"""What a search will come to, before it has run: stand-ins for the points not yet drawn, and as many trials at each rung as may pass it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from fffsweep.pipeline.stage import Metrics
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.graph import TrialPlan
from fffsweep.sweeps.search import FIXED_IN_ADVANCE, Choices, Dimension, Point
from fffsweep.sweeps.space import strata
from fffsweep.sweeps.strategy import SearchTrials


class _Unwritten(Decisions):
    """Reads what was decided, and forgets what a forecast decides."""

    def write(self, **decision: Any) -> None:
        pass


class _Spread:
    """Stand-ins for points: spread evenly over each range by the number in a trial's name."""

    def draw(self, name: str, budget: int, space: Mapping[str, Dimension], fixed: Mapping[str, int]) -> Point:
        number = int(name.rpartition("-t")[2])
        return {path: _spread(dimension, number, budget) for path, dimension in space.items()}


def forecast(config: SweepConfig, folder: Path, metrics_of: Callable[[str], Metrics | None]) -> tuple[list[TrialPlan], list[str]]:
    """Plans of all trials as far as they may come, nothing being stopped across layouts, and lines that say what is assumed."""
    strategy = SearchTrials(config, folder, metrics_of, lambda stratum: _Spread(), _Unwritten(folder))
    plans = {plan.spec.id: plan for plan in strategy.start().plans}
    num_known = len(plans)
    plans |= {plan.spec.id: plan for plan in strategy.more(10**9).plans}
    if config.early_stopping is not None:
        plans |= {plan.spec.id: plan for plan in _passing(strategy, config.early_stopping.eta, config.early_stopping.rungs)}
    return list(plans.values()), list(_notes(config, num_known))


def _passing(strategy: SearchTrials, eta: int, num_rungs: int) -> list[TrialPlan]:
    groups: dict[str, list[str]] = defaultdict(list)
    for racer in strategy.racers:
        if racer.state == "running":
            groups[racer.group].append(racer.id)
    plans = []
    for names in groups.values():
        passing = len(names)
        for rung in range(1, num_rungs + 1):
            passing = max(1, passing // eta)
            plans += [strategy.granted(name, rung) for name in names[:passing]]
    return plans


def _notes(config: SweepConfig, num_known: int) -> list[str]:
    search, stopping, seeds = config.search, config.early_stopping, config.seeds
    notes = []
    if search is not None:
        tuned = [stratum.name or "the whole space" for stratum in strata(config)]
        budget = "every combination" if search.num_trials is None else f"{search.num_trials} trials"
        drawn = "" if config.sampler in FIXED_IN_ADVANCE else f"; {num_known} trials are known by now, stand-ins are counted for the rest"
        notes.append(f"search: sampler {config.sampler}, {budget} for each of {', '.join(tuned)}, over {', '.join(search.space)}{drawn}")
    if stopping is not None:
        shares = ", ".join(f"{100 * share:.3g} %" for share in stopping.shares)
        notes.append(f"early stopping: rungs at {shares} of pretraining; within a layout one in {stopping.eta} goes on, counted as such")
        if seeds.fewest == 1:
            notes.append("across layouts nothing is stopped: one pretraining seed does not tell the seeds' noise; set seeds.pretrain to 2")
    if seeds.most > seeds.fewest:
        notes.append(f"seeds: {seeds.fewest} counted for each trial; up to {seeds.most} where trials near the front are not told apart")
    return notes


def _spread(dimension: Dimension, number: int, budget: int) -> Any:
    share = (number % budget + 0.5) / budget
    if isinstance(dimension, Choices) or (dimension.step is not None and not dimension.log):
        values = dimension.values()
        return values[int(share * len(values))]
    if dimension.log:
        value = dimension.low * (dimension.high / dimension.low) ** share
        return value if dimension.type == "float" else round(value)
    return dimension.low + (dimension.high - dimension.low) * share
