"""Task metrics against their formulas, and on constant columns."""

import math

import numpy as np
import pytest

from fffsweep.pipeline.metrics import METRICS, baseline, decide, scores
from fffsweep.pipeline.tasks import TASKS, Task

PREDICTED = np.array([1, 0, 1, 1, 0, 0, 1, 0])
LABELS = np.array([1, 0, 0, 1, 1, 0, 1, 0])  # 3 true positives, 1 false one, 1 missed, 3 true negatives


def test_classification_metrics():
    assert METRICS["accuracy"](PREDICTED, LABELS) == pytest.approx(6 / 8)
    assert METRICS["f1"](PREDICTED, LABELS) == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert METRICS["matthews"](PREDICTED, LABELS) == pytest.approx((3 * 3 - 1 * 1) / 16)


def test_f1_of_three_classes_is_the_mean_over_classes():
    task = Task("three", "classification", 3, ("text",), ("f1",))
    assert scores(task, np.array([0, 1, 2, 2]), np.array([0, 1, 2, 0]))["f1"] == pytest.approx((2 / 3 + 1 + 2 / 3) / 3)
    # where the third class does not occur it is the mean over the others, not the F1 of class 1
    assert scores(task, np.array([0, 1]), np.array([1, 1]))["f1"] == pytest.approx((0 + 2 / 3) / 2)
    assert scores(TASKS["mrpc"], np.array([0, 1]), np.array([1, 1]))["f1"] == pytest.approx(2 / 3)


def test_correlations():
    labels = np.arange(5, dtype=np.float32)
    assert METRICS["pearson"](3 - 2 * labels, labels) == pytest.approx(-1)
    assert METRICS["spearman"](labels**3, labels) == pytest.approx(1)
    assert METRICS["pearson"](labels**3, labels) < 0.95


@pytest.mark.parametrize("name", ["matthews", "pearson", "spearman"])
def test_constant_predictions_score_nothing(name):
    kind = np.int64 if name == "matthews" else np.float32
    labels = np.array([0, 1, 1, 0, 1], dtype=kind)
    for predicted in (np.zeros(5, kind), np.ones(5, kind)):
        assert METRICS[name](predicted, labels) == 0.0
        assert METRICS[name](labels, predicted) == 0.0
    nearly = np.full(5, 1.0, np.float32) + np.array([0, 1, 0, 0, 0], np.float32) * np.finfo(np.float32).eps
    assert name == "matthews" or math.isfinite(METRICS[name](nearly, labels))


def test_f1_without_any_positive_is_zero():
    assert METRICS["f1"](np.zeros(4, np.int64), np.zeros(4, np.int64)) == 0.0


def test_what_a_task_makes_of_logits():
    logits = np.array([[0.1, 2.0], [3.0, 1.0]], np.float32)
    assert decide(TASKS["mrpc"], logits).tolist() == [1, 0]
    assert decide(TASKS["stsb"], logits[:, :1]).tolist() == pytest.approx([0.1, 3.0])
    assert list(scores(TASKS["mrpc"], np.array([1, 0]), np.array([1, 0]))) == ["f1", "accuracy"]


def test_baseline_is_the_best_class_by_the_primary_metric_or_the_mean():
    assert baseline(TASKS["sst2"], np.array([0, 0, 1])) == 0
    assert baseline(TASKS["mrpc"], np.array([0, 1, 1])) == 1
    # the commonest class has an F1 of 0
    assert baseline(TASKS["mrpc"], np.array([0, 0, 0, 1])) == 1
    # every constant has a Matthews correlation of 0
    assert baseline(TASKS["cola"], np.array([0, 1, 1])) == 1
    assert baseline(TASKS["mnli"], np.array([2, 2, 1, 1])) == 1
    assert baseline(TASKS["stsb"], np.array([1.0, 2.0, 4.5], np.float32)) == pytest.approx(2.5)
