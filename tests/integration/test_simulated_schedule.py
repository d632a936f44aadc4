"""The simulated makespan against that of a real run on three nodes, with durations as a smaller run before it had them."""

import json
from statistics import fmean, median

import pytest

from fffsweep.sweeps.bench import noop_study
from fffsweep.sweeps.controller import Controller
from fffsweep.sweeps.record import Lease, study_folder
from fffsweep.sweeps.simulate import Cluster, SimulatedRun, simulate
from fffsweep.sweeps.strategy import FixedTrials

pytestmark = [pytest.mark.integration, pytest.mark.slow]


class Quiet:
    def update(self, record, num_running):
        pass

    def say(self, line):
        pass


@pytest.fixture(scope="module")
def address():
    from ray.cluster_utils import Cluster as RayCluster

    node = {"num_cpus": 1, "object_store_memory": 80 * 2**20}
    cluster = RayCluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    for _ in range(2):
        cluster.add_node(**node)
    yield cluster.address
    cluster.shutdown()


def driven(trials, results, address):
    """Events of a study run on the cluster."""
    config, plans = noop_study(trials, pause_s=2.0)
    folder = study_folder(results, config.name)
    lease = Lease(folder)
    outcome = Controller(config, FixedTrials(plans), results, folder, Quiet(), "ray", address, None, lease).run()
    lease.release()
    assert outcome.state == "complete"
    return plans, [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]


def test_a_simulated_schedule_is_near_the_real_one(address, tmp_path):
    _, before = driven(1, tmp_path / "before", address)
    seconds = median(event["duration_s"] for event in before if event["event"] == "finished")

    plans, events = driven(4, tmp_path / "after", address)
    started = {event["key"]: event["time"] for event in events if event["event"] == "submitted"}
    ended = {event["key"]: event for event in events if event["event"] == "finished"}
    # What a run costs beside its stage depends on what else this machine does at the time, so it is taken from the time itself.
    overhead_s = fmean(event["time"] - started[key] - event["duration_s"] for key, event in ended.items())
    real_s = max(event["time"] for event in ended.values()) - min(started.values())
    stages = {stage.run.key: stage for plan in plans for stage in plan.stages}
    runs = [SimulatedRun(key, tuple(s.run.inputs.values()), s.resources, seconds) for key, s in stages.items()]
    schedule = simulate(runs, frozenset(), Cluster(3, 1, overhead_s=overhead_s))
    assert schedule.makespan_s == pytest.approx(real_s, rel=0.25)
