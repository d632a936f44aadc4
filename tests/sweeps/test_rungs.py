"""Who is stopped, who waits and who goes on at a rung, from made-up losses."""

import pytest

from fffsweep.pipeline.model_settings import FeedForward, ModelSettings
from fffsweep.sweeps.rungs import GATHERING, Cost, Racer, cost_of, decide, seed_noise
from fffsweep.sweeps.statistics import t_quantile

FAST, SLOW = Cost(100, False), Cost(1000, False)
NOISE = 0.01  # two seeds that are this far to either side of their mean


def racer(name, loss, cost=FAST, group=None, **more):
    """Two seeds at the first rung, `NOISE` to either side of `loss`; in a layout of its own unless said otherwise."""
    return Racer(name, group or name, cost, losses=[[loss - NOISE, loss + NOISE]], **more)


def stopped(*racers, num_rungs=2):
    return decide(racers, 3, num_rungs, lambda group: False).stopped


def margin(num_racers):
    """What two means of two seeds must differ by, with the noise of so many racers pooled."""
    noise = (2 * NOISE**2) ** 0.5
    return t_quantile(0.975, num_racers) * noise


def test_noise_is_pooled_over_all_who_have_more_than_one_seed():
    pair = [racer("a", 1.0), racer("b", 5.0)]
    noise, degrees = seed_noise([*pair, Racer("one seed", "c", FAST, losses=[[3.0]]), Racer("not there yet", "d", FAST)], 0)
    assert (noise, degrees) == (pytest.approx((2 * NOISE**2) ** 0.5), 2)
    assert seed_noise([Racer("one seed", "c", FAST, losses=[[3.0]])], 0) == (0.0, 0)
    assert seed_noise(pair, 1) == (0.0, 0)


def test_a_rival_at_least_as_fast_and_better_by_more_than_the_noise_stops_a_trial():
    better, worse = racer("better", 1.0), racer("worse", 1.0 + 1.01 * margin(2))
    assert stopped(better, worse) == {"worse": "better is at least as fast and better at rung 0 by more than the seeds' noise"}
    slow = racer("worse", 1.0 + 1.01 * margin(2), SLOW)
    assert list(stopped(slow, better)) == ["worse"]


def test_within_the_noise_nobody_is_stopped():
    assert stopped(racer("better", 1.0), racer("worse", 1.0 + 0.99 * margin(2))) == {}
    assert stopped(racer("one", 1.0), racer("equal", 1.0)) == {}


def test_a_slower_rival_stops_nobody():
    assert stopped(racer("better", 1.0, SLOW), racer("worse", 9.0, FAST)) == {}


@pytest.mark.parametrize(
    ("rival", "why"),
    [
        (racer("better", 1.0, group="mine"), "halving decides within a layout"),
        (racer("better", 1.0, competes=False), "reference_dense does not compete"),
        (Racer("better", "other", FAST), "it has not come so far"),
        (Racer("better", "other", FAST, losses=[[1.0]], granted=0), None),
    ],
)
def test_who_may_be_a_rival(rival, why):
    found = stopped(rival, racer("worse", 9.0, group="mine"), racer("noise", 9.0, SLOW, group="third"))
    assert ("worse" in found) == (why is None)


def test_one_seed_says_nothing_of_noise_so_nobody_is_stopped():
    assert stopped(Racer("better", "a", FAST, losses=[[1.0]]), Racer("worse", "b", FAST, losses=[[9.0]])) == {}


def test_a_trial_is_stopped_where_it_waits_and_nowhere_else():
    better = Racer("better", "a", FAST, losses=[[1.0, 1.02]] * 2, granted=1)
    on_its_way = Racer("worse", "b", FAST, losses=[[9.0, 9.02]], granted=1)
    assert stopped(better, on_its_way) == {}
    there = Racer("worse", "b", FAST, losses=[[9.0, 9.02]] * 2, granted=1)
    assert "at rung 1" in stopped(better, there)["worse"]
    assert stopped(better, there, num_rungs=1) == {}, "the whole budget is granted"
    for racers in ([better, there], [there, better]):
        assert list(stopped(*racers)) == ["worse"]
    assert stopped(racer("better", 1.0), racer("worse", 9.0, competes=False)) == {}


def test_a_stopped_rival_counts_as_far_as_it_came():
    assert list(stopped(racer("better", 1.0, state="stopped"), racer("worse", 9.0))) == ["worse"]


def test_a_tree_gathers_so_its_multiply_adds_count_more_beside_dense_ones():
    tree, dense = Cost(100, True), Cost(100 * GATHERING, False)
    assert tree.at_most(dense)
    assert not Cost(101, True).at_most(dense)
    assert dense.at_most(Cost(100 * GATHERING, True))
    assert tree.at_most(tree)
    assert not Cost(101, True).at_most(tree)


def test_cost_counts_what_a_token_uses():
    def cost(**layer):
        return cost_of(ModelSettings(hidden_size=32, num_layers=3, num_heads=2, feedforward=FeedForward(variant="fff", **layer)))

    assert cost(trees=4, depth=3) == Cost(2 * 3 * 32 * 4 * 4, True)
    assert cost(trees=60, depth=0) == Cost(2 * 3 * 32 * 60, False)
