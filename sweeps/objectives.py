"""Which metrics of a trial an objective may name: those that its configured stages produce and that selection may look at."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fffsweep.sweeps.config_errors import nearest_first

if TYPE_CHECKING:
    from fffsweep.sweeps.config import SweepConfig

_PRETRAIN = (
    *("mlm/validation_loss", "mlm/validation_accuracy", "mlm/train_loss"),
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
    if stages.benchmark_cpu is not None:
        metrics += [f"ff/cpu/{figure}" for figure in _BENCHMARK]
        for point in stages.benchmark_cpu.points:
            metrics += [f"ff/cpu/{point.label}/{figure}" for figure in _BENCHMARK]
    return metrics


def unknown_metric(metric: str, known: list[str]) -> str:
    """What to say of an objective that is not among `known`."""
    if "validation" in metric and not metric.startswith("mlm/"):
        why = "a validation split is only reported; objectives take the rows held out for selection"
    elif metric.startswith("ff/cpu/") and not any(name.startswith("ff/cpu/") for name in known):
        why = "no stage produces it, add stages.benchmark_cpu"
    else:
        why = "no configured stage produces it"
    return f"objective {metric}: {why}; expected one of {nearest_first(metric, known)}"
