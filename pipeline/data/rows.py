"""Labelled rows, whatever file they come from: checked, counted, split."""

from __future__ import annotations

import hashlib
import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, TextIO

from fffsweep.pipeline.data.text import is_valid_unicode, normalise
from fffsweep.pipeline.tasks import Task

Row = tuple[int, "Mapping[str, Any] | BadRow"]
_LISTED = 50
_MOST = 2**63  # numbers of rows are kept as int64


@dataclass(frozen=True)
class BadRow:
    """Stands where a row should be that could not be read."""

    reason: str


class BadRows:
    """Rows that were left out: every one with file, row and reason in a JSONL file, counts and the first few in memory.

    Rows count from 1; in text files they are line numbers.
    """

    def __init__(self, path: Path | None = None) -> None:
        self.counts: Counter[tuple[str, str]] = Counter()
        self.first: list[dict[str, Any]] = []
        self._file: TextIO | None = path.open("w", encoding="utf-8") if path else None

    def add(self, file: str, row: int, reason: str) -> None:
        """Leave out one row."""
        entry = {"file": file, "row": row, "reason": reason}
        self.counts[file, reason] += 1
        if len(self.first) < _LISTED:
            self.first.append(entry)
        if self._file:
            self._file.write(json.dumps(entry, ensure_ascii=True) + "\n")

    @property
    def total(self) -> int:
        """How many rows were left out."""
        return sum(self.counts.values())

    def summary(self) -> dict[str, Any]:
        """Counts by file and reason, and the first rows."""
        counts = [{"file": file, "reason": reason, "rows": count} for (file, reason), count in sorted(self.counts.items())]
        return {"total": self.total, "counts": counts, "first": self.first}

    def __enter__(self) -> BadRows:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self._file:
            self._file.close()


@dataclass
class TaskRows:
    """Rows of one split. groups: rows of equal group belong on the same side of any further split; a test split has no labels and groups.

    index: number of each row in its split as it was given: the column `idx` where there is one, else its place from 0, rows that were
    left out counted. num_read: rows read, those left out too.
    """

    texts: list[tuple[str, ...]] = field(default_factory=list)
    labels: list[float] = field(default_factory=list)
    groups: list[str] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    num_read: int = 0

    def __len__(self) -> int:
        return len(self.texts)

    def take(self, rows: Iterable[int]) -> TaskRows:
        """The given rows, in that order."""
        rows = list(rows)
        texts, labels, groups = [self.texts[i] for i in rows], [self.labels[i] for i in rows], [self.groups[i] for i in rows]
        return TaskRows(texts, labels, groups, [self.index[i] for i in rows], len(rows))

    def extend(self, other: TaskRows) -> None:
        """Append the rows of another file of the same split."""
        self.texts += other.texts
        self.labels += other.labels
        self.groups += other.groups
        self.index += other.index
        self.num_read += other.num_read


def parse_rows(task: Task, rows: Iterable[Row], file: str, bad: BadRows, group_column: str | None = None, first: int = 0) -> TaskRows:
    """Checked rows of one file. A row that is broken or lacks text or label goes to `bad`. first: rows of the split in files before.

    A row's group is its first text, or the second where that is empty, unless a column says it: pairs with one premise or question belong
    together, as equal rows do.
    Raises ValueError with file and row if a column is missing or a label is not one of the task's: then the whole file is in doubt.
    """
    parsed = TaskRows()
    checked = False
    for place, (number, row) in enumerate(rows, first):
        parsed.num_read += 1
        if isinstance(row, BadRow):
            bad.add(file, number, row.reason)
            continue
        if not checked:
            check_columns(task, row, file)
            checked = True
        texts = tuple(row.get(column) for column in task.text_columns)
        label = row.get(task.label_column)
        if reason := _fault(task, texts, label):
            bad.add(file, number, reason)
            continue
        clean = tuple(normalise(str(text)) for text in texts)
        parsed.texts.append(clean)
        parsed.labels.append(parse_label(task, label, file, number))
        parsed.groups.append(str(row.get(group_column)) if group_column else next(filter(None, clean)))
        parsed.index.append(_index(row, place))
    return parsed


def parse_unlabelled(task: Task, rows: Iterable[Row], file: str, bad: BadRows, first: int = 0) -> TaskRows:
    """All rows of one file of a test split; labels are not looked at. first: rows of the split in files before.

    A submission must have every row, so none is left out: a text that cannot be read is empty, and its row goes to `bad`. Raises
    ValueError with the file if a column of text is missing, or if a row's number cannot be known.
    """
    parsed = TaskRows()
    checked, unread = False, ""
    for place, (number, row) in enumerate(rows, first):
        parsed.num_read += 1
        texts: list[Any] = [""] * len(task.text_columns)
        reason: str | None = None
        if isinstance(row, BadRow):
            reason, row = row.reason, {}
            unread = unread or f"row {number}: {reason}"
        else:
            if not checked:
                check_columns(task, row, file, labelled=False)
                checked = True
            given = [row.get(column) for column in task.text_columns]
            faults = [_text_fault(column, text) for column, text in zip(task.text_columns, given, strict=True)]
            texts = ["" if fault else normalise(str(text)) for text, fault in zip(given, faults, strict=True)]
            reason = next(filter(None, faults), None)
        if reason:
            bad.add(file, number, f"{reason}: kept, with an empty text")
        parsed.texts.append(tuple(texts))
        parsed.index.append(_index(row, place))
    if unread and parsed.index != list(range(first, first + len(parsed))):
        raise ValueError(f"{file}, {unread}: its number is not known, since rows here are not numbered by their place; mend the row")
    return parsed


def check_index(task: Task, split: str, rows: TaskRows) -> None:
    """Raise ValueError unless a test split has rows and no two of them have the same number."""
    if not len(rows):
        raise ValueError(f"task {task.name}: no row in split {split}; expected GLUE's test rows, or no such split: remove its file")
    number, count = Counter(rows.index).most_common(1)[0]
    if count > 1:
        raise ValueError(
            f"task {task.name}: {count} rows of split {split} have the number {number}; expected each once: "
            "mend its column of numbers, or leave the column out"
        )


def _index(row: Mapping[str, Any], place: int) -> int:
    try:
        number = int(row["idx"])
    except (KeyError, TypeError, ValueError, OverflowError):
        return place
    return number if -_MOST <= number < _MOST else place


def check_columns(task: Task, columns: Iterable[str], file: str, labelled: bool = True) -> None:
    """Raise ValueError if `columns` lack one that the task reads."""
    present = list(columns)
    for column in (*task.text_columns, *((task.label_column,) if labelled else ())):
        if column not in present:
            shown = ", ".join(map(str, present[:12])) or "none"
            raise ValueError(
                f"{file}: column {column!r} of task {task.name} is missing, got columns {shown}; rename it or name it in the config"
            )


def parse_label(task: Task, value: Any, file: str, row: int) -> float:
    """Number of a label given as name, number or text, in this order. Raises ValueError with file, row and what is allowed."""
    if (name := _name(value)) in task.label_names:
        return float(task.label_names.index(name))
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if task.kind == "classification":
        allowed = ", ".join(map(str, range(task.num_labels))) if task.num_labels <= 8 else f"0 to {task.num_labels - 1}"
        if task.label_names:
            allowed += f" or {', '.join(task.label_names)}"
        sound = number.is_integer() and 0 <= number < task.num_labels
    else:
        low, high = task.label_range or (-math.inf, math.inf)
        allowed = "a finite number" if task.label_range is None else f"a number from {low:g} to {high:g}"
        sound = math.isfinite(number) and low <= number <= high
    if not sound:
        raise ValueError(f"{file}, row {row}: label {value!r} of task {task.name}: expected {allowed}; mend the row, or the task's labels")
    return number


def _fault(task: Task, texts: tuple[Any, ...], label: Any) -> str | None:
    """Why a row cannot be used, or None. One of two texts may be empty: two of QQP's training rows are so."""
    unread = next(filter(None, map(_unreadable, task.text_columns, texts)), None)
    if unread is None and not any(map(normalise, texts)):
        unread = f"{' and '.join(task.text_columns)} {'is' if len(texts) == 1 else 'are'} empty"
    return unread or (f"{task.label_column} is missing" if _is_missing(task, label) else None)


def _text_fault(column: str, text: Any) -> str | None:
    return _unreadable(column, text) or (None if normalise(text) else f"{column} is empty")


def _unreadable(column: str, text: Any) -> str | None:
    if not isinstance(text, str):
        return f"{column} is missing" if text is None else f"{column} is {type(text).__name__}, not text"
    if not is_valid_unicode(text):
        return f"{column} holds half a surrogate pair"
    return None


def _is_missing(task: Task, label: Any) -> bool:
    """A dash is how MNLI marks rows whose annotators did not agree; in a task of one's own it can be a class."""
    if isinstance(label, str):
        return label.strip() in ("", "-") and label.strip() not in task.label_names
    return label is None or (isinstance(label, float) and math.isnan(label))


def _name(value: Any) -> str:
    """A label as it stands in `label_names`: a column of whole numbers can have been read as 1 or 1.0."""
    return str(int(value) if isinstance(value, float) and value.is_integer() else value).strip()


def check_labels(task: Task, labels: Iterable[tuple[int, Any]], file: str) -> int:
    """Raise ValueError at the first label, given with its row, that is not the task's; how many labels there are."""
    count = 0
    for row, label in labels:
        if not _is_missing(task, label):
            parse_label(task, label, file, row)
            count += 1
    return count


def hold_out(rows: TaskRows, share: float, seed: int) -> tuple[TaskRows, TaskRows]:
    """(kept, held out): whole groups, drawn by the hash of seed and group, until `share` of the rows is reached; never all of them.

    Rows keep their order.
    """
    sizes = Counter(rows.groups)
    held: set[str] = set()
    num_held, target = 0, max(1, round(share * len(rows)))
    for group in sorted(sizes, key=lambda group: _draw(group, seed))[:-1]:
        if num_held >= target:
            break
        held.add(group)
        num_held += sizes[group]
    inside = [group in held for group in rows.groups]
    return rows.take(i for i, each in enumerate(inside) if not each), rows.take(i for i, each in enumerate(inside) if each)


def _draw(group: str, seed: int) -> bytes:
    return hashlib.blake2b(f"{seed}\n{group}".encode(), digest_size=16).digest()


def number_rows(rows: Iterable[Mapping[str, Any]], start: int = 1) -> Iterator[Row]:
    """Rows with their numbers."""
    yield from enumerate(rows, start)
