"""What is still to be told to a server, on a thread of its own: the sweep goes on while the server is slow, or gone for a while."""

from __future__ import annotations

import contextlib
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Sequence
from functools import partial
from typing import Generic, Protocol, TypeVar

from fffsweep.pipeline.secrets import mask

T_contra = TypeVar("T_contra", contravariant=True)
T = TypeVar("T")
R = TypeVar("R")

_GATHER_S = 1.0  # to tell many at once, which is much cheaper than one by one
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0
_STUCK_S = 30.0  # beyond patience, for a call that neither returns nor fails
_LONG_CLOSE_S = 5.0


class Receiver(Protocol[T_contra]):
    """Who is told. Made on the backlog's thread and used there alone. batch: most items for one call of `write`."""

    batch: int

    def write(self, items: Sequence[T_contra]) -> None:
        """Take items in order. After an error all of them are written again, so what is there already must do no harm."""
        ...

    def close(self) -> None: ...


class Backlog(Generic[T]):
    """Items on their way to a receiver, in order, tried again with growing waits; after `close`, until patience with a lost one is out.

    make: opens the receiver, tried again like everything else. Items are functions, called on the thread: reading what is to be
    told costs the driver nothing. is_refused: whether an error says that an item will never be taken; it is left out then.
    say: told once when the server is lost, once when it is back.
    """

    def __init__(
        self, name: str, make: Callable[[], Receiver[T]], is_refused: Callable[[Exception], bool], say: Callable[[str], None]
    ) -> None:
        self._name, self._make, self._is_refused, self._say = name, make, is_refused, say
        self._items: deque[Callable[[], T | None]] = deque()
        self._changed = threading.Condition()
        self._closed_s: float | None = None
        self._patience_s = math.inf
        self._well_s = self._heard_s = time.monotonic()  # when a call last succeeded, and when one last returned or failed
        self._is_open = threading.Event()
        self.num_lost = 0
        self.error: Exception | None = None
        self._thread = threading.Thread(target=self._run, name=f"fffsweep-{name}", daemon=True)
        self._thread.start()

    def put(self, item: Callable[[], T | None]) -> None:
        """Queue an item; one that turns out None has nothing to tell any more."""
        with self._changed:
            self._items.append(item)
            self._changed.notify()

    def wait_open(self, timeout_s: float) -> bool:
        """Whether the receiver could be opened within this time; `error` says why not."""
        return self._is_open.wait(timeout_s)

    def close(self, patience_s: float = 60.0) -> int:
        """Tell the rest, however long that takes, unless nothing could be told for `patience_s`; how many items were never taken."""
        with self._changed:
            self._closed_s, self._patience_s = time.monotonic(), patience_s
            self._changed.notify()
        self._thread.join(_LONG_CLOSE_S)
        if self._thread.is_alive() and self.error is None:
            self._say(f"telling {self._name} of {len(self._items)} more")
        while self._thread.is_alive() and time.monotonic() - max(self._closed_s, self._heard_s) < patience_s + _STUCK_S:
            self._thread.join(0.2)
        return self.num_lost + len(self._items)

    def _run(self) -> None:
        receiver = self._insist(self._make)
        if receiver is None:
            return
        self._is_open.set()
        while batch := self._next(receiver.batch):
            if not self._deliver(receiver, batch):
                return
        with contextlib.suppress(Exception):  # whoever reads the server finds open runs; there is nothing more to lose here
            receiver.close()

    def _next(self, most: int) -> list[Callable[[], T | None]]:
        """The next items, at least one; none when closed and empty. They stay in the queue until delivered."""
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._closed_s is not None)
            self._changed.wait_for(lambda: len(self._items) >= most or self._closed_s is not None, _GATHER_S)
            return [self._items[index] for index in range(min(most, len(self._items)))]

    def _deliver(self, receiver: Receiver[T], batch: list[Callable[[], T | None]]) -> bool:
        """Whether there is reason to go on."""
        items: list[T] = []
        for make in batch:
            try:
                item = make()
                items += [] if item is None else [item]
            except Exception as error:
                self._lose(error)
        told = self._insist(lambda: self._write(receiver, items))
        if told:
            with self._changed:
                for _ in batch:
                    self._items.popleft()
        return bool(told)

    def _write(self, receiver: Receiver[T], items: list[T]) -> bool:
        try:
            receiver.write(items)
        except Exception as error:
            if not self._is_refused(error):
                raise
            if len(items) == 1:
                self._lose(error)
            else:
                for item in list(items):
                    self._write(receiver, [item])
                    items.remove(item)
        return True

    def _has_closed_since(self, closed_s: float | None) -> bool:
        return self._closed_s != closed_s

    def _lose(self, error: Exception) -> None:
        self.num_lost += 1
        self._say(f"{self._name} refuses an entry: {_first_line(error)}")

    def _insist(self, call: Callable[[], R]) -> R | None:
        """What `call` gives, None if patience ran out first."""
        wait_s = _FIRST_WAIT_S
        while True:
            try:
                result = call()
            except Exception as error:
                if self.error is None:
                    self._say(f"{self._name} cannot be reached ({_first_line(error)}); the sweep goes on and tells it later")
                self.error = error
                self._heard_s = time.monotonic()
            else:
                if self.error is not None:
                    self._say(f"{self._name} can be reached again")
                    self.error = None
                self._well_s = self._heard_s = time.monotonic()
                return result
            closed_s = self._closed_s
            left_s = math.inf if closed_s is None else max(closed_s, self._well_s) + self._patience_s - time.monotonic()
            if left_s <= 0:
                return None
            with self._changed:  # closing cuts a long wait short, once
                self._changed.wait_for(partial(self._has_closed_since, closed_s), min(wait_s, left_s))
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)


def _first_line(error: Exception) -> str:
    return mask(f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0][:200]}")
