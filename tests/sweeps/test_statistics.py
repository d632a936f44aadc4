"""Intervals, tests and probabilities against brute force, closed forms and simulation."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats

from fffsweep.sweeps.statistics import (
    confidence_reached,
    difference,
    holm,
    mean_interval,
    probability_on_front,
    ratio_interval,
    resamples,
    t_cdf,
    t_quantile,
)

numbers = st.floats(-100, 100, allow_nan=False).map(lambda value: round(value, 3))


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_enumerated_resamples_are_all_ordered_draws(count):
    weights, probabilities = resamples(count)
    values = np.arange(1.0, count + 1) ** 2
    brute = np.sort([np.mean(draw) for draw in itertools.product(values, repeat=count)])
    ours = np.sort(np.repeat(weights @ values, np.rint(probabilities * count**count).astype(int)))
    np.testing.assert_allclose(ours, brute, rtol=1e-12)


@pytest.mark.parametrize("count", [2, 7, 8])
def test_resamples_are_a_distribution(count):
    weights, probabilities = resamples(count)
    assert probabilities.sum() == pytest.approx(1, abs=1e-9)
    np.testing.assert_allclose(weights.sum(axis=1), 1, rtol=1e-12)
    # A drawn mean weight has standard error below 1 / sqrt(resamples) / count; five of them.
    np.testing.assert_allclose(probabilities @ weights, 1 / count, atol=5 / count / np.sqrt(len(weights)) + 1e-12)


@given(st.floats(-50, 50), st.integers(1, 30))
def test_t_distribution(t, degrees):
    assert t_cdf(t, degrees) == pytest.approx(stats.t.cdf(t, degrees), abs=1e-12)


@given(st.floats(0.51, 0.999), st.integers(1, 30))
def test_t_quantile(probability, degrees):
    assert t_quantile(probability, degrees) == pytest.approx(stats.t.ppf(probability, degrees), rel=1e-9)


@given(st.lists(numbers, min_size=2, max_size=7))
def test_interval_holds_the_mean_and_stays_among_the_values(values):
    low, high = mean_interval(values)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= low <= np.mean(values) + slack
    assert np.mean(values) - slack <= high <= max(values) + slack


@given(st.lists(numbers, min_size=2, max_size=6), numbers)
def test_interval_moves_with_the_values(values, shift):
    moved = mean_interval([value + shift for value in values])
    assert moved == pytest.approx(tuple(bound + shift for bound in mean_interval(values)), abs=1e-9)


def test_few_replicates_give_their_extremes():
    assert mean_interval([1.0, 5.0]) == (1.0, 5.0)
    assert mean_interval([1.0, 5.0, 2.0]) == (1.0, 5.0)
    assert confidence_reached(2) == 0.5
    assert confidence_reached(3) == 0.75
    assert confidence_reached(20) == 0.95


@pytest.mark.parametrize("count", [6, 10])
def test_interval_covers_the_mean(count):
    """400 normal samples: coverage 95 %, standard error 1.1 %; more than four below would be a fault."""
    generator = np.random.default_rng(1)
    hits = sum(low <= 0 <= high for low, high in (mean_interval(list(generator.normal(size=count))) for _ in range(400)))
    assert hits / 400 >= 0.95 - 4 * 0.011


def test_one_replicate_decides_nothing():
    assert mean_interval([3.0]) is None
    assert ratio_interval([3.0], [2.0]) is None
    assert probability_on_front([[[1.0, 2.0]], [[2.0, 1.0]]], [True, True]) is None
    alone = difference([3.0], [1.0])
    assert (alone.mean, alone.interval, alone.p_value, alone.num_replicates) == (2.0, None, None, 1)


@given(st.lists(st.tuples(numbers, numbers), min_size=3, max_size=6))
def test_paired_test_is_the_t_test(pairs):
    ours, theirs = (list(side) for side in zip(*pairs, strict=True))
    gaps = np.array(ours) - np.array(theirs)
    if gaps.std() < 1e-6 * (1 + np.abs(gaps).max()):
        return
    assert difference(ours, theirs).p_value == pytest.approx(stats.ttest_rel(ours, theirs).pvalue, abs=1e-9)


def test_equal_differences_are_not_tested():
    """Their spread is unknown, not zero: two coarse scores, or replicates with all seeds in common, would else pass for certain."""
    for ours, theirs in [([2.0, 3.0, 4.0], [1.0, 2.0, 3.0]), ([0.9, 0.8], [0.8, 0.7]), ([81.4] * 3, [79.2] * 3)]:
        assert difference(ours, theirs).p_value is None
        assert difference(theirs, ours).p_value is None
    assert difference([2.0, 3.0], [2.0, 3.0]).p_value == 1.0
    assert difference([0.1 + 0.2, 0.3], [0.3, 0.1 + 0.2]).p_value == 1.0, "of order of the rounding"
    assert 0 < difference([1.0, 1.0 + 1e-9], [0.0, 0.0]).p_value < 1e-8
    assert difference([2.0, 4.0], 1.0).mean == 2.0


def test_ratio_is_paired():
    """Replicates that vary together leave the ratio exact, however much they vary."""
    assert ratio_interval([9.0, 18.0, 27.0], [10.0, 20.0, 30.0]) == pytest.approx((0.9, 0.9))
    assert ratio_interval([1.0, 2.0], [0.0, 2.0]) is None
    with pytest.raises(ValueError, match="expected pairs"):
        ratio_interval([1.0], [1.0, 2.0])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=12))
def test_holm(p_values):
    """Against the definition: the largest of (number of p values not below it) times each smaller p value."""
    adjusted = holm(p_values)
    order = np.argsort(p_values, kind="stable")
    for rank, index in enumerate(order):
        expected = max(min(1.0, (len(p_values) - k) * p_values[order[k]]) for k in range(rank + 1))
        assert adjusted[index] == pytest.approx(expected, abs=1e-12)


@given(st.sampled_from([2, 4]), st.integers(2, 4), st.data())
def test_probability_on_front_against_enumeration(num_replicates, num_trials, data):
    size = num_trials * num_replicates * 2
    values = np.array(data.draw(st.lists(st.integers(0, 8), min_size=size, max_size=size)), dtype=float)
    values = values.reshape(num_trials, num_replicates, 2)
    counts = np.zeros(num_trials)
    draws = list(itertools.product(range(num_replicates), repeat=num_replicates))
    for draw in draws:
        means = values[:, list(draw)].sum(axis=1)  # sums of whole numbers: ties stay exact
        for trial in range(num_trials):
            signed = means * [1, -1]
            counts[trial] += not any((other >= signed[trial]).all() and (other > signed[trial]).any() for other in signed)
    # Weights in halves and quarters make exact means, so ties break alike.
    np.testing.assert_allclose(probability_on_front(values, [True, False]), counts / len(draws), atol=1e-12)


def test_probability_on_front_of_the_clear_and_the_hopeless():
    values = [[[10.0, 1.0], [11.0, 1.0], [12.0, 1.0]], [[1.0, 2.0], [2.0, 2.0], [3.0, 2.0]], [[1.0, 0.5], [30.0, 0.5], [2.0, 3.0]]]
    chances = probability_on_front(values, [True, False])
    assert chances[0] > 0.2
    assert chances[1] == 0.0
    assert 0 < chances[2] < 1
