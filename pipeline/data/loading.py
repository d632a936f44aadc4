"""The only importer of `datasets`: files and hub data sets as streams, read in parts."""

from __future__ import annotations

import glob
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fffsweep.pipeline.data.rows import BadRow, BadRows, Row, TaskRows, parse_rows, parse_unlabelled
from fffsweep.pipeline.data.tables import PlainReader
from fffsweep.pipeline.tasks import AX, Task

if TYPE_CHECKING:
    import pyarrow as pa

_BATCH = 1000
_CHUNK_BYTES = 1 << 20


class DatasetsReader(PlainReader):
    """Lines of files through `datasets`, streamed; `cache` takes what that library writes aside.

    Parquet is read plainly: streamed through `datasets` 5.2, with and without Arrow's reading in advance, memory grows with the file.
    """

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def lines(self, path: Path) -> Iterator[str]:
        for table in self._stream("text", path, keep_linebreaks=True, chunksize=_CHUNK_BYTES):
            yield from table.column("text").to_pylist()

    def _stream(self, kind: str, path: Path, **options: Any) -> Iterator[pa.Table]:
        import datasets

        # an unescaped bracket would be a pattern, and a pattern that matches nothing an empty data set
        stream = datasets.load_dataset(
            kind, data_files=[glob.escape(str(path))], split="train", streaming=True, cache_dir=str(self._cache), **options
        )
        yield from stream.with_format("arrow").iter(batch_size=_BATCH)


class Hub:
    """Data sets `owner/name[:config]@revision` of a hub."""

    def __init__(self, cache: Path) -> None:
        self._cache = cache

    def documents(self, name: str, column: str) -> Iterator[tuple[int, str | BadRow]]:
        """Numbered texts of the split `train`. Raises ValueError if the column is missing."""
        number = 0
        for table in self._stream(name, None, "train"):
            if column not in table.column_names:
                raise ValueError(
                    f"{name}: column {column!r} is missing, got columns {', '.join(table.column_names)}; set text_column to one of them"
                )
            for text in table.column(column).to_pylist():
                number += 1
                yield number, text if isinstance(text, str) else BadRow(f"{column} is missing" if text is None else f"{column} is no text")

    def task_rows(self, name: str, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        """Rows of `train` and of the validation splits of the config that bears the task's name."""
        return {
            split: parse_rows(task, self._rows(name, task.name, split), f"{name}, {task.name} {split}", bad)
            for split in ("train", *task.validation_splits)
        }

    def test_rows(self, name: str, task: Task, bad: BadRows) -> dict[str, TaskRows]:
        """Rows of the task's test splits that the data set has; the diagnostic rows are a config of their own."""
        found = {}
        for split in task.test_splits:
            config, theirs = (AX, "test") if split == AX else (task.name, split)
            if theirs in self._split_names(name, config, split == AX):
                found[split] = parse_unlabelled(task, self._rows(name, config, theirs), f"{name}, {config} {theirs}", bad)
        return found

    def _split_names(self, name: str, config: str, optional: bool) -> list[str]:
        """Splits of a config; none if it is `optional` and not there."""
        try:
            return list(self._load(name, config, None))
        except ValueError as error:
            if optional and "not found. Available:" in str(error):
                return []
            raise

    def _rows(self, name: str, config: str, split: str) -> Iterator[Row]:
        number = 0
        for table in self._stream(name, config, split):
            for row in table.to_pylist():
                number += 1
                yield number, row

    def _stream(self, name: str, config: str | None, split: str) -> Iterator[pa.Table]:
        yield from self._load(name, config, split).with_format("arrow").iter(batch_size=_BATCH)

    def _load(self, name: str, config: str | None, split: str | None) -> Any:
        """A split of a data set, or all its splits by name, as streams."""
        import datasets

        dataset, _, revision = name.partition("@")
        dataset, _, named = dataset.partition(":")
        try:
            return datasets.load_dataset(
                dataset, config or named or None, revision=revision, split=split, streaming=True, cache_dir=str(self._cache)
            )
        except (OSError, ValueError, datasets.exceptions.DatasetsError) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0]
            what = f"split {split}" if split else "splits"
            raise ValueError(
                f"{name}: not read ({reason}); expected a data set on the hub: check name, revision, {what} and network"
            ) from None
