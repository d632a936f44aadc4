"""The order in which training reads: a function of seed and epoch, so that a checkpoint needs no data loader."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

SORTED_BATCHES = 50  # rows of so many batches are sorted together; more would bring the same rows together in every epoch


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Places 0 to count - 1 in the order of one epoch, not to be written to. Kept for the steps that follow, and for those of the next."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    order.flags.writeable = False
    return order


def order_by_length(lengths: NDArray[np.int64], batch_size: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """As `epoch_order` of rows of these lengths, in batches of like length, the batches by chance; one that is not full comes last."""
    order = epoch_order(len(lengths), seed, epoch)
    num_full = len(order) // batch_size
    stretch = SORTED_BATCHES * batch_size
    parts = [order[start : min(start + stretch, num_full * batch_size)] for start in range(0, num_full * batch_size, stretch)]
    alike = [part[np.argsort(lengths[part], kind="stable")] for part in parts]
    chance = np.random.Generator(np.random.Philox(key=[seed, epoch]).jumped())  # other numbers than the order's own
    batches = np.concatenate([order[:0], *alike]).reshape(num_full, batch_size)[chance.permutation(num_full)]
    return np.concatenate([batches.ravel(), order[num_full * batch_size :]])
