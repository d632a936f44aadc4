"""Token ids on disk: packed corpora and task rows as Arrow files that are read by memory map."""

from __future__ import annotations

import mmap
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from fffsweep.pipeline.data.vocabulary import Encoder

_BLOCK_BYTES = 1 << 22


def id_type(vocabulary_size: int) -> type[np.unsignedinteger[Any]]:
    """uint16 where every id fits, else uint32."""
    return np.uint16 if vocabulary_size <= 1 << 16 else np.uint32


class Packer:
    """Fills sequences `[CLS] ids...` from a stream of documents with `[SEP]` behind each, and appends them to a raw file.

    A document runs on into the next sequence. What is left over at the end, less than one sequence, is dropped.
    """

    def __init__(self, path: Path, sequence_length: int, cls: int, sep: int, dtype: type[np.unsignedinteger[Any]]) -> None:
        self._path, self._length, self._cls, self._sep, self._dtype = path, sequence_length, cls, sep, dtype
        self._file = path.open("wb")
        self._left = np.empty(0, dtype=dtype)
        self.num_sequences = 0

    def add(self, documents: Iterable[list[int]]) -> None:
        """Append documents."""
        stream: list[int] = []
        for ids in documents:
            stream += ids
            stream.append(self._sep)
        ids_in_order = np.concatenate([self._left, np.array(stream, dtype=self._dtype)])
        body = self._length - 1
        num_full = len(ids_in_order) // body
        self._left = ids_in_order[num_full * body :]
        sequences = np.empty((num_full, self._length), dtype=self._dtype)
        sequences[:, 0] = self._cls
        sequences[:, 1:] = ids_in_order[: num_full * body].reshape(num_full, body)
        self._file.write(sequences.tobytes())
        self.num_sequences += num_full

    def close(self) -> int:
        """Close the raw file; how many tokens were left over."""
        self._file.close()
        return len(self._left)


def pack(texts: Path, encoder: Encoder, packer: Packer) -> Iterator[int]:
    """Encode a file with one document a line into `packer`; yields the bytes read after each block."""
    with texts.open(encoding="utf-8", newline="\n") as file:
        while lines := file.readlines(_BLOCK_BYTES):
            packer.add(encoder.encode(lines))
            yield sum(len(line.encode()) for line in lines)


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


def join_pair(first: list[int], second: list[int] | None, sequence_length: int, cls: int, sep: int) -> list[int]:
    """`[CLS] a [SEP]` or `[CLS] a [SEP] b [SEP]` of at most `sequence_length` ids; the longer text is cut first."""
    if second is None:
        return [cls, *first[: sequence_length - 2], sep]
    room = sequence_length - 3
    if len(first) + len(second) > room:
        half = room // 2
        num_first = max(room - len(second), min(len(first), room - half))
        first, second = first[:num_first], second[: room - num_first]
    return [cls, *first, sep, *second, sep]


def write_rows(ids: Sequence[list[int]], labels: NDArray[Any], dtype: type[np.unsignedinteger[Any]], target: Path) -> None:
    """Rows of one split of a task: columns `input_ids` (list) and `label`, one record batch."""
    import pyarrow as pa

    offsets = np.zeros(len(ids) + 1, dtype=np.int32)
    np.cumsum([len(row) for row in ids], out=offsets[1:])
    values = np.fromiter((each for row in ids for each in row), dtype=dtype, count=int(offsets[-1]))
    column = pa.ListArray.from_arrays(pa.array(offsets), pa.array(values))
    batch = pa.record_batch([column, pa.array(labels)], names=["input_ids", "label"])
    target.parent.mkdir(parents=True, exist_ok=True)
    with pa.OSFile(str(target), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)
