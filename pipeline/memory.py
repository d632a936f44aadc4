"""The most memory that a run took: of this process, and of the GPU it computed on.

A worker process runs many stages one after another, so the peaks are set back where a run begins.
"""

from __future__ import annotations

import contextlib
import resource
import sys
from pathlib import Path

import torch

PROCESS = Path("/proc/self")


def reset_peaks() -> None:
    """Begin anew: from here on, peaks are those of what follows. The process's stays that of its whole life where the system has no way.

    What is resident by now counts, such as memory that Python keeps of an earlier run.
    """
    with contextlib.suppress(OSError):
        (PROCESS / "clear_refs").write_text("5")  # Linux: VmHWM becomes VmRSS
    if torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def peak_rss_bytes() -> int:
    """Largest resident memory of this process since `reset_peaks`; of its whole life where that could not set it back."""
    try:
        lines = (PROCESS / "status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM:")))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def memory_metrics(device: str) -> dict[str, float]:
    """Metrics of a run that ends here: `memory/peak_rss_bytes`, and `memory/peak_device_bytes` if it computed on a GPU.

    The latter are the bytes in tensors; what torch's allocator keeps beside them for later is not in it.
    """
    metrics: dict[str, float] = {"memory/peak_rss_bytes": peak_rss_bytes()}
    if device == "cuda" and (held := torch.cuda.max_memory_allocated()):
        metrics["memory/peak_device_bytes"] = held
    return metrics
