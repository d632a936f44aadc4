"""Figures for a paper, SVG and PDF: matplotlib draws the specifications of the pages' figures. The one importer of matplotlib."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fffsweep.dashboards import depth_figures, figures, speed_figures, training_figures
from fffsweep.dashboards.figures import COLOURS, Figure
from fffsweep.dashboards.queries import StudyView

_MARKERS = {
    "circle": "o",
    "square": "s",
    "diamond": "D",
    "triangle-up": "^",
    "star-open": "*",
    "star": "*",
    "x": "x",
    "cross": "P",
    "hexagon": "h",
    "pentagon": "p",
}
_DASHES = {"solid": "-", "dash": "--", "dot": ":", "dashdot": "-."}
_STEPS = {"hv": "steps-post", "vh": "steps-pre"}
_STYLE: Any = {"font.size": 8, "axes.grid": True, "grid.alpha": 0.3, "svg.fonttype": "none", "pdf.fonttype": 42, "legend.fontsize": 7}


def write_figures(view: StudyView, folder: Path, kinds: Sequence[str] = ("svg", "pdf")) -> list[Path]:
    """Write every line and scatter figure as each of `kinds` into `folder`; the files written.

    Raises ValueError before a trial has finished.
    """
    if not view.finished:
        raise ValueError(f"study {view.name!r}: no trial has finished yet, so there is nothing to draw; run it further first")
    import matplotlib

    matplotlib.use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    found = [
        figures.pareto(view, *figures.pareto_axes(view)),
        depth_figures.quality_by_depth(view),
        depth_figures.quality_by_active_width(view),
        depth_figures.loss_by_active_width(view),
        *speed_figures.speedups(view),
        depth_figures.retention_by_depth(view),
        training_figures.curves(view, training_figures.chosen_for_curves(view), replicate=0),
    ]
    written = []
    for figure in found:
        if figure is not None and any(value is not None for trace in _visible(figure) for value in trace["x"]):
            written += _draw(figure, folder, kinds)
    return written


def _visible(figure: Figure) -> list[dict[str, Any]]:
    return [trace for trace in figure.spec["data"] if trace.get("visible") != "legendonly"]


def _draw(figure: Figure, folder: Path, kinds: Sequence[str]) -> list[Path]:
    import matplotlib.pyplot as plt
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize

    with plt.rc_context(_STYLE):
        drawn, axes = plt.subplots(figsize=(4.8, 3.4), layout="constrained")
        layout, traces = figure.spec["layout"], _visible(figure)
        shades = [value for trace in traces for value in _shades(trace)]
        scale = ScalarMappable(Normalize(min(shades), max(shades)), "cividis") if shades else None
        for trace in traces:
            _trace(axes, trace, scale)
        if scale is not None:
            drawn.colorbar(scale, ax=axes, label=layout["coloraxis"]["colorbar"]["title"]["text"])
        for name in ("x", "y"):
            settings = layout[f"{name}axis"]
            getattr(axes, f"set_{name}label")(settings["title"]["text"])
            getattr(axes, f"set_{name}scale")(settings.get("type", "linear"))
        for shape in layout.get("shapes", []):
            if shape["type"] == "line":
                line = shape["line"]
                axes.axhline(shape["y0"], color=_colour(line["color"]), linestyle=_DASHES[line["dash"]], linewidth=0.8)
        if len(axes.get_legend_handles_labels()[1]) > 1:
            axes.legend(frameon=False)
        paths = [folder / f"{figure.slug}.{suffix}" for suffix in kinds]
        for path in paths:
            drawn.savefig(path)
        plt.close(drawn)
    return paths


def _shades(trace: dict[str, Any]) -> list[float]:
    """A third objective's value at each point; empty where the points share one colour."""
    colour = trace.get("marker", {}).get("color")
    return colour if isinstance(colour, list) else []


def _trace(axes: Any, trace: dict[str, Any], scale: Any = None) -> None:
    mode, marker, line, shades = trace["mode"], trace.get("marker", {}), trace.get("line", {}), _shades(trace)
    colour = _colour("@none" if shades else line.get("color") or marker.get("color"))
    bars = {}
    for name in ("x", "y"):
        if f"error_{name}" in trace:
            bars[f"{name}err"] = [trace[f"error_{name}"]["arrayminus"], trace[f"error_{name}"]["array"]]
    options = {
        "color": colour,
        "label": trace.get("name") if trace.get("showlegend", True) else None,
        "alpha": trace.get("opacity", 1.0),
        "marker": _MARKERS[marker.get("symbol", "circle")] if "markers" in mode else "",
        "markersize": 4,
        "linestyle": _DASHES[line.get("dash", "solid")] if "lines" in mode else "",
        "linewidth": 1,
        "drawstyle": _STEPS.get(line.get("shape", ""), "default"),
    }
    xs, ys = ([math.nan if value is None else value for value in trace[name]] for name in ("x", "y"))
    axes.errorbar(xs, ys, elinewidth=0.6, capsize=1.5, **bars, **options)
    if shades:
        axes.scatter(xs, ys, c=shades, cmap=scale.cmap, norm=scale.norm, marker=options["marker"], s=16, zorder=3)
    for x, y, text in zip(trace["x"], trace["y"], trace.get("text", []), strict=False):
        axes.annotate(text.replace("$", r"\$"), (x, y), xytext=(0, 4), textcoords="offset points", ha="center", fontsize=6)


def _colour(name: str) -> str:
    """The light theme's colour of a name."""
    return COLOURS[name[1:]][0]
