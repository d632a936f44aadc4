"""Figures of training: loss curves, and what the trees do with their leaves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from fffsweep.dashboards.figures import DASHES, NUM_SERIES, SYMBOLS, Figure, Spec, axis
from fffsweep.dashboards.queries import StudyView
from fffsweep.dashboards.trial import TrialView

MOST_CURVES = 8
MOST_LEAVES, MOST_TREES = 64, 8


def chosen_for_curves(view: StudyView) -> list[TrialView]:
    """Trials whose curves are shown unless others are asked for: the controls without trees, then the front, then the rest."""
    members = [entry.trial for entry in view.front()]
    controls = [trial for trial in view.finished if trial.has_role("reference_dense") or trial.variant == "none"]
    return list(dict.fromkeys([*controls, *members, *view.finished]))[:MOST_CURVES]


def columns(trials: Sequence[TrialView]) -> list[str]:
    """What some of these trials have logged while they trained, of `CURVES`, in its order."""
    begun = [next((rows for seed in range(trial.num_replicates) if (rows := trial.curve(seed))), []) for trial in trials]
    logged = {name for rows in begun for row in rows for name, value in row.items() if value is not None}
    return [name for name in CURVES if name in logged]


def curves(view: StudyView, trials: Sequence[TrialView], value: str | None = None, replicate: int | None = None) -> Figure | None:
    """One column of the training curves against tokens read, a line for each replicate; None if no trial has logged it.

    By default the first of `CURVES` that was logged: held-out loss of a pretraining, held-out error of a conversion.
    """
    value = value or next(iter(columns(trials)), CURVES[0])
    data: list[Spec] = []
    rows: list[dict[str, Any]] = []
    for index, trial in enumerate(trials):
        seeds = range(trial.num_replicates) if replicate is None else [replicate]
        for seed in seeds:
            logged = [row for row in trial.curve(seed) if row.get(value) is not None]
            if not logged:
                continue
            rows += [{"trial": trial.id, "replicate": seed, "step": r["step"], "tokens": r["tokens"], value: r[value]} for r in logged]
            data.append(
                _curve(trial, index, seed, [row["tokens"] for row in logged], [row[value] for row in logged], first=seed == seeds[0])
            )
    if not data:
        return None
    layout: Spec = {"xaxis": axis("tokens read"), "yaxis": axis(CURVE_TITLES.get(value, value)), "hovermode": "closest"}
    plateau = next((p for trial in trials if (p := trial.value("mlm/unigram_loss")) is not None), None)
    if plateau is not None and value.endswith("loss"):
        line = {"type": "line", "xref": "paper", "x0": 0, "x1": 1, "y0": plateau, "y1": plateau, "layer": "below"}
        layout["shapes"] = [{**line, "line": {"color": "@none", "dash": "dot", "width": 1}}]
        note = {
            "xref": "paper",
            "x": 0.99,
            "xanchor": "right",
            "y": plateau,
            "yanchor": "bottom",
            "text": "unigram plateau",
            "showarrow": False,
        }
        layout["annotations"] = [{**note, "font": {"color": "@none"}}]
    caption = (
        "Masked-language modelling on held-out text. A model that stands on the unigram plateau has learned word frequencies only: "
        "the moment of leaving it decides at small scale."
    )
    if view.converts:
        caption = (
            "New feedforward layers trained to do what the encoder's own did: squared error over the variance of the old layers' outputs, "
            "mean over layers. 1 is as good as their mean output, 0 is the same layer."
        )
    return Figure(
        f"curve-{value.replace('_', '-')}", f"Training: {CURVE_TITLES.get(value, value)}", caption, {"data": data, "layout": layout}, rows
    )


CURVE_TITLES = {
    "validation_loss": "held-out loss, nats",
    "unexplained": "held-out error, share of the variance",
    "validation_accuracy": "held-out accuracy",
    "loss": "training loss",
    "accuracy": "training accuracy",
    "tokens_per_s": "tokens a second",
    "learning_rate": "learning rate",
    "penalty": "penalty beside the loss",
    "grad_norm": "norm of the gradient",
}
CURVES = tuple(CURVE_TITLES)


def _curve(trial: TrialView, index: int, seed: int, x: list[float], y: list[float], first: bool) -> Spec:
    colour = f"@series{index % NUM_SERIES}"
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 40 else "lines",
        "name": trial.id,
        "legendgroup": trial.id,
        "showlegend": first,
        "x": x,
        "y": y,
        "opacity": 1.0 if first else 0.6,
        "line": {"color": colour, "dash": DASHES[index // 2 % len(DASHES)], "width": 2},
        "marker": {"color": colour, "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 6},
        "hovertemplate": f"replicate {seed}: %{{y:.4g}}<extra>%{{fullData.name}}</extra>",
    }


def leaf_usage(trial: TrialView, replicate: int = 0) -> Figure | None:
    """How held-out tokens spread over the leaves, a line for each tree; 1 is even use. None without trees."""
    health = trial.tree_health(replicate)
    if health is None:
        return None
    rows, shares, names = [], [], []
    for layer in health["layers"]:
        for tree, counts in enumerate(layer["leaf_usage"][:MOST_TREES]):
            total = sum(counts) or 1
            bins = min(MOST_LEAVES, len(counts))
            size = len(counts) // bins
            relative = [sum(counts[start : start + size]) / total * bins for start in range(0, len(counts), size)]
            shares.append(relative)
            names.append(f"layer {layer['layer']}, tree {tree}")
            rows += [{"layer": layer["layer"], "tree": tree, "leaf": leaf, "visits": count} for leaf, count in enumerate(counts)]
    heat: Spec = {
        "type": "heatmap",
        "z": shares,
        "y": names,
        "colorscale": "Cividis",
        "zmin": 0,
        "zmax": min(max(max(line) for line in shares), 8.0),
        "colorbar": {"title": {"text": "use"}, "thickness": 12},
        "hovertemplate": "%{y}, leaves %{x}: %{z:.2f} times even use<extra></extra>",
    }
    layout: Spec = {
        "xaxis": axis("leaves, left to right" + (f", in {MOST_LEAVES} groups" if size > 1 else ""), dtick=max(1, bins // 8)),
        "yaxis": axis("", autorange="reversed"),
    }
    figures = [
        f"layer {e['layer']}: entropy {e['leaf_entropy']:.2f}, {e['dead_nodes']} of {e['nodes']} nodes dead" for e in health["layers"]
    ]
    caption = (
        f"Visits of each leaf over even use, {health['tokens']} held-out tokens. {'; '.join(figures)}. "
        "Entropy 1 is even use, 0 a single leaf."
    )
    slug = "leaf-usage-" + "".join(c if c.isalnum() else "-" for c in trial.id)
    return Figure(slug, f"Leaf usage of {trial.id}", caption, {"data": [heat], "layout": layout}, rows, 130 + 28 * len(names))


def left_turns(trials: Sequence[TrialView], replicate: int = 0) -> Figure | None:
    """Share of tokens that turn left at each level, mean over layers; None if no trial has trees."""
    data: list[Spec] = []
    rows: list[dict[str, Any]] = []
    for index, trial in enumerate(trials):
        health = trial.tree_health(replicate)
        if health is None:
            continue
        layers = [layer["left_share"] for layer in health["layers"]]
        means = [sum(level) / len(level) for level in zip(*layers, strict=True)]
        rows += [{"trial": trial.id, "level": level, "left_share": share} for level, share in enumerate(means)]
        data.append(_curve(trial, index, replicate, list(range(len(means))), means, first=True))
    if not data:
        return None
    layout: Spec = {"xaxis": axis("level of decision (0 is the root)", dtick=1), "yaxis": axis("share of left turns", range=[0, 1])}
    caption = "Half is balanced. GELU mutes the left branch, so a tree may drift to one side."
    return Figure("left-turns", "Left turns by level", caption, {"data": data, "layout": layout}, rows)
