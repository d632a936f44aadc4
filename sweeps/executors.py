"""Where stage runs are executed, and how their end is told; here in this process, in `ray_executor` as tasks on a cluster."""

from __future__ import annotations

import errno
import os
import shutil
import traceback
from collections import deque
from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

from fffsweep.pipeline.execute import KeyBusy, execute
from fffsweep.pipeline.lease import Claim, LeaseLost
from fffsweep.pipeline.machine import machine_fingerprint
from fffsweep.pipeline.secrets import mask
from fffsweep.pipeline.stage import Resources, StageRun, StopRequested
from fffsweep.pipeline.store import DamagedArtifact, Store
from fffsweep.sweeps.capacity import Capacity, Node
from fffsweep.sweeps.limits import ON_EITHER
from fffsweep.sweeps.watchdog import alarmed

EventKind = Literal["progress", "finished", "failed", "stopped"]
# code: the stage itself, trying again would do the same. infrastructure: what it runs on. damaged: a result that it reads.
# busy: another sweep runs the same key. preempted: its node is taken away, and it has saved itself.
Fault = Literal["code", "infrastructure", "damaged", "busy", "preempted"]

_MACHINE_ERRORS = frozenset(
    getattr(errno, name)
    for name in ("ENOSPC", "EDQUOT", "EIO", "EROFS", "ESTALE", "ETIMEDOUT", "EHOSTDOWN", "EHOSTUNREACH", "ENETUNREACH", "EREMOTEIO")
)
_FULL_BYTES = 2**20  # a disk with less free space than this is full


@dataclass(frozen=True)
class Event:
    """What became of a submitted run. `fault` says who is to blame for a failure: those of the code alone are final."""

    key: str
    kind: EventKind
    progress: dict[str, Any] = field(default_factory=dict)
    worker: str | None = None
    fault: Fault | None = None
    message: str = ""
    damaged_key: str | None = None


class Executor(Protocol):
    """Runs stages somewhere. Used by one thread."""

    @property
    def capacity(self) -> Capacity:
        """What there is now; nodes of a cluster come and go."""
        ...

    def submit(self, run: StageRun, resources: Resources) -> None:
        """Start `run` as soon as its resources are free."""
        ...

    def wait(self, timeout_s: float) -> list[Event]:
        """What happened since the last call; returns early when something does."""
        ...

    def close(self) -> None:
        """Release everything; what still runs is abandoned to its checkpoints."""
        ...


def attempt(
    run: StageRun,
    store: Store,
    report: Callable[[dict[str, Any]], None],
    stop_requested: Callable[[], bool],
    device: str = "cpu",
    claim: Claim | None = None,
    **more: Any,
) -> Event:
    """Run one stage and say how it ended. Nothing but a process's death escapes. `more` goes to `execute`."""
    worker = f"{os.uname().nodename}:{os.getpid()}"

    def failed(fault: Fault, message: str, damaged_key: str | None = None) -> Event:
        return Event(run.key, "failed", worker=worker, fault=fault, message=mask(message), damaged_key=damaged_key)

    planned = run.fingerprints.get("machine")
    if planned is not None and planned != machine_fingerprint():
        return failed(
            "code",
            f"{os.uname().nodename} is another machine ({machine_fingerprint()}) than the one this result was planned for ({planned}): "
            "times compare within one kind of machine; start the driver on such a one, and label one of its kind role=bench",
        )
    try:
        execute(run, store, report, stop_requested, device, claim, **more)
    except StopRequested:
        return Event(run.key, "stopped", worker=worker)
    except KeyBusy as error:
        return failed("busy", str(error))
    except LeaseLost as error:
        return failed("infrastructure", str(error))
    except DamagedArtifact as error:
        return failed("damaged", str(error), error.key)
    except Exception as error:
        if _holds(store, run.key):  # another attempt published while this one ran on: its result stands
            return Event(run.key, "finished", worker=worker)
        if of_the_machine(error) or _is_full(store):
            return failed("infrastructure", f"{type(error).__name__}: {error}")
        return failed("code", traceback.format_exc())
    return Event(run.key, "finished", worker=worker)


def of_the_machine(error: BaseException) -> bool:
    """Whether an error, or one that led to it, comes from disks or networks and not from what was asked of them."""
    return any(
        isinstance(each, ConnectionError | TimeoutError | BlockingIOError) or (isinstance(each, OSError) and each.errno in _MACHINE_ERRORS)
        for each in _chain(error)
    )


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _holds(store: Store, key: str) -> bool:
    try:
        return store.has(key)
    except OSError:
        return False


def _is_full(store: Store) -> bool:
    """Whether nothing can be written any more; libraries hide the operating system's reason when they fail to write."""
    try:
        return shutil.disk_usage(store.root).free < _FULL_BYTES
    except OSError:
        return True


class _OneByOne(Capacity):
    """A process that runs one stage at a time: that one has the machine, whatever it asks for."""

    def has_room(self, wanted: Resources, running: Collection[Resources]) -> bool:
        return not running

    def fits(self, wanted: Resources) -> bool:
        return True


class InlineExecutor:
    """One run after another in this process: a laptop, an HPC node, an air-gapped GPU box.

    device: "cuda" or "cpu" for the stages that can run on either; None for CUDA where a run's resources have a GPU.
    """

    def __init__(
        self,
        store: Store,
        stop_requested: Callable[[], bool],
        on_progress: Callable[[Event], None],
        claim: Claim | None = None,
        device: str | None = None,
    ) -> None:
        self.capacity: Capacity = _OneByOne((Node(len(os.sched_getaffinity(0))),))
        self._store, self._stop_requested, self._on_progress, self._claim = store, stop_requested, on_progress, claim
        self._device = device
        self._queue: deque[tuple[StageRun, Resources]] = deque()

    def submit(self, run: StageRun, resources: Resources) -> None:
        self._queue.append((run, resources))

    def wait(self, timeout_s: float) -> list[Event]:
        if not self._queue:
            return []
        run, resources = self._queue.popleft()
        worker = f"{os.uname().nodename}:{os.getpid()}"
        self._on_progress(Event(run.key, "progress", worker=worker))
        report = lambda figures: self._on_progress(Event(run.key, "progress", figures, worker))  # noqa: E731
        device = "cuda" if resources.gpus else "cpu"
        if self._device is not None and run.stage in ON_EITHER:
            device = self._device
        with alarmed(resources):
            return [attempt(run, self._store, report, self._stop_requested, device, self._claim)]

    def close(self) -> None:
        self._queue.clear()
