"""The kernel benchmark on a CUDA device: `python -m fffsweep.kernels.bench --device cuda`. Each implementation is gated, then timed."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fffsweep.kernels import bench_report, registry
from fffsweep.kernels.gate import passes
from fffsweep.kernels.gpu import availability, timing
from fffsweep.kernels.gpu.deadline import Deadline, OutOfTime
from fffsweep.kernels.layer import LayerWeights, random_layer
from fffsweep.kernels.measure import as_used, layer_call
from fffsweep.kernels.registry import Implementation
from fffsweep.kernels.shape import TreeShape, parse_layout

SCHEMA = 1
DEVICE = "cuda"
SLOW_FACTOR = 30.0  # implementations that far behind the fastest are timed by one call alone
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Row = dict[str, Any]


def main(arguments: list[str]) -> int:
    """0 if every case has a verified CMM, 1 if one has none, 2 for wrong arguments or no device."""
    options = _parse(arguments)
    reason = availability.no_triton()
    if not torch.cuda.is_available():
        reason = "there is no CUDA device: expected one that torch.cuda.is_available() finds"
    if reason is not None:
        print(f"fffsweep bench: {reason}", file=sys.stderr)
        return 2
    torch.set_float32_matmul_precision("highest")  # float32 means float32: TF32 has entries of its own
    rows, failed, skipped = [], 0, []
    over = Deadline(options.budget_s)
    for layout, dtype, direction, tokens in product(options.layout, options.dtype, options.direction, options.tokens):
        case = f"{layout} hidden {options.hidden} {tokens} tokens {dtype} {direction}"
        try:
            with over:
                found = run_case(layout, options.hidden, tokens, dtype, direction, options)
        except OutOfTime:
            skipped.append(case)
            continue
        rows += found
        best = next((row for row in found if row["best"]), None)
        failed += best is None
        print(_line(case, best), flush=True)
    for case in skipped:
        print(f"{case}: left out, --budget-s {options.budget_s:g} was spent")
    result = {"schema": SCHEMA, "provenance": _provenance(arguments), "left_out": skipped, "rows": rows}
    if options.json:
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return 1 if failed else 0


def _parse(arguments: list[str]) -> argparse.Namespace:
    def several(text: str) -> list[str]:
        return [each.strip() for each in text.split(",") if each.strip()]

    def numbers(text: str) -> list[int]:
        return [int(each) for each in several(text)]

    parser = argparse.ArgumentParser("fffsweep bench --device cuda", description=__doc__)
    parser.add_argument("--device", choices=["cuda"], default="cuda")
    parser.add_argument("--layout", type=several, default=["1x11"])
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--tokens", type=numbers, default=[1, 16, 128, 1024, 16384, 65536])
    parser.add_argument("--dtype", type=several, default=["bfloat16", "float32"], help=f"of {', '.join(DTYPES)}")
    parser.add_argument("--direction", type=several, default=["forward"], help="forward, train (forward and backward)")
    parser.add_argument(
        "--mode", choices=["hot", "cold"], default="hot", help="cold: the device's caches are overwritten before each sample"
    )
    parser.add_argument("--min-time", type=float, default=0.3, help="seconds of alternating samples a case")
    parser.add_argument("--budget-s", type=float, default=240.0, help="seconds after which the case at work is ended and none begun")
    parser.add_argument("--slow", action="store_true", help="time torch.compile's, cuSPARSE's and the naive CUDA kernel's forms too")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args(arguments)
    for name, values, allowed in (("dtype", options.dtype, DTYPES), ("direction", options.direction, ("forward", "train"))):
        for value in values:
            if value not in allowed:
                parser.error(f"--{name} {value}: expected one of {', '.join(allowed)}")
    for layout in options.layout:
        try:
            parse_layout(layout)
        except ValueError as error:
            parser.error(str(error))
    return options


def run_case(layout: str, hidden: int, tokens: int, dtype: str, direction: str, options: argparse.Namespace) -> list[Row]:
    """Rows of one case: every CMM form of the layout, and every dense form of as many neurons, in the dtype."""
    shape, kind = parse_layout(layout), DTYPES[dtype]
    sides = {"cmm": random_layer(shape, hidden, seed=options.seed), "dense": random_layer(TreeShape(shape.width, 0), hidden, seed=1)}
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(options.seed)).to(DEVICE, kind)
    rows: list[Row] = []
    calls: dict[int, Callable[[], object]] = {}
    for role, exact in sides.items():
        weights = exact.to(kind).on(DEVICE)
        for each in registry.applicable(weights, kind, "cuda", backward=direction == "train"):
            if each.role != role or (each.slow and not options.slow) or (each.variant_of and direction == "train" and not each.tf32):
                continue
            row, call = _gated(each, weights, exact, x, direction, options)
            rows.append({"layout": layout, "hidden": hidden, "tokens": tokens, "direction": direction} | row)
            if call is not None:
                calls[len(rows) - 1] = call
    with as_used(direction):
        _time(rows, calls, tokens, options)
    gathered = next((row["ns_per_token"] for row in rows if row["implementation"] == "gather"), None)
    for row in rows:
        row |= _floor(row, sides[row["role"]].shape)
        row["speedup_vs_gather"] = None if None in (gathered, row["ns_per_token"]) else gathered / row["ns_per_token"]
    rows, rounded = [row for row in rows if row["dtype"] == dtype], [row for row in rows if row["dtype"] != dtype]
    # TF32 is compared with TF32, and is never the best of float32
    return bench_report.compare(rows) + [row | {"best": False} for row in bench_report.compare(rounded)]


def _gated(
    each: Implementation, weights: LayerWeights, exact: LayerWeights, x: Tensor, direction: str, options: argparse.Namespace
) -> tuple[Row, Callable[[], object] | None]:
    """Row without times, and the call to time if the implementation passed the gate, by other tokens each time."""
    dtype = "tf32" if each.tf32 else str(x.dtype).removeprefix("torch.")
    row = {
        "suite": "gpu",
        "dtype": dtype,
        "threads": 0,
        "mode": options.mode,
        "device": "cuda",
        "role": each.role,
        "implementation": each.name,
    }
    try:
        verdict = passes(each, exact, x, x.dtype, backward=direction == "train", seed=time.time_ns() % (1 << 62), device=DEVICE)
        row |= {"verified": verdict.verified, "path_flips": verdict.path_flips, "worst": verdict.worst, "reason": verdict.reason}
        call = layer_call(each, [weights], [x], direction) if verdict.verified else None
        if call is not None:
            with as_used(direction):
                row["once_s"] = timing.once(call)
    except (RuntimeError, torch.OutOfMemoryError) as error:  # a baseline that does not run here is a row, not the end
        return row | {"verified": False, "path_flips": 0, "worst": None, "reason": str(error)[:500], "once_s": None}, None
    return row, call


def _time(rows: list[Row], calls: dict[int, Callable[[], object]], tokens: int, options: argparse.Namespace) -> None:
    """Fill in the times: of the device alone (a CUDA graph), and of plain launches as `launched_ns_per_token`."""
    for row in rows:
        row |= {"ns_per_token": None, "q20": None, "q80": None, "noisy": None, "launched_ns_per_token": None, "graph": False}
    quickest = min((rows[at]["once_s"] for at in calls), default=0.0)
    ready: dict[str, tuple[Callable[[], object], int]] = {}
    for at, call in calls.items():
        row = rows[at]
        if row["once_s"] > SLOW_FACTOR * max(quickest, 1e-4):
            row["ns_per_token"] = row["q20"] = row["q80"] = 1e9 * row["once_s"] / tokens
            row["noisy"] = True
            continue
        ready_call, repeats, row["graph"] = timing.captured(call, row["once_s"], options.mode)
        ready[str(at)] = ready_call, repeats
    flush = options.mode == "cold"
    scale = 1e9 / tokens
    for name, series in timing.interleave(ready, min_time_s=options.min_time, flush=flush).items() if ready else ():
        rows[int(name)] |= {"ns_per_token": series.median_s * scale, "q20": series.q20_s * scale, "q80": series.q80_s * scale}
        rows[int(name)]["noisy"] = series.noisy
    plain: dict[str, tuple[Callable[[], object], int]] = {name: (calls[int(name)], 1) for name in ready}
    for name, series in timing.interleave(plain, min_time_s=options.min_time / 4, flush=flush).items() if plain else ():
        rows[int(name)]["launched_ns_per_token"] = series.median_s * scale


def _floor(row: Row, shape: TreeShape) -> Row:
    """Nanoseconds a token that memory and arithmetic allow at least, and how far above the larger of the two the row is.

    Bytes: tokens read and outputs written once, and the rows that this batch can touch, once; operations: those of the visited nodes.
    """
    size, tokens, hidden = 2 if row["dtype"] in ("bfloat16", "float16") else 4, row["tokens"], row["hidden"]
    touched = min(shape.width, tokens * shape.active_width)
    passes = 3 if row["direction"] == "train" else 1
    count = passes * (2 * hidden * tokens + 2 * touched * hidden) * size
    operations = passes * 4 * shape.active_width * hidden * tokens
    memory = 1e9 * count / timing.bandwidth_bytes_per_s() / tokens
    arithmetic = 1e9 * operations / timing.operations_per_s(row["dtype"]) / tokens
    floor = max(memory, arithmetic)
    taken = row["ns_per_token"]
    return {
        "macs_per_token": operations // 2 // tokens,
        "memory_floor_ns": memory,
        "arithmetic_floor_ns": arithmetic,
        "flop_limit": arithmetic,
        "fraction_of_limit": None if taken is None else floor / taken,
        "times_the_floor": None if taken is None else taken / floor,
    }


def _line(case: str, best: Row | None) -> str:
    if best is None:
        return f"{case}: no verified implementation"
    ratio = "-" if best["speedup_vs_best_dense"] is None else f"{best['speedup_vs_best_dense']:.2f}x {best['best_dense']}"
    launched = best["launched_ns_per_token"] or float("nan")
    noisy = ", noisy" if best["noisy"] else ""
    return (
        f"{case}: {best['implementation']} {best['ns_per_token']:,.2f} ns a token ({launched:,.2f} launched one by one), {ratio}, "
        f"{best['times_the_floor']:.1f} times the floor{noisy}"
    )


def _provenance(arguments: list[str]) -> dict[str, Any]:
    import triton

    properties = torch.cuda.get_device_properties(0)
    return bench_report.provenance(arguments) | {
        "gpu": properties.name,
        "gpu_memory_bytes": properties.total_memory,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "triton": triton.__version__,
        "bandwidth_bytes_per_s": timing.bandwidth_bytes_per_s(),
        "operations_per_s": {kind: timing.operations_per_s(kind) for kind in ("float32", "tf32", "bfloat16", "float16")},
    }
