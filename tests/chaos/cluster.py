"""A Ray cluster of three nodes on this machine, whose parts can be killed one by one."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil

MEMORY = 80 * 2**20


class ThreeNodes:
    """A head and two further nodes with one CPU each. `preemptible` is a node that `ray start --block` holds, as on a spot machine.

    Every process started here is ended by `stop`, and no other one.
    """

    def __init__(self, environment: dict[str, str]) -> None:
        os.environ.update(environment)
        self.start()

    def start(self) -> None:
        from ray.cluster_utils import Cluster

        node = {"num_cpus": 1, "object_store_memory": MEMORY}
        self._before = _descendants()
        self._cluster = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
        self.address: str = self._cluster.address
        self.worker = self._cluster.add_node(**node)
        self._preemptible: subprocess.Popen[bytes] | None = None
        self.add_preemptible()

    def add_worker(self) -> None:
        self.worker = self._cluster.add_node(num_cpus=1, object_store_memory=MEMORY)

    def kill_worker_node(self) -> None:
        """SIGKILL to everything that runs on the second node, at once, as when its power fails."""
        node = self.worker
        raylet = node.all_processes["raylet"][0].process
        doomed = [raylet, *psutil.Process(raylet.pid).children(recursive=True)]
        for process in doomed:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.kill()
        self._cluster.remove_node(node, allow_graceful=False)

    def add_preemptible(self) -> None:
        command = [sys.executable, "-m", "ray.scripts.scripts", "start", "--block", f"--address={self.address}", "--num-cpus=1"]
        command += [f"--object-store-memory={MEMORY}", "--disable-usage-stats"]
        environment = {**os.environ, "RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "90"}
        num_nodes = self.num_nodes()
        self._preemptible = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        wait_for(lambda: self.num_nodes() > num_nodes, "a third node")

    def preempt(self) -> None:
        """SIGTERM to the third node: its time is running out."""
        assert self._preemptible is not None
        self._preemptible.terminate()

    def wait_preempted(self) -> None:
        assert self._preemptible is not None
        self._preemptible.wait(150)

    def runs_on_preemptible(self, pid: int) -> bool:
        """Whether a worker process belongs to the third node."""
        assert self._preemptible is not None
        with contextlib.suppress(psutil.NoSuchProcess):
            return self._preemptible.pid in [parent.pid for parent in psutil.Process(pid).parents()]
        return False

    def num_nodes(self) -> int:
        from ray._private.state import GlobalState
        from ray._raylet import GcsClientOptions

        state = GlobalState()
        state._initialize_global_state(
            GcsClientOptions.create(self.address, None, allow_cluster_id_nil=True, fetch_cluster_id_if_nil=False)
        )
        try:
            return sum(node["Alive"] for node in state.node_table())
        finally:
            state.disconnect()

    def kill_head(self) -> None:
        """SIGKILL to everything: the head with the cluster's state, and the nodes that cannot live without it."""
        self.stop()

    def kill_head_alone(self) -> None:
        """SIGKILL to the head's own processes: cluster state, raylet, monitors. The other nodes and their workers live on."""
        for started in self._cluster.head_node.all_processes.values():
            for info in started:
                with contextlib.suppress(psutil.NoSuchProcess):
                    psutil.Process(info.process.pid).kill()

    def others_live(self) -> bool:
        """Whether the other nodes, the second and the spot one, are still there."""
        assert self._preemptible is not None
        raylet = psutil.Process(self.worker.all_processes["raylet"][0].process.pid)
        return self._preemptible.poll() is None and raylet.is_running() and raylet.status() != psutil.STATUS_ZOMBIE

    def stop(self) -> None:
        for process in _descendants() - self._before:
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGKILL)
        with contextlib.suppress(Exception):
            self._cluster.shutdown()


def _descendants() -> set[psutil.Process]:
    return set(psutil.Process().children(recursive=True))


def wait_for(condition: Callable[[], object], what: str, limit_s: float = 120.0, alive: subprocess.Popen[str] | None = None) -> None:
    """Return when `condition` holds; fail if `alive` ends or the limit passes before."""
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, f"waited {limit_s:g} s for {what}"
        assert alive is None or alive.poll() is None, f"the driver ended before {what}: {Path(alive.args[-1]).name}"  # type: ignore[index]
        time.sleep(0.02)
