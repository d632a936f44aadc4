"""Part of a sweep at a time: whole trials, one after the other, as far as a machine is lent."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Literal

from fffsweep.pipeline.machine import machine_fingerprint
from fffsweep.pipeline.stage import get_stage
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.book import DONE, ENDED, Book
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.config_errors import nearest_first
from fffsweep.sweeps.history import History
from fffsweep.sweeps.record import TrialState


@dataclass(frozen=True)
class InlineOptions:
    """What one call of the inline executor does, and where.

    device: of the stages that can run on a GPU; None follows the config's resources. only: names of trials; none for all.
    slice_minutes: no trial is begun that is not expected to end within so many minutes; None for no limit.
    """

    device: Literal["cuda", "cpu"] | None = None
    only: tuple[str, ...] = ()
    slice_minutes: float | None = None

    @property
    def is_part(self) -> bool:
        """Whether trials may be left for another call."""
        return bool(self.only) or self.slice_minutes is not None

    def check(self, config: SweepConfig, executor: str) -> None:
        """Raises ConfigError where these do not go with the executor, the config or this machine, ValueError where the config does not."""
        given = [
            option
            for option, value in (("--device", self.device), ("--only", self.only), ("--slice-minutes", self.slice_minutes))
            if value not in (None, ())
        ]
        if given and executor != "inline":
            raise ConfigError(f"{given[0]} with executor {executor}: expected the one that runs trials one by one; add --executor inline")
        if self.slice_minutes is not None and not 0 < self.slice_minutes < math.inf:
            raise ConfigError(f"--slice-minutes {self.slice_minutes:g}: expected more than 0")
        if self.is_part and config.early_stopping is not None:
            raise ConfigError(f"{given[-1]} with early_stopping: its trials advance together, not one by one; leave one of the two out")
        if config.stages.benchmark_gpu is not None:
            get_stage("benchmark_gpu").fingerprints(config.stages.benchmark_gpu)  # refuses a machine without a GPU
        if self.device == "cuda" and (missing := no_cuda()) is not None:
            raise ConfigError(f"--device cuda: {missing}; run where there is one, or give --device cpu")


def no_cuda() -> str | None:
    """Why this torch cannot compute on a GPU, None if it can."""
    import torch

    if torch.cuda.is_available():
        return None
    return f"torch {torch.__version__} finds no CUDA device" + ("" if torch.version.cuda else ", and is built without CUDA")


@dataclass(frozen=True)
class Remainder:
    """What a slice left for another call. hindrance: why not even one trial was begun, None if one was or all asked for have ended."""

    trials: tuple[str, ...]
    hindrance: str | None = None


class Slice:
    """Opens trials one after the other in the sweep's order, which has the reference first. Used by one thread.

    A trial's time is estimated from finished stage runs of this machine; one of which nothing is known is begun only as a slice's first.
    """

    def __init__(self, options: InlineOptions, store: Store, clock: Callable[[], float] = time.monotonic) -> None:
        self._options, self._store, self._clock = options, store, clock
        self._begun = clock()
        self.opened: list[str] = []
        self._under_way: str | None = None
        self.is_over = False
        self._hindrance: str | None = None

    def check(self, trials: Collection[str]) -> None:
        """Raises ConfigError for a name that no trial has."""
        for name in self._options.only:
            if name not in trials:
                raise ConfigError(f"--only {name}: no such trial; expected one of {nearest_first(name, trials)}")

    def next(self, book: Book) -> TrialState | None:
        """The trial to open now, None while one is under way and when nothing more is to be begun."""
        if self.is_over or (self._under_way is not None and book.trial(self._under_way).state not in ENDED):
            return None
        waiting = self._waiting(book)
        if not waiting or not self._fits(waiting[0], book):
            self.is_over = True
            return None
        self._under_way = waiting[0].plan.spec.id
        self.opened.append(self._under_way)
        return waiting[0]

    def changed(self, trial: str) -> None:
        """A trial has another plan, such as one with further seeds: it has to be opened again for that."""
        if trial == self._under_way:
            self._under_way = None

    def remainder(self, book: Book) -> Remainder:
        """What is left of the whole sweep."""
        left = tuple(trial.plan.spec.id for trial in book.trials if trial.state not in ENDED)
        return Remainder(left, self._hindrance)

    def _waiting(self, book: Book) -> list[TrialState]:
        only = self._options.only
        return [trial for trial in book.trials if trial.state not in ENDED and (not only or trial.plan.spec.id in only)]

    def _fits(self, trial: TrialState, book: Book) -> bool:
        if self._options.slice_minutes is None:
            return True
        expected = self._expected_s(trial, book)
        if expected is None:
            return not self.opened
        minutes, left_s = self._options.slice_minutes, 60 * self._options.slice_minutes - (self._clock() - self._begun)
        if expected <= left_s:
            return True
        if not self.opened:
            least = math.ceil((expected + 60 * minutes - left_s) / 6) / 10  # to a tenth of a minute
            self._hindrance = f"trial {trial.plan.spec.id} takes about {expected / 60:.1f} min: expected --slice-minutes {least:g} or more"
        return False

    def _expected_s(self, trial: TrialState, book: Book) -> float | None:
        history, total = History(self._store, machine_fingerprint()), 0.0
        for key in book.needed(trial):
            if book.state(key) in DONE:
                continue
            known = history.median(book.planned(key).run)
            if known is None:
                return None
            total += known[0]
        return total
