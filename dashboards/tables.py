"""Tables of single tasks, in the paper's columns, and the paper's own."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fffsweep.dashboards import paper
from fffsweep.dashboards.queries import StudyView
from fffsweep.dashboards.summary import ABSENT, number, with_interval
from fffsweep.dashboards.trial import TrialView

TITLES = {
    "rte": "RTE",
    "mrpc": "MRPC",
    "stsb": "STS-B",
    "sst2": "SST-2",
    "mnli": "MNLI",
    "qnli": "QNLI",
    "qqp": "QQP",
    "cola": "CoLA",
    "avg_without_cola": "avg without CoLA",
    "avg": "avg",
}
_AVERAGES = {"avg_without_cola": "glue/avg_without_cola", "avg": "glue/avg"}


def task_table(view: StudyView, trials: Sequence[TrialView]) -> dict[str, Any]:
    """Scores of single tasks on the validation splits, and their baselines: the paper's columns in its order, then the others.

    Its averages are there where every task of them was read whole.
    """
    finished = [trial for trial in trials if trial.metrics]
    columns = [name for name in paper.TASK_COLUMNS if name in view.tasks or _has_average(finished, name)]
    columns += [task for task in view.tasks if task not in columns]
    lines = [[trial.id, *(with_interval(trial.estimate(_metric(name))) for name in columns)] for trial in finished]
    if view.reference:
        lines.append(["majority/mean baseline", *(_baseline(view.reference, name) for name in columns)])
    return {"titles": ["trial", *(TITLES.get(name, name) for name in columns)], "rows": lines}


def _has_average(trials: Sequence[TrialView], name: str) -> bool:
    return name in _AVERAGES and any(_AVERAGES[name] in trial.metrics for trial in trials)


def _metric(column: str) -> str:
    return _AVERAGES.get(column, f"task/{column}/validation")


def _baseline(reference: TrialView, column: str) -> str:
    if column in _AVERAGES:
        return ABSENT
    value = reference.value(f"task/{column}/baseline_validation")
    return number(reference.value(f"task/{column}/baseline") if value is None else value)


def paper_table() -> dict[str, Any]:
    """Table 1 of the paper, as transcribed."""
    titles = ["model", "width", "active %", *(TITLES[name] for name in paper.TASK_COLUMNS)]
    lines = [
        [row.model, str(row.width), f"{row.active_percent:g}", *(number(row.scores.get(name), 1) for name in paper.TASK_COLUMNS)]
        for row in paper.table()
    ]
    return {"titles": titles, "rows": lines}


def paper_speed_table() -> dict[str, Any]:
    """Table 2 of the paper, as transcribed."""
    lines = paper.speedups()
    titles = [name for name in lines[0] if name != "note"]
    return {"titles": titles, "rows": [[line[name] or ABSENT for name in titles] for line in lines]}
