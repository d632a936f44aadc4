"""The gate before any timing: an implementation must be right on the very batch, in the very calls, that are timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from fffsweep.kernels import registry
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.registry import Implementation
from fffsweep.kernels.verify import Verdict, verify

GATE_TOKENS = 48
GATE_NODES = 20_000  # visited rows that the reference walks in a gate


def candidates(
    weights: LayerWeights, dtype: torch.dtype, *, backward: bool = False, variants: bool = False, slow: bool = False, device: str = "cpu"
) -> list[Implementation]:
    """Implementations that can run these weights in `dtype` on `device`; forced `variants` and `slow` ones only on demand."""
    applicable = registry.applicable(weights, dtype, device, backward=backward)
    return [each for each in applicable if (variants or each.variant_of is None) and (slow or not each.slow)]


def passes(
    each: Implementation,
    weights: LayerWeights,
    x: Tensor,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    seed: int = 0,
    device: str = "cpu",
) -> Verdict:
    """Verdict on an implementation that computes all of x [tokens, hidden] in `dtype` on `device`, as it does when it is timed.

    Held against the reference are some of the tokens, wherever they stand in the batch, every other one of them replaced by a fresh
    random one of the same scale. Where the batch is one token, that and fresh ones are held, each by a call. Their number keeps the
    reference below `GATE_NODES` rows.
    """
    generator = torch.Generator().manual_seed(seed + 1)
    count = max(2, min(GATE_TOKENS, GATE_NODES // weights.shape.active_width))
    alone = len(x) == 1
    places = torch.zeros(count, dtype=torch.int64) if alone else torch.randperm(len(x), generator=generator)[:count]
    held = x[places.to(x.device)].float().cpu()
    fresh = held[1 :: 1 if alone else 2]
    fresh.copy_(float(x.float().std(unbiased=False)) * torch.randn(fresh.shape, generator=generator))
    timed = one_by_one(each) if alone else amid(each, x.to(device, dtype), places.to(device))
    exact = None if dtype in (torch.float32, torch.float64) else weights
    return verify(timed, weights.to(dtype).on(device), held.to(device, dtype), backward=backward, exact=exact)


def gate(
    weights: LayerWeights, x: Tensor, dtype: torch.dtype, *, backward: bool = False, seed: int = 0, device: str = "cpu"
) -> list[tuple[Implementation, Verdict]]:
    """Verdicts on every candidate."""
    chosen = candidates(weights, dtype, backward=backward, device=device)
    return [(each, passes(each, weights, x, dtype, backward=backward, seed=seed, device=device)) for each in chosen]


def amid(each: Implementation, x: Tensor, places: Tensor) -> Implementation:
    """`each`, given tokens [len(places), hidden], computes all of x with these in their places: a batch as large as the timed one."""

    def whole(tokens: Tensor) -> Tensor:
        return x.index_copy(0, places, tokens)

    def prepare(weights: LayerWeights) -> Callable[[Tensor], Tensor]:
        layer = each.prepare(weights)
        return lambda tokens: layer(whole(tokens))[places]

    own = each.paths
    return replace(each, prepare=prepare, paths=None if own is None else lambda weights, tokens: own(weights, whole(tokens))[places])


def one_by_one(each: Implementation) -> Implementation:
    """`each`, called for every token by itself."""

    def prepare(weights: LayerWeights) -> Callable[[Tensor], Tensor]:
        layer = each.prepare(weights)
        return lambda tokens: torch.cat([layer(token) for token in tokens.split(1)])

    own = each.paths
    if own is None:
        return replace(each, prepare=prepare)
    return replace(each, prepare=prepare, paths=lambda weights, tokens: torch.cat([own(weights, token) for token in tokens.split(1)]))
