"""Finetuning tasks: what a row holds, what its labels mean, how it is scored. Torch-free, so that planning a sweep stays quick."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from typing import Literal

AX = "ax"  # GLUE's diagnostic rows, which models of mnli predict
METRIC_NAMES = ("accuracy", "f1", "matthews", "pearson", "spearman")


@dataclass(frozen=True)
class Task:
    """One task.

    num_labels: classes, 1 for regression. text_columns: one or two. metrics: names, the first is primary.
    label_names: what labels are called in the task's own files and in submissions; empty where those hold numbers.
    label_range: least and greatest value of a regression's labels, None for no limit.
    validation_splits: held-out splits that are reported. test_splits: those without labels, for a submission to the GLUE server, which
    takes the predictions of each in a file called by its entry of submission_names.
    """

    name: str
    kind: Literal["classification", "regression"]
    num_labels: int
    text_columns: tuple[str, ...]
    metrics: tuple[str, ...]
    label_column: str = "label"
    label_names: tuple[str, ...] = ()
    label_range: tuple[float, float] | None = None
    validation_splits: tuple[str, ...] = ("validation",)
    test_splits: tuple[str, ...] = ()
    submission_names: tuple[str, ...] = ()

    @property
    def primary(self) -> str:
        """The metric that counts."""
        return self.metrics[0]


_PAIR = ("sentence1", "sentence2")
_ENTAILMENT = ("entailment", "not_entailment")


def _classes(name: str, columns: tuple[str, ...], metrics: tuple[str, ...], submission: str = "", names: tuple[str, ...] = ()) -> Task:
    tests, submissions = (("test",), (submission,)) if submission else ((), ())
    num_labels = len(names) or 2
    return Task(name, "classification", num_labels, columns, metrics, label_names=names, test_splits=tests, submission_names=submissions)


_TASKS = (
    _classes("cola", ("sentence",), ("matthews", "accuracy"), "CoLA"),
    _classes("sst2", ("sentence",), ("accuracy",), "SST-2"),
    _classes("mrpc", _PAIR, ("f1", "accuracy"), "MRPC"),
    Task(
        "stsb",
        "regression",
        1,
        _PAIR,
        ("pearson", "spearman"),
        label_range=(0.0, 5.0),
        test_splits=("test",),
        submission_names=("STS-B",),
    ),
    _classes("qqp", ("question1", "question2"), ("accuracy", "f1"), "QQP"),
    Task(
        "mnli",
        "classification",
        3,
        ("premise", "hypothesis"),
        ("accuracy",),
        label_names=("entailment", "neutral", "contradiction"),
        validation_splits=("validation_matched", "validation_mismatched"),
        test_splits=("test_matched", "test_mismatched", AX),
        submission_names=("MNLI-m", "MNLI-mm", "AX"),
    ),
    _classes("qnli", ("question", "sentence"), ("accuracy",), "QNLI", _ENTAILMENT),
    _classes("rte", _PAIR, ("accuracy",), "RTE", _ENTAILMENT),
    _classes("wnli", _PAIR, ("accuracy",), "WNLI"),
    _classes("sst2-like", ("sentence",), ("accuracy",)),
    _classes("mrpc-like", _PAIR, ("f1", "accuracy")),
    _classes("qnli-like", ("question", "sentence"), ("accuracy",), names=_ENTAILMENT),
    _classes("rte-like", _PAIR, ("accuracy",), names=_ENTAILMENT),
)
TASKS: dict[str, Task] = {task.name: task for task in _TASKS}
GLUE_TASKS = tuple(name for name, task in TASKS.items() if task.submission_names)


def get_task(name: str) -> Task:
    """The built-in task called `name`. Raises ValueError with the choices, nearest first."""
    if name not in TASKS:
        raise ValueError(f"task {name!r}: expected one of {nearest_first(name, TASKS)}; or define it under stages.prepare.tasks")
    return TASKS[name]


def nearest_first(name: str, choices: Iterable[str]) -> str:
    """The choices as a list to read, those that look like `name` first."""
    return ", ".join(sorted(choices, key=lambda choice: -SequenceMatcher(None, name.lower(), choice.lower()).ratio()))
