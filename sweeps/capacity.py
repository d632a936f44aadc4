"""What there is to run on, node by node, and whether a run has room there beside others."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Collection
from dataclasses import dataclass

from fffsweep.pipeline.stage import Resources

_ROUNDING = 1e-9  # three thirds of a GPU are one


@dataclass(frozen=True)
class Node:
    """One machine of a cluster. memory_bytes: what it gives to runs that ask for memory."""

    cpus: int
    gpus: float = 0.0
    memory_bytes: float = math.inf

    def room(self, wanted: Resources) -> int:
        """How many workers of a run it holds while nothing else runs there; an exclusive run takes all of it, however many CPUs it has."""
        room = num_fitting(wanted, self.cpus, self.gpus)
        return int(min(room, self.memory_bytes / wanted.memory_bytes)) if wanted.memory_bytes else room


def num_fitting(wanted: Resources, cpus: int, gpus: float) -> int:
    """How many workers of a run so many CPUs and GPUs are enough for; an exclusive run takes all CPUs there are."""
    room = int(cpus > 0) if wanted.exclusive else cpus // wanted.cpus
    return min(room, int(gpus / wanted.gpus + _ROUNDING)) if wanted.gpus else room


@dataclass(frozen=True)
class Capacity:
    """What an executor has to run on. bench: nodes kept for exclusive runs, apart from `nodes`."""

    nodes: tuple[Node, ...]
    bench: tuple[Node, ...] = ()

    @property
    def cpus(self) -> int:
        """CPUs for all but timings on nodes of their own."""
        return sum(node.cpus for node in self.nodes)

    def fits(self, wanted: Resources) -> bool:
        """Whether `wanted` could be started if nothing else ran: each worker has to find room on one node."""
        return sum(node.room(wanted) for node in self._places(wanted)) >= wanted.workers

    def has_room(self, wanted: Resources, running: Collection[Resources]) -> bool:
        """Whether `wanted` can be started beside what is running."""
        places = self._places(wanted)
        needs = [self._needs(each) for each in (*running, wanted) if self._is_apart(each) == self._is_apart(wanted)]
        there = [(node.cpus, node.gpus, node.memory_bytes) for node in places]
        return self.fits(wanted) and all(
            sum(asked) <= sum(given) + _ROUNDING for asked, given in zip(zip(*needs, strict=True), zip(*there, strict=True), strict=True)
        )

    def whole_node_cpus(self, wanted: Resources) -> int:
        """CPUs that an exclusive run asks for: all of the largest node that can hold it, so that it is alone wherever it gets them."""
        return max((node.cpus for node in self._places(wanted) if node.room(wanted)), default=0)

    def lacking(self, wanted: Resources) -> str:
        """What to say of a run that does not fit."""
        places = self._places(wanted)
        kind = "node labelled role=bench" if self._is_apart(wanted) else "node"
        asked = _described(0 if wanted.exclusive else wanted.cpus, wanted.gpus, wanted.memory_bytes)
        if room := sum(node.room(wanted) for node in places):
            return f"waits for a larger cluster: it asks for {wanted.workers} workers of {asked} each, and there is room for {room}"
        if wanted.exclusive:
            asked = f"all of one {kind}" + (f" that has {asked}" if asked else "")
        else:
            asked = f"{asked} on one {kind}"
        has_memory = wanted.memory_bytes is not None
        kinds = Counter(_described(node.cpus, node.gpus, node.memory_bytes if has_memory else None) or "0 CPUs" for node in places)
        there = ", ".join(f"{number} with {described}" for described, number in kinds.most_common(4)) or "none"
        return f"waits for a larger cluster: it asks for {asked}; nodes there are: {there}"

    def _is_apart(self, wanted: Resources) -> bool:
        return wanted.exclusive and bool(self.bench)

    def _places(self, wanted: Resources) -> tuple[Node, ...]:
        return self.bench if self._is_apart(wanted) else self.nodes

    def _needs(self, wanted: Resources) -> tuple[float, float, float]:
        """CPUs, GPUs and bytes of memory that all workers of a run take."""
        cpus = self.whole_node_cpus(wanted) if wanted.exclusive else wanted.workers * wanted.cpus
        return cpus, wanted.workers * wanted.gpus, wanted.workers * (wanted.memory_bytes or 0)


def _described(cpus: int, gpus: float, memory_bytes: float | None) -> str:
    parts = [f"{cpus} CPU{'s' * (cpus != 1)}"] * bool(cpus) + [f"{gpus:g} GPU{'s' * (gpus != 1)}"] * bool(gpus)
    if memory_bytes is not None:
        parts.append(f"{memory_bytes / 1e9:.3g} GB of memory")
    return " and ".join(parts)
