"""Cleaning: normal form, duplicates, contamination."""

import re

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from fffsweep.pipeline.data.text import HeldOutSentences, SeenHashes, is_valid_unicode, normalise, text_hash

WORDS = st.lists(st.sampled_from(["a", "b", "Cat", "dog", "é", "x9"]), max_size=30)


def test_normal_form():
    assert normalise("  cafe\u0301 \r\n\tau\u00a0lait\x00 \u200bnow\ufeff ") == "café au lait now"
    assert normalise("\x07\u200b \n") == ""


@given(st.text())
def test_normal_form_is_stable_and_one_line(text):
    once = normalise(text)
    assert normalise(once) == once
    assert once == once.strip()
    assert not re.search(r"[\n\r\t\x00-\x1f]|  ", once)


def test_half_a_surrogate_pair_is_no_text():
    assert not is_valid_unicode("a\ud800")
    assert is_valid_unicode("a\U00010000")


def test_content_hash_is_the_same_on_every_machine():
    assert text_hash("the cat") == 3042635075010022360
    assert text_hash("the cat") != text_hash("the cat ")


@given(st.lists(st.lists(st.integers(0, 40), max_size=20), max_size=8))
def test_seen_hashes_are_a_set(batches):
    seen, reference = SeenHashes(least=5), set()
    for batch in batches:
        expected = []
        for value in batch:
            expected.append(value not in reference)
            reference.add(value)
        assert seen.add_all(batch) == expected


def naive(sentences, document):
    """Whether any sentence of 8 words or more is among the document's words, word for word."""
    words = " ".join(re.findall(r"\w+", document.lower()))
    parts = [part for sentence in sentences for part in (sentence, *re.split(r"(?<=[.!?])\s+", sentence))]
    wanted = [" ".join(found) for part in parts if len(found := re.findall(r"\w+", part.lower())) >= 8]
    return any(f" {each} " in f" {words} " for each in wanted)


@given(st.lists(WORDS, max_size=4), st.lists(WORDS, max_size=6))
def test_contamination_equals_a_naive_search(sentences, documents):
    sentences, documents = [" ".join(words) for words in sentences], [" ".join(words) for words in documents]
    found = HeldOutSentences(sentences).found_in(documents)
    assert found.tolist() == [naive(sentences, document) for document in documents]


def test_contamination_sees_through_case_and_punctuation_but_not_across_documents():
    held_out = HeldOutSentences(["A man, tall and thin, is playing the old guitar. Short one."])
    assert held_out.num_sentences == 2
    documents = [
        "Yes: a MAN tall and thin is - playing the old guitar! he said",
        "a man tall and thin is playing",
        "the old guitar",
        "a man tall and thin is playing the old piano",
        "",
    ]
    assert held_out.found_in(documents).tolist() == [True, False, False, False, False]
    assert HeldOutSentences([]).found_in(documents).tolist() == [False] * 5
    assert held_out.found_in([]).dtype == np.bool_
