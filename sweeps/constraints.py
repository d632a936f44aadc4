"""Constraints of a search: bounds on a trial's metrics, and on how much of the reference's quality it keeps."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import TYPE_CHECKING

from fffsweep.pipeline.stage import Metrics
from fffsweep.sweeps.config_errors import Misfit, nearest_first
from fffsweep.sweeps.objectives import metrics_of

if TYPE_CHECKING:
    from fffsweep.sweeps.config import SweepConfig

RETENTION = "quality_retention"
QUALITY = "quality/avg"


@dataclass(frozen=True)
class Constraint:
    """metric >= bound, or metric <= bound."""

    metric: str
    at_least: bool
    bound: float

    @property
    def text(self) -> str:
        """As `parse_constraint` reads it."""
        short = f"{self.bound:g}"
        bound = short if float(short) == self.bound else repr(self.bound)
        return f"{self.metric} {'>=' if self.at_least else '<='} {bound}"

    def violation(self, value: float) -> float:
        """How far `value` is beyond the bound; 0 and below is allowed."""
        return self.bound - value if self.at_least else value - self.bound


def parse_constraint(text: str) -> Constraint:
    """Constraint of `quality_retention >= 0.96` and the like. Raises ValueError."""
    match = re.fullmatch(r"\s*([^\s<>=]+)\s*(>=|<=)\s*([-+0-9.eE]+)\s*", str(text))
    try:
        if match:
            return Constraint(match[1], match[2] == ">=", float(match[3]))
    except ValueError:
        pass
    raise ValueError(f"constraint {text!r}: expected a metric, >= or <=, and a number, such as {RETENTION} >= 0.96")


def check_constraints(config: SweepConfig) -> None:
    """Raises Misfit for a metric that no trial has, and where there is no search that could heed a constraint."""
    for index, text in enumerate(config.constraints):
        constraint = parse_constraint(text)
        if config.search is None:
            raise Misfit(f"constraints[{index}]={text}: nothing is searched, so nothing heeds it; add a search block", "constraints", index)
        known = [RETENTION, *metrics_of(config)]
        if constraint.metric not in known:
            raise Misfit(
                f"constraints[{index}]={text}: unknown metric; expected one of {nearest_first(constraint.metric, known)}",
                *("constraints", index),
            )
        if constraint.metric == RETENTION and not any(control.startswith("reference_dense") for control in config.controls):
            raise Misfit(
                f"constraints[{index}]={text}: there is no reference whose quality could be kept; add reference_dense(WIDTH) to controls",
                *("constraints", index),
            )


def best_reference(references: Iterable[Metrics]) -> Metrics | None:
    """Of the trials in the role reference_dense the one best on the rows held out for selection, None if there is none."""
    return max(references, key=lambda metrics: metrics[QUALITY], default=None)


def retention(metrics: Mapping[str, float], reference: Mapping[str, float]) -> float:
    """mean(trial) / mean(reference) of quality over the replicates that both have; 0 where the reference's mean is not positive."""
    numbers = [n for n in range(len(metrics)) if f"{QUALITY}/{n}" in metrics and f"{QUALITY}/{n}" in reference]
    ours, theirs = (fmean(each[f"{QUALITY}/{n}"] for n in numbers) if numbers else each[QUALITY] for each in (metrics, reference))
    return ours / theirs if theirs > 0 else 0.0


def constraint_values(config: SweepConfig, metrics: Mapping[str, float], reference: Metrics | None) -> dict[str, float]:
    """Every constraint of a config -> how far a finished trial is beyond it, always under the same names."""
    values = {}
    for constraint in map(parse_constraint, config.constraints):
        if constraint.metric == RETENTION:
            value = retention(metrics, reference) if reference is not None else 0.0
        else:
            value = metrics[constraint.metric]
        values[constraint.text] = constraint.violation(value)
    return values
