"""Which trials deserve another pretraining seed: those near the front that are not yet told apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np

from fffsweep.sweeps.pareto import costs, front
from fffsweep.sweeps.statistics import difference


@dataclass
class Replicated:
    """A finished trial: the mean of each objective, for each objective replicate -> value, and the replicates that it may come to."""

    id: str
    means: list[float]
    values: list[dict[int, float]]
    most: int

    @property
    def num_replicates(self) -> int:
        return len(self.values[0])


def undecided(trials: list[Replicated], directions: Mapping[str, Literal["maximize", "minimize"]]) -> list[str]:
    """Trials that should get one more seed, in the study's order; none when all is decided or may get no more.

    Near the front is whoever at most one other trial beats. Of each two of them, one being on the front, it must be known which
    objectives either is better in; while that is open, whoever has fewer seeds gets one, or both. One seed decides nothing but
    objectives that are equal.
    """
    if len(trials) < 2:
        return []
    maximize = [direction == "maximize" for direction in directions.values()]
    means = [trial.means for trial in trials]
    on_front = front(means, maximize)
    cost = costs(means, maximize)
    beaten_by = [int(((cost <= own).all(axis=1) & (cost < own).any(axis=1)).sum()) for own in cost]
    near = [index for index in range(len(trials)) if beaten_by[index] <= 1]
    chosen: set[int] = set()
    for one, other in combinations(near, 2):
        if (on_front[one] or on_front[other]) and not separated(trials[one], trials[other]):
            fewest = min(trials[one].num_replicates, trials[other].num_replicates)
            fewer = {index for index in (one, other) if trials[index].num_replicates == fewest}
            if all(fewest < trials[index].most for index in fewer):
                chosen |= fewer
    return [trials[index].id for index in sorted(chosen)]


def separated(one: Replicated, other: Replicated) -> bool:
    """Whether it is known which of two trials is better in which objective, as far as that decides who beats whom.

    Better in one and worse in another is known once both are; beside that nothing further matters.
    """
    signs = [_sign(ours, theirs) for ours, theirs in zip(one.values, other.values, strict=True)]
    known = {sign for sign in signs if sign is not None}
    return None not in signs or {-1, 1} <= known


def _sign(ours: dict[int, float], theirs: dict[int, float]) -> int | None:
    """-1, 0 or 1 where the difference is known, None where it may be either; paired by seed."""
    common = sorted(ours.keys() & theirs.keys())
    found = difference([ours[number] for number in common], [theirs[number] for number in common])
    if found.interval is None:
        return 0 if found.mean == 0 else None
    low, high = found.interval
    if low == high == 0:
        return 0
    return int(np.sign(found.mean)) if low > 0 or high < 0 else None
