"""Rows and documents of Parquet, JSONL, CSV, TSV and text files; whoever calls says how a file's lines or tables are read."""

from __future__ import annotations

import codecs
import csv
import functools
import hashlib
import json
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from fffsweep.pipeline.data.rows import BadRow, Row

if TYPE_CHECKING:
    import pyarrow as pa

KINDS = {".parquet": "parquet", ".jsonl": "jsonl", ".csv": "csv", ".tsv": "tsv", ".txt": "text"}
_BUFFER_BYTES = 1 << 20
_LONGEST_DOCUMENT = 100_000
_LONGEST_RECORD = 100_000  # lines


@dataclass(frozen=True)
class DataFile:
    """One file. name: how it is called in messages and in data.json, free of the machine's folders.

    columns: what its columns are called by us, where that differs: names as in the header, or numbers where there is no header.
    """

    path: Path
    name: str
    columns: Mapping[str, str | int] | None = None

    @property
    def kind(self) -> str:
        """Parquet, jsonl, csv, tsv or text."""
        return KINDS[self.path.suffix.lower()]

    @property
    def headless(self) -> bool:
        """Whether the first line is a row already."""
        return any(isinstance(column, int) for column in (self.columns or {}).values())


class Reader(Protocol):
    """How bytes become lines and tables: plainly while planning, lines through `datasets` in prepare."""

    def lines(self, path: Path) -> Iterator[str]:
        """Lines of a UTF-8 file with their ends."""
        ...

    def tables(self, path: Path, columns: list[str] | None) -> Iterator[pa.Table]:
        """A Parquet file in parts, `columns` of it or all."""
        ...


class PlainReader:
    """Reads without `datasets`; for planning, which must not import it. Memory does not grow with a file."""

    def lines(self, path: Path) -> Iterator[str]:
        with path.open(encoding="utf-8") as file:
            yield from file

    def tables(self, path: Path, columns: list[str] | None) -> Iterator[pa.Table]:
        import pyarrow as pa
        import pyarrow.parquet as pq

        # by default all that was read of a file is kept until its end
        for batch in pq.ParquetFile(path, pre_buffer=False, buffer_size=_BUFFER_BYTES).iter_batches(1000, columns=columns):
            yield pa.Table.from_batches([batch])


def check_file(file: DataFile) -> None:
    """Raise ValueError with one line if a file is not readable, no Parquet, or not UTF-8 from end to end."""
    try:
        if file.kind == "parquet":
            _parquet_columns(file)
            return
        with file.path.open("rb") as stream:
            _check_utf8(stream, file.name)
    except OSError as error:
        raise ValueError(f"{file.name}: {error.strerror or error}; expected a file that can be read") from None


def content_hash(path: Path) -> str:
    """SHA-256 of a file, remembered in this process while size and time of change stay."""
    state = path.stat()
    return _sha256_of(str(path), state.st_size, state.st_mtime_ns)


@functools.cache
def _sha256_of(path: str, _size: int, _mtime_ns: int) -> str:
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def columns_of(file: DataFile) -> list[str] | None:
    """Columns by the header or the first good line; None for plain text and where there is no header."""
    if file.kind == "parquet":
        return _parquet_columns(file)
    if file.kind == "text" or file.headless:
        return None
    if file.kind == "jsonl":
        first = next((row for _, row in rows_of(file, PlainReader()) if not isinstance(row, BadRow)), {})
        return list(first)
    return next(_fields(file, PlainReader().lines(file.path)), (1, []))[1]


def rows_of(file: DataFile, reader: Reader) -> Iterator[Row]:
    """Numbered rows with our column names; what cannot be read as a row comes as BadRow.

    Rows count from 1, line numbers in text formats. A TSV file has no quoting, as GLUE's; a CSV file has RFC 4180's.
    """
    for number, row in _raw_rows(file, reader):
        if file.columns is None or isinstance(row, BadRow):
            yield number, row
        else:
            renamed = {ours: row[str(theirs)] for ours, theirs in file.columns.items() if str(theirs) in row}
            yield number, {**row, **renamed}


def labels_of(file: DataFile, column: str) -> Iterator[tuple[int, Any]]:
    """Numbered values of one column; rows that cannot be read are passed over. Reads plainly, for planning."""
    if file.kind == "parquet" and file.columns is None:
        number = 0
        for table in PlainReader().tables(file.path, [column]):
            for value in table.column(column).to_pylist():
                number += 1
                yield number, value
    else:
        yield from ((number, row.get(column)) for number, row in rows_of(file, PlainReader()) if not isinstance(row, BadRow))


def documents_of(file: DataFile, reader: Reader, column: str) -> Iterator[tuple[int, str | BadRow]]:
    """Numbered documents: one a row, or one a paragraph of a text file (paragraphs end at a blank line)."""
    if file.kind == "text":
        yield from _paragraphs(reader.lines(file.path))
    elif file.kind == "parquet":
        number = 0
        for table in reader.tables(file.path, [column]):
            for text in table.column(column).to_pylist():
                number += 1
                yield number, text if isinstance(text, str) else BadRow(f"{column} is missing" if text is None else f"{column} is no text")
    else:
        for number, row in rows_of(file, reader):
            if isinstance(row, BadRow):
                yield number, row
                continue
            text = row.get(column)
            yield number, text if isinstance(text, str) else BadRow(f"{column} is missing" if text is None else f"{column} is no text")


def _raw_rows(file: DataFile, reader: Reader) -> Iterator[Row]:
    if file.kind == "parquet":
        number = 0
        for table in reader.tables(file.path, None):
            for row in table.to_pylist():
                number += 1
                yield number, row
    elif file.kind == "jsonl":
        for number, line in enumerate(reader.lines(file.path), 1):
            if line.strip():
                yield number, _json_row(line)
    elif file.kind == "text":
        raise ValueError(f"{file.name}: plain text has no columns; expected Parquet, JSONL, CSV or TSV")
    else:
        yield from _delimited(file, reader.lines(file.path))


def _json_row(line: str) -> Mapping[str, Any] | BadRow:
    try:
        row = json.loads(line.rstrip("\n"))
    except json.JSONDecodeError as error:
        return BadRow(f"no JSON: {error.msg} at column {error.colno}")
    except RecursionError:
        return BadRow("no JSON that can be read: nested too deep")
    return row if isinstance(row, dict) else BadRow(f"expected a JSON object, got {type(row).__name__}")


def _delimited(file: DataFile, lines: Iterable[str]) -> Iterator[Row]:
    header: list[str] | None = None
    for number, fields in _fields(file, lines):
        if isinstance(fields, BadRow):
            yield number, fields
            continue
        if header is None and not file.headless:
            header = fields
            continue
        if header is None:
            header = [str(position) for position in range(len(fields))]
        if len(fields) != len(header):
            yield number, BadRow(f"{len(fields)} fields, expected {len(header)}")
        else:
            yield number, dict(zip(header, fields, strict=True))


def _fields(file: DataFile, lines: Iterable[str]) -> Iterator[tuple[int, Any]]:
    """Line number and fields of each row that is not blank; BadRow where quoting is broken."""
    if file.kind == "tsv":
        for number, line in enumerate(lines, 1):
            if text := line.lstrip("\ufeff").rstrip("\n"):
                yield number, text.split("\t")
        return
    csv.field_size_limit(sys.maxsize)
    source = _RecordLines(line.lstrip("\ufeff") if number == 0 else line for number, line in enumerate(lines))
    reader = csv.reader(source, strict=True)
    start = 1
    while True:
        source.record.clear()
        try:
            fields = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            yield start, BadRow(f"no CSV: {error}")
            source.give_back()
            start += 1
            continue
        if fields:
            yield start, fields
        start += len(source.record)


class _RecordLines(Iterator[str]):
    """Lines for a CSV reader. `record` holds those of the record being read: one whose quoting is broken costs its first line alone.

    A quote that is never closed would take all that follows; it counts as broken after `_LONGEST_RECORD` lines.
    """

    def __init__(self, lines: Iterable[str]) -> None:
        self._lines = iter(lines)
        self._given_back: deque[str] = deque()
        self.record: list[str] = []

    def __next__(self) -> str:
        if len(self.record) >= _LONGEST_RECORD:
            raise csv.Error(f"a quote is not closed within {_LONGEST_RECORD} lines")
        line = self._given_back.popleft() if self._given_back else next(self._lines)
        self.record.append(line)
        return line

    def give_back(self) -> None:
        """Have the record's lines but the first read again."""
        self._given_back.extendleft(reversed(self.record[1:]))


def _paragraphs(lines: Iterable[str]) -> Iterator[tuple[int, str]]:
    """Paragraphs with the number of their first line; one longer than 100,000 characters is cut at a line end."""
    start, length = 1, 0
    paragraph: list[str] = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            if not paragraph:
                start = number
            paragraph.append(line)
            length += len(line)
        if paragraph and (not line.strip() or length > _LONGEST_DOCUMENT):
            yield start, "".join(paragraph)
            paragraph, length = [], 0
    if paragraph:
        yield start, "".join(paragraph)


def _parquet_columns(file: DataFile) -> list[str]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return list(pq.ParquetFile(file.path).schema_arrow.names)
    except pa.ArrowInvalid as error:
        raise ValueError(f"{file.name}: {str(error).splitlines()[0]}; expected a Parquet file: fetch or write it again") from None


def _check_utf8(stream: Any, name: str) -> None:
    decoder = codecs.getincrementaldecoder("utf-8")()
    num_lines = 1
    while True:
        block = stream.read(1 << 22)
        held, _ = decoder.getstate()
        try:
            decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            line = num_lines + (held + block)[: error.start].count(b"\n")
            byte = (held + block)[error.start]
            raise ValueError(
                f"{name}, line {line}: byte 0x{byte:02x} is not UTF-8; expected UTF-8 text: convert it, such as with iconv"
            ) from None
        if not block:
            return
        num_lines += block.count(b"\n")
