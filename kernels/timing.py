"""Timing of alternatives in one process: alternating, pinned, with the load recorded and disturbed samples refused."""

from __future__ import annotations

import contextlib
import math
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import quantiles

import torch

PREEMPTED = 1.08  # wall time over CPU time of a sample beyond which something else ran on this CPU
SPREAD = 0.25  # (q80 - q20) / median beyond which a series is called noisy
SAMPLE_S = 0.002  # a sample repeats its call until it lasts this long
READ_BYTES = 256 << 20
REFUSALS = 3  # times the wanted samples that may be refused before disturbed ones are taken and flagged


@dataclass(frozen=True)
class Series:
    """Seconds a call of one alternative: all samples, median, 20 % and 80 % quantiles, and whether they were disturbed."""

    samples_s: tuple[float, ...]
    median_s: float
    q20_s: float
    q80_s: float
    noisy: bool


@contextlib.contextmanager
def pinned(threads: int) -> Iterator[None]:
    """Torch on `threads` threads, and the process on as many CPUs where the system allows that; both are restored at the end."""
    before, affinity = torch.get_num_threads(), os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    if threads < 1:
        raise ValueError(f"threads={threads}: expected an integer >= 1")
    try:
        torch.set_num_threads(threads)
        if affinity and threads == 1:
            # the pool's threads keep their own affinity, so more threads than one are left to the scheduler
            os.sched_setaffinity(0, {max(affinity)})
        yield
    finally:
        if affinity:
            os.sched_setaffinity(0, affinity)
        torch.set_num_threads(before)


def shortlist(calls: dict[str, Callable[[], object]], *, within: float = 3.0) -> tuple[list[str], dict[str, float]]:
    """Names whose second call takes at most `within` times the fastest one's, and the seconds of all.

    A call that something else disturbed is taken again, up to `REFUSALS` times: it would leave out the best.
    """
    once = {}
    for name, call in calls.items():
        call()
        once[name], clean = _sample(call, 1)
        for _ in range(REFUSALS):
            if clean:
                break
            seconds, clean = _sample(call, 1)
            once[name] = min(once[name], seconds)
    return [name for name, seconds in once.items() if seconds <= within * min(once.values())], once


def interleave(calls: dict[str, Callable[[], object]], *, min_time_s: float, min_rounds: int = 5) -> dict[str, Series]:
    """Time `calls` in alternating rounds for `min_time_s` altogether, at least `min_rounds` each."""
    repeats = {name: _repeats(call) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    disturbed = dict.fromkeys(calls, 0)
    begin, rounds, order = time.perf_counter(), 0, list(calls)
    while rounds < min_rounds or time.perf_counter() - begin < min_time_s:
        for name in order:
            seconds, clean = _sample(calls[name], repeats[name])
            while not clean and disturbed[name] < REFUSALS * min_rounds:
                disturbed[name] += 1
                seconds, clean = _sample(calls[name], repeats[name])
            samples[name].append(seconds)
        order.reverse()
        rounds += 1
    exhausted = {name for name, count in disturbed.items() if count >= REFUSALS * min_rounds}
    return {name: summarise(each, noisy=name in exhausted) for name, each in samples.items()}


def summarise(samples_s: list[float], *, noisy: bool = False) -> Series:
    """Series of `samples_s`; noisy if told so or if the quantiles lie further apart than `SPREAD`."""
    q20, median, q80 = quantiles_of(samples_s)
    return Series(tuple(samples_s), median, q20, q80, noisy or q80 - q20 > SPREAD * median)


def quantiles_of(values: list[float]) -> tuple[float, float, float]:
    """20 %, 50 % and 80 % quantiles."""
    if len(values) == 1:
        return values[0], values[0], values[0]
    tenths = quantiles(values, n=10, method="inclusive")
    return tenths[1], tenths[4], tenths[7]


def read_bytes_per_s() -> float:
    """Bytes a second that torch's threads read from memory: the best of several sums over more than any cache holds."""
    data, least = torch.ones(READ_BYTES // 4), math.inf
    data.sum()
    for _ in range(5):
        begin = time.perf_counter()
        data.sum()
        least = min(least, time.perf_counter() - begin)
    return READ_BYTES / least


def load() -> float:
    """Processes that wanted a CPU in the last minute, of the whole machine; NaN where the system does not tell."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else math.nan


def _sample(call: Callable[[], object], repeats: int) -> tuple[float, bool]:
    wall, cpu = time.perf_counter(), time.thread_time()
    for _ in range(repeats):
        call()
    wall, cpu = time.perf_counter() - wall, time.thread_time() - cpu
    return wall / repeats, wall < PREEMPTED * cpu + 2e-5


def _repeats(call: Callable[[], object]) -> int:
    call()
    begin = time.perf_counter()
    call()
    once = max(time.perf_counter() - begin, 1e-7)
    return max(1, math.ceil(SAMPLE_S / once))
