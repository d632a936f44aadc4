"""Trial averages as the measures define them."""

from pathlib import Path

import pytest

from fffsweep.pipeline.stage import StageContext
from fffsweep.pipeline.stages.collect import Collect, CollectConfig


def collect(tasks, input_metrics):
    context = StageContext(seed=0, inputs={}, input_metrics=input_metrics, output=Path(), work=Path())
    return Collect().run(CollectConfig(tasks=tasks), context)


def finetuned(selection, validation, baseline=0.5, **more):
    return {
        "selection/primary": selection,
        "validation/primary": validation,
        "baseline/selection_primary": baseline,
        "baseline/validation_primary": baseline,
        **more,
    }


def test_a_replicate_is_the_median_of_its_finetunings_and_a_trial_the_mean_of_its_replicates():
    metrics = collect(
        ("a", "b"),
        {
            **{f"finetune/0/a/{f}": finetuned(s, 0.1) for f, s in enumerate([0.2, 0.9, 0.4])},
            **{f"finetune/0/b/{f}": finetuned(s, 0.3) for f, s in enumerate([0.8, 0.8, 0.8])},
            **{f"finetune/1/a/{f}": finetuned(s, 0.1) for f, s in enumerate([0.6, 0.6, 0.6])},
            **{f"finetune/1/b/{f}": finetuned(s, 0.3) for f, s in enumerate([0.1, 1.0, 0.2])},
            "pretrain/0": {"mlm/validation_loss": 5.0},
            "pretrain/1": {"mlm/validation_loss": 6.0},
            "benchmark_cpu/0": {"ff/cpu/rel_time": 0.1},
            "benchmark_cpu/1": {"ff/cpu/rel_time": 0.3},
        },
    )
    assert metrics["quality/avg/0"] == pytest.approx((40 + 80) / 2)
    assert metrics["quality/avg/1"] == pytest.approx((60 + 20) / 2)
    assert metrics["quality/avg"] == pytest.approx(50)
    assert metrics["quality/validation_avg"] == pytest.approx(20)
    assert metrics["quality/baseline_avg"] == pytest.approx(50)
    assert metrics["task/a/selection/1"] == pytest.approx(60)
    assert metrics["mlm/validation_loss"] == 5.5
    assert metrics["ff/cpu/rel_time/1"] == 0.3
    assert metrics["ff/cpu/rel_time"] == pytest.approx(0.2)


def test_a_metric_that_would_pass_for_a_replicate_is_refused():
    with pytest.raises(ValueError, match="metric loss/1 of a stage: a replicate's value has that name; rename it"):
        collect((), {"pretrain/0": {"loss": 1.0, "loss/1": 2.0}, "pretrain/1": {"loss": 3.0, "loss/1": 4.0}})


GLUE = ("cola", "sst2", "mrpc", "stsb", "qqp", "qnli", "rte")


def glue_runs(complete):
    runs = {f"finetune/0/{task}/0": finetuned(0.5, 0.8 if task != "cola" else 0.4, **{"data/complete": 1.0}) for task in GLUE}
    accuracies = {"validation_matched/accuracy": 0.7, "validation_mismatched/accuracy": 0.6}
    runs["finetune/0/mnli/0"] = finetuned(0.5, 0.65, **accuracies, **{"data/complete": complete})
    return runs


def test_the_papers_mean_counts_mnli_twice():
    metrics = collect((*GLUE, "mnli"), glue_runs(1.0))
    assert metrics["glue/avg"] == pytest.approx((40 + 6 * 80 + 70 + 60) / 9)
    assert metrics["glue/avg_without_cola"] == pytest.approx((6 * 80 + 70 + 60) / 8)


def test_no_glue_average_unless_every_task_was_read_whole():
    assert "glue/avg" not in collect((*GLUE, "mnli"), glue_runs(0.0))
    assert "glue/avg" not in collect(GLUE, {role: m for role, m in glue_runs(1.0).items() if "mnli" not in role})
