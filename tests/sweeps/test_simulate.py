"""Simulated schedules against ones that can be worked out by hand."""

import json
import os

import pytest

from fffsweep.pipeline.stage import Resources
from fffsweep.sweeps.bench import noop_study
from fffsweep.sweeps.history import start_cost_s
from fffsweep.sweeps.simulate import Cluster, SimulatedRun, simulate


def run(key, seconds, inputs=(), **resources):
    return SimulatedRun(key, tuple(inputs), Resources(**resources), seconds)


def test_a_chain_takes_the_sum_and_a_fan_its_share():
    chain = [run("a", 3), run("b", 4, "a"), run("c", 5, "b")]
    assert simulate(chain, frozenset(), Cluster(8, 4)).makespan_s == 12
    fan = [run("a", 2), *(run(f"k{n}", 3, "a") for n in range(8))]
    assert simulate(fan, frozenset(), Cluster(1, 4)).makespan_s == 2 + 3 + 3
    schedule = simulate(fan, frozenset(), Cluster(2, 4))
    assert (schedule.makespan_s, schedule.num_runs) == (5, 9)
    assert schedule.node_hours == pytest.approx(2 * 5 / 3600)
    assert schedule.utilisation == pytest.approx((2 + 8 * 3) / (5 * 8))


def test_a_benchmark_has_its_node_alone_and_comes_when_nothing_else_can_start():
    runs = [run("bench", 5, exclusive=True), run("a", 2), run("b", 4)]
    assert simulate(runs, frozenset(), Cluster(1, 2)).makespan_s == 4 + 5
    assert simulate(runs, frozenset(), Cluster(3, 2)).makespan_s == 5


def test_wide_runs_wait_and_narrow_ones_pass_them():
    runs = [run("a", 4, cpus=3), run("wide", 2, cpus=4), run("narrow", 4)]
    assert simulate(runs, frozenset(), Cluster(1, 4)).makespan_s == 4 + 2


def test_what_no_node_can_hold_is_refused():
    with pytest.raises(ValueError, match="--node-cpus 4: a stage run asks for 8 CPUs; expected at least as many on a node"):
        simulate([run("a", 4, cpus=8)], frozenset(), Cluster(3, 4))
    assert simulate([run("a", 4, cpus=8, exclusive=True)], frozenset(), Cluster(3, 4)).makespan_s == 4


def test_gpus_are_counted():
    runs = [run(f"k{n}", 6, gpus=0.5) for n in range(4)]
    assert simulate(runs, frozenset(), Cluster(1, 16, node_gpus=1)).makespan_s == 12
    with pytest.raises(ValueError, match=r"asks for 0\.5 GPUs"):
        simulate(runs, frozenset(), Cluster(1, 16))


def test_workers_of_a_run_start_together_on_as_many_nodes_as_they_need():
    shared = run("shared", 6, gpus=1.0, workers=4)
    assert simulate([shared], frozenset(), Cluster(2, 16, node_gpus=2)).utilisation == pytest.approx(4 / 32)
    one_is_taken = [run("a", 4, gpus=1.0), shared]
    assert simulate(one_is_taken, frozenset(), Cluster(2, 16, node_gpus=2)).makespan_s == 4 + 6
    assert simulate(one_is_taken, frozenset(), Cluster(3, 16, node_gpus=2)).makespan_s == 6
    thirds = [run(f"k{n}", 5, gpus=1 / 3, workers=3) for n in range(2)]
    assert simulate(thirds, frozenset(), Cluster(1, 16, node_gpus=1)).makespan_s == 10
    with pytest.raises(ValueError, match="--nodes 1: a stage run has 4 workers of 1 CPUs and 1 GPUs each; there is room for 2"):
        simulate([shared], frozenset(), Cluster(1, 16, node_gpus=2))


def test_what_is_done_is_not_run():
    runs = [run("b", 4, "a")]
    assert simulate(runs, frozenset("a"), Cluster(1, 1)).makespan_s == 4
    with pytest.raises(ValueError, match="reads a, which nothing makes"):
        simulate(runs, frozenset(), Cluster(1, 1))
    assert simulate([], frozenset("a"), Cluster(1, 1)).makespan_s == 0


def test_a_cluster_has_nodes():
    with pytest.raises(ValueError, match="--nodes 0 --node-cpus 16 --node-gpus 0: expected at least one node"):
        Cluster(0, 16)


def test_no_node_does_more_than_it_can_and_nothing_comes_before_its_inputs():
    _, plans = noop_study(6)
    stages = {stage.run.key: stage for plan in plans for stage in plan.stages}
    runs = [SimulatedRun(key, tuple(stage.run.inputs.values()), stage.resources, 1.0) for key, stage in stages.items()]
    few, many = simulate(runs, frozenset(), Cluster(1, 2)), simulate(runs, frozenset(), Cluster(50, 4))
    assert many.makespan_s == 4  # prepare, pretrain, the ten that read it, collect
    assert few.makespan_s >= len(runs) / 2
    assert few.utilisation > 0.9


def test_what_it_costs_to_start_a_run_is_read_from_the_newest_study_on_ray(tmp_path):
    def history(study, executor, *lines):
        path = tmp_path / "studies" / study / "events.jsonl"
        path.parent.mkdir(parents=True)
        started = {"event": "started", "time": 0.0, "executor": executor}
        path.write_text("".join(json.dumps(line) + "\n" for line in (started, *lines)) + '{"event": "subm')

    def ran(key, begun, ended, duration_s):
        return (
            {"event": "submitted", "time": begun, "key": key},
            {"event": "finished", "time": ended, "key": key, "duration_s": duration_s},
        )

    assert start_cost_s(tmp_path) == 0
    history("older", "ray", *ran("a", 1.0, 9.0, 1.0))
    os.utime(tmp_path / "studies" / "older" / "events.jsonl", (1, 1))
    assert start_cost_s(tmp_path) == 7
    history("newer", "ray", *ran("a", 1.0, 5.0, 3.5), *ran("b", 1.0, 4.0, 2.5))
    history("newest", "inline", *ran("a", 1.0, 5.0, 1.0))
    assert start_cost_s(tmp_path) == 0.5
