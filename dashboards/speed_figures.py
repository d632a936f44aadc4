"""Figures of speed: what depth gains over the dense reference layer, beside what arithmetic and the machine allow."""

from __future__ import annotations

from collections.abc import Sequence

from fffsweep.dashboards.figures import NUM_SERIES, SYMBOLS, Figure, Spec, axis
from fffsweep.dashboards.queries import Point, StudyView
from fffsweep.dashboards.trial import TrialView

_MANY_TRIALS = 60  # beyond, lines through the layouts would only blur
_TITLES = {  # on a GPU?, mode
    (False, "cold"): "Speed-up against depth, weights from memory",
    (False, "hot"): "Speed-up against depth, weights in the cache",
    (True, "cold"): "Speed-up against depth on a GPU, its caches overwritten",
    (True, "hot"): "Speed-up against depth on a GPU, again and again",
}


def speedups(view: StudyView) -> list[Figure]:
    """Speed-up of the layer at every benchmark point, a figure each for cold and hot weights, on a CPU and on a GPU; those timed."""
    found = (_speedup(view, on_gpu, mode) for on_gpu, mode in _TITLES)
    return [figure for figure in found if figure is not None]


def _speedup(view: StudyView, on_gpu: bool, mode: str) -> Figure | None:
    trials = [trial for trial in view.finished if trial.in_study and trial.shape is not None]
    trials = sorted(trials, key=lambda trial: (trial.shape.depth, trial.shape.trees) if trial.shape else (0, 0))
    data: list[Spec] = []
    roofs: list[Spec] = []
    rows = []
    for index, point in enumerate(point for point in view.points if (point.on_gpu, point.mode) == (on_gpu, mode)):
        timed = [trial for trial in trials if trial.metrics.get(f"{point.prefix}/rel_time")]
        if not timed:
            continue
        trace = _speed_trace(timed, point, index)
        data.append(trace)
        roofs += _roofline_trace(timed, point, index, first=not roofs)
        for trial, speed in zip(timed, trace["y"], strict=True):
            row = {"trial": trial.id, "depth": trial.shape.depth if trial.shape else None, **_facts(point), "speedup": speed}
            rows.append({**row, "limit": view.flop_limit(trial), "roofline": roofline(trial, point)})
    if not data:
        return None
    limits = [(trial.shape.depth, limit) for trial in trials if trial.shape and (limit := view.flop_limit(trial))]
    if limits:
        line = {"type": "scatter", "mode": "lines", "name": "limit by arithmetic", "line": {"color": "@none", "dash": "dot", "width": 2}}
        data.append({**line, "x": [depth for depth, _ in limits], "y": [limit for _, limit in limits]})
    layout: Spec = {"xaxis": axis("depth (branch decisions)", dtick=1), "yaxis": axis("speed-up over reference_dense", log=True)}
    caption = (
        "Trained weights and real activations, best verified implementation, median times interleaved with the reference. "
        "The limit counts multiplications alone: reference width over active width. "
    )
    if not on_gpu:  # no peaks of a GPU are measured
        caption += _about_roofline(mode) if roofs else _NO_ROOFLINE
    return Figure(
        f"speedup-{'gpu-' * on_gpu}{mode}", _TITLES[on_gpu, mode], caption.strip(), {"data": data + roofs, "layout": layout}, rows, 440
    )


_NO_ROOFLINE = "No roofline: the machine's peaks were not measured when these layers were timed; run the sweep again to have them."


def _about_roofline(mode: str) -> str:
    least = "its arithmetic at the peak that a matrix product reaches here"
    if mode == "cold":
        least += ", or every visited node read from memory once, whichever takes longer"
    return f"Roofline, in each point's colour: the reference's time over the least that the layer could take, {least}."


def roofline(trial: TrialView, point: Point) -> float | None:
    """Speed-up over the reference, as it was timed, that the machine's peaks allow; None where they were not measured."""
    least, reference = (trial.metrics.get(f"{point.prefix}/{name}") for name in ("roofline_ns_per_token", "reference_ns_per_token"))
    return reference / least if least and reference else None


def _roofline_trace(timed: Sequence[TrialView], point: Point, index: int, first: bool) -> list[Spec]:
    """A line in the point's colour, all of them under one name; none where the peaks were not measured."""
    limits = [(trial.shape.depth, limit) for trial in timed if trial.shape and (limit := roofline(trial, point))]
    if not limits:
        return []
    line = {"color": f"@series{index % NUM_SERIES}", "dash": "dash", "width": 1}
    named: Spec = {"name": "roofline", "legendgroup": "roofline", "showlegend": first}
    told = f"roofline, {_name(point)}: %{{y:.1f}}x<extra></extra>"
    place = {"x": [depth for depth, _ in limits], "y": [limit for _, limit in limits]}
    return [{"type": "scatter", "mode": "lines", "line": line, "hovertemplate": told, **named, **place}]


def _name(point: Point) -> str:
    tokens = f"{point.tokens:,} token{'s' if point.tokens > 1 else ''}"
    return tokens + ("" if point.dtype == "float32" else f", {point.dtype}") + _threads(point)


def _speed_trace(timed: Sequence[TrialView], point: Point, index: int) -> Spec:
    speeds = [1 / trial.metrics[f"{point.prefix}/rel_time"] for trial in timed]
    joined = len(timed) <= _MANY_TRIALS
    return {
        "type": "scatter",
        "mode": "lines+markers" if joined else "markers",
        "name": _name(point),
        "x": [trial.shape.depth for trial in timed if trial.shape],
        "y": speeds,
        "marker": {"color": f"@series{index % NUM_SERIES}", "symbol": SYMBOLS[index % len(SYMBOLS)], "size": 8},
        "line": {"color": f"@series{index % NUM_SERIES}", "width": 2},
        "customdata": [trial.id for trial in timed],
        "hovertemplate": "%{customdata}: %{y:.2f}x<extra>%{fullData.name}</extra>",
    }


def _threads(point: Point) -> str:
    return "" if point.threads in (None, 1) else f", {point.threads} threads"


def _facts(point: Point) -> dict[str, object]:
    return {"tokens": point.tokens, "dtype": point.dtype, "threads": point.threads, "mode": point.mode}
