"""What each page of the web app shows: from a study and the page's query to the template's variables. Knows nothing of HTTP."""

from __future__ import annotations

import math
import shlex
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

from fffsweep.dashboards import depth_figures, figures, formats, paper, picking, report, speed_figures, tables, training_figures
from fffsweep.dashboards.figures import Figure
from fffsweep.dashboards.picks import picks
from fffsweep.dashboards.queries import GPU_REL_TIME, QUALITY, REL_TIME, StudyView
from fffsweep.dashboards.summary import number, rows, used_columns, with_interval
from fffsweep.dashboards.trial import FINISHED, TrialView
from fffsweep.dashboards.verdicts import KEPT, claims, decidability
from fffsweep.sweeps import statistics as stats
from fffsweep.sweeps.constraints import RETENTION, parse_constraint

PAGE_ROWS = 100
MARKS = {"complete": "✓", "reused": "=", "running": "▶", "failed": "✗", "waiting": "·", "pruned": "✂", "paused": "⏸"}
_SPEED = (REL_TIME, "ff/cpu/ns_per_token", GPU_REL_TIME, "ff/gpu/ns_per_token")
MOST_COMPARED = 6


@dataclass(frozen=True)
class Query:
    """A page's query: the values of each name, in order."""

    values: dict[str, list[str]] = field(default_factory=dict)

    def get(self, name: str, default: str = "") -> str:
        return (self.values.get(name) or [default])[-1]

    def all(self, name: str) -> list[str]:
        """The values that say something: an empty field of a form is none."""
        return [value for value in self.values.get(name, []) if value]

    def number(self, name: str, default: float) -> float:
        """A finite number; the default where the text is none."""
        try:
            given = float(self.get(name))
        except ValueError:
            return default
        return given if math.isfinite(given) else default

    def text(self, **changes: object) -> str:
        """As a URL's query, with some values replaced."""
        merged = {**self.values, **{name: [str(value)] for name, value in changes.items()}}
        return urlencode([(name, value) for name, values in merged.items() for value in values])

    def without(self, *names: str) -> str:
        """As a URL's query, with some names left out."""
        return Query({name: values for name, values in self.values.items() if name not in names}).text()


Context = dict[str, Any]


def study_page(view: StudyView, query: Query) -> Context:
    """Stage grid, what runs now, progress, the results so far."""
    wanted, text = query.get("state"), query.get("q")
    states = Counter(trial.state for trial in view.trials)
    chosen = [trial for trial in view.trials if (not wanted or trial.state == wanted) and text.lower() in _text(trial)]
    chosen.sort(key=lambda trial: {"running": 0, "failed": 1}.get(trial.state, 2))
    page = max(0, min(int(query.number("page", 0)), (len(chosen) - 1) // PAGE_ROWS)) if chosen else 0
    part = chosen[page * PAGE_ROWS : (page + 1) * PAGE_ROWS]
    names = list(dict.fromkeys(stage["name"] for trial in view.trials[:50] for stage in trial.stages))
    running = [(trial, stage) for trial in view.trials for stage in trial.stages if stage["state"] == "running"]
    unique = {stage["key"]: (trial, stage) for trial, stage in running}
    table = rows(view, part)
    return {
        "states": states,
        "stage_names": names,
        "grid": [(trial, [_cell(trial, name) for name in names]) for trial in part],
        "running": list(unique.values())[:50],
        "num_found": len(chosen),
        "page_number": page + 1,
        "num_pages": (len(chosen) - 1) // PAGE_ROWS + 1 if chosen else 0,
        "columns": used_columns(table),
        "rows": table,
        "notes": formats.notes(view),
        "tiles": report.tiles(view),
        "events": view.events(12)[::-1],
        "picked": (picked := picking.shown(view)),
        "picking": any(pick["state"] == "running" for pick in picked),
    }


def _text(trial: TrialView) -> str:
    """What a trial is found by."""
    return f"{trial.id} {' '.join(trial.controls)} {' '.join(f'{name}={value}' for name, value in trial.params.items())}".lower()


def _cell(trial: TrialView, name: str) -> tuple[str, str, str]:
    """State, text and hint of one trial's runs of one stage."""
    own = [stage for stage in trial.stages if stage["name"] == name]
    states = Counter(stage["state"] for stage in own)
    done = states["complete"] + states["reused"]
    leading = ("failed", "running", "waiting") if done < len(own) else ("complete",)
    state = next((state for state in leading if states[state]), "waiting")
    state = "reused" if own and states["reused"] == len(own) else state
    mark = MARKS[state]
    retried = max((stage["attempts"] for stage in own), default=0)
    text = mark if len(own) == 1 else f"{mark} {done}/{len(own)}"
    hint = ", ".join(f"{count} {state}" for state, count in states.items())
    return state, text + (f" ↻{retried}" if retried > 1 else ""), f"{name} of {trial.id}: {hint or 'none'}"


def objective_choices(view: StudyView) -> list[str]:
    """Metrics that may be an axis: those that every finished trial of the study has."""

    def found() -> list[str]:
        own = [trial.averages.keys() for trial in view.finished if trial.in_study]
        shared = set(own[0]).intersection(*own[1:]) if own else set(view.objectives)
        return sorted(shared, key=lambda name: (name not in view.objectives, not name.startswith(("quality", "task", "glue")), name))

    return view.memo("choices", found)


def asked_share(view: StudyView) -> float:
    """Share of the dense quality to be kept: the study's own constraint, where it has one."""
    asked = [each.bound for each in map(parse_constraint, view.constraints) if each.metric == RETENTION and each.at_least]
    return max(asked, default=KEPT)


def pareto_page(view: StudyView, query: Query) -> Context:
    """Front over chosen objectives and filters, and the picks under a constraint."""
    choices = objective_choices(view)
    x, y, third = figures.pareto_axes(view)
    x, y = (given if (given := query.get(name)) in choices else default for name, default in (("x", x), ("y", y)))
    third = query.get("z") if query.get("z") in choices else (third if "z" not in query.values else None)
    shares = query.number("kept", 100 * asked_share(view))
    low, high, widest = query.number("depth_min", 0), query.number("depth_max", 30), query.number("active_max", math.inf)
    text = query.get("q").lower()
    kept = [
        trial
        for trial in view.finished
        if trial.in_study
        and low <= (trial.shape.depth if trial.shape else 0) <= high
        and trial.active_width <= widest
        and text in _text(trial)
    ]
    key = ("pareto", x, y, third, low, high, widest, text)
    shown = view.memo(key, lambda: figures.pareto(view, x, y, third, kept)) if view.finished else None
    volume = view.memo("hypervolume", lambda: figures.hypervolume_over_time(view))
    names = [name for name in (y, x, third) if name]
    members = view.front(
        names, [figures.maximised(name, view.objectives) for name in names], [t for t in kept if all(n in t.metrics for n in names)]
    )
    table = rows(view, [entry.trial for entry in members[:PAGE_ROWS]])
    return {
        "choices": choices,
        "x": x,
        "y": y,
        "z": third or "",
        "kept": shares,
        "depth_min": int(low),
        "depth_max": int(high),
        "active_max": "" if math.isinf(widest) else int(widest),
        "num_kept": len(kept),
        "num_competing": sum(trial.in_study for trial in view.finished),
        "deepest": max((trial.shape.depth for trial in view.trials if trial.shape), default=0),
        "figures": [figure for figure in (shown, volume) if figure is not None],
        "picks": picks(view, kept, shares / 100),
        "columns": used_columns(table),
        "rows": table,
        "notes": formats.notes(view),
    }


def depth_page(view: StudyView, query: Query) -> Context:
    """The project's question in figures, and the tasks in the paper's columns."""

    def drawn() -> list[Figure]:
        if not view.finished:
            return []
        found = [
            depth_figures.quality_by_depth(view),
            depth_figures.quality_by_active_width(view),
            depth_figures.loss_by_active_width(view),
            *speed_figures.speedups(view),
            depth_figures.retention_by_depth(view),
        ]
        return [figure for figure in found if figure is not None and figure.spec["data"]]

    columns = [name for name in paper.TASK_COLUMNS if name in view.tasks]
    return {
        "figures": view.memo("depth", drawn),
        "claims": view.memo("claims", lambda: claims(view)),
        "decidable": decidability(view),
        "tasks": view.memo("tasks", lambda: tables.task_table(view, report.shown_trials(view))),
        "paper": tables.paper_table() if columns else None,
    }


def training_page(view: StudyView, query: Query) -> Context:
    """Curves of chosen trials, left turns and leaf usage."""
    asked = [view.trial(name) for name in dict.fromkeys(query.all("trial"))]
    chosen = (asked or training_figures.chosen_for_curves(view))[: training_figures.MOST_CURVES]
    offered = training_figures.columns(chosen) or list(training_figures.CURVES)
    value = query.get("value") if query.get("value") in offered else offered[0]
    replicate = int(query.number("replicate", -1))
    seed = replicate if 0 <= replicate < view.seeds_of_trials[1] else None
    found = [training_figures.curves(view, chosen, value, seed), training_figures.left_turns(chosen, seed or 0)]
    found += [training_figures.leaf_usage(trial, seed or 0) for trial in chosen]
    return {
        "chosen": chosen,
        "value": value,
        "curve_choices": {name: training_figures.CURVE_TITLES[name] for name in offered},
        "replicate": "" if seed is None else str(seed),
        "figures": [figure for figure in found if figure is not None],
        "most": training_figures.MOST_CURVES,
    }


def trial_page(view: StudyView, query: Query) -> Context:
    """Everything about one trial."""
    trial = view.trial(query.get("trial"))
    metrics = [
        (name, with_interval(trial.estimate(name), 4), ", ".join(number(value, 4) for value in trial.replicates(name).values()) or "–")
        for name in sorted(trial.averages, key=_importance)
    ]
    curve = training_figures.curves(view, [trial])
    leaves = [training_figures.leaf_usage(trial, replicate) for replicate in range(1)]
    chance = view.front_chances(tuple(view.objectives), tuple(view.maximize)).get(trial.id)
    found = {stage["label"]: m for stage in trial.stages if (m := trial.stage_manifest(stage["label"]))}
    artifacts = {label: sorted(manifest.artifacts) for label, manifest in found.items()}
    manifest = trial.training(0)
    picks_of_study = picking.shown(view)
    return {
        "trial": trial,
        "chance": number(chance),
        "facts": flat(trial.model),
        "metrics": metrics,
        "figures": [figure for figure in (curve, *leaves) if figure is not None],
        "artifacts": artifacts,
        "seeds": {label: manifest.run.seed for label, manifest in found.items()},
        "recipe": flat(manifest.run.config) if manifest else [],
        "finished_states": FINISHED,
        "commands": _commands(view, trial),
        "picks": [pick for pick in picks_of_study if pick["trial"] == trial.id],
        "picking": any(pick["state"] == "running" for pick in picks_of_study),
    }


def _commands(view: StudyView, trial: TrialView) -> dict[str, str]:
    """What a terminal is told about a trial, to be pasted as it is. Those of MLflow and Optuna are there where their files are."""
    where = "" if view.results == Path("results").resolve() else f" --results {shlex.quote(str(view.results))}"
    named = f"{shlex.quote(view.name)} {shlex.quote(trial.id)}"
    found = {"pick": f"fffsweep pick {named} --alias champion{where}", "export": f"fffsweep export {named} DIR{where}"}
    for tool, program in (("mlflow", "mlflow ui --backend-store-uri"), ("optuna", "optuna-dashboard")):
        database = view.results / f"{tool}.db"
        if database.exists():  # else a server was told
            found[tool] = f"{program} {shlex.quote(f'sqlite:///{database}')}"
    return found


def _importance(metric: str) -> tuple[int, str]:
    first = ("quality/", "glue/", "task/", *_SPEED, "mlm/", "distill/unexplained", "tree/")
    return next((place for place, start in enumerate(first) if metric.startswith(start)), len(first)), metric


def compare_page(view: StudyView, query: Query) -> Context:
    """Two to six trials beside each other: what differs in config, and in metrics against the first, with significance."""
    wanted = list(dict.fromkeys(query.all("trial")))[:MOST_COMPARED]
    chosen = [view.trial(name) for name in wanted]
    settings = [{**dict(flat(trial.params)), **dict(flat(trial.model))} for trial in chosen]
    names = list(dict.fromkeys(name for setting in settings for name in setting))
    differing = [(name, [s.get(name, "–") for s in settings]) for name in names if len({s.get(name) for s in settings}) > 1]
    return {
        "chosen": chosen,
        "differing": [[name, *values] for name, values in differing],
        "metrics": _compared(view, chosen),
        "most": MOST_COMPARED,
        "figures": [figure] if len(chosen) > 1 and (figure := training_figures.curves(view, chosen)) else [],
    }


def _compared(view: StudyView, chosen: Sequence[TrialView]) -> list[list[str]]:
    """Each main metric of each trial; for all but the first with the difference and its P value, Holm's over all of these."""
    if len(chosen) < 2:
        return []
    shared = set.intersection(*(set(trial.averages) for trial in chosen))
    main = ("quality/", "task/", "glue/", "mlm/validation", "distill/unexplained", "tree/")
    names = sorted(name for name in shared if name.startswith(main) or name in _SPEED)
    names = [name for name in names if "baseline" not in name]
    names.sort(key=lambda name: name != QUALITY)
    gaps = {(name, trial.id): view.difference(trial, chosen[0], name) for name in names for trial in chosen[1:]}
    tested = [(key, gap.p_value) for key, gap in gaps.items() if gap is not None and gap.p_value is not None]
    adjusted = dict(zip((key for key, _ in tested), stats.holm([p for _, p in tested]), strict=True))
    table = []
    for name in names:
        cells = [with_interval(chosen[0].estimate(name), 3)]
        for trial in chosen[1:]:
            gap, p_value = gaps[name, trial.id], adjusted.get((name, trial.id))
            cell = with_interval(trial.estimate(name), 3)
            if gap is not None:
                sign = "+" if gap.mean >= 0 else ""
                cell += f"; {sign}{number(gap.mean, 3)}" + (
                    "" if p_value is None else f", p {'< 0.001' if p_value < 0.001 else f'= {p_value:.3f}'}"
                )
            cells.append(cell + (" *" if p_value is not None and p_value < 0.05 else ""))
        table.append([name, *cells])
    return table


def flat(value: Any, prefix: str = "") -> list[tuple[str, str]]:
    """Nested settings as `a.b.c` and text."""
    if isinstance(value, dict):
        return [pair for name, entry in value.items() for pair in flat(entry, f"{prefix}.{name}" if prefix else str(name))]
    return [(prefix, "–" if value is None else str(value))]


PAGES: dict[str, Callable[[StudyView, Query], Context]] = {
    "study": study_page,
    "pareto": pareto_page,
    "depth": depth_page,
    "training": training_page,
    "trial": trial_page,
    "compare": compare_page,
}
