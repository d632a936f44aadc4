"""Batches for masked-language modelling, as pure functions of seed and position: a resumed run reads the same ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from fffsweep.pipeline.order import epoch_order

Ids = NDArray[np.int64]


class MaskedBatch(NamedTuple):
    """inputs [batch, length] with tokens hidden; positions [asked], flat into inputs; labels [asked], the tokens hidden there."""

    inputs: Ids
    positions: Ids
    labels: Ids


@dataclass(frozen=True)
class Masking:
    """Which tokens are asked, and what stands in their place.

    In each sequence `share` of its length is drawn among the tokens that are not special, the same number in every sequence as
    far as it has that many: 80 % of them are replaced by [MASK], 10 % by any token, 10 % stay.
    Source: Devlin et al. 2019, section 3.1; share and fixed number: Geiping & Goldstein 2022, arXiv 2212.14034.
    """

    mask_id: int
    special_ids: tuple[int, ...]
    vocabulary_size: int
    share: float

    def apply(self, sequences: NDArray[Any], seed: int, position: int) -> MaskedBatch:
        """Mask sequences [batch, length]; `position`, the first one's place in the run, and `seed` decide everything."""
        rng = np.random.Generator(np.random.Philox(key=[seed, position]))
        inputs = sequences.astype(np.int64)
        asked = max(1, round(self.share * inputs.shape[1]))
        order = rng.random(inputs.shape)
        order[np.isin(inputs, self.special_ids)] = 2.0  # after every token that may be asked
        chosen = np.sort(np.argpartition(order, asked - 1, axis=1)[:, :asked], axis=1)
        chosen_flat = (chosen + inputs.shape[1] * np.arange(len(inputs))[:, None]).ravel()
        positions = chosen_flat[order.ravel()[chosen_flat] < 2.0]
        labels = inputs.ravel()[positions]
        kind = rng.random(len(positions))
        anything = rng.integers(self.vocabulary_size, size=len(positions))
        inputs.ravel()[positions] = np.where(kind < 0.8, self.mask_id, np.where(kind < 0.9, anything, labels))
        return MaskedBatch(inputs, positions, labels)


class Reading:
    """Order in which a corpus [sequences, length] is read: every sequence once an epoch, each epoch in an order of its own."""

    def __init__(self, corpus: NDArray[Any], seed: int) -> None:
        self.corpus, self.seed = corpus, seed

    def rows(self, position: int, count: int) -> NDArray[Any]:
        """The `count` sequences that come after the first `position` of the run."""
        where = np.arange(position, position + count)
        epochs, places = np.divmod(where, len(self.corpus))
        chosen = np.empty(count, np.int64)
        for epoch in np.unique(epochs):
            here = epochs == epoch
            chosen[here] = epoch_order(len(self.corpus), self.seed, int(epoch))[places[here]]
        return self.corpus[chosen]


def unigram_loss(corpus: NDArray[Any], labels: Ids, vocabulary_size: int, special_ids: Sequence[int] = (), limit: int = 1 << 26) -> float:
    """Cross-entropy, in nats, of predicting every label by the token frequencies of the first `limit` tokens of a corpus, add-one
    smoothed: the plateau that a model stands on until it reads context. `special_ids` are never asked, hence never predicted."""
    sequences = corpus[: max(1, limit // corpus.shape[1])]
    counts = np.ones(vocabulary_size)
    step = max(1, (1 << 22) // corpus.shape[1])
    for start in range(0, len(sequences), step):
        counts += np.bincount(sequences[start : start + step].ravel(), minlength=vocabulary_size)
    counts[list(special_ids)] = 0
    return float(np.log(counts.sum()) - np.log(counts[labels]).mean())
