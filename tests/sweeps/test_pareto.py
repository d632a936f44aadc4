"""Fronts, hypervolumes, knees and picks against brute force."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fffsweep.sweeps.pareto import front, hypervolume, knee, pick


@st.composite
def problems(draw, max_trials=12, max_objectives=4):
    """Values on a coarse grid, so that ties and equal trials happen, with any directions."""
    num_objectives = draw(st.integers(1, max_objectives))
    num_trials = draw(st.integers(1, max_trials))
    values = draw(
        st.lists(st.lists(st.integers(-3, 3), min_size=num_objectives, max_size=num_objectives), min_size=num_trials, max_size=num_trials)
    )
    return np.array(values, dtype=float), draw(st.lists(st.booleans(), min_size=num_objectives, max_size=num_objectives))


def dominates(a, b, maximize):
    signs = np.where(maximize, 1, -1)
    return bool((signs * a >= signs * b).all() and (signs * a > signs * b).any())


@given(problems())
def test_front_is_what_nothing_dominates(problem):
    values, maximize = problem
    expected = [not any(dominates(other, value, maximize) for other in values) for value in values]
    assert front(values, maximize).tolist() == expected


@given(st.integers(1, 3), st.data())
def test_front_of_a_batch_is_the_front_of_each(num_objectives, data):
    values = np.array(
        data.draw(st.lists(st.integers(-2, 2), min_size=3 * 6 * num_objectives, max_size=3 * 6 * num_objectives)), dtype=float
    )
    values = values.reshape(3, 6, num_objectives)
    maximize = [True, False, True][:num_objectives]
    assert np.array_equal(front(values, maximize), np.stack([front(each, maximize) for each in values]))


@given(problems(max_trials=6, max_objectives=3))
def test_hypervolume_counts_unit_cells(problem):
    """On an integer grid the dominated volume is the number of unit cells below the reference that some trial dominates."""
    values, maximize = problem
    signs = np.where(maximize, -1.0, 1.0)
    cost, corner = values * signs, np.full(values.shape[1], 2.0)
    cells = itertools.product(range(-3, 2), repeat=values.shape[1])
    expected = sum(any((each <= np.array(cell)).all() for each in cost) for cell in cells)
    assert hypervolume(values, maximize, corner * signs) == expected


@given(problems(max_objectives=3), st.randoms(use_true_random=False))
def test_front_does_not_depend_on_the_order(problem, random):
    values, maximize = problem
    order = list(range(len(values)))
    random.shuffle(order)
    assert front(values[order], maximize).tolist() == front(values, maximize)[order].tolist()


@given(problems(max_objectives=3), st.integers(-3, 3))
def test_pick_is_the_best_that_satisfies_the_bound(problem, bound):
    values, maximize = problem
    column = values.shape[1] - 1
    chosen = pick(values, maximize, 0, at_least={column: bound})
    allowed = [index for index in range(len(values)) if values[index, column] >= bound]
    if not allowed:
        assert chosen is None
    else:
        best = (max if maximize[0] else min)(values[index, 0] for index in allowed)
        assert chosen in allowed
        assert values[chosen, 0] == best
        assert not any(dominates(values[index], values[chosen], maximize) for index in allowed)


def test_knee_is_where_the_front_bends():
    values = [[0.0, 10.0], [1.0, 2.0], [9.0, 1.0], [10.0, 0.0], [5.0, 9.0]]
    assert knee(values, [False, False]) == 1


def test_a_straight_or_tiny_front_has_no_knee():
    assert knee([[0.0, 2.0], [1.0, 1.0], [2.0, 0.0]], [False, False]) is None
    assert knee([[0.0, 2.0], [2.0, 0.0]], [False, False]) is None
    assert knee([[0.0, 0.0], [2.0, 2.0]], [False, False]) is None


def test_knee_on_a_logarithmic_axis():
    """Quality against relative time: halving the time each step at a falling price bends only in log time."""
    values = [[80.0, 1.0], [79.5, 0.1], [79.0, 0.01], [70.0, 0.001]]
    assert knee(values, [True, False], log=[False, True]) == 2
    with pytest.raises(ValueError, match="not positive"):
        knee([[80.0, 0.0], *values], [True, False], log=[False, True])


def test_values_that_are_not_finite_are_refused():
    with pytest.raises(ValueError, match="not finite"):
        front([[1.0, float("nan")]], [True, False])
    with pytest.raises(ValueError, match="one column for each objective"):
        front([[1.0, 2.0]], [True])
