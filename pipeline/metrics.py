"""Task metrics, as fractions. A constant column, whose correlation is undefined, scores 0 in the correlations; never NaN."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from fffsweep.pipeline.tasks import Task

Values = NDArray[np.generic]


def accuracy(predictions: Values, labels: Values) -> float:
    """Share of rows predicted right."""
    return float(np.mean(predictions == labels))


def f1(predictions: Values, labels: Values) -> float:
    """F1 of class 1; 0 where it is neither predicted nor found."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="binary", zero_division=0))


def mean_f1(predictions: Values, labels: Values) -> float:
    """Unweighted mean of the F1 of each class that is predicted or found."""
    from sklearn.metrics import f1_score

    return float(f1_score(labels, predictions, average="macro", zero_division=0))


def matthews(predictions: Values, labels: Values) -> float:
    """Matthews correlation; 0 if predictions or labels are all of one class."""
    from sklearn.metrics import matthews_corrcoef

    return float(matthews_corrcoef(labels, predictions))


def pearson(predictions: Values, labels: Values) -> float:
    """Linear correlation; 0 if predictions or labels are constant."""
    from scipy.stats import pearsonr

    return _correlation(pearsonr, predictions, labels)


def spearman(predictions: Values, labels: Values) -> float:
    """Rank correlation; 0 if predictions or labels are constant."""
    from scipy.stats import spearmanr

    return _correlation(spearmanr, predictions, labels)


def _correlation(of: Callable[..., tuple[float, float]], predictions: Values, labels: Values) -> float:
    if len(labels) < 2 or np.ptp(predictions) == 0 or np.ptp(labels) == 0:
        return 0.0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a nearly constant column warns; what comes out is checked instead
        value = float(of(predictions.astype(np.float64), labels.astype(np.float64))[0])
    return value if np.isfinite(value) else 0.0


METRICS: dict[str, Callable[[Values, Values], float]] = {each.__name__: each for each in (accuracy, f1, matthews, pearson, spearman)}


def decide(task: Task, logits: NDArray[np.float32]) -> Values:
    """Predictions of logits [rows, num_labels]: the likeliest class, int64, or the single value of a regression, float32."""
    return logits[:, 0] if task.kind == "regression" else logits.argmax(1)


def scores(task: Task, predictions: Values, labels: Values) -> dict[str, float]:
    """Each of the task's metrics; `f1` of a task of more than two classes is their mean, whichever of them occur here."""
    metrics = METRICS if task.num_labels <= 2 else METRICS | {"f1": mean_f1}
    return {name: metrics[name](predictions, labels) for name in task.metrics}


def baseline(task: Task, labels: Values) -> float | int:
    """The constant prediction that is best on the training labels: their mean, or the class by the task's primary metric.

    Of classes that are equally good it is the commonest, of equally common ones the lowest.
    """
    if task.kind == "regression":
        return float(labels.astype(np.float64).mean())
    counts = np.bincount(labels.astype(np.int64), minlength=task.num_labels)
    good = [scores(task, np.full(len(labels), each), labels)[task.primary] for each in range(len(counts))]
    return max(range(len(counts)), key=lambda each: (good[each], counts[each]))
