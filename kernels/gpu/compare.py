"""Time of one layer over another's on a CUDA device: gated there against the reference, then timed alternating in one process."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fffsweep.kernels import timing as host
from fffsweep.kernels.gate import gate
from fffsweep.kernels.gpu import timing
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.measure import Comparison, as_used, comparison, draw, layer_call, row_of

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Clock = Callable[[dict[str, timing.Call], str, float], dict[str, host.Series]]


def compare_on_gpu(
    candidate: LayerWeights,
    reference: LayerWeights,
    x_candidate: Tensor,
    x_reference: Tensor,
    *,
    tokens: int,
    dtype: str = "float32",
    mode: str = "cold",
    min_time_s: float = 0.5,
    seed: int = 0,
    device: str = "cuda",
    clock: Clock = timing.time_layers,
) -> Comparison:
    """Gate and time `candidate` against `reference` on `tokens` drawn, by `seed`, from saved activations x_* [any, hidden].

    `mode`: "hot" runs the layer again and again, "cold" overwrites the device's caches before each sample. float32 is timed without
    TF32. `device` and `clock` stand in for a GPU where there is none. Implementations that compile or crawl take no part.
    Raises ValueError for an argument that does not fit, RuntimeError if no implementation of a side passes the gate.
    """
    for name, value, allowed in (("dtype", dtype, tuple(DTYPES)), ("mode", mode, ("hot", "cold"))):
        if value not in allowed:
            raise ValueError(f"{name}={value!r}: expected one of {', '.join(allowed)}")
    sides = {"candidate": (candidate, x_candidate), "reference": (reference, x_reference)}
    load, kind = host.load(), DTYPES[dtype]
    rows: list[dict[str, Any]] = []
    best: dict[str, tuple[str, timing.Call]] = {}
    precision = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    try:
        for side, (weights, saved) in sides.items():
            x = draw(saved, weights, tokens, seed)
            timed: dict[str, tuple[float, timing.Call]] = {}
            for each, verdict in gate(weights, x, kind, seed=seed, device=device):
                series = None
                if verdict.verified and not (each.bits8 or each.tf32):
                    call = layer_call(each, [weights.to(kind).on(device)], [x.to(device, kind)])
                    with as_used("forward"):
                        series = clock({each.name: call}, mode, min_time_s / 8)[each.name]
                    timed[each.name] = series.median_s, call
                rows.append({"side": side} | row_of(each, verdict, series, tokens))
            if not timed:
                told = "; ".join(f"{row['implementation']}: {row['reason']}" for row in rows if row["side"] == side)
                raise RuntimeError(f"no implementation of the {side} {weights.shape.layout} passed the gate: {told}")
            name = min(timed, key=lambda each: timed[each][0])
            best[side] = name, timed[name][1]
        with as_used("forward"):
            final = clock({side: call for side, (_, call) in best.items()}, mode, min_time_s)
    finally:
        torch.set_float32_matmul_precision(precision)
    return comparison(final, {side: name for side, (name, _) in best.items()}, rows, tokens, load)
