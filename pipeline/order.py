"""The order in which training reads: a function of seed and epoch, so that a checkpoint needs no data loader."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from numpy.typing import NDArray


@lru_cache(maxsize=2)
def epoch_order(count: int, seed: int, epoch: int) -> NDArray[np.int64]:
    """Places 0 to count - 1 in the order of one epoch, not to be written to. Kept for the steps that follow, and for those of the next."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(count)
    order.flags.writeable = False
    return order
