"""The simulated makespan against that of a real run on three nodes, foretold from a smaller study that ran before."""

import json

import pytest

from fffsweep.pipeline.store import Store
from fffsweep.sweeps.bench import noop_study
from fffsweep.sweeps.controller import Controller
from fffsweep.sweeps.history import History, start_cost_s
from fffsweep.sweeps.record import Lease, study_folder
from fffsweep.sweeps.simulate import Cluster, SimulatedRun, simulate
from fffsweep.sweeps.strategy import FixedTrials
from tests.sweeps.conftest import Heard

pytestmark = [pytest.mark.integration, pytest.mark.slow]


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
    """Plans of a study run on the cluster, and how long it took from its first run's start to its last run's result."""
    config, plans = noop_study(trials, pause_s=2.0)
    folder = study_folder(results, config.name)
    lease = Lease(folder)
    outcome = Controller(config, FixedTrials(plans), results, folder, Heard(), "ray", address, None, lease).run()
    lease.release()
    assert outcome.state == "complete"
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    times = {kind: [event["time"] for event in events if event["event"] == kind] for kind in ("submitted", "finished")}
    return plans, max(times["finished"]) - min(times["submitted"])


def test_a_schedule_is_foretold_from_a_smaller_study(address, tmp_path):
    """Durations and the cost of starting a run are the smaller one's, which ran before."""
    driven(2, tmp_path / "before", address)
    history = History(Store(tmp_path / "before" / "store"))
    cluster = Cluster(3, 1, overhead_s=start_cost_s(tmp_path / "before"))
    assert cluster.overhead_s > 0

    plans, real_s = driven(4, tmp_path / "after", address)
    stages = {stage.run.key: stage for plan in plans for stage in plan.stages}
    runs = [SimulatedRun(key, tuple(s.run.inputs.values()), s.resources, history.median(s.run)[0]) for key, s in stages.items()]
    assert simulate(runs, frozenset(), cluster).makespan_s == pytest.approx(real_s, rel=0.25)
