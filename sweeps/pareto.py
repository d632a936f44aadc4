"""Pareto fronts over any objectives: who is on the front, how much it dominates, its knee, and the pick under constraints.

Every function takes values [..., trials, objectives] and `maximize` [objectives]; all values must be finite.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

_PIVOTS, _BLOCK = 16, 256  # strong trials tried first; rows compared at a time, which bounds the memory


def costs(values: ArrayLike, maximize: Sequence[bool]) -> Floats:
    """`values` with maximised objectives negated, so that less is better everywhere. Raises ValueError if one is not finite."""
    array = np.asarray(values, dtype=np.float64)
    if array.ndim < 2 or array.shape[-1] != len(maximize):
        raise ValueError(f"values of shape {list(array.shape)}: expected [..., trials, {len(maximize)}], one column for each objective")
    if not np.isfinite(array).all():
        raise ValueError("values that are not finite: leave out trials that lack an objective")
    return array * np.where(maximize, -1.0, 1.0)


def front(values: ArrayLike, maximize: Sequence[bool]) -> Bools:
    """Mask [..., trials] of those that no other trial equals or betters everywhere and betters somewhere. Equal trials stay together."""
    cost = costs(values, maximize)
    if cost.shape[-1] == 1:
        return np.asarray(cost[..., 0] == cost[..., 0].min(axis=-1, keepdims=True, initial=np.inf))
    if cost.shape[-1] == 2:
        return _front_of_two(cost)
    flat = cost.reshape(-1, *cost.shape[-2:])
    masks = [_front_of_many(each) for each in flat]
    return np.asarray(masks, dtype=bool).reshape(cost.shape[:-1])


def _front_of_two(cost: Floats) -> Bools:
    """By sorting: in order of the first cost, a trial is on the front iff its second cost is below all before, or it equals one that is."""
    order = np.lexsort((cost[..., 1], cost[..., 0]), axis=-1)
    ordered = np.take_along_axis(cost, order[..., None], axis=-2)
    second = ordered[..., 1]
    before = np.concatenate([np.full_like(second[..., :1], np.inf), np.minimum.accumulate(second, axis=-1)[..., :-1]], axis=-1)
    leads = np.ones(second.shape, dtype=bool)
    leads[..., 1:] = (ordered[..., 1:, :] != ordered[..., :-1, :]).any(axis=-1)
    group = np.maximum.accumulate(np.where(leads, np.arange(second.shape[-1]), 0), axis=-1)
    on_front = np.take_along_axis(second < before, group, axis=-1)
    mask = np.empty_like(on_front)
    np.put_along_axis(mask, order, on_front, axis=-1)
    return mask


def _front_of_many(cost: Floats) -> Bools:
    """By comparing all pairs, after a few strong trials have thrown out most of what they dominate."""
    alive = np.arange(len(cost))
    ranks = np.argsort(np.argsort(cost, axis=0), axis=0).sum(axis=1)
    for strong in np.argsort(ranks)[:_PIVOTS]:
        alive = alive[~_dominated(cost[alive], cost[strong])]
    left = cost[alive]
    mask = np.zeros(len(cost), dtype=bool)
    for start in range(0, len(left), _BLOCK):
        block = left[start : start + _BLOCK]
        mask[alive[start : start + _BLOCK]] = ~_dominated(block[:, None], left[None]).any(axis=1)
    return mask


def _dominated(cost: Floats, by: Floats) -> Bools:
    columns = range(cost.shape[-1])  # a loop over few columns beats a reduction over a short axis
    never_worse = np.logical_and.reduce([by[..., column] <= cost[..., column] for column in columns])
    return np.asarray(never_worse & np.logical_or.reduce([by[..., column] < cost[..., column] for column in columns]))


def hypervolume(values: ArrayLike, maximize: Sequence[bool], reference: ArrayLike) -> float:
    """Volume between the trials and `reference` [objectives]; a trial not better than `reference` everywhere adds nothing."""
    cost, corner = costs(values, maximize), costs(np.asarray(reference)[None], maximize)[0]
    inside = cost[(cost < corner).all(axis=1)]
    return _volume(inside[front(inside, [False] * len(maximize))], corner) if len(inside) else 0.0


def _volume(cost: Floats, corner: Floats) -> float:
    """By slicing along the last objective; each slab has the volume of the trials below it in the other objectives."""
    if not len(cost):
        return 0.0
    if cost.shape[1] == 1:
        return float(corner[0] - cost.min())
    if cost.shape[1] == 2:
        ordered = cost[np.argsort(cost[:, 0])]
        lowest = np.minimum.accumulate(np.append(corner[1], ordered[:, 1]))
        return float((corner[0] - ordered[:, 0]) @ -np.diff(lowest))
    levels = np.unique(cost[:, -1])
    heights = np.diff(np.append(levels, corner[-1]))
    return float(
        sum(height * _volume(cost[cost[:, -1] <= level][:, :-1], corner[:-1]) for level, height in zip(levels, heights, strict=True))
    )


def knee(values: ArrayLike, maximize: Sequence[bool], log: Sequence[bool] | None = None) -> int | None:
    """Index of the front's trial that lies farthest on the good side of the front's extremes; None if there is none.

    Objectives are scaled to the front's range and summed; the extremes are the trials best in one objective, and their mean sum is
    the level to be below. Objectives marked in `log` are scaled by their logarithm (all of their values must be positive).
    A front of fewer than three different trials, or one that nowhere bulges towards the good side, has no knee.
    """
    array = np.asarray(values, dtype=np.float64)
    cost = costs(array, maximize)
    for column, logarithmic in enumerate(log or ()):
        if logarithmic:
            if (array[:, column] <= 0).any():
                raise ValueError("a logarithmic objective with values that are not positive; leave those trials out")
            cost[:, column] = np.log(array[:, column]) * (-1 if maximize[column] else 1)
    members = np.flatnonzero(front(values, maximize))
    chosen = cost[members]
    if len(np.unique(chosen, axis=0)) < 3:
        return None
    spread = np.ptp(chosen, axis=0)
    scaled = (chosen - chosen.min(axis=0)) / np.where(spread > 0, spread, 1)
    sums = scaled.sum(axis=1)
    below = sums[scaled.argmin(axis=0)].mean() - sums
    best = int(np.argmax(below))
    return int(members[best]) if below[best] > 1e-12 else None


def pick(
    values: ArrayLike,
    maximize: Sequence[bool],
    objective: int,
    at_least: Mapping[int, float] | None = None,
    at_most: Mapping[int, float] | None = None,
) -> int | None:
    """Index of the trial best in `objective` among those that satisfy the bounds (column -> bound); None if none does.

    Ties go to the trial that is better in the other objectives, in their order.
    """
    array = np.asarray(values, dtype=np.float64)
    cost = costs(array, maximize)
    allowed = np.ones(len(array), dtype=bool)
    for column, bound in (at_least or {}).items():
        allowed &= array[:, column] >= bound
    for column, bound in (at_most or {}).items():
        allowed &= array[:, column] <= bound
    if not allowed.any():
        return None
    columns = [objective, *(column for column in range(cost.shape[1]) if column != objective)]
    order = np.lexsort(cost[:, columns[::-1]].T)
    return int(next(index for index in order if allowed[index]))
