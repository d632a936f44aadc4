"""The least time that a layer could take on this machine: its arithmetic at peak speed, or its weights at the memory's speed.

Source: Williams et al. 2009, Roofline: An Insightful Visual Performance Model, CACM 52(4).
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from fffsweep.kernels import timing
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.measure import DTYPES
from fffsweep.kernels.torch_forms import masked_paths

_SIDE = 768  # of the matrices that show the peak: past every blocking, and done in tens of milliseconds
_REPEATS = 5
_CHUNK = 1024  # tokens whose paths are walked at once


@dataclass(frozen=True)
class Peaks:
    """What a machine reached: floating-point operations of a dense matrix product and bytes read from memory, a second."""

    flops_per_s: float
    bytes_per_s: float


@cache
def machine_peaks(dtype: str, threads: int) -> Peaks:
    """Best of several measurements here, once a process. The faster of `dtype` and float32: no kernel must be slower than either."""
    with timing.pinned(threads), torch.inference_mode():
        speeds = []
        for kind in {DTYPES[dtype], torch.float32}:
            a = torch.ones(_SIDE, _SIDE, dtype=kind)
            speeds.append(2 * _SIDE**3 / _least_s(lambda a=a: torch.mm(a, a)))  # type: ignore[misc]
        return Peaks(max(speeds), timing.read_bytes_per_s())


def roofline_ns(weights: LayerWeights, x: Tensor, dtype: str, threads: int, mode: str) -> float:
    """Least nanoseconds a token of a layer on activations x [tokens, hidden].

    Cold: the larger of its arithmetic at peak speed and of its traffic, which is every node that one of the tokens visits, once, and
    the tokens in and out. Hot: its arithmetic alone, for its weights are in the cache.
    """
    peaks, shape, tokens = machine_peaks(dtype, threads), weights.shape, len(x)
    arithmetic_s = 4 * shape.active_width * weights.hidden * tokens / peaks.flops_per_s
    if mode == "hot":
        return 1e9 * arithmetic_s / tokens
    size = torch.empty(0, dtype=DTYPES[dtype]).element_size()
    traffic = size * weights.hidden * 2 * (num_visited(weights, x) + tokens)
    return 1e9 * max(arithmetic_s, traffic / peaks.bytes_per_s) / tokens


def num_visited(weights: LayerWeights, x: Tensor) -> int:
    """Nodes of all trees that at least one of the tokens x [tokens, hidden] visits."""
    shape = weights.shape
    if shape.depth == 0:
        return shape.width
    seen = torch.zeros(shape.trees, shape.nodes, dtype=torch.bool)
    for part in x.split(_CHUNK):
        visited = masked_paths(part, weights.w_in, weights.b_in, shape)
        seen.scatter_(1, visited.transpose(0, 1).flatten(1), True)
    return int(seen.sum())


def _least_s(call: Callable[[], object]) -> float:
    call()
    least = float("inf")
    for _ in range(_REPEATS):
        start = time.perf_counter()
        call()
        least = min(least, time.perf_counter() - start)
    return least
