"""Tasks: the official metrics, and errors that help."""

import pytest

from fffsweep.pipeline.metrics import METRICS
from fffsweep.pipeline.tasks import GLUE_TASKS, METRIC_NAMES, TASKS, get_task, nearest_first

OFFICIAL = {
    "cola": ("matthews", 2),
    "sst2": ("accuracy", 2),
    "mrpc": ("f1", 2),
    "stsb": ("pearson", 1),
    "qqp": ("accuracy", 2),
    "mnli": ("accuracy", 3),
    "qnli": ("accuracy", 2),
    "rte": ("accuracy", 2),
    "wnli": ("accuracy", 2),
}


def test_glue_tasks_have_the_official_primary_metric_and_classes():
    assert {name: (TASKS[name].primary, TASKS[name].num_labels) for name in GLUE_TASKS} == OFFICIAL
    assert TASKS["mnli"].label_names == ("entailment", "neutral", "contradiction")
    assert TASKS["mnli"].validation_splits == ("validation_matched", "validation_mismatched")


def test_every_metric_exists():
    assert set(METRIC_NAMES) == set(METRICS)
    assert {metric for task in TASKS.values() for metric in task.metrics} <= set(METRICS)


def test_tasks_like_glue_are_never_called_glue():
    likes = [name for name in TASKS if name.endswith("-like")]
    assert len(likes) == 4
    assert not set(likes) & set(GLUE_TASKS)
    assert not any(TASKS[name].submission_names for name in likes)


def test_unknown_task_lists_choices_nearest_first():
    with pytest.raises(ValueError, match=r"task 'sts': expected one of stsb, ") as caught:
        get_task("sts")
    assert all(name in str(caught.value) for name in TASKS)
    assert nearest_first("QNLI", ["sst2", "qnli"]) == "qnli, sst2"
