"""Clean text: normal form, exact duplicates, and sentences of the tasks' validation splits that pretraining must not see."""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections.abc import Iterable, Sequence
from itertools import repeat
from typing import Any

import numpy as np
from numpy.typing import NDArray

# C0 and C1 controls that are no white space, soft hyphen, zero-width and directional marks, byte order mark
_INVISIBLE = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\xad\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
_WORD = re.compile(r"\w+")
_WORD_OR_END = re.compile(r"\w+|\n")
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
LEAST_WORDS = 8
_END = 1 << 32
_BASE = np.uint64(0x9E3779B97F4A7C15)


def normalise(text: str) -> str:
    """NFC, without control and invisible characters, every run of white space one space, none at the ends."""
    if not text.isascii() and not unicodedata.is_normalized("NFC", text):
        text = unicodedata.normalize("NFC", text)
    return " ".join(_INVISIBLE.sub("", text).split())


def is_valid_unicode(text: str) -> bool:
    """Whether the text can be written as UTF-8; half a surrogate pair, as JSON can hold it, cannot."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def text_hash(text: str) -> int:
    """64 bits of the content; equal on every machine."""
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "little")


class SeenHashes:
    """A set of 64-bit hashes at about 8 bytes each: a small hash set before sorted arrays, merged when it has grown."""

    def __init__(self, least: int = 1 << 16) -> None:
        self.least = least
        self._recent: set[int] = set()
        self._sorted = np.empty(0, dtype=np.uint64)

    def add_all(self, hashes: Sequence[int]) -> list[bool]:
        """Add each in turn; whether it was new then."""
        if not hashes:
            return []
        wanted = np.array(hashes, dtype=np.uint64)
        known = _is_in(wanted, self._sorted)
        new = []
        for value, is_known in zip(hashes, known.tolist(), strict=True):
            new.append(not is_known and value not in self._recent)
            if not is_known:
                self._recent.add(value)
        if len(self._recent) > max(self.least, len(self._sorted) // 4):
            recent = np.fromiter(self._recent, dtype=np.uint64, count=len(self._recent))
            self._sorted = np.sort(np.concatenate([self._sorted, recent]))
            self._recent = set()
        return new


class HeldOutSentences:
    """Sentences of at least 8 words, compared as lower-case words without punctuation, found anywhere inside a document.

    A rolling hash over 8 word ids finds candidates; each is then compared word for word, so no document is dropped by chance.
    """

    def __init__(self, texts: Iterable[str]) -> None:
        self._ids: dict[str, int] = {"\n": _END}
        self._sentences: dict[int, list[tuple[int, ...]]] = {}
        known: set[tuple[str, ...]] = set()
        for text in texts:
            for part in (text, *_SENTENCE_END.split(text)):
                words = tuple(_WORD.findall(part.lower()))
                if len(words) >= LEAST_WORDS and words not in known:
                    known.add(words)
                    ids = tuple(self._ids.setdefault(word, len(self._ids)) for word in words)
                    start = int(_windows(np.array(ids[:LEAST_WORDS], dtype=np.uint64))[0])
                    self._sentences.setdefault(start, []).append(ids)
        self._starts = np.sort(np.fromiter(self._sentences, dtype=np.uint64, count=len(self._sentences)))
        self.num_sentences = len(known)

    def found_in(self, documents: Sequence[str]) -> NDArray[np.bool_]:
        """For each document, whether it contains one of the sentences."""
        found = np.zeros(len(documents), dtype=bool)
        if not self._sentences or not documents:
            return found
        # documents hold no line end, so one can mark theirs
        words = _WORD_OR_END.findall("\n".join([*documents, ""]).lower())
        ids = np.fromiter(map(self._ids.get, words, repeat(0)), dtype=np.uint64, count=len(words))
        ends = np.flatnonzero(ids == _END)
        if len(ids) < LEAST_WORDS:
            return found
        windows = _windows(ids)
        for at in np.flatnonzero(_is_in(windows, self._starts)):
            for sentence in self._sentences[int(windows[at])]:
                if tuple(ids[at : at + len(sentence)].tolist()) == sentence:
                    found[np.searchsorted(ends, at, side="right")] = True
        return found


def _windows(ids: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """Hash of every run of 8 ids."""
    count = len(ids) - LEAST_WORDS + 1
    value = np.zeros(count, dtype=np.uint64)
    for offset in range(LEAST_WORDS):
        value = value * _BASE + ids[offset : offset + count]
    return value


def _is_in(values: NDArray[Any], sorted_values: NDArray[Any]) -> NDArray[np.bool_]:
    if len(sorted_values) == 0:
        return np.zeros(len(values), dtype=bool)
    at = np.searchsorted(sorted_values, values)
    result: NDArray[np.bool_] = sorted_values[np.minimum(at, len(sorted_values) - 1)] == values
    return result
