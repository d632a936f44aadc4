"""Which stage runs could be started now, found without looking at all of them: a study may have a hundred thousand."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterable, Iterator


class ReadyRuns:
    """Keys whose inputs are there, in the order in which they were added. Used by one thread.

    is_ready: whether a key waits and all that it reads is there. It is asked of a key only when something about that key or one
    that it reads has changed, and again before the key is offered, so that it may have stopped being so meanwhile.
    kind_of: what decides whether there is room for a key; where one of a kind finds none, no other does.
    """

    def __init__(self, is_ready: Callable[[str], bool], kind_of: Callable[[str], Hashable] = lambda key: None) -> None:
        self._is_ready, self._kind_of = is_ready, kind_of
        self._order: dict[str, int] = {}
        self._readers: dict[str, list[str]] = defaultdict(list)
        self._heaps: dict[Hashable, list[tuple[int, str]]] = defaultdict(list)
        self._queued: set[str] = set()

    def add(self, key: str, inputs: Iterable[str]) -> None:
        """Make a run known, and what it reads."""
        if key not in self._order:
            self._order[key] = len(self._order)
            for upstream in inputs:
                self._readers[upstream].append(key)
        self.touch(key)

    def touch(self, key: str) -> None:
        """Look at a key again: it waits (again)."""
        if key not in self._queued and self._is_ready(key):
            self._queued.add(key)
            heapq.heappush(self._heaps[self._kind_of(key)], (self._order[key], key))

    def done(self, key: str) -> None:
        """A key has its result: look at those that read it."""
        for reader in self._readers[key]:
            self.touch(reader)

    def take(self, accept: Callable[[str], bool | None]) -> Iterator[str]:
        """Keys that `accept` takes, in order; it says False to leave a key for later and None to leave all of its kind."""
        later: list[tuple[list[tuple[int, str]], tuple[int, str]]] = []
        heaps = list(self._heaps.values())
        while heaps := [heap for heap in heaps if heap]:
            heap = min(heaps)
            key = heap[0][1]
            if not self._is_ready(key):
                self._queued.discard(heapq.heappop(heap)[1])
                continue
            taken = accept(key)
            if taken is None:
                heaps.remove(heap)
                continue
            entry = heapq.heappop(heap)
            if taken:
                self._queued.discard(key)
                yield key
            else:
                later.append((heap, entry))
        for heap, entry in later:
            heapq.heappush(heap, entry)

    def __bool__(self) -> bool:
        """Whether some key is ready."""
        for heap in self._heaps.values():
            while heap and not self._is_ready(heap[0][1]):
                self._queued.discard(heapq.heappop(heap)[1])
        return any(self._heaps.values())
