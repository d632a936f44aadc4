"""Where stage runs are executed: in this process, or as tasks on a Ray cluster. The one importer of ray."""

from __future__ import annotations

import logging
import os
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

from fffsweep.pipeline.execute import KeyBusy, execute
from fffsweep.pipeline.stage import Resources, StageRun, StopRequested
from fffsweep.pipeline.store import DamagedArtifact, Store

EventKind = Literal["progress", "finished", "failed", "stopped"]
Fault = Literal["code", "infrastructure", "damaged"]


@dataclass(frozen=True)
class Event:
    """What became of a submitted run. `fault` says who is to blame for a failure: only infrastructure faults are worth another try."""

    key: str
    kind: EventKind
    progress: dict[str, Any] = field(default_factory=dict)
    worker: str | None = None
    fault: Fault | None = None
    message: str = ""
    damaged_key: str | None = None


class Executor(Protocol):
    """Runs stages somewhere. Used by one thread."""

    num_cpus: int

    def submit(self, run: StageRun, resources: Resources) -> None:
        """Start `run` as soon as its resources are free."""
        ...

    def wait(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; returns early when something does."""
        ...

    def close(self) -> None:
        """Release everything; what still runs is abandoned to its checkpoints."""
        ...


def attempt(run: StageRun, store: Store, report: Callable[[dict[str, Any]], None], stop_file: Path, device: str = "cpu") -> Event:
    """Run one stage and say how it ended. Nothing but a process's death escapes."""
    worker = f"{os.uname().nodename}:{os.getpid()}"
    try:
        execute(run, store, report, stop_file.exists, device)
    except StopRequested:
        return Event(run.key, "stopped", worker=worker)
    except KeyBusy as error:
        return Event(run.key, "failed", worker=worker, fault="infrastructure", message=str(error))
    except DamagedArtifact as error:
        return Event(run.key, "failed", worker=worker, fault="damaged", message=str(error), damaged_key=error.key)
    except (ConnectionError, TimeoutError, BlockingIOError) as error:
        return Event(run.key, "failed", worker=worker, fault="infrastructure", message=f"{type(error).__name__}: {error}")
    except Exception:
        return Event(run.key, "failed", worker=worker, fault="code", message=traceback.format_exc())
    return Event(run.key, "finished", worker=worker)


class InlineExecutor:
    """One run after another in this process: a laptop, an HPC node, an air-gapped GPU box."""

    def __init__(self, store: Store, stop_file: Path, on_progress: Callable[[Event], None], device: str = "cpu") -> None:
        self.num_cpus = len(os.sched_getaffinity(0))
        self._store, self._stop_file, self._on_progress, self._device = store, stop_file, on_progress, device
        self._queue: deque[StageRun] = deque()

    def submit(self, run: StageRun, resources: Resources) -> None:
        self._queue.append(run)

    def wait(self, timeout_s: float) -> list[Event]:
        if not self._queue:
            return []
        run = self._queue.popleft()
        worker = f"{os.uname().nodename}:{os.getpid()}"
        self._on_progress(Event(run.key, "progress", worker=worker))
        report = lambda figures: self._on_progress(Event(run.key, "progress", figures, worker))  # noqa: E731
        return [attempt(run, self._store, report, self._stop_file, self._device)]

    def close(self) -> None:
        self._queue.clear()


class RayExecutor:
    """Each run a Ray task with resources of its own.

    Joins the cluster at `address`, or starts one on this machine. An exclusive run asks for all CPUs of a node, because Ray pins
    nothing and a timing must not share its node.
    """

    def __init__(self, store: Store, stop_file: Path, address: str | None = None, num_cpus: int | None = None) -> None:
        os.environ.setdefault("RAY_ENABLE_UV_RUN_RUNTIME_ENV", "0")
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
        import ray

        self._ray = ray
        self._started_here = not ray.is_initialized()
        if self._started_here:
            local: dict[str, Any] = {
                "num_cpus": num_cpus or len(os.sched_getaffinity(0)),
                "object_store_memory": 100 * 2**20,
                "include_dashboard": False,
            }
            ray.init(address=address or "local", log_to_driver=False, logging_level=logging.ERROR, **({} if address else local))
        self._node_cpus = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes() if node["Alive"])
        self.num_cpus = int(ray.cluster_resources()["CPU"])
        self._store, self._stop_file = store, stop_file
        self._progress: Any = ray.remote(num_cpus=0)(_ProgressBoard).remote()
        self._task = ray.remote(max_retries=0)(_ray_attempt)
        self._running: dict[Any, str] = {}

    def submit(self, run: StageRun, resources: Resources) -> None:
        cpus = self._node_cpus if resources.exclusive else resources.cpus
        task = self._task.options(num_cpus=cpus, num_gpus=resources.gpus, name=f"{run.stage}:{run.key[:8]}")
        self._running[task.remote(run, self._store.root.resolve(), self._stop_file.resolve(), self._progress)] = run.key

    def wait(self, timeout_s: float) -> list[Event]:
        ready, _ = self._ray.wait(list(self._running), num_returns=1, timeout=timeout_s) if self._running else ([], [])
        latest: dict[str, tuple[dict[str, Any], str]] = self._ray.get(self._progress.take.remote())
        events = [Event(key, "progress", figures, worker) for key, (figures, worker) in latest.items()]
        for task in ready:
            key = self._running.pop(task)
            try:
                events.append(self._ray.get(task))
            except self._ray.exceptions.RayError as error:
                events.append(Event(key, "failed", fault="infrastructure", message=f"{type(error).__name__}: {error}"))
        return events

    def close(self) -> None:
        if self._started_here:
            self._ray.shutdown()


class _ProgressBoard:
    """Actor that holds the latest figures of each run until the driver takes them."""

    def __init__(self) -> None:
        self._latest: dict[str, tuple[dict[str, Any], str]] = {}

    def put(self, key: str, figures: dict[str, Any], worker: str) -> None:
        self._latest[key] = (figures, worker)

    def take(self) -> dict[str, tuple[dict[str, Any], str]]:
        latest, self._latest = self._latest, {}
        return latest


def _ray_attempt(run: StageRun, store_root: Path, stop_file: Path, board: Any) -> Event:
    worker = f"{os.uname().nodename}:{os.getpid()}"
    board.put.remote(run.key, {}, worker)
    return attempt(run, Store(store_root), lambda figures: board.put.remote(run.key, figures, worker), stop_file)
