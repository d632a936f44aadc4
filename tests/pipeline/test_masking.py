"""Masked batches: pure functions of seed and position."""

import numpy as np
import pytest

from fffsweep.pipeline.masking import Masking, Reading, unigram_loss

MASK, SPECIAL, VOCABULARY = 4, (0, 1, 2, 3, 4), 1000
MASKING = Masking(MASK, SPECIAL, VOCABULARY, 0.25)


@pytest.fixture
def sequences():
    ids = np.random.default_rng(0).integers(5, VOCABULARY, size=(64, 128)).astype(np.uint16)
    ids[:, 0], ids[:, 40] = 2, 3
    return ids


def test_a_quarter_of_each_sequence_is_asked(sequences):
    batch = MASKING.apply(sequences, 0, 0)
    rows, columns = np.divmod(batch.positions, 128)
    assert np.bincount(rows).tolist() == [32] * 64
    assert len(np.unique(batch.positions)) == len(batch.positions)
    assert not np.isin(columns, (0, 40)).any()
    assert (batch.labels == sequences.ravel()[batch.positions]).all()
    untouched = np.ones(sequences.size, bool)
    untouched[batch.positions] = False
    assert (batch.inputs.ravel()[untouched] == sequences.ravel()[untouched]).all()


def test_eighty_ten_ten(sequences):
    batch = MASKING.apply(np.tile(sequences, (8, 1)), 0, 0)
    shown = batch.inputs.ravel()[batch.positions]
    count = len(shown)
    masked, kept = (shown == MASK).mean(), (shown == batch.labels).mean()
    assert abs(masked - 0.8) < 4 * (0.8 * 0.2 / count) ** 0.5
    assert abs(kept - 0.1) < 4 * (0.1 * 0.9 / count) ** 0.5 + 0.1 / VOCABULARY


def test_seed_and_position_decide(sequences):
    first, again = MASKING.apply(sequences, 7, 5), MASKING.apply(sequences, 7, 5)
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    for other in (MASKING.apply(sequences, 8, 5), MASKING.apply(sequences, 7, 6)):
        assert (other.positions != first.positions).any()


def test_sequences_of_special_tokens_ask_for_nothing():
    ids = np.full((2, 16), 3, np.uint16)
    ids[1, 4:6] = 100
    batch = MASKING.apply(ids, 0, 0)
    assert sorted(batch.positions.tolist()) == [20, 21]


def test_reading_takes_every_sequence_once_an_epoch():
    corpus = np.arange(10)[:, None]
    reading = Reading(corpus, seed=3)
    whole = reading.rows(0, 30).ravel().reshape(3, 10)
    assert all(sorted(epoch) == list(range(10)) for epoch in whole.tolist())
    assert (whole[0] != whole[1]).any()
    assert (reading.rows(7, 9).ravel() == whole.ravel()[7:16]).all()
    assert (Reading(corpus, seed=4).rows(0, 30).ravel() != whole.ravel()).any()


def test_unigram_loss_is_the_entropy_of_the_frequencies():
    corpus = np.array([[0, 0, 0, 1] * 250], np.uint16)
    share = np.array([751, 251]) / 1002
    assert unigram_loss(corpus, np.array([0, 1]), 2) == pytest.approx(-np.log(share).mean())


def test_tokens_that_are_never_asked_have_no_part_in_the_unigram_loss():
    corpus = np.array([[2, 0, 0, 1], [2, 1, 0, 0]])
    expected = unigram_loss(corpus[:, 1:], np.array([0, 1]), 2)
    assert unigram_loss(corpus, np.array([0, 1]), 3, special_ids=(2,)) == pytest.approx(expected)
