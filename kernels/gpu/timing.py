"""Timing on a CUDA device: events around replays of a CUDA graph or around plain launches, alternating, with the caches emptied between."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable

import torch

from fffsweep.kernels.timing import Series, summarise

GRAPH_S = 0.002  # a graph holds as many calls as take this long
FLUSH_BYTES = 256 << 20  # several times any second-level cache
Call = Callable[[], object]


def graphed(call: Call, repeats: int) -> Call:
    """A call that replays `repeats` of `call` as one CUDA graph: what is left is the device's time. Raises RuntimeError if it cannot."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up beside the capture: compilation and lazy initialisation may not be captured
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(repeats):
            call()
    return graph.replay


def captured(call: Call, once_s: float, mode: str) -> tuple[Call, int, bool]:
    """A call as a CUDA graph, how often that does its work, and whether it is one: what cannot be captured is launched plainly."""
    # emptied caches are full again after the first call of a graph
    repeats = 1 if mode == "cold" else max(1, min(50, int(GRAPH_S / once_s)))
    try:
        return graphed(call, repeats), repeats, True
    except RuntimeError:
        torch.cuda.synchronize()
        return call, 1, False


def time_layers(calls: dict[str, Call], mode: str, min_time_s: float) -> dict[str, Series]:
    """Seconds of one run of each layer, alternating, inside CUDA graphs where they can be; "cold" overwrites the caches before each."""
    ready = {name: captured(call, once(call), mode)[:2] for name, call in calls.items()}
    return interleave(ready, min_time_s=min_time_s, flush=mode == "cold")


def interleave(calls: dict[str, tuple[Call, int]], *, min_time_s: float, flush: bool, min_rounds: int = 7) -> dict[str, Series]:
    """Seconds a call, of calls that each do their work so many times; alternating rounds, `flush` overwrites the caches before each."""
    scratch = torch.empty(FLUSH_BYTES if flush else 0, dtype=torch.uint8, device="cuda")
    samples: dict[str, list[float]] = {name: [] for name in calls}
    begin, rounds, order = time.perf_counter(), 0, list(calls)
    while rounds < min_rounds or time.perf_counter() - begin < min_time_s:
        for name in order:
            call, repeats = calls[name]
            if flush:
                scratch.zero_()
            first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            first.record()
            call()
            last.record()
            last.synchronize()
            samples[name].append(first.elapsed_time(last) / 1e3 / repeats)
        order.reverse()
        rounds += 1
    return {name: summarise(each) for name, each in samples.items()}


def once(call: Call) -> float:
    """Seconds of the second call of two: enough to see what is worth more samples."""
    for _ in range(2):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        call()
        torch.cuda.synchronize()
    return time.perf_counter() - begin


@functools.cache
def bandwidth_bytes_per_s() -> float:
    """What a copy of half a gibibyte moves, read and written: the memory's floor, measured and not looked up."""
    source = torch.zeros(1 << 29, dtype=torch.uint8, device="cuda")
    target = torch.empty_like(source)
    series = interleave({"copy": (lambda: target.copy_(source), 1)}, min_time_s=0.1, flush=False)
    return 2 * source.numel() / series["copy"].q20_s


@functools.cache
def operations_per_s(kind: str) -> float:
    """What a large matrix product of this kind reaches, two operations a multiply-add: float32, tf32, bfloat16 or float16."""
    dtype = {"float32": torch.float32, "tf32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[kind]
    size = 8192 if dtype != torch.float32 else 4096
    a, b = (torch.randn(size, size, device="cuda").to(dtype) for _ in range(2))
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if kind == "tf32" else "highest")
    try:
        series = interleave({"product": (lambda: a @ b, 1)}, min_time_s=0.1, flush=False)
    finally:
        torch.set_float32_matmul_precision(before)
    return 2 * size**3 / series["product"].q20_s
