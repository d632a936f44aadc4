"""From documents to two text files, one clean document a line; bad rows, duplicates and contaminated documents are counted and left out."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

import numpy as np

from fffsweep.pipeline.data.rows import BadRow, BadRows
from fffsweep.pipeline.data.text import HeldOutSentences, SeenHashes, is_valid_unicode, normalise, text_hash
from fffsweep.pipeline.stage import StageContext, StopRequested

if TYPE_CHECKING:
    from fffsweep.pipeline.data.sources import Document
    from fffsweep.pipeline.stages.prepare import PrepareConfig

_BATCH = 1000


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

    def summary(self) -> dict[str, Any]:
        """What data.json says."""
        return {
            "documents_read": self.num_read,
            "duplicates": self.num_duplicates,
            "contaminated": self.num_contaminated,
            "over_limit": self.num_over_limit,
            "kept": {name: {"documents": self.documents[name], "bytes": self.num_bytes[name]} for name in sorted(self.documents)},
        }


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
            contaminated = held_out.found_in([text for _, text, _ in fresh])
            corpus.num_contaminated += int(contaminated.sum())
            for (document, text, value), is_contaminated in zip(fresh, contaminated.tolist(), strict=True):
                if is_contaminated:
                    continue
                is_validation = document.held_out if own_validation else (value & 0xFFFFFFFF) < config.validation_share * 2**32
                (validation if is_validation else train).write(text + "\n")
                indices[is_validation].add(document.collection, value, len(text.encode()))
    _limit(corpus, indices, own_validation, config.max_corpus_bytes)
    return corpus


def _limit(corpus: CleanCorpus, indices: dict[bool, _Index], own_validation: bool, limit: int | None) -> None:
    """Keep the documents of lowest hash that fit into `limit` bytes together, and count what is kept.

    A validation set of its own stays whole.
    """
    drawn = [indices[False]] if own_validation else list(indices.values())
    threshold = None
    if limit is not None:
        hashes = np.concatenate([np.array(index.hashes, dtype=np.uint64) for index in drawn])
        sizes = np.concatenate([np.array(index.sizes, dtype=np.int64) for index in drawn])
        order = np.argsort(hashes, kind="stable")
        num_fit = int(np.searchsorted(np.cumsum(sizes[order]), limit, side="right"))
        threshold = int(hashes[order][num_fit]) if num_fit < len(hashes) else None
    for is_validation, path in ((False, corpus.train), (True, corpus.validation)):
        index = indices[is_validation]
        keep = np.ones(len(index.hashes), dtype=bool)
        if threshold is not None and not (is_validation and own_validation):
            keep = np.array(index.hashes, dtype=np.uint64) < np.uint64(threshold)
            _keep_lines(path, keep)
            corpus.num_over_limit += int((~keep).sum())
        collections = np.array(index.collections, dtype=np.int64)[keep]
        sizes = np.array(index.sizes, dtype=np.int64)[keep]
        for number, name in enumerate(index.names):
            corpus.documents[name] += int((collections == number).sum())
            corpus.num_bytes[name] += int(sizes[collections == number].sum())


def _keep_lines(path: Path, keep: Iterable[bool]) -> None:
    aside = path.with_suffix(".kept")
    with path.open(encoding="utf-8", newline="\n") as source, _writing(aside) as target:
        target.writelines(line for line, kept in zip(source, keep, strict=True) if kept)
    aside.replace(path)


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


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    stream = iter(documents)
    while batch := list(islice(stream, _BATCH)):
        yield batch


def _writing(path: Path) -> TextIO:
    return path.open("w", encoding="utf-8", newline="\n")
