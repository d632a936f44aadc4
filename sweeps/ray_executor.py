"""Stage runs as tasks on a Ray cluster, each with resources of its own. With `submission`, the only importers of ray."""

from __future__ import annotations

import contextlib
import functools
import logging
import os
import signal
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from fffsweep.pipeline.lease import Claim
from fffsweep.pipeline.stage import Resources, StageRun
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.capacity import Capacity, Node
from fffsweep.sweeps.cluster_auth import use_token
from fffsweep.sweeps.executors import Event, Fault, attempt
from fffsweep.sweeps.ray_workers import on_workers
from fffsweep.sweeps.watchdog import guarded, leave_fate, take_fate

BENCH = {"role": "bench"}  # label of nodes that are kept for timings
NOT_BENCH = {name: f"!{value}" for name, value in BENCH.items()}
_NODES_S = 1.0  # how old the list of nodes may be
_PROGRESS_S = 0.25
_BEGUN_S = 0.2  # a run that is over sooner has no need to say that it began


class RayExecutor:
    """Each run a Ray task.

    Joins the cluster at `address`, or starts one on this machine. An exclusive run gets a node with the label role=bench to itself where
    there are such nodes, which then run nothing else; elsewhere it asks for all CPUs of a node, because Ray pins nothing and a timing
    must not share its node. A node that is being drained, as before a spot instance is taken back, has its runs save themselves.
    """

    def __init__(self, store: Store, stop_file: Path, address: str | None = None, claim: Claim | None = None) -> None:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        if address is not None:
            use_token()
        import ray

        self._ray = ray
        self._started_here = not ray.is_initialized()
        if self._started_here:
            local: dict[str, Any] = {
                "num_cpus": len(os.sched_getaffinity(0)),
                "object_store_memory": 100 * 2**20,
                "_memory": psutil.virtual_memory().total,  # as `check_fits_here` has it; by default Ray offers a part of what is free
                "include_dashboard": False,
            }
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
        self._store, self._stop_file, self._claim = store.resolved(), stop_file.resolve(), claim or Claim()
        here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        board: Any = ray.remote(_ProgressBoard)
        self._board_name = f"progress-{uuid.uuid4().hex}"  # not the actor itself: a task pays for every handle that it is sent
        self._board: Any = board.options(name=self._board_name, num_cpus=0, max_restarts=-1, scheduling_strategy=here).remote()
        self._task = ray.remote(max_retries=0)(_ray_attempt)
        self._running: dict[Any, str] = {}
        self._num_submitted = 0
        self._nodes: list[dict[str, Any]] = []
        self._nodes_at = 0.0
        self._next_progress = 0.0

    @property
    def capacity(self) -> Capacity:
        if time.monotonic() - self._nodes_at > _NODES_S or not self._nodes:
            self._nodes = [node for node in self._ray.nodes() if node["Alive"]]
            self._nodes_at = time.monotonic()
            self._have_drained_nodes_saved()
        return capacity_of(self._nodes)

    def submit(self, run: StageRun, resources: Resources) -> None:
        # Ray counts tasks by name and forgets none, in the driver and in its metrics: the stage's name, not the run's
        options: dict[str, Any] = {"num_cpus": resources.cpus, "num_gpus": resources.gpus, "name": run.stage}
        if resources.memory_bytes is not None:
            options["memory"] = resources.memory_bytes
        if resources.workers > 1:
            options |= {"num_cpus": 0, "num_gpus": 0}  # Ray Train reserves for the workers
        capacity = capacity_of(self._nodes)  # those that it was found to fit
        if resources.exclusive:
            options["num_cpus"] = capacity.whole_node_cpus(resources)
        if capacity.bench:
            options["label_selector"] = BENCH if resources.exclusive else NOT_BENCH
        self._num_submitted += 1
        claim = Claim(self._claim.name, self._claim.rank + self._num_submitted)
        task = self._task.options(**options).remote(run, resources, self._store, self._stop_file, self._board_name, claim)
        self._running[task] = run.key

    def wait(self, timeout_s: float) -> list[Event]:
        waiting = list(self._running)
        ready, _ = self._ray.wait(waiting, num_returns=1, timeout=timeout_s) if waiting else ([], [])
        if ready:
            ready, _ = self._ray.wait(waiting, num_returns=len(waiting), timeout=0)
        elif not waiting:
            time.sleep(timeout_s)  # nothing to wait for but the time of a retry
        progress: list[Event] = []
        if time.monotonic() >= self._next_progress:  # asking costs as much as a short run
            progress = self._take_progress()
            self._next_progress = time.monotonic() + _PROGRESS_S
        return [*progress, *(self._end_of(task) for task in ready)]

    def close(self) -> None:
        if self._started_here:
            self._ray.shutdown()

    def _take_progress(self) -> list[Event]:
        try:
            latest: dict[str, tuple[dict[str, Any], str]] = self._ray.get(self._board.take.remote(), timeout=10)
        except (self._ray.exceptions.RayError, TimeoutError):  # the board is being restarted; figures of progress can be missed
            return []
        return [Event(key, "progress", figures, worker) for key, (figures, worker) in latest.items()]

    def _end_of(self, task: Any) -> Event:
        key = self._running.pop(task)
        fate = fate_path(self._store, key)
        try:
            event: Event = self._ray.get(task)
        except self._ray.exceptions.RayError as error:
            why, message = take_fate(fate) or ("died", _first_line(error))
            return Event(key, "failed", fault=_FAULT_OF_FATE.get(why, "infrastructure"), message=message)
        return event

    def _have_drained_nodes_saved(self) -> None:
        for node_id in self._ray._private.state.state.get_draining_nodes():
            with contextlib.suppress(OSError):  # a full disk: asked again when the nodes are looked at again
                yield_path(self._stop_file, node_id).touch()


_FAULT_OF_FATE: dict[str, Fault] = {"memory": "code", "timeout": "infrastructure", "preempted": "preempted"}


def fate_path(store: Store, key: str) -> Path:
    """Where a run's end is told if its process does not live to tell it."""
    return store.work_path(key) / "fate.json"


def yield_path(stop_file: Path, node_id: str) -> Path:
    """Flag that asks the runs on one node to save themselves and make room."""
    return stop_file.with_name(f"yield-{node_id}")


def capacity_of(nodes: Sequence[dict[str, Any]]) -> Capacity:
    """What living nodes, as Ray lists them, have; those for timings stand apart unless there are no others."""
    bench = tuple(_node(node) for node in nodes if _is_bench(node))
    shared = tuple(_node(node) for node in nodes if not _is_bench(node))
    return Capacity(shared, bench) if shared else Capacity(bench)


def _node(node: dict[str, Any]) -> Node:
    there = node["Resources"]
    return Node(int(there.get("CPU", 0)), float(there.get("GPU", 0)), float(there.get("memory", 0)))


def _is_bench(node: dict[str, Any]) -> bool:
    return bool(BENCH.items() <= node.get("Labels", {}).items())


def _first_line(error: Exception) -> str:
    """What Ray says of a task that it lost, without its advice on how to debug one."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


class _ProgressBoard:
    """Actor that holds the latest figures of each run until the driver takes them."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[dict[str, Any], str]] = {}

    def put(self, key: str, figures: dict[str, Any], worker: str) -> None:
        self._latest[key] = (figures, worker)

    def take(self) -> dict[str, tuple[dict[str, Any], str]]:
        latest, self._latest = self._latest, {}
        return latest


@functools.lru_cache(maxsize=4)
def _board(name: str) -> Any:
    """The board of a driver, from within one of its tasks."""
    import ray

    return ray.get_actor(name)


def _ray_attempt(run: StageRun, resources: Resources, store: Store, stop_file: Path, board: str, claim: Claim) -> Event:
    """One run in a worker process. SIGTERM has it save itself, say so and end its process, as the sender wants."""
    import ray

    worker = f"{os.uname().nodename}:{os.getpid()}"

    def report(figures: dict[str, Any]) -> None:
        with contextlib.suppress(ValueError, ray.exceptions.RayError):  # no board to be found: figures of progress can be missed
            _board(board).put.remote(run.key, figures, worker)

    fate = fate_path(store, run.key)
    take_fate(fate)  # an earlier attempt's, which no driver lived to read
    drained = yield_path(stop_file, ray.get_runtime_context().get_node_id())
    terminated = threading.Event()
    shared = {}
    if resources.workers > 1:
        where = NOT_BENCH if any(map(_is_bench, ray.nodes())) else None
        shared["run_stage"] = on_workers(resources, where, functools.partial(yield_path, stop_file))
    begun = threading.Timer(_BEGUN_S, report, [{}])
    begun.daemon = True
    begun.start()
    before: Callable[..., Any] | int | None = signal.signal(signal.SIGTERM, lambda number, frame: terminated.set())
    try:
        with guarded(resources, fate):
            event = attempt(
                run,
                store,
                report,
                lambda: terminated.is_set() or stop_file.exists() or drained.exists(),
                "cuda" if resources.gpus else "cpu",
                claim,
                **shared,
            )
    finally:
        begun.cancel()
        signal.signal(signal.SIGTERM, before)
    if event.kind != "stopped" or stop_file.exists():
        return event
    if terminated.is_set():
        leave_fate(fate, "preempted", "its process was asked to end, and it saved itself")
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(5)
    why = "its node is being drained" if resources.workers == 1 else "one of its workers has to go"
    return Event(run.key, "failed", worker=worker, fault="preempted", message=f"{why}, and it saved itself")
