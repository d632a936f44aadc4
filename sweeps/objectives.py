"""Which metrics of a trial an objective may name: those that its configured stages produce and that selection may look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fffsweep.sweeps.config_errors import nearest_first

if TYPE_CHECKING:
    from fffsweep.sweeps.config import SweepConfig

_PRETRAIN = (
    *("mlm/validation_loss", "mlm/validation_accuracy", "mlm/train_loss", "mlm/train_accuracy"),
    *("params/total", "params/feedforward", "memory/peak_rss_bytes", "time/tokens_per_s", "time/train_s"),
    *("tree/leaf_entropy", "tree/dead_nodes", "ff/width", "ff/active_width"),
)
_CONVERT = ("params/total", "params/feedforward", "ff/width", "ff/active_width")  # what controls have too
_BENCHMARK = ("rel_time", "ns_per_token")


def metrics_of(config: SweepConfig) -> list[str]:
    """Metrics that a finished trial of this config has and that an objective may name.

    Figures of the official validation splits are not among them: they are reported, never selected by.
    """
    stages = config.stages
    trained = _PRETRAIN if stages.pretrain is not None else _CONVERT
    metrics = ["quality/avg", *(f"task/{task}/selection" for task in stages.finetune.tasks), *trained]
    for stage, benchmark in stages.benchmarks.items():
        device = stage.removeprefix("benchmark_")
        metrics += [f"ff/{device}/{figure}" for figure in _BENCHMARK]
        metrics += [f"ff/{device}/{point.label}/{figure}" for point in benchmark.points for figure in _BENCHMARK]
    return metrics


def unknown_metric(metric: str, known: list[str]) -> str:
    """What to say of an objective that is not among `known`."""
    if "validation" in metric and not metric.startswith("mlm/"):
        why = "a validation split is only reported; objectives take the rows held out for selection"
    elif metric.startswith(("ff/cpu/", "ff/gpu/")) and not any(name.startswith(metric[:7]) for name in known):
        why = f"no stage produces it, add stages.benchmark_{metric[3:6]}"
    else:
        why = "no configured stage produces it"
    return f"objective {metric}: {why}; expected one of {nearest_first(metric, known)}"
