"""Token ids on disk: packed corpora and task rows as Arrow files that are read by memory map."""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fffsweep.pipeline.data.vocabulary import Encoder, Ids, id_type

_BLOCK_BYTES = 1 << 22


class Packer:
    """Cuts a stream of ids into sequences that begin with `[CLS]` and appends them to a raw file.

    A document runs on into the next sequence. What is left over at the end, less than one sequence, is dropped.
    """

    def __init__(self, path: Path, sequence_length: int, encoder: Encoder) -> None:
        self._path, self._length, self._cls = path, sequence_length, encoder.cls
        self._file = path.open("wb")
        self.dtype = id_type(encoder.vocabulary_size)
        self._left = np.empty(0, dtype=self.dtype)
        self.num_sequences = 0

    def add(self, ids: Ids) -> None:
        """Append ids, separators included."""
        stream = np.concatenate([self._left, ids])
        body = self._length - 1
        num_full = len(stream) // body
        self._left = stream[num_full * body :]
        sequences = np.empty((num_full, self._length), dtype=self.dtype)
        sequences[:, 0] = self._cls
        sequences[:, 1:] = stream[: num_full * body].reshape(num_full, body)
        self._file.write(sequences.tobytes())
        self.num_sequences += num_full

    def close(self) -> int:
        """Close the raw file; how many tokens were left over."""
        self._file.close()
        return len(self._left)


def pack(texts: Path, encoder: Encoder, packer: Packer) -> Iterator[int]:
    """Encode a file with one document a line, `[SEP]` behind each, into `packer`; yields the bytes read after each block."""
    with texts.open(encoding="utf-8", newline="\n") as file:
        while lines := file.readlines(_BLOCK_BYTES):
            packer.add(encoder.encode(lines, separated=True)[0])
            yield sum(len(line) if line.isascii() else len(line.encode()) for line in lines)


def write_corpus(raw: Path, num_sequences: int, sequence_length: int, dtype: type[np.unsignedinteger[Any]], target: Path) -> None:
    """Turn a raw file of sequences into an Arrow file with one record batch, so that it can be read as one array; memory stays flat."""
    import pyarrow as pa

    num_bytes = num_sequences * sequence_length * np.dtype(dtype).itemsize
    target.parent.mkdir(parents=True, exist_ok=True)
    with raw.open("rb") as file, mmap.mmap(file.fileno(), num_bytes, access=mmap.ACCESS_READ) as mapped:
        flat = pa.Array.from_buffers(pa.from_numpy_dtype(dtype), num_sequences * sequence_length, [None, pa.py_buffer(mapped)])
        column = pa.FixedSizeListArray.from_arrays(flat, sequence_length)
        batch = pa.record_batch([column], names=["input_ids"])
        with target.open("wb") as out:
            sink = pa.PythonFile(_Released(out, mapped), mode="w")
            with pa.ipc.new_file(sink, batch.schema) as writer:
                writer.write_batch(batch)
            sink.flush()
        del batch, column, flat, writer, sink


class _Released:
    """Writes a large mapped buffer in parts and gives the pages of each part back, so that the map never fills memory."""

    def __init__(self, out: Any, mapped: mmap.mmap) -> None:
        self._out, self._mapped = out, mapped
        self.closed = False

    def write(self, data: Any) -> int:
        view = memoryview(data)
        for start in range(0, len(view), _BLOCK_BYTES):
            self._out.write(view[start : start + _BLOCK_BYTES])
            if len(view) >= _BLOCK_BYTES and hasattr(mmap, "MADV_DONTNEED"):
                self._mapped.madvise(mmap.MADV_DONTNEED)
        return len(view)

    def tell(self) -> int:
        return int(self._out.tell())

    def flush(self) -> None:
        self._out.flush()

    def close(self) -> None:
        self.closed = True


def join_texts(first: Ids, second: Ids | None, sequence_length: int, cls: int, sep: int) -> Ids:
    """`[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` of at most `sequence_length` ids; the longer text is cut first."""
    start, end = np.array([cls], dtype=first.dtype), np.array([sep], dtype=first.dtype)
    if second is None:
        return np.concatenate([start, first[: sequence_length - 2], end])
    room = sequence_length - 3
    first = first[: max(room - len(second), min(len(first), room - room // 2))]
    return np.concatenate([start, first, end, second[: room - len(first)], end])


def write_rows(ids: Sequence[Ids], columns: Mapping[str, NDArray[Any]], target: Path) -> None:
    """Rows of one split of a task: column `input_ids` (list) and those given, one record batch."""
    import pyarrow as pa

    offsets = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in ids], out=offsets[1:])
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(np.concatenate([np.empty(0, dtype=np.uint16), *ids])))
    batch = pa.record_batch({"input_ids": column, **{name: pa.array(values) for name, values in columns.items()}})
    target.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
