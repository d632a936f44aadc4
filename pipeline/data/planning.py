"""What planning asks of the data: is it fit, and which data is it. Imports neither torch nor `datasets`."""

from __future__ import annotations

import hashlib

from fffsweep.pipeline.data.directory import corpus_files, task_files, unlabelled_files
from fffsweep.pipeline.data.fetch import WHEELS, cache_folder, check_obtainable
from fffsweep.pipeline.data.rows import check_columns, check_labels
from fffsweep.pipeline.data.tables import DataFile, check_file, columns_of, content_hash, labels_of
from fffsweep.pipeline.data.wheels import packages_for
from fffsweep.pipeline.encoder_folder import vocabulary_path
from fffsweep.pipeline.settings import canonical_json
from fffsweep.pipeline.stages.prepare import PrepareConfig
from fffsweep.pipeline.tasks import Task


def check(config: PrepareConfig) -> None:
    """Raise ValueError, one line, for data that prepare could not use: missing or damaged files, columns, encoding, labels."""
    if config.source == "wheels":
        check_obtainable(cache_folder(), packages_for(config))
    elif config.source == "directory":
        corpus = corpus_files(config)
        for file in (*corpus.train, *corpus.validation):
            check_file(file)
            columns = columns_of(file)
            if columns is not None and config.text_column not in columns:
                shown = ", ".join(columns[:12]) or "none"
                raise ValueError(
                    f"{file.name}: column {config.text_column!r} is missing, got columns {shown}; set text_column to one of them"
                )
    tasks = {task.name: task for task in config.task_list}
    for name, splits in task_files(config).items():
        for files in splits.values():
            for file in files:
                _check_task_file(tasks[name], file)
    for name, splits in unlabelled_files(config).items():
        for files in splits.values():
            for file in files:
                _check_test_file(tasks[name], file)
    if config.vocabulary_file is not None:
        from fffsweep.pipeline.data.vocabulary import read_vocabulary

        read_vocabulary(vocabulary_path(config.vocabulary_file))


def fingerprint(config: PrepareConfig) -> str:
    """Hash of the content of everything that prepare will read; of no path and no time."""
    content: dict[str, object] = {}
    if config.source == "wheels":
        content["wheels"] = sorted(WHEELS[package].sha256 for package in packages_for(config))
    elif config.source == "directory":
        corpus = corpus_files(config)
        content["corpus"] = [[content_hash(file.path) for file in split] for split in (corpus.train, corpus.validation)]
    else:
        content["hub"] = [*config.corpus, config.task_dataset]
    content["tasks"] = {
        name: {split: [content_hash(file.path) for file in files] for split, files in splits.items()}
        for name, splits in task_files(config).items()
    }
    tests = unlabelled_files(config).items()
    content["tests"] = {
        name: {split: [content_hash(file.path) for file in files] for split, files in splits.items()} for name, splits in tests
    }
    if config.vocabulary_file is not None:
        content["vocabulary"] = content_hash(vocabulary_path(config.vocabulary_file))
    return hashlib.sha256(canonical_json(content).encode()).hexdigest()


def _check_test_file(task: Task, file: DataFile) -> None:
    check_file(file)
    columns = columns_of(file) or []
    renamed = [ours for ours, theirs in (file.columns or {}).items() if theirs in columns]
    check_columns(task, [*columns, *renamed], file.name, labelled=False)


def _check_task_file(task: Task, file: DataFile) -> None:
    """Every label of a task file is read: one out of range must not surface hours later. Texts are left to prepare."""
    check_file(file)
    if file.columns is None and (columns := columns_of(file)) is not None:
        check_columns(task, columns, file.name)
    if not check_labels(task, labels_of(file, task.label_column), file.name):
        raise ValueError(f"{file.name}: no row of task {task.name} has a label; expected at least one with text and label")
