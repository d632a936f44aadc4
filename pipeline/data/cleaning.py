"""From documents to two text files, one clean document a line; bad rows, duplicates and contaminated documents are counted and left out."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import compress, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, TypeVar

import numpy as np
from numpy.typing import NDArray

from fffsweep.pipeline.data.rows import BadRow, BadRows
from fffsweep.pipeline.data.text import HeldOutSentences, SeenHashes, is_valid_unicode, normalise, text_hash
from fffsweep.pipeline.stage import StageContext, StopRequested

if TYPE_CHECKING:
    from fffsweep.pipeline.data.sources import Document
    from fffsweep.pipeline.stages.prepare import PrepareConfig

_BATCH = 1000
T = TypeVar("T")


class _Index:
    """14 bytes a document, from which `max_corpus_bytes` is drawn."""

    def __init__(self) -> None:
        self.hashes, self.sizes, self.collections = array("Q"), array("I"), array("H")
        self.names: list[str] = []

    def add(self, collection: str, value: int, size: int) -> None:
        if collection not in self.names:
            self.names.append(collection)
        self.hashes.append(value)
        self.sizes.append(size)
        self.collections.append(self.names.index(collection))


@dataclass
class CleanCorpus:
    """train, validation: files with one document a line. Counters by collection."""

    train: Path
    validation: Path
    num_read: int = 0
    num_duplicates: int = 0
    num_contaminated: int = 0
    num_over_limit: int = 0
    documents: Counter[str] = field(default_factory=Counter)
    num_bytes: Counter[str] = field(default_factory=Counter)

    def count(self, index: _Index, kept: NDArray[np.bool_]) -> None:
        """Add the kept documents of one file to the counters."""
        collections, sizes = np.array(index.collections, dtype=np.int64)[kept], np.array(index.sizes, dtype=np.int64)[kept]
        for number, name in enumerate(index.names):
            self.documents[name] += int((collections == number).sum())
            self.num_bytes[name] += int(sizes[collections == number].sum())

    def summary(self) -> dict[str, Any]:
        """What data.json says."""
        return {
            "documents_read": self.num_read,
            "duplicates": self.num_duplicates,
            "contaminated": self.num_contaminated,
            "over_limit": self.num_over_limit,
            "kept": {name: {"documents": self.documents[name], "bytes": self.num_bytes[name]} for name in sorted(self.documents)},
        }


def clean_corpus(
    documents: Iterable[Document], config: PrepareConfig, held_out: HeldOutSentences, context: StageContext, bad: BadRows
) -> CleanCorpus:
    """Normalised documents, each once, none with a sentence of a validation split, in the order they came, in train and validation.

    Validation are the documents held out as such, or else a share by content hash; memory grows by about 25 bytes a document.
    """
    corpus = CleanCorpus(context.work / "train.txt", context.work / "validation.txt")
    seen = SeenHashes()
    indices = {False: _Index(), True: _Index()}
    own_validation = False
    with _writing(corpus.train) as train, _writing(corpus.validation) as validation:
        for batch in _batches(documents):
            if context.stop_requested():
                raise StopRequested
            corpus.num_read += len(batch)
            own_validation = own_validation or batch[0].held_out
            sound = list(_sound(batch, bad))
            hashes = [text_hash(text) for _, text in sound]
            fresh = [(*each, value) for each, value, new in zip(sound, hashes, seen.add_all(hashes), strict=True) if new]
            corpus.num_duplicates += len(sound) - len(fresh)
            for document, text, value in fresh:
                is_validation = document.held_out if own_validation else (value & 0xFFFFFFFF) < config.validation_share * 2**32
                (validation if is_validation else train).write(text + "\n")
                indices[is_validation].add(document.collection, value, len(text.encode()))
    kept = _within_limit(indices, config.max_corpus_bytes, own_validation)
    for is_validation, path in ((False, corpus.train), (True, corpus.validation)):
        corpus.num_over_limit += int((~kept[is_validation]).sum())
        corpus.num_contaminated += _filter(path, kept[is_validation], held_out)
        corpus.count(indices[is_validation], kept[is_validation])
    return corpus


def _within_limit(indices: dict[bool, _Index], limit: int | None, own_validation: bool) -> dict[bool, NDArray[np.bool_]]:
    """Which documents to keep: those of lowest hash that fit into `limit` bytes together. A validation set of its own stays whole."""
    kept = {side: np.ones(len(index.hashes), dtype=bool) for side, index in indices.items()}
    drawn = [False] if own_validation else [False, True]
    if limit is not None:
        hashes = np.concatenate([np.array(indices[side].hashes, dtype=np.uint64) for side in drawn])
        sizes = np.concatenate([np.array(indices[side].sizes, dtype=np.int64) for side in drawn])
        order = np.argsort(hashes)
        num_fit = int(np.searchsorted(np.cumsum(sizes[order]), limit, side="right"))
        if num_fit < len(order):
            for side in drawn:
                kept[side] = np.array(indices[side].hashes, dtype=np.uint64) < hashes[order[num_fit]]
    return kept


def _filter(path: Path, kept: NDArray[np.bool_], held_out: HeldOutSentences) -> int:
    """Rewrite a file with the lines that are kept and not contaminated; clears `kept` at the latter and returns their number."""
    aside = path.with_suffix(".kept")
    num_contaminated = 0
    with path.open(encoding="utf-8", newline="\n") as source, _writing(aside) as target:
        for batch in _batches(compress(enumerate(source), kept.copy())):
            contaminated = held_out.found_in([line[:-1] for _, line in batch])
            num_contaminated += int(contaminated.sum())
            kept[[number for (number, _), found in zip(batch, contaminated, strict=True) if found]] = False
            target.writelines(line for (_, line), found in zip(batch, contaminated, strict=True) if not found)
    aside.replace(path)
    return num_contaminated


def _sound(batch: list[Document], bad: BadRows) -> Iterator[tuple[Document, str]]:
    for document in batch:
        if isinstance(document.text, BadRow):
            bad.add(document.file, document.row, document.text.reason)
        elif not is_valid_unicode(document.text):
            bad.add(document.file, document.row, "text holds half a surrogate pair")
        elif text := normalise(document.text):
            yield document, text
        else:
            bad.add(document.file, document.row, "text is empty")


def _batches(items: Iterable[T]) -> Iterator[list[T]]:
    stream = iter(items)
    while batch := list(islice(stream, _BATCH)):
        yield batch


def _writing(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")
