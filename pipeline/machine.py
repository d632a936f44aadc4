"""What machine this is, and what a result must carry to be traced: commit, versions, device, load."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from pathlib import Path
from typing import Any

import psutil

from fffsweep.pipeline.settings import canonical_json

PACKAGES = (
    "fffsweep",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "pyarrow",
    "numpy",
    "scikit-learn",
    "scipy",
    "ray",
    "mlflow",
    "optuna",
)
_INSTRUCTION_SETS = ("avx2", "fma", "avx512f", "avx512_bf16", "avx512_vnni", "amx_bf16", "asimd", "sve")


@functools.cache
def machine() -> dict[str, Any]:
    """Facts of this machine that decide how fast it computes: processor, instruction sets, cores, memory, GPUs, torch build."""
    info = _cpu_info()
    return {
        "cpu": info.get("model name") or platform.processor() or platform.machine(),
        "instruction_sets": [name for name in _INSTRUCTION_SETS if name in info.get("flags", info.get("Features", "")).split()],
        "num_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": _gpus(),
        "torch": version_of("torch"),
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def machine_fingerprint() -> str:
    """16 hexadecimal digits that differ where timings are not comparable. Memory is left out: it varies by a few pages a boot."""
    facts = {name: value for name, value in machine().items() if name not in ("memory_bytes", "python")}
    return hashlib.sha256(canonical_json(facts).encode()).hexdigest()[:16]


@functools.cache
def commit() -> dict[str, Any]:
    """Git commit of the running code and whether files differ from it; both None outside a checkout."""
    folder = Path(__file__).resolve().parent
    try:
        head = _git(folder, "rev-parse", "HEAD")
        return {"commit": head, "dirty": bool(_git(folder, "status", "--porcelain", "--untracked-files=no"))}
    except (OSError, subprocess.CalledProcessError):
        return {"commit": None, "dirty": None}


def versions() -> dict[str, str | None]:
    """Version of each package that can change a result; None if it is not installed."""
    return {name: version_of(name) for name in PACKAGES}


def provenance() -> dict[str, Any]:
    """Everything about here and now that goes into a manifest."""
    return {
        **commit(),
        "versions": versions(),
        "machine": machine(),
        "machine_fingerprint": machine_fingerprint(),
        "host": platform.node(),
        "load_1min": os.getloadavg()[0],
    }


def write_benchmark(target: Path, rows: list[dict[str, Any]]) -> None:
    """Rows of a benchmark as JSON, with the provenance of here and now."""
    target.parent.mkdir(parents=True, exist_ok=True)
    report = {"schema": "fffsweep.bench/1", "provenance": provenance(), "rows": rows}
    target.write_text(json.dumps(report, indent=1, allow_nan=False) + "\n")


@functools.cache
def version_of(package: str) -> str | None:
    """Installed version of a distribution, None if there is none; imports nothing."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_info() -> dict[str, str]:
    try:
        text = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in text.splitlines())}


def _gpus() -> list[str]:
    """Names of the GPUs, from the driver's own table, so that planning needs no torch."""
    try:
        listing = subprocess.run(
            ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], capture_output=True, text=True, timeout=20, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return []
    return listing.stdout.splitlines()


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", str(folder), *arguments], capture_output=True, text=True, check=True).stdout.strip()
