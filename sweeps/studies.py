"""The Optuna studies of one sweep: one of the trials that compete, and one of reference_dense where that is tuned.

There are none on a machine without Optuna, which runs grids; it is told of them where their results are imported.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any

from fffsweep.sweeps.backends import is_installed
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.space import REFERENCE, TrialSpec

if TYPE_CHECKING:
    from fffsweep.sweeps.optuna_study import OptunaStudy


def check_sampler(config: SweepConfig) -> None:
    """Raises ConfigError if the sampler is one of Optuna's and Optuna is not installed."""
    if config.sampler != "grid" and not is_installed("optuna"):
        raise ConfigError(f"sampler: {config.sampler}: optuna is not installed here; expected sampler: grid, or pip install optuna")


class Studies:
    """Knows which of our trials belong to which study, and under which parameters."""

    def __init__(self, config: SweepConfig, storage: str, say: Callable[[str], None]) -> None:
        self._config, self._storage, self._say = config, storage, say

    def connect(self) -> None:
        """Make sure of the storage, before a sweep rather than in it."""
        _ = self._competing

    def open(self, spec: TrialSpec) -> int | None:
        """Number of the Optuna trial for one of ours, None if it has none: controls that are not tuned have nothing to choose."""
        study = self._of(spec)
        if study is None:
            return None
        space = self._config.search.space if self._config.search is not None else {}
        drawn = f"-t{spec.id.rpartition('-t')[2]}" if spec.stratum == "" else None  # before its layout was known
        return study.open(spec.id, self._params(spec), space, {"layout": spec.layout}, drawn)

    def tell(self, spec: TrialSpec, metrics: Mapping[str, float], constraints: Mapping[str, float]) -> None:
        """Record the objective values of a finished trial, and how far it is beyond each constraint."""
        study = self._of(spec)
        if study is not None:
            study.tell(spec.id, [metrics[name] for name in self._config.objectives], constraints)

    def prune(self, spec: TrialSpec) -> None:
        """Record that a trial was stopped early."""
        study = self._of(spec)
        if study is not None:
            study.prune(spec.id)

    def fail(self, spec: TrialSpec) -> None:
        """Record that a trial failed."""
        study = self._of(spec)
        if study is not None:
            study.fail(spec.id)

    def values_of(self, spec: TrialSpec) -> list[float] | None:
        """Objective values told for a trial, None if there are none."""
        study = self._of(spec)
        return None if study is None else study.values_of(spec.id)

    def has_told(self, spec: TrialSpec, values: list[float]) -> bool:
        """Whether these objective values were told for a trial."""
        study = self._of(spec)
        return study is not None and study.has_told(spec.id, values)

    def of_stratum(self, stratum: str) -> OptunaStudy:
        """The study that draws for a stratum."""
        study = self._reference if stratum == REFERENCE else self._competing
        assert study is not None, "check_sampler is asked before a sweep"
        return study

    def _of(self, spec: TrialSpec) -> OptunaStudy | None:
        if spec.in_study and spec.layout is not None:
            return self._competing
        return self._reference if spec.stratum == REFERENCE else None

    def _params(self, spec: TrialSpec) -> dict[str, Any]:
        """Trees and depth where the grid fixes them, and what was searched."""
        shape = spec.model.feedforward.shape
        fixed = {"trees": shape.trees, "depth": shape.depth} if shape is not None and spec.stratum != "" else {}
        return {**fixed, **spec.point}

    @cached_property
    def _competing(self) -> OptunaStudy | None:
        return self._open_study(self._config.name)

    @cached_property
    def _reference(self) -> OptunaStudy | None:
        return self._open_study(f"{self._config.name} ({REFERENCE})")

    def _open_study(self, name: str) -> OptunaStudy | None:
        if not is_installed("optuna"):
            return None
        from fffsweep.sweeps.optuna_study import OptunaStudy

        seed = self._config.search.seed if self._config.search is not None else 0
        return OptunaStudy(self._storage, name, self._config.objectives, self._config.sampler, seed, self._say)
