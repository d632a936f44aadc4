"""Two records of one study become one: trials made elsewhere join those made here, under other names where a name means two points."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from fffsweep.pipeline.store import Store
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.record import TrialState
from fffsweep.sweeps.search import FIXED_IN_ADVANCE, Point

Place = tuple[str, int]  # a searched trial's stratum, and its number within it
Decision = Mapping[str, Any]


@dataclass(frozen=True)
class Names:
    """What trials made elsewhere are called here. by_place: the same for searched ones, by their place there."""

    by_name: dict[str, str] = field(default_factory=dict)
    by_place: dict[Place, str] = field(default_factory=dict)

    @property
    def changed(self) -> dict[str, str]:
        """Names that are others here."""
        return {there: here for there, here in self.by_name.items() if there != here}


def names_here(config: SweepConfig, ours: list[TrialState], theirs: list[TrialState], decided: Iterable[Decision]) -> Names:
    """Names for `theirs` beside `ours`, whose decisions are `decided`; of a name that means two points ours keeps it.

    A sampler that learns draws by what its study holds, so two sites that begin one search have different points of equal names: those
    from there get the next numbers, and their share of the budget. Raises ConfigError where no other name can be given: a sampler
    that learns nothing has one point for each name.
    """
    names, known = Names(), {trial.plan.spec.id: trial.plan.spec for trial in ours}
    points: dict[Place, Point] = {(each["drawn"], each["index"]): each["point"] for each in decided if "drawn" in each}
    points |= {place: trial.plan.spec.point for trial in ours if (place := _place(trial)) is not None}
    used = points.keys() | {place for trial in theirs if (place := _place(trial)) is not None}
    different = []
    for trial in theirs:
        spec, place = trial.plan.spec, _place(trial)
        name = spec.id
        if place is None:
            if name in known and known[name].model != spec.model:
                different.append(name)
        elif points.get(place, spec.point) != spec.point:
            if config.sampler in FIXED_IN_ADVANCE:
                different.append(name)
                continue
            equal = next((each for each, point in points.items() if each[0] == place[0] and point == spec.point), None)
            here = equal or (place[0], 1 + max(index for stratum, index in used if stratum == place[0]))
            used |= {here}
            name = f"{name.rpartition('-t')[0]}-t{here[1]}"
        names.by_name[spec.id] = name
        if place is not None:
            names.by_place[place] = name
    if different:
        shown = ", ".join(different[:4]) + (f" and {len(different) - 4} more" if len(different) > 4 else "")
        raise ConfigError(
            f"study {config.name!r}: {shown} of there are other trials than those of these names here, so the two are two studies; nothing "
            "was imported: import them into another results folder (--results)"
        )
    return names


def merged(ours: list[TrialState], theirs: list[TrialState], names: Names, store: Store) -> tuple[list[TrialState], set[str]]:
    """The trials of both, and the names of those that are as they were made elsewhere.

    A trial of both stays as it is here, unless it is unfinished here and its result is there.
    """
    trials, taken = {trial.plan.spec.id: trial for trial in ours}, set()
    for trial in theirs:
        name = names.by_name[trial.plan.spec.id]
        known = trials.get(name)
        if known is not None:
            has_result = trial.plan.is_whole and store.has(trial.stages[-1].planned.run.key)
            if known.state in ("complete", "pruned") or not has_result:
                continue
        trial.number = None if known is None else known.number  # Optuna numbers its trials itself
        trial.plan = replace(trial.plan, spec=replace(trial.plan.spec, id=name))
        trials[name] = trial
        taken.add(name)
    return list(trials.values()), taken


def decisions_of(theirs: Iterable[Decision], ours: Collection[Decision], names: Names, taken: Collection[str]) -> Iterator[dict[str, Any]]:
    """Decisions made elsewhere that hold here too: of trials that were taken from there, and of those that none was made of here.

    That a further seed failed there is no reason to take seeds from a trial that stays as it is here.
    """
    drawn = {(each["drawn"], each["index"]) for each in ours if "drawn" in each}
    decided = {each["trial"] for each in ours if "trial" in each}
    for each in theirs:
        if "drawn" in each:
            name = names.by_place.get((each["drawn"], each["index"]))
            if name is not None and (place := (each["drawn"], _number(name))) not in drawn:
                drawn.add(place)
                yield {**each, "index": place[1]}
        elif (name := names.by_name.get(each.get("trial", ""))) is not None and (
            name in taken or (name not in decided and "seeds" not in each)
        ):
            yield {**each, "trial": name}


def _place(trial: TrialState) -> Place | None:
    """None if the trial is not searched."""
    spec = trial.plan.spec
    return None if spec.stratum is None else (spec.stratum, _number(spec.id))


def _number(name: str) -> int:
    return int(name.rpartition("-t")[2])
