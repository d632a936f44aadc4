"""What the benchmark says beside its times: speed-ups, the arithmetic limit, provenance, tables and plots."""

from __future__ import annotations

import datetime
import functools
import math
import os
import platform
import re
import subprocess
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fffsweep.kernels import library, timing
from fffsweep.kernels.shape import TreeShape

Row = dict[str, Any]


def compare(rows: list[Row]) -> list[Row]:
    """The rows of one case with their speed-ups over torch's dense float32 layer, the best dense of their dtype, and `best` marked."""
    dense = [row for row in rows if row["role"] == "dense" and row["ns_per_token"] is not None and row["verified"]]
    eager = next((row["ns_per_token"] for row in dense if (row["implementation"], row["dtype"]) == ("torch_dense", "float32")), None)
    timed = [row for row in rows if row["role"] == "cmm" and row["ns_per_token"] is not None]
    fastest = min(timed, key=lambda row: row["ns_per_token"], default=None)
    for row in rows:
        alike = [each for each in dense if each["dtype"] == row["dtype"]]
        best = min(alike, key=lambda each: each["ns_per_token"], default=None)
        same = next((each["ns_per_token"] for each in alike if each["implementation"] == "torch_dense"), None)
        row["speedup_vs_torch_dense"] = _ratio(eager, row)
        row["speedup_vs_best_dense"] = _ratio(None if best is None else best["ns_per_token"], row)
        row["best_dense"] = best and best["implementation"]
        row["speedup_vs_same_dtype_dense"] = _ratio(same, row)
        row["best"] = row is fastest
    return rows


def median_run(runs: list[list[Row]]) -> Row | None:
    """The best row of the median of several runs of a case by speed-up; in the others `best` is unset. None if a run has no best one."""
    best = [next((row for row in rows if row["best"]), None) for rows in runs]
    if any(row is None for row in best):
        for row in filter(None, best):
            row["best"] = False
        return None
    ordered = sorted(filter(None, best), key=lambda row: row["speedup_vs_torch_dense"] or 0.0)
    for row in ordered:
        row["best"] = row is ordered[(len(ordered) - 1) // 2]
    return ordered[(len(ordered) - 1) // 2]


def _ratio(dense_ns: float | None, row: Row) -> float | None:
    return None if dense_ns is None or row["ns_per_token"] is None else dense_ns / row["ns_per_token"]


def bytes_per_token(shape: TreeShape, hidden: int, tokens: int, size: int, direction: str) -> float:
    """Bytes that must move for each token of a batch: tokens and outputs once, and once the rows of the nodes that it can meet.

    size: bytes of an element. Forward and backward move three times as much: both once more, and as many gradients.
    """
    met = min(shape.width, tokens * shape.active_width)
    return (3 if direction == "train" else 1) * 2 * hidden * size * (1 + met / tokens)


@functools.cache
def read_bytes_per_ns(threads: int) -> float:
    """Bytes a nanosecond that are read from memory here, measured in this run."""
    with timing.pinned(threads):
        return timing.read_bytes_per_s() / 1e9


@functools.cache
def peak_macs_per_ns(dtype: str, threads: int) -> float | None:
    """Multiply-adds a nanosecond that a large matrix product reaches here: the arithmetic limit, measured and not looked up.

    None for 8-bit weights, whose products torch does not offer by themselves.
    """
    if dtype == "int8":
        return None
    kind = getattr(torch, dtype)
    size = 1024
    a, b = (torch.randn(size, size).to(kind) for _ in range(2))
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        a @ b
        times = []
        for _ in range(5):
            begin = time.perf_counter()
            a @ b
            times.append(time.perf_counter() - begin)
    finally:
        torch.set_num_threads(before)
    return float(size**3 / min(times) / 1e9)


def provenance(arguments: list[str]) -> dict[str, Any]:
    """Command, commit, versions and machine of a benchmark run."""
    return {
        "command": " ".join(["fffsweep", "bench", *arguments]),
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "cpu": _cpu_model(),
        "cpus": os.cpu_count(),
        "isa": None if library.why_missing() else library.best_isa(),
        "called_directly": library.is_called_directly(),
        "platform": platform.platform(),
    }


def file_stem(origin: dict[str, Any]) -> str:
    """Name, without suffix, of the files of a run with this provenance: cmm_cpu_<machine>_<date>."""
    machine = re.sub(r"[^a-z0-9]+", "-", origin["cpu"].lower()).strip("-") or "unknown"
    return f"cmm_cpu_{machine}_{origin['date'][:10]}"


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _cpu_model() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.processor())


def markdown(result: dict[str, Any]) -> str:
    """Table of the best implementation of each case, with provenance."""
    origin = result["provenance"]
    heads = ["layout", "hidden", "tokens", "dtype", "threads", "mode", "direction", "implementation", "ns a token (q20-q80)"]
    heads += ["vs torch dense", "vs best dense", "of the limit", "path flips", "noisy"]
    lines = [
        f"# CMM on {origin['cpu']}",
        "",
        f"`{origin['command']}`, {origin['date']}, commit {origin['commit']}{' (dirty)' if origin['dirty'] else ''}, "
        f"torch {origin['torch']}, instruction set {origin['isa']}, {origin['cpus']} CPUs.",
        "",
        f"| {' | '.join(heads)} |",
        "|---" * len(heads) + "|",
        *(_table_row(row) for row in result["rows"] if row["best"]),
    ]
    return "\n".join(lines) + "\n"


def _table_row(row: Row) -> str:
    cells = [str(row[key]) for key in ("layout", "hidden", "tokens", "dtype", "threads", "mode", "direction", "implementation")]
    cells += [
        f"{row['ns_per_token']:,.0f} ({row['q20']:,.0f}-{row['q80']:,.0f})",
        "-" if row["speedup_vs_torch_dense"] is None else f"{row['speedup_vs_torch_dense']:.1f}x",
        f"{row['speedup_vs_best_dense']:.1f}x {row['best_dense']}" if row["best_dense"] else "-",
        "-" if row["fraction_of_limit"] is None else f"{row['fraction_of_limit']:.0%}",
        str(row["path_flips"]),
        "yes" if row["noisy"] else "no",
    ]
    return f"| {' | '.join(cells)} |"


def plot(result: dict[str, Any], path: Path) -> None:
    """Speed-up by tokens and a roofline, as one picture. Raises RuntimeError without matplotlib.

    Roofline (Williams et al. 2009): operations a second over operations a byte that must move, below what arithmetic and memory allow.
    """
    try:
        import matplotlib as mpl
    except ImportError:
        raise RuntimeError("--plot needs matplotlib, which is not installed: pip install matplotlib") from None
    mpl.use("Agg")
    from matplotlib import pyplot

    figure, (speed, roof) = pyplot.subplots(1, 2, figsize=(13, 5))
    series: dict[tuple[Any, ...], list[Row]] = {}
    for row in result["rows"]:
        if row["best"]:
            series.setdefault(tuple(row[key] for key in ("layout", "dtype", "threads", "mode", "direction")), []).append(row)
    for key, rows in series.items():
        rows.sort(key=lambda row: row["tokens"])
        tokens, label = [row["tokens"] for row in rows], " ".join(str(part) for part in key)
        speed.plot(tokens, [row["speedup_vs_torch_dense"] for row in rows], marker="o", label=label)
        reached = [2 * row["macs_per_token"] / row["ns_per_token"] for row in rows]
        roof.plot([_intensity(row) for row in rows], reached, marker="o", label=label)
    _draw_roofs(roof, [row for row in result["rows"] if row["best"]])
    speed.set(xscale="log", yscale="log", xlabel="tokens", ylabel="times faster than torch dense float32")
    roof.set(xscale="log", yscale="log", xlabel="operations a byte moved", ylabel="GFLOP/s")
    speed.legend(fontsize=6)
    figure.tight_layout()
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


def _draw_roofs(axes: Any, rows: list[Row]) -> None:
    """For each dtype and number of threads what memory allows, rising, up to what arithmetic does."""
    intensities = [_intensity(row) for row in rows]
    for kind, threads in sorted({(row["dtype"], row["threads"]) for row in rows}):
        row = next(each for each in rows if (each["dtype"], each["threads"]) == (kind, threads))
        bandwidth = row["bytes_per_token"] / row["memory_limit"]
        peak = math.inf if row["flop_limit"] is None else 2 * row["macs_per_token"] / row["flop_limit"]
        end = 2 * max(*intensities, 0.0 if row["flop_limit"] is None else peak / bandwidth)
        across = np.geomspace(min(intensities) / 2, end)
        axes.plot(across, np.minimum(peak, bandwidth * across), linestyle="--", color="grey")
        axes.annotate(f"{kind}, {threads} thread(s)", (end, min(peak, bandwidth * end)), fontsize=7, ha="right", va="bottom")


def _intensity(row: Row) -> float:
    return float(2 * row["macs_per_token"] / row["bytes_per_token"])
