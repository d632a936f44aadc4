"""Which trial to take: the fastest that keeps enough quality, and the knee of the front, with how sure that is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fffsweep.dashboards.queries import QUALITY, StudyView
from fffsweep.dashboards.summary import number
from fffsweep.dashboards.trial import TrialView
from fffsweep.sweeps.constraints import RETENTION
from fffsweep.sweeps.pareto import knee, pick


@dataclass(frozen=True)
class Pick:
    """A choice and what is known for it; `trial` is None where nothing satisfies it."""

    name: str
    trial: TrialView | None
    why: str


def picks(view: StudyView, trials: Sequence[TrialView], share: float) -> list[Pick]:
    """The fastest of `trials` that keeps `share` of the dense quality on the same seeds, the best quality, and the knee.

    All of them keep the study's constraints, save that `share` takes the place of the one on kept quality.
    """
    timed = [trial for trial in trials if QUALITY in trial.metrics and trial.metrics.get(view.rel_time, 0) > 0 and _is_allowed(view, trial)]
    if not timed or view.reference is None:
        return []
    enough = [trial for trial in timed if (kept := view.retention(trial)) and kept.value >= share]
    keeping = [trial for trial in timed if not view.violated(trial)]
    fastest = pick(_values(view, enough), [True, False], 1) if enough else None
    best = pick(_values(view, timed), [True, False], 0)
    bend = knee(_values(view, keeping), [True, False], log=[False, True]) if keeping else None
    name = f"Fastest that keeps {100 * share:g} % of the dense quality"
    none = "no trial keeps so much on the seeds that it shares with the reference; lower the share, or widen the filters"
    return [
        _pick(view, name, enough, fastest, share, none),
        _pick(view, "Best quality", timed, best, share, "nothing to choose from"),
        _pick(view, "Knee of the front", keeping, bend, share, "the front has too few trials to have a knee, or none stands out"),
    ]


def _values(view: StudyView, trials: Sequence[TrialView]) -> list[list[float]]:
    return [[trial.metrics[QUALITY], trial.metrics[view.rel_time]] for trial in trials]


def _is_allowed(view: StudyView, trial: TrialView) -> bool:
    return all(text.startswith(RETENTION) for text in view.violated(trial))


def _pick(view: StudyView, name: str, trials: Sequence[TrialView], index: int | None, share: float, otherwise: str) -> Pick:
    if index is None:
        return Pick(name, None, otherwise)
    trial = trials[index]
    kept = view.retention(trial)
    said = [f"quality {number(trial.metrics[QUALITY])}" + (f" ({100 * kept.value:.1f} % of dense)" if kept else "")]
    said.append(f"layer {1 / trial.metrics[view.rel_time]:.2f}x as fast as the dense reference{view.where_timed}")
    chance = view.front_chances(tuple(view.objectives), tuple(view.maximize)).get(trial.id)
    holds = view.chance_kept(trial, share)
    if chance is None or holds is None:
        few = "one replicate" if trial.num_replicates < 2 else "fewer than two replicates in common with every other trial"
        said.append(f"{few}: how sure this is cannot be told")
    else:
        said += [f"probability of being on the front {chance:.2f}", f"of keeping {100 * share:g} % {holds:.2f}"]
    return Pick(name, trial, "; ".join(said))
