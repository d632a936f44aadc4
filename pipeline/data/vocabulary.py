"""WordPiece: train a vocabulary or load one, write the tokenizer, and encode long text fast.

Lower-casing, accents, Chinese characters and punctuation as in BERT; no token types. As crammed BERT does, the vocabulary is
trained on the corpus (Geiping & Goldstein 2022, arXiv 2212.14034).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, repeat
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from tokenizers import Tokenizer

SPECIAL_TOKENS = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
_MOST_CHARACTERS = 1000
_MOST_KNOWN = 1_000_000
_ASCII_PARTS = re.compile(r"[0-9A-Za-z]+|[^0-9A-Za-z]")
_END = ""  # no word is empty, so it can stand for the end of a text

Ids = NDArray[np.unsignedinteger[Any]]


def train_vocabulary(texts: Iterable[str], size: int, lowercase: bool) -> list[str]:
    """At most `size` word pieces trained on `texts` (read twice, so no iterator), special tokens first; equal in every run.

    The library's trainer numbers the characters inside words in the order of a hash map that differs from process to process, and
    breaks ties by these numbers. Here every `##character` has its number before training starts, which leaves nothing to chance.
    """
    from tokenizers import trainers

    tokenizer = _pieces(list(SPECIAL_TOKENS), lowercase)
    characters = _characters(texts, tokenizer, min(_MOST_CHARACTERS, size // 4))
    inside = [f"##{character}" for character in characters if len(tokenizer.pre_tokenizer.pre_tokenize_str(f"a{character}")) == 1]
    trainer = trainers.WordPieceTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[*SPECIAL_TOKENS, *inside],
        initial_alphabet=characters,
        limit_alphabet=len(characters),
        show_progress=False,
    )
    with single_threaded():
        tokenizer.train_from_iterator(texts, trainer)
    ids = tokenizer.get_vocab()
    return sorted(ids, key=ids.__getitem__)


def read_vocabulary(path: Path) -> list[str]:
    """Pieces of a vocab.txt, line number = id, or of a tokenizer.json. Raises ValueError with file and line if it cannot serve."""
    try:
        text = path.expanduser().read_text(encoding="utf-8")
        pieces = _pieces_of_json(text) if path.suffix == ".json" else text.rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        reason = "not UTF-8" if isinstance(error, UnicodeDecodeError) else error.strerror
        raise ValueError(f"vocabulary_file: {path}: {reason}; expected a vocab.txt with one piece a line") from None
    for token in SPECIAL_TOKENS:
        if token not in pieces:
            raise ValueError(f"vocabulary_file: {path}: {token} is missing; expected {', '.join(SPECIAL_TOKENS)} among its lines")
    repeated = [piece for piece, count in Counter(pieces).items() if count > 1 or not piece]
    if repeated:
        line = max(number for number, piece in enumerate(pieces, 1) if piece == repeated[0])
        raise ValueError(f"vocabulary_file: {path}, line {line}: {repeated[0]!r} is empty or given twice; expected every piece once")
    return pieces


def vocabulary_hash(pieces: Sequence[str]) -> str:
    """SHA-256 of a vocabulary: equal for equal pieces in equal order, whatever file they come from."""
    return hashlib.sha256("\n".join(pieces).encode()).hexdigest()


def _pieces_of_json(text: str) -> list[str]:
    ids: dict[str, int] = json.loads(text)["model"]["vocab"]
    return sorted(ids, key=ids.__getitem__)


def make_tokenizer(pieces: list[str], lowercase: bool) -> Tokenizer:
    """The tokenizer of a vocabulary: `[CLS] a [SEP]`, pairs `[CLS] a [SEP] b [SEP]`, token type 0 throughout."""
    from tokenizers import decoders, processors

    tokenizer = _pieces(pieces, lowercase)
    tokenizer.add_special_tokens(list(SPECIAL_TOKENS))
    special = [(token, tokenizer.token_to_id(token)) for token in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", "[CLS] $A [SEP] $B:0 [SEP]:0", special)
    tokenizer.decoder = decoders.WordPiece(prefix="##")
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path, sequence_length: int) -> None:
    """Write `folder` as PreTrainedTokenizerFast.from_pretrained reads it."""
    from transformers import PreTrainedTokenizerFast

    names = {f"{token[1:-1].lower()}_token": token for token in SPECIAL_TOKENS}
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=sequence_length,
        model_input_names=["input_ids", "attention_mask"],
        **names,
    ).save_pretrained(str(folder))


class Encoder:
    """Token ids of normalised text, without special tokens; the same ids as the tokenizer gives, many times faster.

    BERT's normaliser and pre-tokeniser never look across white space, so each space-separated word is tokenised once and its ids
    are kept in a table. Text that looks like a special token is text. cls, sep: ids of these tokens; vocabulary_size: number of ids.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        from tokenizers import Tokenizer as Copy

        self._tokenizer = Copy.from_str(tokenizer.to_str())
        self._tokenizer.encode_special_tokens = True
        self._lowercase = bool(tokenizer.normalizer.lowercase)
        ids = tokenizer.get_vocab()
        self.cls, self.sep, self.vocabulary_size = ids["[CLS]"], ids["[SEP]"], len(ids)
        self._numbers: dict[str, int] = {}
        self._starts = self._lengths = np.empty(0, dtype=np.int64)
        self._table: Ids = np.empty(0, dtype=id_type(self.vocabulary_size))
        self._forget()

    def encode(self, texts: Sequence[str], separated: bool = False) -> tuple[Ids, NDArray[np.int64]]:
        """Ids of all texts in a row, and how many belong to each text; `separated` puts a `[SEP]` behind each."""
        if len(self._numbers) > _MOST_KNOWN:
            self._forget()
        words = [text.split() for text in texts]
        if separated:
            for each in words:
                each.append(_END)
        counts = np.array([len(each) for each in words], dtype=np.int64)
        flat = list(chain.from_iterable(words))
        numbers = np.fromiter(map(self._numbers.get, flat, repeat(-1)), dtype=np.int64, count=len(flat))
        unknown = np.flatnonzero(numbers < 0)
        self._learn(list(dict.fromkeys(flat[at] for at in unknown)))
        numbers[unknown] = [self._numbers[flat[at]] for at in unknown]
        ends = np.cumsum(self._lengths[numbers])
        before = np.concatenate([[0], ends])
        shift = np.repeat(self._starts[numbers] - before[:-1], self._lengths[numbers])
        return self._table[shift + np.arange(before[-1])], np.diff(before[np.concatenate([[0], np.cumsum(counts)])])

    def encode_each(self, texts: Sequence[str]) -> list[Ids]:
        """Ids of each text."""
        ids, lengths = self.encode(texts)
        return np.split(ids, np.cumsum(lengths)[:-1]) if len(lengths) else []

    def _learn(self, new: list[str]) -> None:
        """Append words to the table."""
        if not new:
            return
        parts = [self._parts(word) for word in new]
        unknown = [part for part in set(chain.from_iterable(parts)) if part not in self._pieces]
        with single_threaded():
            encodings = self._tokenizer.encode_batch_fast(unknown, add_special_tokens=False)
        self._pieces.update((part, encoding.ids) for part, encoding in zip(unknown, encodings, strict=True))
        found = [[each for part in of_word for each in self._pieces[part]] for of_word in parts]
        self._numbers.update(zip(new, range(len(self._numbers), len(self._numbers) + len(new)), strict=True))
        lengths = np.array([len(ids) for ids in found], dtype=np.int64)
        self._starts = np.concatenate([self._starts, len(self._table) + np.cumsum(lengths) - lengths])
        self._lengths = np.concatenate([self._lengths, lengths])
        self._table = np.concatenate([self._table, np.fromiter(chain.from_iterable(found), dtype=self._table.dtype)])

    def _parts(self, word: str) -> list[str]:
        """What BERT's pre-tokeniser makes of a plain word, so that `film,` and `Film` share their ids; any other word is left whole."""
        if not (word.isascii() and word.isprintable()):
            return [word]
        return _ASCII_PARTS.findall(word.lower() if self._lowercase else word)

    def _forget(self) -> None:
        """An empty table: it must not grow with the corpus."""
        self._numbers = {_END: 0}
        self._pieces: dict[str, list[int]] = {}
        self._starts, self._lengths = np.zeros(1, dtype=np.int64), np.ones(1, dtype=np.int64)
        self._table = np.array([self.sep], dtype=self._table.dtype)


def id_type(vocabulary_size: int) -> type[np.unsignedinteger[Any]]:
    """uint16 where every id fits, else uint32."""
    return np.uint16 if vocabulary_size <= 1 << 16 else np.uint32


@contextlib.contextmanager
def single_threaded() -> Iterator[None]:
    """Keep `tokenizers` on the calling thread: the stage owns no more, and a pool must not outlive a fork."""
    before = os.environ.get("TOKENIZERS_PARALLELISM")
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ["TOKENIZERS_PARALLELISM"]
        else:
            os.environ["TOKENIZERS_PARALLELISM"] = before


def _pieces(pieces: list[str], lowercase: bool) -> Tokenizer:
    from tokenizers import Tokenizer as Make
    from tokenizers import models, normalizers, pre_tokenizers

    tokenizer = Make(models.WordPiece({piece: number for number, piece in enumerate(pieces)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=lowercase)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer


def _characters(texts: Iterable[str], tokenizer: Tokenizer, most: int) -> list[str]:
    """The `most` characters found in most texts, ties by code point, sorted by code point."""
    raw: Counter[str] = Counter()
    for text in texts:
        raw.update(set(text))
    counts: Counter[str] = Counter()
    for character, count in raw.items():
        for normal in set(tokenizer.normalizer.normalize_str(character)) - {" "}:
            counts[normal] += count
    return sorted(sorted(counts, key=lambda character: (-counts[character], character))[:most])
