"""Figures as plain plotly specifications, with the rows they were drawn from. Colours are names (`@front`) for the page's theme to fill in.

No plotly is imported: a specification is a dict that plotly.js draws, so that a page costs milliseconds.
"""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from fffsweep.dashboards import paper
from fffsweep.dashboards.queries import GPU_REL_TIME, QUALITY, QUALITY_VALIDATION, REL_TIME, StudyView
from fffsweep.dashboards.summary import number, with_interval
from fffsweep.dashboards.trial import TrialView
from fffsweep.sweeps.pareto import front as non_dominated
from fffsweep.sweeps.pareto import hypervolume

Spec = dict[str, Any]

# Okabe & Ito's palette; the second of each pair is for dark backgrounds. Every role has its own marker too.
COLOURS = {
    "layout": ("#0072B2", "#56B4E9"),
    "front": ("#D55E00", "#FF8F52"),
    "reference": ("#1A1A1A", "#FFFFFF"),
    "none": ("#6B6B6B", "#B0B0B0"),
    "dense_active": ("#007A5A", "#2BC49A"),
    "random_routing": ("#A8497F", "#E9A6CB"),
    "unchanged": ("#2A9BD6", "#9AD4F5"),
    "infeasible": ("#6B6B6B", "#B0B0B0"),
    "paper": ("#9A6700", "#F0B84A"),
    "series0": ("#0072B2", "#56B4E9"),
    "series1": ("#D55E00", "#FF8F52"),
    "series2": ("#007A5A", "#2BC49A"),
    "series3": ("#A8497F", "#E9A6CB"),
    "series4": ("#9A6700", "#F0B84A"),
    "series5": ("#1A1A1A", "#FFFFFF"),
    "series6": ("#2A9BD6", "#9AD4F5"),
    "series7": ("#6B6B6B", "#B0B0B0"),
}
MARKERS = {
    "layout": "circle",
    "front": "circle",
    "reference": "square",
    "none": "hexagon",
    "dense_active": "diamond",
    "random_routing": "triangle-up",
    "unchanged": "pentagon",
    "infeasible": "x",
    "paper": "star-open",
}
NAMES = {
    "layout": "layouts",
    "front": "Pareto front",
    "reference": "reference_dense",
    "none": "none (no feedforward)",
    "dense_active": "dense_active",
    "random_routing": "random_routing",
    "unchanged": "unchanged (the encoder's own layer)",
    "infeasible": "infeasible (beyond a constraint)",
}
NUM_SERIES = 8  # colours `@series0` to `@series7`; with DASHES and SYMBOLS beside them
DASHES = ("solid", "dash", "dot", "dashdot")
SYMBOLS = ("circle", "square", "diamond", "triangle-up", "x", "cross", "star", "hexagon")
LABELS = {
    QUALITY: "quality (selection rows, x 100)",
    QUALITY_VALIDATION: "quality (validation splits, x 100)",
    REL_TIME: "relative time of the feedforward layer",
    GPU_REL_TIME: "relative time of the feedforward layer on a GPU",
    "ff/cpu/ns_per_token": "feedforward layer, ns a token",
    "ff/gpu/ns_per_token": "feedforward layer on a GPU, ns a token",
    "mlm/validation_loss": "held-out MLM loss, nats",
    "distill/unexplained": "held-out error of a conversion, share of the variance",
}
_MANY = 200  # points; beyond, error bars are drawn on the front alone
_LABELLED = 14


@dataclass(frozen=True)
class Figure:
    """One figure. `rows` share their columns and are what its CSV and Parquet downloads hold."""

    slug: str
    title: str
    caption: str
    spec: Spec
    rows: list[dict[str, Any]] = field(default_factory=list)
    height: int = 400


def label(metric: str) -> str:
    """Axis title of a metric."""
    return LABELS.get(metric, metric)


def maximised(metric: str, objectives: Mapping[str, str]) -> bool:
    """Direction in which a metric is good: the study's where it says, else scores and throughputs up, the rest down."""
    if metric in objectives:
        return objectives[metric] == "maximize"
    return metric.startswith(("quality/", "task/", "glue/")) or metric.endswith(("accuracy", "tokens_per_s", "leaf_entropy", "verified"))


def role(trial: TrialView) -> str:
    """What a trial is drawn as."""
    if trial.has_role("reference_dense"):
        return "reference"
    if trial.in_study:
        return "layout"
    return trial.controls[0].partition("(")[0] if trial.controls else "layout"


def axis(title: str, log: bool = False, **more: Any) -> Spec:
    # On a log axis plotly labels every 2 and 5 in full size; decades with minor ticks stay readable on a phone.
    scale: Spec = {"type": "log", "dtick": 1, "minor": {"dtick": "D1", "ticks": "outside"}} if log else {}
    return {"title": {"text": title}, "automargin": True, **scale, **more}


def is_wide(values: Sequence[float]) -> bool:
    """Whether an axis of these values wants a logarithm, and can have one."""
    return len(values) > 1 and min(values) > 0 and max(values) / min(values) > 10


def error_bars(trials: Sequence[TrialView], metric: str) -> Spec | None:
    """Asymmetric error bars from the bootstrap intervals; None where there are none."""
    estimates = [trial.estimate(metric) for trial in trials]
    if not any(e is not None and e.interval for e in estimates):
        return None
    bounds = [(e.value - e.interval[0], e.interval[1] - e.value) if e and e.interval else (0.0, 0.0) for e in estimates]
    return {"type": "data", "symmetric": False, "array": [b[1] for b in bounds], "arrayminus": [b[0] for b in bounds], "thickness": 1}


def hover(view: StudyView, trial: TrialView, metrics: tuple[str, ...]) -> str:
    """What a point says of its trial."""
    return view.memo(("hover", trial.id, metrics), lambda: _hover(view, trial, metrics))


def _hover(view: StudyView, trial: TrialView, metrics: tuple[str, ...]) -> str:
    shape = trial.shape
    size = (
        "no feedforward" if shape is None else f"{shape.trees} trees of depth {shape.depth}, active {trial.active_width} of {trial.width}"
    )
    lines = [f"<b>{html.escape(trial.id)}</b>", html.escape(", ".join(trial.controls)), size]
    lines += [html.escape(f"{name}: {value}") for name, value in trial.params.items() if "." in name]  # what a search has set
    lines += [f"{html.escape(metric)}: {with_interval(trial.estimate(metric), 3)}" for metric in metrics]
    lines += [html.escape(f"does not keep {text}") for text in view.violated(trial)]
    chance = view.front_chances(tuple(view.objectives), tuple(view.maximize)).get(trial.id)
    if chance is not None:
        lines.append(f"P(on front): {chance:.2f}")
    return "<br>".join(line for line in lines if line)


def points(view: StudyView, trials: Sequence[TrialView], x: str, y: str, kind: str, bars: bool = True, **more: Any) -> Spec:
    """Scatter of trials in the colour and marker of `kind`."""
    trace: Spec = {
        "type": "scatter",
        "mode": "markers",
        "name": NAMES.get(kind, kind),
        "x": [trial.metrics[x] for trial in trials],
        "y": [trial.metrics[y] for trial in trials],
        "marker": {"color": f"@{kind}", "symbol": MARKERS[kind], "size": 9},
        "customdata": [trial.id for trial in trials],
        "hovertext": [hover(view, trial, (x, y)) for trial in trials],
        "hoverinfo": "text",
        **more,
    }
    for name, metric in (("error_x", x), ("error_y", y)):
        if bars and (found := error_bars(trials, metric)):
            trace[name] = found
    return trace


def level(trial: TrialView | None, metric: str, remark: str) -> tuple[list[Spec], Spec]:
    """Horizontal line at a trial's value, for trials that have no place on the other axis; its interval is a band.

    Its entry of the legend, where the value cannot lie on a point, and what the layout is given.
    """
    estimate = trial.estimate(metric) if trial else None
    if trial is None or estimate is None:
        return [], {}
    across: Spec = {"xref": "paper", "x0": 0, "x1": 1, "layer": "below"}
    shapes = [
        {**across, "type": "line", "y0": estimate.value, "y1": estimate.value, "line": {"color": "@none", "width": 2, "dash": "dash"}}
    ]
    if estimate.interval:
        low, high = estimate.interval
        shapes.append({**across, "type": "rect", "y0": low, "y1": high, "fillcolor": "@none", "opacity": 0.15, "line": {"width": 0}})
    text = f"{html.escape(trial.id)}: {number(estimate.value)}{remark}"
    line = {"color": "@none", "width": 2, "dash": "dash"}
    entry: Spec = {"type": "scatter", "mode": "lines", "name": text, "x": [None], "y": [None], "line": line}
    return [entry], {"shapes": shapes}


def pareto_axes(view: StudyView) -> tuple[str, str, str | None]:
    """x, y and the colour of the Pareto figure: the study's first objective upwards, the second to the right, the third as colour."""
    names = list(view.objectives)
    return (names[0] if len(names) == 1 else names[1], names[0], names[2] if len(names) > 2 else None)


def pareto(
    view: StudyView, x: str = REL_TIME, y: str = QUALITY, third: str | None = None, trials: Sequence[TrialView] | None = None
) -> Figure:
    """Trials on two objectives, the front drawn, dominated ones faded, controls beside it; a third objective is the colour.

    Trials beyond a constraint of the study are drawn as such and are never on the front. `trials` narrows what competes; the default
    is every finished trial of the study.
    """
    names = [name for name in (y, x, third) if name]
    directions = [maximised(name, view.objectives) for name in names]
    wanted = view.competing(names)
    shown = [trial for trial in (wanted if trials is None else trials) if trial in wanted]
    front = [entry.trial for entry in view.front(names, directions, shown)]
    members = sorted(front, key=lambda trial: (trial.metrics[x], trial.metrics[y]))
    infeasible = [trial for trial in shown if view.violated(trial)]
    dominated = [trial for trial in shown if trial not in {*members, *infeasible}]
    overlays = [trial for trial in view.finished if trial.controls and x in trial.metrics and y in trial.metrics]
    if x.startswith("ff/") or y.startswith("ff/"):  # what is absent has no time, no width and no place there
        overlays = [trial for trial in overlays if trial.variant != "none"]
    data = []
    if dominated:
        faded = points(view, dominated, x, y, "layout", len(dominated) <= _MANY, name="dominated", opacity=0.45)
        data.append(faded)
    if infeasible:
        data.append(points(view, infeasible, x, y, "infeasible", len(infeasible) <= _MANY, opacity=0.6))
    if members:
        mode = "markers+text" if third is None and len(members) <= _LABELLED else "markers"
        drawn = points(view, members, x, y, "front", mode=mode, text=spaced_labels(members, x, y), textposition="top center")
        if third is None:
            step = "vh" if maximised(x, view.objectives) else "hv"
            drawn |= {"mode": f"lines+{mode}", "line": {"shape": step, "color": "@front", "width": 2}}
        data.append(drawn)
    if third:
        every = [trial.metrics[third] for trial in shown]
        for trace in data:
            by_id = {trial.id: trial.metrics[third] for trial in shown}
            trace["marker"] |= {"color": [by_id[i] for i in trace["customdata"]], "coloraxis": "coloraxis"}
    for kind in ("reference", "none", "dense_active", "random_routing", "unchanged"):
        controls = [trial for trial in overlays if role(trial) == kind]
        if controls:
            data.append(points(view, controls, x, y, kind, len(controls) <= _MANY))
    beside_paper = x == REL_TIME and y.startswith("quality/")
    if beside_paper:
        data.append(_paper_trace())
    across, up = ([trial.metrics[name] for trial in (*shown, *overlays)] for name in (x, y))
    layout: Spec = {"xaxis": axis(label(x), is_wide(across)), "yaxis": axis(label(y), is_wide(up))}
    if third:
        layout["coloraxis"] = {
            "colorscale": "Cividis",
            "colorbar": {"title": {"text": label(third)}, "thickness": 12},
            "cmin": min(every, default=0),
        }
    if x.startswith("ff/"):
        entry, line = level(view.no_feedforward, y, " (no layer to time)" if x.endswith(("rel_time", "ns_per_token")) else " (no layer)")
        data, layout = data + entry, layout | line
    caption = "Bold: non-dominated trials and the front; faded: dominated ones. Controls are overlays and do not compete."
    if beside_paper:
        caption += " The paper's models can be switched on in the legend."
    if infeasible:
        caption += f" Crosses do not keep {' and '.join(view.constraints)}, so they cannot be on the front."
    return Figure(
        "pareto",
        "Pareto front",
        caption,
        {"data": data, "layout": layout},
        trial_rows(view, names, shown, overlays),
    )


def _paper_trace() -> Spec:
    """The paper's models, hidden until their entry in the legend is chosen: their quality is of other tasks."""
    found = paper.quality_and_time()
    return {
        "type": "scatter",
        "mode": "markers",
        "name": paper.AS_TRANSCRIBED,
        "visible": "legendonly",
        "x": [time for _, _, time in found],
        "y": [quality for _, quality, _ in found],
        "marker": {"color": "@paper", "symbol": MARKERS["paper"], "size": 11},
        "hovertext": [f"{model}: GLUE average {quality:g}, layer time {time:.4f} (as transcribed)" for model, quality, time in found],
        "hoverinfo": "text",
    }


def spaced_labels(trials: Sequence[TrialView], x: str, y: str) -> list[str]:
    """Names of trials in order along the front; one that would lie on the name before it is left empty (hovering tells it)."""
    columns = [[trial.metrics[name] for trial in trials] for name in (x, y)]
    columns = [[math.log(value) for value in column] if is_wide(column) else column for column in columns]
    places = list(zip(*columns, strict=True))
    spans = [max(column) - min(column) or 1.0 for column in columns]
    labels: list[str] = []
    last = None
    for trial, place in zip(trials, places, strict=True):
        near = last is not None and all(abs(a - b) / span < gap for a, b, span, gap in zip(place, last, spans, (0.12, 0.08), strict=True))
        labels.append("" if near else trial.id)
        last = last if near else place
    return labels


def trial_rows(view: StudyView, names: Sequence[str], *groups: Sequence[TrialView]) -> list[dict[str, Any]]:
    """Download rows of trials: place, and each metric with its interval."""
    rows = []
    for trial in dict.fromkeys(trial for group in groups for trial in group):
        row: dict[str, Any] = {"trial": trial.id, "role": role(trial), "depth": trial.shape.depth if trial.shape else None}
        row["active_width"] = trial.active_width
        row["violated"] = "; ".join(view.violated(trial))
        for name in names:
            estimate = trial.estimate(name)
            low, high = estimate.interval if estimate and estimate.interval else (None, None)
            row |= {name: estimate.value if estimate else None, f"{name}/low": low, f"{name}/high": high}
        rows.append(row)
    return rows


def hypervolume_over_time(view: StudyView) -> Figure | None:
    """Volume that the front dominates after each finished trial, as a share of the last; None before two trials are finished."""
    names = list(view.objectives)
    trials = sorted((t for t in view.competing(names) if not view.violated(t)), key=lambda trial: trial.finished_at)
    if len(trials) < 2:
        return None
    values = [[trial.metrics[name] for name in names] for trial in trials]
    worst = [(min if up else max)(column) for column, up in zip(zip(*values, strict=True), view.maximize, strict=True)]
    step = max(1, len(trials) // 100)
    counts = sorted({*range(1, len(trials) + 1, step), len(trials)})
    volumes: list[float] = []
    members: list[list[float]] = []
    for start, count in zip([0, *counts], counts, strict=False):  # what is dominated once stays so: only the front goes on
        members += values[start:count]
        members = [row for row, leads in zip(members, non_dominated(members, view.maximize), strict=True) if leads]
        volumes.append(hypervolume(members, view.maximize, worst))
    if volumes[-1] == 0:
        return None
    rows = [{"trials": count, "hypervolume": volume / volumes[-1]} for count, volume in zip(counts, volumes, strict=True)]
    trace = {
        "type": "scatter",
        "mode": "lines+markers",
        "x": counts,
        "y": [row["hypervolume"] for row in rows],
        "line": {"color": "@front", "shape": "hv"},
    }
    layout = {"xaxis": axis("finished trials"), "yaxis": axis("share of the final hypervolume", rangemode="tozero"), "showlegend": False}
    caption = "Volume dominated by the front, measured from the worst value of each objective in the study."
    return Figure("hypervolume", "Hypervolume over time", caption, {"data": [trace], "layout": layout}, rows)
