"""Where text and rows come from, behind one interface."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from fffsweep.pipeline.data.directory import corpus_files, task_files, unlabelled_files
from fffsweep.pipeline.data.fetch import WHEELS, cache_folder, fetch_wheels
from fffsweep.pipeline.data.loading import DatasetsReader, Hub
from fffsweep.pipeline.data.rows import BadRow, BadRows, TaskRows, parse_rows, parse_unlabelled
from fffsweep.pipeline.data.tables import DataFile, Reader, content_hash, documents_of, rows_of
from fffsweep.pipeline.data.wheels import Wheels, packages_for, texts_of
from fffsweep.pipeline.tasks import Task

if TYPE_CHECKING:
    from fffsweep.pipeline.stages.prepare import PrepareConfig


class Document(NamedTuple):
    """One text. collection: what it is counted under; held_out: for validation, whatever its content."""

    collection: str
    file: str
    row: int
    text: str | BadRow
    held_out: bool = False


class Source(Protocol):
    """Rows of tasks, documents, and what they were read from."""

    def task_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        """Rows of `train` and the task's validation splits."""
        ...

    def test_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        """Rows of those of the task's test splits that are there, without labels."""
        ...

    def documents(self) -> Iterator[Document]:
        """The corpus, in the same order in every run; documents held out as such come first."""
        ...

    def describe(self) -> list[dict[str, Any]]:
        """What was read: names, hashes, licences where they are known."""
        ...


def open_source(config: PrepareConfig, work: Path) -> Source:
    """The source that the config names, files read through `datasets`; tasks of the user's own come from files in any case."""
    reader = DatasetsReader(work / "datasets")
    if config.source == "wheels":
        return WheelsSource(config, reader)
    if config.source == "directory":
        return DirectorySource(config, reader)
    return HubSource(config, reader, Hub(work / "datasets"))


class TaskFiles:
    """Tasks that are read from files."""

    def __init__(self, config: PrepareConfig, reader: Reader) -> None:
        self._files, self._tests, self._reader = task_files(config), unlabelled_files(config), reader

    def __contains__(self, task: Task) -> bool:
        return task.name in self._files

    def rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        """Rows of each split, its files one after the other."""
        splits = {}
        for split, files in self._files[task.name].items():
            splits[split] = TaskRows()
            for file in files:
                rows = rows_of(file, self._reader)
                splits[split].extend(parse_rows(task, rows, file.name, bad, first=splits[split].num_read))
        return splits

    def test_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        """Rows of each test split that is there."""
        splits = {}
        for split, files in self._tests.get(task.name, {}).items():
            splits[split] = TaskRows()
            for file in files:
                rows = rows_of(file, self._reader)
                splits[split].extend(parse_unlabelled(task, rows, file.name, bad, first=splits[split].num_read))
        return splits

    def describe(self) -> list[dict[str, Any]]:
        every = [*self._files.values(), *self._tests.values()]
        return [_described(file) for splits in every for files in splits.values() for file in files]


class WheelsSource:
    """The pinned packages, fetched if the cache lacks them."""

    def __init__(self, config: PrepareConfig, reader: Reader) -> None:
        self._config, self._packages = config, packages_for(config)
        self._own = TaskFiles(config, reader)
        self._wheels = Wheels(fetch_wheels(cache_folder(), packages=self._packages))

    def task_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        return self._own.rows(task, bad) if task in self._own else self._wheels.task_rows(task, bad)

    def test_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        return {}

    def documents(self) -> Iterator[Document]:
        for text in texts_of(self._config):
            for document in self._wheels.documents(text):
                yield Document(text, *document)

    def describe(self) -> list[dict[str, Any]]:
        wheels = [WHEELS[package] for package in self._packages]
        licences = [
            {
                "file": wheel.file,
                "sha256": wheel.sha256,
                "package_licence": wheel.package_licence,
                "texts": [list(text) for text in wheel.texts],
            }
            for wheel in wheels
        ]
        return licences + self._own.describe()


class DirectorySource:
    """Files below one folder."""

    def __init__(self, config: PrepareConfig, reader: Reader) -> None:
        self._config, self._reader = config, reader
        self._files, self._tasks = corpus_files(config), TaskFiles(config, reader)

    def task_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        return self._tasks.rows(task, bad)

    def test_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        return self._tasks.test_rows(task, bad)

    def documents(self) -> Iterator[Document]:
        for files, held_out in ((self._files.validation, True), (self._files.train, False)):
            for file in files:
                for row, text in documents_of(file, self._reader, self._config.text_column):
                    yield Document("corpus", file.name, row, text, held_out)

    def describe(self) -> list[dict[str, Any]]:
        ignored = [{"file": name, "ignored": True} for name in self._files.ignored]
        return [_described(file) for file in (*self._files.train, *self._files.validation)] + ignored + self._tasks.describe()


class HubSource:
    """Data sets of a hub at pinned revisions."""

    def __init__(self, config: PrepareConfig, reader: Reader, hub: Hub) -> None:
        self._config, self._hub, self._own = config, hub, TaskFiles(config, reader)

    def task_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        if task in self._own or self._config.task_dataset is None:
            return self._own.rows(task, bad)
        return self._hub.task_rows(self._config.task_dataset, task, bad)

    def test_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        if task in self._own or self._config.task_dataset is None:
            return {}
        return self._hub.test_rows(self._config.task_dataset, task, bad)

    def documents(self) -> Iterator[Document]:
        for name in self._config.corpus:
            for row, text in self._hub.documents(name, self._config.text_column):
                yield Document(name, name, row, text)

    def describe(self) -> list[dict[str, Any]]:
        names = [*self._config.corpus, *([self._config.task_dataset] if self._config.task_dataset else [])]
        return [{"file": name} for name in names] + self._own.describe()


def _described(file: DataFile) -> dict[str, Any]:
    return {"file": file.name, "sha256": content_hash(file.path)}
