"""Stage `collect`: what a trial amounts to, over all its replicates.

Input roles: `pretrain/r` or `convert/r`, `finetune/r/task/f`, `benchmark_cpu/r`, `benchmark_gpu/r`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable
from statistics import fmean, median
from typing import ClassVar

from fffsweep.pipeline.settings import Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext

_SPLITS = ("selection", "validation")
_AVERAGES = {
    "avg": "selection",
    "validation_avg": "validation",
    "baseline_avg": "baseline",
    "baseline_validation_avg": "baseline_validation",
}


class CollectConfig(Settings):
    """tasks: the tasks whose primary metrics make `quality/avg`, in the config's order."""

    tasks: tuple[str, ...]


class Collect:
    """Averages as defined once for the whole project.

    A replicate is one pretraining seed; its score on a task is the median over its finetuning seeds; `quality/avg` is the
    unweighted mean of the tasks' primary metrics times 100, on the rows held out of the training split for selection;
    `quality/validation_avg` the same on the official validation split. Trial values are means over the replicates, each of
    which stands beside them as `<name>/<replicate>`.
    """

    name: ClassVar[str] = "collect"
    version: ClassVar[int] = 2
    sources: ClassVar[tuple[str, ...]] = ("pipeline/tasks.py",)
    Config: ClassVar[type[Settings]] = CollectConfig

    def resources(self, config: CollectConfig) -> Resources:
        return Resources(cpus=1)

    def fingerprints(self, config: CollectConfig) -> dict[str, str]:
        return {}

    def run(self, config: CollectConfig, context: StageContext) -> Metrics:
        replicates: dict[str, dict[int, float]] = defaultdict(dict)
        finetunings: dict[tuple[int, str], list[Metrics]] = defaultdict(list)
        for role, metrics in context.input_metrics.items():
            kind, *rest = role.split("/")
            if kind == "finetune":
                finetunings[int(rest[0]), rest[1]].append(metrics)
            elif kind in ("pretrain", "convert", "benchmark_cpu", "benchmark_gpu"):
                for name, value in metrics.items():
                    replicates[name][int(rest[0])] = value
        for replicate in sorted({number for number, _ in finetunings}):
            for name, value in _scores(config.tasks, {task: runs for (r, task), runs in finetunings.items() if r == replicate}).items():
                replicates[name][replicate] = value
        collected: Metrics = {}
        for name, values in replicates.items():
            of_replicates = {f"{name}/{replicate}": value for replicate, value in values.items()}
            if taken := replicates.keys() & of_replicates.keys():
                raise ValueError(f"metric {min(taken)} of a stage: a replicate's value has that name; rename it to end in no number")
            collected |= {name: fmean(values.values()), **of_replicates}
        return collected


def _scores(tasks: Iterable[str], runs: dict[str, list[Metrics]]) -> Metrics:
    """One replicate's task scores and their averages, times 100."""

    def score(task: str, metric: str) -> float:
        return 100 * median(run[metric] for run in runs[task])

    scores: Metrics = {}
    for task in tasks:
        for split in _SPLITS:
            scores[f"task/{task}/{split}"] = score(task, f"{split}/primary")
        scores[f"task/{task}/baseline"] = score(task, "baseline/selection_primary")
        scores[f"task/{task}/baseline_validation"] = score(task, "baseline/validation_primary")
    for name, column in _AVERAGES.items():
        scores[f"quality/{name}"] = fmean(scores[f"task/{task}/{column}"] for task in tasks)
    scores.update(_glue(scores, runs))
    return scores


# The paper's table: eight tasks without WNLI, MNLI's two validation splits counted as two columns.
_GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "rte")


def _glue(scores: Metrics, runs: dict[str, list[Metrics]]) -> Metrics:
    """`glue/avg` and `glue/avg_without_cola`, only if every task of the paper's mean was read whole (`data/complete`)."""
    if not all(run.get("data/complete") == 1.0 for task in (*_GLUE, "mnli") for run in runs.get(task, [{}])):
        return {}
    columns = {task: scores[f"task/{task}/validation"] for task in _GLUE}
    for split in ("matched", "mismatched"):
        columns[f"mnli_{split}"] = 100 * median(run[f"validation_{split}/accuracy"] for run in runs["mnli"])
    return {
        "glue/avg": fmean(columns.values()),
        "glue/avg_without_cola": fmean(value for task, value in columns.items() if task != "cola"),
    }
