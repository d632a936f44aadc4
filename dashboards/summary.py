"""The results table as rows of text, the same in the terminal, in LaTeX and on a page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fffsweep.dashboards.queries import BASELINE, GPU_REL_TIME, QUALITY, QUALITY_VALIDATION, REL_TIME, StudyView
from fffsweep.dashboards.trial import Estimate, TrialView
from fffsweep.sweeps.statistics import CONFIDENCE, confidence_reached

ABSENT = "–"


@dataclass(frozen=True)
class Column:
    """One column: `title` as short as a terminal needs, `explanation` as long as a reader does."""

    key: str
    title: str
    explanation: str
    numeric: bool = True


@dataclass(frozen=True)
class Row:
    """One trial's cells, by column."""

    trial: TrialView
    cells: dict[str, str]
    on_front: bool


COLUMNS = (
    Column("front", "", "* marks the Pareto front of the study's objectives", numeric=False),
    Column("trial", "trial", "trees x depth, or the control", numeric=False),
    Column("role", "role", "control that the trial plays", numeric=False),
    Column("active", "active", "neurons used for one token, of those stored"),
    Column("quality", "quality", "quality/avg: mean of the tasks' primary metrics x 100, on the rows held out for selection"),
    Column("above", "above base", "quality above the majority/mean baseline"),
    Column("validation", "validation", "the same mean on the official validation splits, reported only"),
    Column("retention", "kept %", "quality over that of reference_dense on the same seeds, at matched training tokens"),
    Column("retention_time", "kept % (time)", "quality over that of reference_dense on the same seeds, at matched training time"),
    Column("rel_time", "rel. time", "ff/cpu/rel_time: time of the feedforward layer over the reference dense layer's"),
    Column("speedup", "speed-up", "1 / relative time"),
    Column("gpu_rel_time", "rel. time (GPU)", "ff/gpu/rel_time: the same on a GPU"),
    Column("gpu_speedup", "speed-up (GPU)", "1 / relative time on a GPU"),
    Column("limit", "limit", "speed-up that the number of multiplications would allow"),
    Column("p_front", "P(front)", "probability of being on the front, from the replicates"),
)
_KEYS = [column.key for column in COLUMNS]
_SHOWN = (QUALITY, REL_TIME, GPU_REL_TIME, "ff/active_width", "ff/width")  # metrics that have a column already


def number(value: float | None, digits: int = 2) -> str:
    """A figure for people; small ones keep their significant digits, large ones lose those after the point."""
    if value is None:
        return ABSENT
    if abs(value) >= 1000:
        return f"{value:,.0f}"
    return f"{value:.3g}" if 0 < abs(value) < 0.1 ** (digits - 1) else f"{value:.{digits}f}"


def with_interval(estimate: Estimate | None, digits: int = 2, scale: float = 1.0) -> str:
    """`80.12 [79.5, 81.0]`; the interval is left out where there is none."""
    if estimate is None:
        return ABSENT
    shown = number(scale * estimate.value, digits)
    if estimate.interval is None:
        return shown
    low, high = (number(scale * bound, digits) for bound in estimate.interval)
    return f"{shown} [{low}, {high}]"


def rows(view: StudyView, trials: Sequence[TrialView] | None = None) -> list[Row]:
    """Rows of `trials`, by default all of the study in its own order."""
    front = {entry.trial.id for entry in view.front()}
    chances = view.front_chances(tuple(view.objectives), tuple(view.maximize))
    return [_row(view, trial, front, chances) for trial in (view.trials if trials is None else trials)]


def _row(view: StudyView, trial: TrialView, front: set[str], chances: dict[str, float]) -> Row:
    cells = {
        "front": "*" if trial.id in front else "",
        "trial": trial.id,
        "role": ", ".join(role for role in trial.controls if role != trial.id),
        "active": f"{trial.active_width} of {trial.width}" if trial.width else "0",
    }
    others = [name for name in view.objectives if name not in _SHOWN]
    if not trial.metrics:
        state = trial.state if trial.error is None else f"{trial.state}: {trial.error}"
        return Row(trial, {**cells, "quality": state, **{key: "" for key in (*_KEYS, *others) if key not in (*cells, "quality")}}, False)
    quality, baseline = trial.value(QUALITY), trial.value(BASELINE[QUALITY])
    cells |= {
        "quality": with_interval(trial.estimate(QUALITY)),
        "above": ABSENT if quality is None or baseline is None else f"{quality - baseline:+.2f}",
        "validation": with_interval(trial.estimate(QUALITY_VALIDATION)),
        "retention": ABSENT if view.matches_time else with_interval(view.retention(trial), 1, 100),
        "retention_time": with_interval(view.retention(trial), 1, 100) if view.matches_time else ABSENT,
        "limit": number(view.flop_limit(trial), 1),
        "p_front": number(chances.get(trial.id)),
    }
    for metric, device in ((REL_TIME, ""), (GPU_REL_TIME, "gpu_")):
        rel_time = trial.value(metric)
        cells[f"{device}rel_time"] = with_interval(trial.estimate(metric), 3) if rel_time != 0 else "no layer"
        cells[f"{device}speedup"] = f"{1 / rel_time:.2f}x" if rel_time else ABSENT
    cells |= {name: with_interval(trial.estimate(name), 3) for name in others}
    return Row(trial, cells, trial.id in front)


def used_columns(shown: Sequence[Row]) -> list[Column]:
    """Columns in which some row says something, and last the study's objectives that none of `COLUMNS` shows, under their names."""
    others = dict.fromkeys(name for row in shown for name in row.cells if name not in _KEYS)
    columns = [*COLUMNS, *(Column(name, name, f"{name}: an objective of the study") for name in others)]
    return [column for column in columns if any(row.cells[column.key] not in ("", ABSENT) for row in shown)]


def interval_note(view: StudyView) -> str:
    """What the brackets mean in this study."""
    count, most = view.seeds_of_trials
    if most > count:
        said = f"[low, high]: 95 % bootstrap interval over the replicates (pretraining seeds) of a trial, {count} to {most}, paired by seed"
        few = [n for n in range(max(count, 2), most + 1) if confidence_reached(n) < CONFIDENCE]
        if few:
            said += f"; {' and '.join(map(str, few))} can carry {' and '.join(f'{100 * confidence_reached(n):.0f}' for n in few)} % at most"
        return f"{said}; a trial with one has no interval, and P(front) needs two of every trial." if count < 2 else f"{said}."
    if count < 2:
        return "One replicate (pretraining seed): no intervals and no probability of being on the front. Set seeds.pretrain to 2 or more."
    reached = confidence_reached(count)
    note = f"[low, high]: 95 % bootstrap interval over {count} replicates (pretraining seeds), paired by seed"
    return f"{note}." if reached >= CONFIDENCE else f"{note}; so few can carry {100 * reached:.0f} % at most."
