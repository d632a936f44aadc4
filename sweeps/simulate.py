"""The schedule of a sweep on a cluster that is not there: events in the order of their times, durations as earlier runs had them.

Stage runs are started as the driver starts them: those whose inputs are there, in the order of the plan, on the first node with room;
a run that several workers share starts when there is room for all of them, and a run that needs a node to itself waits until nothing
else can be started.
"""

from __future__ import annotations

import heapq
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from fffsweep.pipeline.stage import Resources
from fffsweep.sweeps.capacity import num_fitting
from fffsweep.sweeps.ready import ReadyRuns

SCHEMA = "fffsweep.simulation/1"


@dataclass(frozen=True)
class SimulatedRun:
    """A stage run to come: what it reads, what it occupies, how long it takes."""

    key: str
    inputs: tuple[str, ...]
    resources: Resources
    seconds: float


@dataclass(frozen=True)
class Cluster:
    """Nodes that are all alike. overhead_s: what the driver and the start of a run add to each."""

    num_nodes: int
    node_cpus: int
    node_gpus: float = 0.0
    overhead_s: float = 0.0

    def __post_init__(self) -> None:
        if self.num_nodes < 1 or self.node_cpus < 1 or self.node_gpus < 0:
            raise ValueError(
                f"--nodes {self.num_nodes} --node-cpus {self.node_cpus} --node-gpus {self.node_gpus:g}: "
                "expected at least one node, one CPU and no fewer than 0 GPUs"
            )


@dataclass(frozen=True)
class Schedule:
    """What came of it. node_hours: all nodes as long as the sweep lasts. utilisation: share of their CPUs that was occupied.

    overhead_s: the cluster's, which the makespan rests on.
    """

    num_nodes: int
    num_runs: int
    makespan_s: float
    node_hours: float
    utilisation: float
    num_bytes: float
    overhead_s: float

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


@dataclass
class _Node:
    cpus: int
    gpus: float
    runs: set[str] = field(default_factory=set)

    def room(self, wanted: Resources) -> int:
        """Workers of a run that could still start here."""
        return 0 if wanted.exclusive and self.runs else num_fitting(wanted, self.cpus, self.gpus)

    def take(self, key: str, cpus: int, gpus: float) -> None:
        self.cpus -= cpus
        self.gpus -= gpus
        self.runs.add(key)

    def give_back(self, key: str, cpus: int, gpus: float) -> None:
        self.cpus += cpus
        self.gpus += gpus
        self.runs.discard(key)


def simulate(runs: Sequence[SimulatedRun], done: frozenset[str], cluster: Cluster, num_bytes: float = 0.0) -> Schedule:
    """Schedule of `runs`, in the order of the plan, on a cluster; `done` are keys that have their result already.

    Raises ValueError if a run asks for more than a node or the cluster has, or reads what nothing makes.
    """
    by_key = {run.key: run for run in runs}
    _check(by_key, done, cluster)
    finished, started = set(done), set[str]()

    def is_ready(key: str) -> bool:
        return key not in started and all(upstream in finished for upstream in by_key[key].inputs)

    shared, alone = (ReadyRuns(is_ready, lambda key: by_key[key].resources) for _ in range(2))
    queue_of = {run.key: alone if run.resources.exclusive else shared for run in runs}
    for run in runs:
        queue_of[run.key].add(run.key, run.inputs)
    nodes = [_Node(cluster.node_cpus, cluster.node_gpus) for _ in range(cluster.num_nodes)]
    ends: list[tuple[float, int, str, list[_Node]]] = []
    now = busy = 0.0

    def cpus_of(key: str) -> int:
        wanted = by_key[key].resources
        return cluster.node_cpus if wanted.exclusive else wanted.cpus

    def place(key: str) -> bool | None:
        wanted, cpus = by_key[key].resources, cpus_of(key)
        found: list[_Node] = []  # a node for each worker, the same one as often as it has room
        for node in nodes:
            found += [node] * min(node.room(wanted), wanted.workers - len(found))
            if len(found) == wanted.workers:
                break
        else:
            return None
        for node in found:
            node.take(key, cpus, wanted.gpus)
        started.add(key)
        heapq.heappush(ends, (now + by_key[key].seconds + cluster.overhead_s, len(started), key, found))
        return True

    while True:
        for _ in shared.take(place):
            pass
        if not shared:
            for _ in alone.take(place):
                pass
        if not ends:
            break
        now, _, key, occupied = heapq.heappop(ends)
        busy += len(occupied) * cpus_of(key) * (by_key[key].seconds + cluster.overhead_s)
        for node in occupied:
            node.give_back(key, cpus_of(key), by_key[key].resources.gpus)
        finished.add(key)
        for queue in (shared, alone):
            queue.done(key)
    share = busy / (now * cluster.num_nodes * cluster.node_cpus) if now else 0.0
    return Schedule(cluster.num_nodes, len(runs), now, cluster.num_nodes * now / 3600, share, num_bytes, cluster.overhead_s)


def _check(by_key: Mapping[str, SimulatedRun], done: frozenset[str], cluster: Cluster) -> None:
    for run in by_key.values():
        asked = run.resources
        if asked.gpus > cluster.node_gpus:
            raise ValueError(
                f"--node-gpus {cluster.node_gpus:g}: a stage run asks for {asked.gpus:g} GPUs; expected at least as many on a node"
            )
        if asked.cpus > cluster.node_cpus and not asked.exclusive:
            raise ValueError(
                f"--node-cpus {cluster.node_cpus}: a stage run asks for {asked.cpus} CPUs; expected at least as many on a node"
            )
        if (there := cluster.num_nodes * num_fitting(asked, cluster.node_cpus, cluster.node_gpus)) < asked.workers:
            raise ValueError(
                f"--nodes {cluster.num_nodes}: a stage run has {asked.workers} workers of {asked.cpus} CPUs and {asked.gpus:g} GPUs each; "
                f"there is room for {there}"
            )
        if missing := [key for key in run.inputs if key not in by_key and key not in done]:
            raise ValueError(f"stage run {run.key} reads {missing[0]}, which nothing makes")
