"""Which metrics of a trial an objective may name: those that its configured stages produce and that selection may look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fffsweep.sweeps.config_errors import nearest_first
from fffsweep.sweeps.search import searchable_shapes

if TYPE_CHECKING:
    from fffsweep.sweeps.config import SweepConfig

_PRETRAIN = (
    *("mlm/validation_loss", "mlm/validation_accuracy", "mlm/train_loss", "mlm/train_accuracy"),
    *("params/total", "params/feedforward", "memory/peak_rss_bytes", "time/tokens_per_s", "time/train_s"),
    *("ff/width", "ff/active_width"),
)
_TREE = ("tree/leaf_entropy", "tree/dead_nodes")
_CONVERT = ("params/total", "params/feedforward", "ff/width", "ff/active_width")  # what controls have too
_BENCHMARK = ("rel_time", "ns_per_token")


def metrics_of(config: SweepConfig) -> list[str]:
    """Metrics that a finished trial of this config has and that an objective may name.

    Figures of the official validation splits are not among them: they are reported, never selected by.
    """
    stages = config.stages
    trained = _PRETRAIN if stages.pretrain is not None else _CONVERT
    metrics = ["quality/avg", *(f"task/{task}/selection" for task in stages.finetune.tasks), *trained]
    if _has_layouts(config) and _dense_layout(config) is None:
        metrics += _TREE
    for stage, benchmark in stages.benchmarks.items():
        device = stage.removeprefix("benchmark_")
        metrics += [f"ff/{device}/{figure}" for figure in _BENCHMARK]
        metrics += [f"ff/{device}/{point.label}/{figure}" for point in benchmark.points for figure in _BENCHMARK]
    return metrics


def _has_layouts(config: SweepConfig) -> bool:
    """Whether there is more than controls: a study of existing encoders may do without."""
    return config.search is not None or bool(config.shapes)


def _dense_layout(config: SweepConfig) -> str | None:
    """A layout of the space that has no branches, and so no figures of them; None if there is none."""
    search = config.search
    if search is not None and "trees" in search.space:
        return "Kx0" if min(search.space["depth"].probes()) == 0 else None
    return next((shape.layout for shape in searchable_shapes(config) or config.shapes if shape.depth == 0), None)


def unknown_metric(metric: str, config: SweepConfig) -> str:
    """What to say of an objective that is not among `metrics_of`."""
    known = metrics_of(config)
    if "validation" in metric and not metric.startswith("mlm/"):
        why = "a validation split is only reported; objectives take the rows held out for selection"
    elif metric.startswith(("ff/cpu/", "ff/gpu/")) and not any(name.startswith(metric[:7]) for name in known):
        why = f"no stage produces it, add stages.benchmark_{metric[3:6]}"
    elif metric in _TREE and _has_layouts(config):
        why = f"layout {_dense_layout(config)} has no branches to count, and all trials need it"
    else:
        why = "no configured stage produces it"
    return f"objective {metric}: {why}; expected one of {nearest_first(metric, known)}"
