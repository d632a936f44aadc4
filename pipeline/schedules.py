"""Learning rate over the budget. Torch-free: configs are checked against it."""

from __future__ import annotations

import math
from collections.abc import Callable

WSD_DECAY = 0.2  # share of the budget in which `wsd` falls; Hägele et al. 2024, arXiv 2405.18392, take 10 to 20 %


def _triangle(progress: float) -> float:
    """Starts at 25 %, peaks at 75 % of the budget, falls to 0: cramming's "budget-triangle2"."""
    return min(0.25 + progress, 4 * (1 - progress))


def _one_cycle(progress: float) -> float:
    """From 0 to the peak half-way and back to 0."""
    return 1 - abs(1 - 2 * progress)


def _wsd(progress: float) -> float:
    """Stable, then linear to 0."""
    return min(1.0, (1 - progress) / WSD_DECAY)


def _cosine(progress: float) -> float:
    return 0.5 * (1 + math.cos(math.pi * progress))


def _constant(progress: float) -> float:
    return 1.0


SCHEDULES: dict[str, Callable[[float], float]] = {
    "triangle": _triangle,
    "one_cycle": _one_cycle,
    "wsd": _wsd,
    "cosine": _cosine,
    "constant": _constant,
}
RISING = ("triangle", "one_cycle")  # they rise by themselves: a warm-up would be a second one


def factor(schedule: str, progress: float, warmup: float = 0.0) -> float:
    """Share of the peak learning rate when `progress`, 0 to 1, of the budget is spent; the first `warmup` of it rises linearly from 0.

    What follows the warm-up is the schedule squeezed into the rest, but `wsd`, whose decay is a share of the whole budget.
    """
    progress = min(max(progress, 0.0), 1.0)
    if progress < warmup:
        return progress / warmup
    rest = progress if schedule == "wsd" else (progress - warmup) / (1 - warmup)
    return SCHEDULES[schedule](rest)


def rung_factor(progress: float, share: float, warmup: float = 0.0) -> float:
    """Factor of a `wsd` run that is to end after `share` of the budget: the whole run's, but falling to 0 over the last fifth of it."""
    return min(factor("wsd", progress, warmup), max(0.0, (share - progress) / (WSD_DECAY * share)))
