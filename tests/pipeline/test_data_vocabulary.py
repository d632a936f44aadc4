"""WordPiece: the same vocabulary in every process, and an encoder that agrees with the tokenizer."""

import os
import subprocess
import sys

import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from fffsweep.pipeline.data.text import normalise
from fffsweep.pipeline.data.vocabulary import SPECIAL_TOKENS, Encoder, make_tokenizer, read_vocabulary, save_tokenizer, train_vocabulary

TEXTS = [
    "The cats and the dogs were running; the cat's running dog ran.",
    "Running dogs, RUNNING cats! Naïve cafés cost 12.50 euro, don't they?",
    "the dog walks and walked, the cat talks and talked",
] * 3


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer(train_vocabulary(TEXTS, 300, lowercase=True), lowercase=True)


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return Encoder(tokenizer)


def test_vocabulary_starts_with_the_special_tokens_and_learns_words():
    pieces = train_vocabulary(TEXTS, 300, lowercase=True)
    assert tuple(pieces[:5]) == SPECIAL_TOKENS
    assert len(pieces) == len(set(pieces)) <= 300
    assert {"the", "running"} <= set(pieces)
    assert "##," not in pieces


def test_vocabulary_keeps_case_if_asked():
    assert any(piece.isupper() and len(piece) == 1 for piece in train_vocabulary(TEXTS, 300, lowercase=False))


@pytest.mark.parametrize("size", [256, 300])
def test_rare_characters_leave_room_for_words(size):
    """400 characters that are all equally rare: which are kept is decided by code point, and there are fewer than a quarter."""
    texts = [*TEXTS, "".join(chr(0x3B1 + i) + " " for i in range(400))]
    pieces = train_vocabulary(texts, size, lowercase=True)
    assert len(pieces) <= size
    assert pieces == train_vocabulary(texts, size, lowercase=True)
    assert "running" in pieces


def test_vocabulary_is_the_same_in_every_process():
    """Unequal hash seeds and thread counts: the trainer of the library alone gives another vocabulary in most processes."""
    program = (
        "import random, hashlib; from fffsweep.pipeline.data.vocabulary import train_vocabulary; rng = random.Random(1); "
        "words = [''.join(rng.choices('abcdefghij', k=rng.randint(2, 9))) for _ in range(3000)]; "
        "texts = [' '.join(rng.choices(words, k=40)) for _ in range(500)]; "
        "print(hashlib.sha256(repr(train_vocabulary(texts, 1500, True)).encode()).hexdigest())"
    )
    outputs = set()
    for seed in range(4):
        environment = {**os.environ, "PYTHONHASHSEED": str(seed), "RAYON_NUM_THREADS": str(1 + seed % 3)}
        outputs.add(subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=True).stdout)
    assert len(outputs) == 1


@given(st.lists(st.text(max_size=40), max_size=5))
@example(["The café, the CATS don't[SEP] [MASK] ##ing a##b naïve\x01cat \u200b ﬁne 中文x İ ß \u0301 " + "x" * 300])
@example(["", "a"])
def test_encoder_agrees_with_the_tokenizer(tokenizer, encoder, texts):
    texts = [normalise(text) for text in texts]
    reference = type(tokenizer).from_str(tokenizer.to_str())
    reference.encode_special_tokens = True
    expected = [reference.encode(text, add_special_tokens=False).ids for text in texts]
    assert [ids.tolist() for ids in encoder.encode_each(texts)] == expected
    flat, lengths = encoder.encode(texts, separated=True)
    assert flat.tolist() == [each for ids in expected for each in (*ids, encoder.sep)]
    assert lengths.tolist() == [len(ids) + 1 for ids in expected]


def test_encoder_forgets_and_goes_on(tokenizer, monkeypatch):
    encoder = Encoder(tokenizer)
    before, _ = encoder.encode(TEXTS, separated=True)
    monkeypatch.setattr("fffsweep.pipeline.data.vocabulary._MOST_KNOWN", 5)
    after, _ = encoder.encode(TEXTS, separated=True)
    assert np.array_equal(before, after)
    assert before.dtype == np.uint16


def test_case_is_kept_by_the_encoder_too():
    cased = make_tokenizer(train_vocabulary(TEXTS, 300, lowercase=False), lowercase=False)
    text = "The RUNNING cats, the Dogs"
    assert Encoder(cased).encode_each([text])[0].tolist() == cased.encode(text, add_special_tokens=False).ids


def test_saved_tokenizer_is_read_by_transformers(tokenizer, tmp_path):
    from transformers import AutoTokenizer, PreTrainedTokenizerFast

    save_tokenizer(tokenizer, tmp_path / "tokenizer", 64)
    loaded = PreTrainedTokenizerFast.from_pretrained(str(tmp_path / "tokenizer"))
    names = ("pad_token_id", "unk_token_id", "cls_token_id", "sep_token_id", "mask_token_id")
    assert [getattr(loaded, name) for name in names] == [0, 1, 2, 3, 4]
    assert len(loaded) == tokenizer.get_vocab_size()
    encoded = loaded("the cat", "a dog")
    assert set(encoded) == {"input_ids", "attention_mask"}
    assert loaded.decode(encoded["input_ids"]) == "[CLS] the cat [SEP] a dog [SEP]"
    assert AutoTokenizer.from_pretrained(str(tmp_path / "tokenizer"))("the cat")["input_ids"] == loaded("the cat")["input_ids"]


def test_vocabulary_file(tmp_path):
    path = tmp_path / "vocab.txt"
    path.write_text("\n".join([*SPECIAL_TOKENS, "the", "\u2028", "##s"]) + "\n")
    assert read_vocabulary(path) == [*SPECIAL_TOKENS, "the", "\u2028", "##s"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"[PAD]\n[UNK]\n[CLS]\n[SEP]\nthe\n", r"\[MASK\] is missing; expected"),
        ("\n".join([*SPECIAL_TOKENS, "the", "the"]).encode(), r"line 7: 'the' is empty or given twice"),
        ("\n".join([*SPECIAL_TOKENS, "", "the"]).encode(), r"line 6: '' is empty"),
        (b"\xff\xfe", "not UTF-8; expected"),
        (None, "No such file"),
    ],
)
def test_vocabulary_file_that_cannot_serve(tmp_path, content, message):
    path = tmp_path / "vocab.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_vocabulary(path)
    assert str(path) in str(caught.value)
