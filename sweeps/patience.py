"""What disks and networks refuse a driver now, they may take later: it waits, and says for what."""

from __future__ import annotations

import contextlib
import copy
import functools
import time
from collections.abc import Callable, Iterator
from typing import ParamSpec, TypeVar

from fffsweep.pipeline.secrets import mask
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.executors import of_the_machine

P = ParamSpec("P")
R = TypeVar("R")
_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.5, 10.0


class Patience:
    """Of one driver. `say` is told once when something is refused, however often it is tried. Errors of the code are raised at once."""

    def __init__(self, say: Callable[[str], None]) -> None:
        self._say = say
        self._refused = False

    def insist(self, what: str, call: Callable[P, R], *arguments: P.args, **named: P.kwargs) -> R:
        """What `call` gives or raises, tried again with growing waits for as long as it takes: without it there is no going on."""
        wait_s, lost = _FIRST_WAIT_S, False
        while True:
            refused = False
            try:
                return call(*arguments, **named)
            except OSError as error:
                if not of_the_machine(error):
                    raise
                refused = True
                if not lost:
                    self._say(mask(f"{what}: {error}; the sweep waits for it"))
            finally:
                if lost and not refused:
                    self._say(f"{what}: it answers again")
            lost = True
            time.sleep(wait_s)
            wait_s = min(2 * wait_s, _LONGEST_WAIT_S)

    @contextlib.contextmanager
    def tolerating(self) -> Iterator[None]:
        """Go on while the results folder refuses the record: it is written again and again, and the manifests are the truth."""
        try:
            yield
        except OSError as error:
            if not of_the_machine(error):
                raise
            if not self._refused:
                self._say(f"results folder: {error}; the record of this study waits until it can be written")
            self._refused = True
        else:
            self._refused = False


def patient(store: Store, patience: Patience) -> Store:
    """The store as a driver asks it: each answer is insisted on."""
    asked = copy.copy(store)
    for name in ("has", "get", "read", "forget"):
        setattr(asked, name, functools.partial(patience.insist, "result store", getattr(store, name)))
    asked.keys = lambda: iter(patience.insist("result store", lambda: list(store.keys())))  # type: ignore[method-assign]
    return asked
