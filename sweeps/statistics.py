"""How sure a comparison is, from a handful of replicates: bootstrap over them, paired by seed; Holm over many comparisons.

A replicate is one pretraining seed. Up to seven replicates every resample is enumerated with its probability, so a figure is
exact and needs no seed; beyond, 4,000 resamples are drawn from a fixed seed. One replicate gives no interval at all: None.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations_with_replacement
from statistics import NormalDist

import numpy as np
from numpy.typing import ArrayLike, NDArray

from fffsweep.sweeps.pareto import front

Floats = NDArray[np.float64]
Interval = tuple[float, float]

CONFIDENCE = 0.95
_ENUMERATED = 7  # replicates; C(13, 7) = 1,716 resamples
_DRAWN = 4000
_ROUNDING = 2.0**-48  # of a difference beside its terms: 0.9 - 0.8 and 0.8 - 0.7 are equal, means of some dozen scores as well
_REMEMBERED = 50_000  # comparisons: a page of a running study makes the same ones again, all but those of its newest trial


@functools.cache
def resamples(num_replicates: int) -> tuple[Floats, Floats]:
    """Bootstrap weights [resamples, replicates], rows summing to 1, and the probability of each resample."""
    if num_replicates > _ENUMERATED:
        drawn = np.random.default_rng(0).multinomial(num_replicates, np.full(num_replicates, 1 / num_replicates), _DRAWN)
        return drawn / num_replicates, np.full(_DRAWN, 1 / _DRAWN)
    counts = [
        np.bincount(chosen, minlength=num_replicates) for chosen in combinations_with_replacement(range(num_replicates), num_replicates)
    ]
    ways = [math.factorial(num_replicates) / math.prod(math.factorial(int(n)) for n in count) for count in counts]
    return np.asarray(counts) / num_replicates, np.asarray(ways) / num_replicates**num_replicates


def confidence_reached(num_replicates: int, confidence: float = CONFIDENCE) -> float:
    """Confidence that an interval from so few replicates can have at most: resampled means stay between the smallest and the
    largest value, which for a symmetric law enclose the mean with probability 1 - 2**(1 - replicates)."""
    return min(confidence, 1 - 2.0 ** (1 - num_replicates))


def mean_interval(values: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Bootstrap interval of the mean; None for fewer than two values."""
    if len(values) < 2:
        return None
    weights, probabilities = resamples(len(values))
    if _tail(len(values), confidence) < probabilities.min():
        return float(min(values)), float(max(values))
    return _quantiles(weights @ np.asarray(values, dtype=np.float64), probabilities, len(values), confidence)


def ratio_interval(numerator: Sequence[float], denominator: Sequence[float], confidence: float = CONFIDENCE) -> Interval | None:
    """Bootstrap interval of mean / mean, paired; None for fewer than two pairs or where a resampled denominator is not positive."""
    if len(numerator) != len(denominator):
        raise ValueError(f"{len(numerator)} values over {len(denominator)}: expected pairs, one of each for every replicate")
    return _ratio_interval(tuple(numerator), tuple(denominator), confidence)


@functools.lru_cache(maxsize=_REMEMBERED)
def _ratio_interval(numerator: tuple[float, ...], denominator: tuple[float, ...], confidence: float) -> Interval | None:
    if len(numerator) < 2 or min(denominator) <= 0:
        return None
    weights, probabilities = resamples(len(numerator))
    ratios = (weights @ np.asarray(numerator, dtype=np.float64)) / (weights @ np.asarray(denominator, dtype=np.float64))
    return _quantiles(ratios, probabilities, len(numerator), confidence)


def _quantiles(statistics: Floats, probabilities: Floats, num_replicates: int, confidence: float) -> Interval:
    """Percentiles of a resampled statistic, widened for few replicates.

    The plain percentile interval of n values is too narrow by about sqrt((n - 1) / n) and ignores the t law; both are put right by
    taking percentiles farther out. Source: Hesterberg 2015, What Teachers Should Know About the Bootstrap, "expanded percentile".
    """
    tail = _tail(num_replicates, confidence)
    order = np.argsort(statistics, kind="stable")
    cumulative = np.cumsum(probabilities[order])
    low = statistics[order[np.searchsorted(cumulative, tail, side="right")]]
    high = statistics[order[min(int(np.searchsorted(cumulative, 1 - tail - 1e-12)), len(order) - 1)]]
    return float(low), float(high)


@functools.cache
def _tail(num_replicates: int, confidence: float) -> float:
    """Probability to leave out on each side, so that the interval is as wide as a t interval would be."""
    spread = math.sqrt(num_replicates / (num_replicates - 1)) * t_quantile((1 + confidence) / 2, num_replicates - 1)
    return NormalDist().cdf(-spread)


def t_cdf(t: float, degrees: int) -> float:
    """Student's t distribution function for whole degrees of freedom >= 1. Source: Abramowitz & Stegun 1964, 26.7.3 and 26.7.4."""
    angle = math.atan(t / math.sqrt(degrees))
    cosine = math.cos(angle)
    total, term = 0.0, cosine if degrees % 2 else 1.0
    for step in range(3 if degrees % 2 else 2, degrees + 1, 2):
        total += term
        term *= cosine * cosine * (step - 1) / step
    area = 2 / math.pi * (angle + math.sin(angle) * total) if degrees % 2 else math.sin(angle) * total
    return (1 + area) / 2


def t_quantile(probability: float, degrees: int) -> float:
    """Inverse of `t_cdf` for probabilities in (0.5, 1), by bisection."""
    low, high = 0.0, 1.0
    while t_cdf(high, degrees) < probability:
        high *= 2
    for _ in range(80):
        middle = (low + high) / 2
        low, high = (middle, high) if t_cdf(middle, degrees) < probability else (low, middle)
    return (low + high) / 2


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences over the replicates. `interval` and `p_value` are None where one replicate leaves nothing to compare.

    p_value: two-sided paired t test; 1 if all differences are zero, None if all are equal and not zero: without spread there is nothing
    to judge them by, for a few coarse scores agree by chance and replicates that share all their seeds agree by construction.
    """

    mean: float
    interval: Interval | None
    p_value: float | None
    num_replicates: int


def difference(ours: Sequence[float], theirs: Sequence[float] | float) -> Difference:
    """Difference ours - theirs, paired by replicate; `theirs` may be one constant."""
    others = [theirs] * len(ours) if isinstance(theirs, int | float) else theirs
    if len(others) != len(ours):
        raise ValueError(f"{len(ours)} values against {len(others)}: expected pairs, one of each for every replicate")
    gaps = tuple(float(mine) - float(other) for mine, other in zip(ours, others, strict=True))
    return _mean_difference(gaps, _ROUNDING * max(map(abs, (*ours, *others)), default=0.0))


@functools.lru_cache(maxsize=_REMEMBERED)
def _mean_difference(values: tuple[float, ...], rounding: float) -> Difference:
    """`rounding`: a standard deviation up to that is none."""
    count, mean = len(values), math.fsum(values) / len(values)
    if count < 2:
        return Difference(mean, None, None, count)
    deviation = math.sqrt(math.fsum((value - mean) ** 2 for value in values) / (count - 1))
    if deviation <= rounding:
        p_value: float | None = 1.0 if abs(mean) <= rounding else None
    else:
        p_value = 2 * (1 - t_cdf(abs(mean) / deviation * math.sqrt(count), count - 1))
    return Difference(mean, mean_interval(values), p_value, count)


def holm(p_values: Sequence[float]) -> list[float]:
    """P values adjusted for having made all these comparisons: rejecting those below a level keeps any false rejection below it."""
    order = sorted(range(len(p_values)), key=lambda index: p_values[index])
    adjusted, running = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(order):
        running = max(running, min(1.0, (len(p_values) - rank) * p_values[index]))
        adjusted[index] = running
    return adjusted


def probability_on_front(values: ArrayLike, maximize: Sequence[bool]) -> Floats | None:
    """Share of the resamples in which each trial is on the front; values [trials, replicates, objectives], paired by replicate.

    None for fewer than two replicates.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 3 or array.shape[1] < 2:
        return None
    weights, probabilities = resamples(array.shape[1])
    means = np.einsum("sr,tro->sto", weights, array)
    return np.asarray(probabilities @ front(means, maximize), dtype=np.float64)


def common_replicates(trials: Sequence[Mapping[int, float]]) -> list[int]:
    """Replicates that every one of these replicate -> value maps has, in order."""
    return sorted(set.intersection(*(set(trial) for trial in trials))) if trials else []
