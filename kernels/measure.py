"""Time of one layer over another's: every implementation gated against the reference, then timed alternating in one process."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from fffsweep.kernels import registry, timing
from fffsweep.kernels.layer import LayerWeights, random_layer
from fffsweep.kernels.registry import Implementation
from fffsweep.kernels.verify import Verdict, verify

__all__ = ["Comparison", "LayerWeights", "compare_layers", "gate", "layer_call", "random_layer"]

MODEL_LAYERS = 12  # "cold" cycles the weights of this many layers through the cache, as an encoder does
COLD_BYTES = 2 << 30  # of copies at most; a layer that large leaves the caches by itself
GATE_NODES = 20_000  # visited rows that the reference walks in a gate
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


@dataclass(frozen=True)
class Comparison:
    """Median time of the candidate's best verified implementation over that of the reference's, from alternating samples.

    `rel_time_q20`, `rel_time_q80`: quantiles of the ratio of samples taken one after the other. `path_flips`: tokens of the gate
    whose path differs from the float64 path of the float32 weights. `verified`: both chosen implementations passed the gate.
    `rows`: one dict for each implementation that was gated (side, implementation, ns_per_token, q20, q80, verified, path_flips,
    worst, reason, noisy). `load`: as `timing.load`, before the timing.
    """

    rel_time: float
    rel_time_q20: float
    rel_time_q80: float
    ns_per_token: float
    reference_ns_per_token: float
    implementation: str
    reference_implementation: str
    path_flips: int
    verified: bool
    load: float
    noisy: bool
    rows: list[dict[str, Any]]


def compare_layers(
    candidate: LayerWeights,
    reference: LayerWeights,
    x_candidate: Tensor,
    x_reference: Tensor,
    *,
    tokens: int,
    dtype: str = "float32",
    threads: int = 1,
    mode: str = "cold",
    direction: str = "forward",
    min_time_s: float = 0.5,
    seed: int = 0,
) -> Comparison:
    """Gate and time `candidate` against `reference` on `tokens` drawn, by `seed`, from saved activations x_* [any, hidden].

    `mode`: "hot" calls one copy of the weights, "cold" cycles twelve. `direction`: "forward", or "train" for forward and backward.
    Raises ValueError for an argument that does not fit, RuntimeError if no implementation of a side passes the gate.
    """
    for name, value, allowed in (
        ("dtype", dtype, tuple(DTYPES)),
        ("mode", mode, ("hot", "cold")),
        ("direction", direction, ("forward", "train")),
    ):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    sides = {"candidate": (candidate, x_candidate), "reference": (reference, x_reference)}
    load, rows, calls = timing.load(), [], {}
    with timing.pinned(threads):
        for side, (weights, saved) in sides.items():
            x = draw(saved, weights, tokens, seed)
            verdicts = gate(weights, x, DTYPES[dtype], backward=direction == "train", seed=seed)
            sound = [implementation for implementation, verdict in verdicts if verdict.verified and not implementation.bits8]
            if not sound:
                told = "; ".join(f"{implementation.name}: {verdict.reason}" for implementation, verdict in verdicts)
                raise RuntimeError(f"no implementation of the {side} {weights.shape.layout} passed the gate: {told}")
            quick = {
                each.name: layer_call(each, weights.to(DTYPES[dtype]), x.to(DTYPES[dtype]), mode=mode, direction=direction)
                for each in sound
            }
            fast, once = timing.shortlist(quick)
            series = {name: timing.summarise([seconds]) for name, seconds in once.items()}
            series |= timing.interleave({name: quick[name] for name in fast}, min_time_s=min_time_s / 8, min_rounds=3)
            calls[side] = min(series, key=lambda name: series[name].median_s), quick
            for implementation, verdict in verdicts:
                rows.append({"side": side} | row_of(implementation, verdict, series.get(implementation.name), tokens))
        chosen = {side: quick[name] for side, (name, quick) in calls.items()}
        final = timing.interleave(chosen, min_time_s=min_time_s, min_rounds=7)
    return comparison(final, {side: name for side, (name, _) in calls.items()}, rows, tokens, load)


def comparison(final: dict[str, timing.Series], chosen: dict[str, str], rows: list[dict[str, Any]], tokens: int, load: float) -> Comparison:
    """What alternating samples of the sides "candidate" and "reference" amount to; `chosen` are the implementations that were timed."""
    mine, theirs = final["candidate"], final["reference"]
    ratios = [a / b for a, b in zip(mine.samples_s, theirs.samples_s, strict=True)]
    q20, _, q80 = timing.quantiles_of(ratios)
    name = chosen["candidate"]
    return Comparison(
        rel_time=mine.median_s / theirs.median_s,
        rel_time_q20=q20,
        rel_time_q80=q80,
        ns_per_token=1e9 * mine.median_s / tokens,
        reference_ns_per_token=1e9 * theirs.median_s / tokens,
        implementation=name,
        reference_implementation=chosen["reference"],
        path_flips=next(row["path_flips"] for row in rows if row["side"] == "candidate" and row["implementation"] == name),
        verified=True,
        load=load,
        noisy=mine.noisy or theirs.noisy,
        rows=rows,
    )


def draw(saved: Tensor, weights: LayerWeights, tokens: int, seed: int) -> Tensor:
    """`tokens` rows of saved activations, float32 [any, hidden]: without repetition while there are enough, the same for a seed."""
    if saved.dim() != 2 or saved.shape[1] != weights.hidden or len(saved) == 0:
        raise ValueError(f"activations have shape {list(saved.shape)}: expected [at least 1, {weights.hidden}], the layer's hidden size")
    if tokens < 1:
        raise ValueError(f"tokens={tokens}: expected an integer >= 1")
    order = torch.randperm(len(saved), generator=torch.Generator().manual_seed(seed))
    return saved.float()[order.repeat(-(-tokens // len(saved)))[:tokens]].contiguous()


def gate(
    weights: LayerWeights,
    x: Tensor,
    dtype: torch.dtype,
    *,
    backward: bool = False,
    seed: int = 0,
    variants: bool = False,
    slow: bool = False,
    device: str = "cpu",
) -> list[tuple[Implementation, Verdict]]:
    """Verdicts on every applicable implementation in `dtype` on `device`, on x's first tokens and on fresh random ones of the same scale.

    The number of tokens keeps the reference's walk below `GATE_NODES` rows. Forced `variants` and `slow` ones only on demand.
    """
    count = min(len(x), max(2, min(48, GATE_NODES // weights.shape.active_width)))
    fresh = torch.randn(max(2, count // 2), weights.hidden, generator=torch.Generator().manual_seed(seed + 1)) * x.float().std(
        unbiased=False
    )
    held = torch.cat([x[:count].float(), fresh]).to(device, dtype)
    rounded = weights.to(dtype).on(device)
    exact = None if dtype in (torch.float32, torch.float64) else weights
    applicable = registry.applicable(rounded, dtype, device, backward=backward)
    chosen = [each for each in applicable if (variants or each.variant_of is None) and (slow or not each.slow)]
    return [(each, verify(each, rounded, held, backward=backward, exact=exact)) for each in chosen]


def layer_call(
    implementation: Implementation, weights: LayerWeights, x: Tensor, *, mode: str = "hot", direction: str = "forward"
) -> Callable[[], object]:
    """A call of no arguments that runs the layer on x once; "cold" goes to the next copy of the weights at each call."""
    size = 2 * weights.w_in.numel() * weights.w_in.element_size()
    copies = 1 if mode == "hot" else max(1, min(MODEL_LAYERS, COLD_BYTES // size))
    if direction == "train":
        return _training_call(implementation, weights, x, copies)
    layers = cycle([implementation.prepare(weights if copy == 0 else weights.copy()) for copy in range(copies)])

    def call() -> Tensor:
        with torch.inference_mode():
            return next(layers)(x)

    return call


def _training_call(implementation: Implementation, weights: LayerWeights, x: Tensor, copies: int) -> Callable[[], object]:
    leaves = []
    for _ in range(copies):
        own = weights.copy()
        bias = None if own.b_in is None else own.b_in.requires_grad_()
        leaves.append(replace(own, w_in=own.w_in.requires_grad_(), b_in=bias, w_out=own.w_out.requires_grad_()))
    layers = cycle([(each, implementation.prepare(each)) for each in leaves])
    grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(0)).to(x)
    tokens = x.clone().requires_grad_()

    def call() -> None:
        own, layer = next(layers)
        wanted = [each for each in (tokens, own.w_in, own.b_in, own.w_out) if each is not None]
        torch.autograd.grad(layer(tokens), wanted, grad_y)

    return call


def row_of(implementation: Implementation, verdict: Verdict, series: timing.Series | None, tokens: int) -> dict[str, Any]:
    """A row of `Comparison.rows`, without its side."""
    scale = 1e9 / tokens
    return {
        "implementation": implementation.name,
        "ns_per_token": None if series is None else series.median_s * scale,
        "q20": None if series is None else series.q20_s * scale,
        "q80": None if series is None else series.q80_s * scale,
        "noisy": None if series is None else series.noisy,
        "verified": verdict.verified,
        "path_flips": verdict.path_flips,
        "worst": verdict.worst,
        "reason": verdict.reason,
    }
