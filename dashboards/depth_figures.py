"""Figures of the project's question: what depth, width and active width do to quality and to speed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from fffsweep.dashboards import paper
from fffsweep.dashboards.figures import (
    MARKERS,
    NAMES,
    Figure,
    Spec,
    axis,
    error_bars,
    hover,
    label,
    level,
    role,
    trial_rows,
)
from fffsweep.dashboards.queries import BASELINE, QUALITY_VALIDATION, StudyView
from fffsweep.dashboards.trial import TrialView
from fffsweep.kernels.shape import parse_layout

LOSS = "mlm/validation_loss"
_KINDS = ("layout", "reference", "dense_active", "random_routing", "unchanged")
_MANY_TRIALS = 60  # beyond, lines through the layouts would only blur


def scatter(view: StudyView, trials: Sequence[TrialView], xs: Sequence[float], metric: str, kind: str, **more: object) -> Spec:
    """Trials of one kind at given places."""
    trace: Spec = {
        "type": "scatter",
        "mode": "markers",
        "name": NAMES[kind],
        "x": list(xs),
        "y": [trial.metrics[metric] for trial in trials],
        "marker": {"color": f"@{kind}", "symbol": MARKERS[kind], "size": 9},
        "line": {"color": f"@{kind}", "width": 2},
        "customdata": [trial.id for trial in trials],
        "hovertext": [hover(view, trial, (metric,)) for trial in trials],
        "hoverinfo": "text",
        **more,
    }
    if bars := error_bars(trials, metric):
        trace["error_y"] = bars
    return trace


def depth_of(trial: TrialView) -> int | None:
    """Depth that a trial stands for: its own, or that of the layout whose active width it has."""
    for control in trial.controls:
        kind, _, layout = control.rstrip(")").partition("(")
        if kind in ("dense_active", "random_routing") and layout:
            return parse_layout(layout).depth
    return None if trial.shape is None else trial.shape.depth


def quality_by_depth(view: StudyView, metric: str = QUALITY_VALIDATION) -> Figure:
    """Quality against depth; dense_active and random_routing stand at the depth of the layout they belong to."""
    groups = _groups(view, metric)
    data = []
    for kind, trials in groups.items():
        ordered = sorted(trials, key=lambda trial: depth_of(trial) or 0)
        depths = [depth_of(trial) or 0 for trial in ordered]
        joined = kind == "layout" and len(set(depths)) == len(depths)
        data.append(scatter(view, ordered, depths, metric, kind, mode="lines+markers" if joined else "markers"))
    layout: Spec = {"xaxis": axis("depth (branch decisions)", dtick=1), "yaxis": axis("quality, x 100")}
    return _finish(
        view,
        metric,
        groups,
        Figure(
            "quality-depth",
            "Quality against depth",
            "Is depth worth anything? Each dense_active control has as many neurons in all as its layout uses for one token.",
            {"data": data, "layout": layout},
        ),
    )


def quality_by_active_width(view: StudyView, metric: str = QUALITY_VALIDATION) -> Figure:
    """Quality against the neurons used for one token."""
    caption = "Layouts above the dense_active controls at the same place gain from having more neurons than they use."
    figure = Figure("quality-active-width", "Quality against active width", caption, {"data": [], "layout": {}})
    return _by_active_width(view, metric, "quality, x 100", figure)


def loss_by_active_width(view: StudyView) -> Figure | None:
    """Held-out loss of pretraining against the neurons used for one token; None where fewer than two trials have one.

    It tells layouts apart long before the tasks do.
    """
    if sum(LOSS in trial.metrics for trial in view.finished) < 2:
        return None
    caption = "Layouts below the dense_active controls at the same place gain from having more neurons than they use."
    figure = Figure("loss-active-width", "Held-out loss against active width", caption, {"data": [], "layout": {}})
    return _by_active_width(view, LOSS, label(LOSS), figure)


def _by_active_width(view: StudyView, metric: str, title: str, figure: Figure) -> Figure:
    groups = _groups(view, metric)
    data = []
    for kind, trials in groups.items():
        ordered = sorted((trial for trial in trials if trial.shape), key=lambda trial: trial.active_width)
        widths = [trial.active_width for trial in ordered]
        joined = kind in ("layout", "dense_active") and 1 < len(ordered) <= _MANY_TRIALS
        data.append(scatter(view, ordered, widths, metric, kind, mode="lines+markers" if joined else "markers"))
    layout: Spec = {"xaxis": axis("active width (neurons used for one token)", log=True), "yaxis": axis(title)}
    return _finish(view, metric, groups, replace(figure, spec={"data": data, "layout": layout}))


def _groups(view: StudyView, metric: str) -> dict[str, list[TrialView]]:
    found = [trial for trial in view.finished if metric in trial.metrics and trial.shape is not None]
    return {kind: group for kind in _KINDS if (group := [trial for trial in found if role(trial) == kind])}


def _finish(view: StudyView, metric: str, groups: dict[str, list[TrialView]], figure: Figure) -> Figure:
    """Add the level of `none`, that of the baseline where it is near enough not to flatten the rest, and the rows."""
    none = view.no_feedforward
    layout = figure.spec["layout"]
    entry, line = level(none, metric, "")
    layout |= line
    figure.spec["data"].extend(entry)
    if entry:
        figure = replace(figure, caption=f"{figure.caption} Dashed: no feedforward layers.")
    shown = [trial for group in groups.values() for trial in group] + ([none] if none else [])
    figure.rows.extend(trial_rows(view, [metric], shown))
    baseline = view.reference.value(BASELINE[metric]) if view.reference and metric in BASELINE else None
    if baseline is None:
        return figure
    values = [trial.metrics[metric] for trial in shown if metric in trial.metrics]
    if min(values) - baseline > 2 * (max(values) - min(values)):
        return replace(figure, caption=f"{figure.caption} The majority/mean baseline, {baseline:.1f}, lies far below.")
    line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": baseline, "y1": baseline, "layer": "below"}
    layout.setdefault("shapes", []).append({**line, "line": {"color": "@none", "width": 1, "dash": "dot"}})
    return replace(figure, caption=f"{figure.caption} Dotted: the majority/mean baseline, {baseline:.1f}.")


def retention_by_depth(view: StudyView) -> Figure | None:
    """Share of the dense quality that each layout keeps, beside the paper's; None without a reference."""
    trials = [trial for trial in view.finished if trial.in_study and trial.shape is not None]
    kept = [(trial, estimate) for trial in trials if (estimate := view.retention(trial, QUALITY_VALIDATION))]
    if not kept:
        return None
    kept.sort(key=lambda pair: pair[0].shape.depth if pair[0].shape else 0)
    ours: Spec = {
        "type": "scatter",
        "mode": "markers",
        "name": "this study",
        "x": [trial.shape.depth for trial, _ in kept if trial.shape],
        "y": [100 * estimate.value for _, estimate in kept],
        "marker": {"color": "@layout", "size": 9},
        "customdata": [trial.id for trial, _ in kept],
        "hovertemplate": "%{customdata}: %{y:.1f} %<extra></extra>",
    }
    if len(kept) <= _MANY_TRIALS and any(estimate.interval for _, estimate in kept):
        highs = [100 * (e.interval[1] - e.value) if e.interval else 0.0 for _, e in kept]
        lows = [100 * (e.value - e.interval[0]) if e.interval else 0.0 for _, e in kept]
        ours["error_y"] = {"type": "data", "symmetric": False, "array": highs, "arrayminus": lows, "thickness": 1}
    dense = paper.dense()
    rows = paper.trees()
    theirs: Spec = {
        "type": "scatter",
        "mode": "lines+markers",
        "name": paper.AS_TRANSCRIBED,
        "x": [row.depth for row in rows],
        "y": [100 * row.scores["avg"] / dense.scores["avg"] for row in rows],
        "marker": {"color": "@paper", "symbol": MARKERS["paper"], "size": 9},
        "line": {"color": "@paper", "dash": "dot", "width": 1},
        "customdata": [row.model for row in rows],
        "hovertemplate": "%{customdata}: %{y:.1f} %<extra></extra>",
    }
    limit = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": 96, "y1": 96, "line": {"color": "@none", "dash": "dash", "width": 1}}
    layout: Spec = {"xaxis": axis("depth (branch decisions)", dtick=1), "yaxis": axis("share of the dense quality, %"), "shapes": [limit]}
    caption = (
        "Quality on the validation splits over that of reference_dense. Stars: GLUE averages of the paper's models over its depth 0, "
        "as transcribed: another model, other data, another budget. Dashed: 96 %."
    )
    lines = [
        {
            "trial": trial.id,
            "depth": trial.shape.depth if trial.shape else None,
            "retention": estimate.value,
            "low": estimate.interval[0] if estimate.interval else None,
            "high": estimate.interval[1] if estimate.interval else None,
        }
        for trial, estimate in kept
    ]
    return Figure("retention-depth", "Dense quality kept, against depth", caption, {"data": [ours, theirs], "layout": layout}, lines)
