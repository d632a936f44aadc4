"""Time of one layer over another's: every implementation gated against the reference, then timed alternating in one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import cycle
from typing import Any

import torch
from torch import Tensor

from fffsweep.kernels import timing
from fffsweep.kernels.gate import candidates, passes
from fffsweep.kernels.layer import LayerWeights, random_layer
from fffsweep.kernels.registry import Implementation
from fffsweep.kernels.verify import Verdict

__all__ = ["Comparison", "LayerWeights", "compare_layers", "layer_call", "random_layer"]

MODEL_LAYERS = 12  # "cold" cycles the weights of this many layers through the cache, as an encoder does
COLD_BYTES = 512 << 20  # more than any cache: copies of a dense layer, which is read as a whole, need be no more
MOST_BYTES = 5 << 30  # of copies
DENSE_TOKENS = 1024  # a dense layer's time a token changes little beyond, so longer batches are not timed for it
PROBE_TOKENS = 128  # in larger batches than those, implementations take part that keep up in one of this size
FAR_BEHIND = 20.0
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


@dataclass(frozen=True)
class Contender:
    """An implementation, what the gate says of it, and a call to time if it may be timed; `left_out` says why a sound one is not."""

    implementation: Implementation
    verdict: Verdict
    call: Callable[[], object] | None
    left_out: str | None

    @property
    def name(self) -> str:
        """Name of the implementation."""
        return self.implementation.name


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

    Each call has other tokens, unless a batch is large. `mode`: "hot" calls one copy of the weights, "cold" cycles twelve.
    `direction`: "forward", or "train" for forward and backward.
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
            exact = [each for each in candidates(weights, DTYPES[dtype], backward=direction == "train") if not each.bits8]
            batches = batches_of(saved, weights, tokens, seed)
            found = contenders(exact, weights, batches, DTYPES[dtype], mode=mode, direction=direction, seed=seed)
            quick = {each.name: each.call for each in found if each.call is not None}
            if not quick:
                reasons = "; ".join(f"{each.name}: {each.verdict.reason}" for each in found)
                raise RuntimeError(f"no implementation of the {side} {weights.shape.layout} passed the gate: {reasons}")
            with as_used(direction):
                fast, once = timing.shortlist(quick)
                series = {name: timing.summarise([seconds]) for name, seconds in once.items()}
                series |= timing.interleave({name: quick[name] for name in fast}, min_time_s=min_time_s / 8, min_rounds=3)
            calls[side] = min(series, key=lambda name: series[name].median_s), quick
            told = (row_of(each.implementation, each.verdict, series.get(each.name), tokens, each.left_out) for each in found)
            rows += [{"side": side} | row for row in told]
        chosen = {side: quick[name] for side, (name, quick) in calls.items()}
        with as_used(direction):
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


def contenders(
    chosen: Sequence[Implementation],
    weights: LayerWeights,
    batches: Sequence[Tensor],
    dtype: torch.dtype,
    *,
    mode: str = "hot",
    direction: str = "forward",
    seed: int = 0,
) -> list[Contender]:
    """`chosen` implementations of a layer as contenders on `batches` [tokens, hidden] each; call it under `timing.pinned`.

    In large batches only those are gated and called that are not `FAR_BEHIND` in a small one, where they are gated too.
    """
    rounded, backward = weights.to(dtype), direction == "train"
    probe, copies = [batches[0][:PROBE_TOKENS].to(dtype)], copies_of(rounded, mode)

    def held(each: Implementation, x: Tensor) -> Contender:
        return Contender(each, passes(each, weights, x, dtype, backward=backward, seed=seed), None, None)

    if len(batches[0]) <= DENSE_TOKENS:
        found = [held(each, batches[0]) for each in chosen]
    else:
        found = [held(each, probe[0]) for each in chosen]
        quick = {each.name: layer_call(each.implementation, [rounded], probe, direction) for each in found if each.verdict.verified}
        near, once = timing.shortlist(quick, within=FAR_BEHIND) if quick else ([], {})
        for index, each in enumerate(found):
            if each.name in near:
                found[index] = held(each.implementation, batches[0])
            elif each.verdict.verified:
                behind = once[each.name] / min(once.values())
                found[index] = replace(each, left_out=f"not timed: {behind:.0f} times the fastest at {len(probe[0])} tokens")
    tokens = [each.to(dtype) for each in batches]
    return [
        replace(each, call=layer_call(each.implementation, copies, tokens, direction))
        if each.verdict.verified and each.left_out is None
        else each
        for each in found
    ]


def copies_of(weights: LayerWeights, mode: str) -> list[LayerWeights]:
    """The layer once for "hot"; for "cold" as often as an encoder has layers, or a dense one so often that no cache holds them."""
    size = 2 * weights.w_in.numel() * weights.w_in.element_size()
    enough = MODEL_LAYERS if weights.shape.depth else -(-COLD_BYTES // size)
    count = 1 if mode == "hot" else max(1, min(MODEL_LAYERS, enough, MOST_BYTES // size))
    return [weights, *(weights.copy() for _ in range(count - 1))]


def batches_of(saved: Tensor, weights: LayerWeights, tokens: int, seed: int) -> list[Tensor]:
    """Batches of `tokens` rows of saved activations, drawn as by `draw`: each call has other tokens, and so other paths.

    Small batches are many, and no multiple of `MODEL_LAYERS`: one layer's weights do not meet the same tokens each time.
    """
    return list(draw(saved, weights, tokens * num_batches(tokens, weights.hidden), seed).split(tokens))


def num_batches(tokens: int, hidden: int) -> int:
    """How many batches `batches_of` makes: primes, as long as they hold no more than 48 MiB."""
    return next((count for count in (1009, 499, 251, 127, 61, 31, 13, 7, 5) if count * tokens * hidden <= 12 << 20), 1)


def as_used(direction: str) -> torch.inference_mode:
    """The mode in which calls in this direction are timed: entered once for many, as it would cost one token as much as its walk."""
    return torch.inference_mode(direction == "forward")


def layer_call(
    implementation: Implementation, copies: Sequence[LayerWeights], batches: Sequence[Tensor], direction: str = "forward"
) -> Callable[[], object]:
    """A call of no arguments that runs the layer once: each time on the next copy of its weights, and on the next batch.

    Time it under `as_used`.
    """
    if direction == "train":
        return _training_call(implementation, copies, batches)
    layers, tokens = cycle([implementation.prepare(each) for each in copies]), cycle(batches)
    return lambda: next(layers)(next(tokens))


def _training_call(implementation: Implementation, copies: Sequence[LayerWeights], batches: Sequence[Tensor]) -> Callable[[], object]:
    leaves = []
    for each in map(implementation.stores, copies):
        bias = None if each.b_in is None else each.b_in.detach().requires_grad_()
        leaves.append(replace(each, w_in=each.w_in.detach().requires_grad_(), b_in=bias, w_out=each.w_out.detach().requires_grad_()))
    layers = cycle([(each, implementation.prepare(each)) for each in leaves])
    grad_y = torch.randn(batches[0].shape, generator=torch.Generator().manual_seed(0)).to(batches[0])
    tokens = cycle([each.clone().requires_grad_() for each in batches])

    def call() -> None:
        (own, layer), x = next(layers), next(tokens)
        wanted = [each for each in (x, own.w_in, own.b_in, own.w_out) if each is not None]
        torch.autograd.grad(layer(x), wanted, grad_y)

    return call


def row_of(
    implementation: Implementation, verdict: Verdict, series: timing.Series | None, tokens: int, left_out: str | None = None
) -> dict[str, Any]:
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
        "reason": verdict.reason or left_out,
    }
