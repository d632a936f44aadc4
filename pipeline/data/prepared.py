"""Reads what stage `prepare` wrote. Torch-free and memory-mapped: a corpus larger than memory opens at once."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fffsweep.pipeline.tasks import Task

if TYPE_CHECKING:
    import pyarrow as pa
    from transformers import PreTrainedTokenizerFast


class Sequences(Sequence[NDArray[Any]]):
    """Token ids of every row, each a read-only view into the file."""

    def __init__(self, offsets: NDArray[Any], values: NDArray[Any]) -> None:
        self.offsets, self.values = offsets, values

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, row: Any) -> Any:
        if isinstance(row, slice):
            return [self[each] for each in range(*row.indices(len(self)))]
        if not -len(self) <= row < len(self):
            raise IndexError(f"row {row} of {len(self)}")
        row = row % len(self)
        return self.values[self.offsets[row] : self.offsets[row + 1]]

    def __iter__(self) -> Iterator[NDArray[Any]]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class Unlabelled:
    """Rows of one split. input_ids: `[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]`, not padded; index: each row's number, int64."""

    input_ids: Sequences
    index: NDArray[Any]

    def __len__(self) -> int:
        return len(self.index)


@dataclass(frozen=True)
class Split(Unlabelled):
    """Rows of a split with labels: int64, or float32 for regression."""

    labels: NDArray[Any]


@dataclass(frozen=True)
class PreparedTask:
    """A task and its splits: `train`, `selection` (held out of train) and the task's validation splits.

    tests: those of the task's test splits that were there.
    """

    task: Task
    splits: dict[str, Split]
    tests: dict[str, Unlabelled]


class PreparedData:
    """The artifacts of one prepare run below `folder`."""

    def __init__(self, folder: Path) -> None:
        self.folder = Path(folder)

    def tokenizer(self) -> PreTrainedTokenizerFast:
        """The tokenizer that every sequence here was made with."""
        from transformers import PreTrainedTokenizerFast

        tokenizer: PreTrainedTokenizerFast = PreTrainedTokenizerFast.from_pretrained(str(self.folder / "tokenizer"))
        return tokenizer

    def corpus(self, split: str) -> NDArray[Any]:
        """Packed token ids of `train` or `validation` [num_sequences, sequence_length], uint16 or uint32, read-only memory map."""
        batch = _open(self.folder / "corpus" / f"{split}.arrow")
        column = batch.column("input_ids")
        flat: NDArray[Any] = column.values.to_numpy(zero_copy_only=True)
        return flat.reshape(len(column), column.type.list_size)

    def task_names(self) -> list[str]:
        """Tasks that were prepared."""
        return sorted(path.parent.name for path in (self.folder / "tasks").glob("*/task.json"))

    def task(self, name: str) -> PreparedTask:
        """A prepared task. Raises ValueError with those there are."""
        if name not in self.task_names():
            raise ValueError(f"task {name!r} was not prepared: expected one of {', '.join(self.task_names()) or 'none'}; add it to prepare")
        folder = self.folder / "tasks" / name
        description = json.loads((folder / "task.json").read_text())
        task = _task(description["task"])
        names = ["train", "selection", *task.validation_splits]
        tests = {split: path for split in task.test_splits if (path := folder / f"{split}.arrow").exists()}
        return PreparedTask(
            task,
            {split: _split(folder / f"{split}.arrow") for split in names},
            {split: Unlabelled(*_rows(_open(path))) for split, path in tests.items()},
        )

    def description(self) -> dict[str, Any]:
        """data.json: what was read, under which licences, counts, the first bad rows."""
        description: dict[str, Any] = json.loads((self.folder / "data.json").read_text())
        return description


def _open(path: Path) -> pa.RecordBatch:
    """The one record batch of an Arrow file, memory-mapped."""
    import pyarrow as pa

    return pa.ipc.open_file(pa.memory_map(str(path))).get_batch(0)


def _split(path: Path) -> Split:
    batch = _open(path)
    return Split(*_rows(batch), batch.column("label").to_numpy(zero_copy_only=True))


def _rows(batch: pa.RecordBatch) -> tuple[Sequences, NDArray[Any]]:
    column = batch.column("input_ids")
    ids = Sequences(column.offsets.to_numpy(), column.values.to_numpy(zero_copy_only=True))
    if "index" not in batch.schema.names:  # stage prepare of version 1, whose results an older study still reads
        return ids, np.arange(len(ids))
    return ids, batch.column("index").to_numpy(zero_copy_only=True)


def _task(fields: dict[str, Any]) -> Task:
    values: dict[str, Any] = {name: tuple(value) if isinstance(value, list) else value for name, value in fields.items()}
    return Task(**values)
