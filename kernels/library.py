"""The native library, compiled by setup.py: loaded once, and if it cannot be, the reason is kept and told once."""

from __future__ import annotations

import functools
import importlib
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

ISA_NAMES = ("generic", "avx2", "avx512", "avx512_bf16")  # their codes in native/cmm.h
NATIVE_DTYPES = frozenset({torch.float32, torch.bfloat16})


PATH = Path(__file__).with_name("_native.so")


def _load() -> str | None:
    if not PATH.exists():
        return f"{PATH} does not exist: pip install --no-build-isolation . with a C++20 compiler builds it"
    try:
        torch.ops.load_library(str(PATH))
    except OSError as error:
        return f"{PATH} does not load ({error}): rebuild it with the torch that is installed, pip install --no-build-isolation ."
    return None


def _by_torch(*arguments: object) -> Tensor:
    y: Tensor = torch.ops.fffsweep.cmm(*arguments)
    return y


def _operator() -> Callable[..., Tensor]:
    """A built function that unpacks its arguments itself. Where there is none, built without the headers of this Python, torch.ops."""
    try:
        direct: Callable[..., Tensor] = importlib.import_module("fffsweep.kernels._binding").cmm
    except ImportError:
        return _by_torch
    return direct


# loaded on import: a constant is all that torch.compile sees of it, and exported programs find their operators
MISSING = _load()
operator = _operator()  # fffsweep::cmm for eager calls, arguments by position; torch.compile knows torch.ops alone


def is_called_directly() -> bool:
    """Whether eager calls save the 4 us that torch's own way from Python to an operator takes."""
    return operator is not _by_torch


def why_missing() -> str | None:
    """None if the native operators are there, else the reason why not."""
    return MISSING


@functools.cache
def warn_if_missing() -> None:
    """Warn, once in a process, that CMM on the CPU runs in its portable form."""
    reason = why_missing()
    if reason:
        warnings.warn(f"native CMM kernels are missing, the portable implementation 'gather' runs in their place: {reason}", stacklevel=3)


@functools.cache
def missing_isa(name: str) -> str | None:
    """None if kernels of instruction set `name` can run here, else the reason why not."""
    reason = why_missing()
    if reason is None and not torch.ops.fffsweep.has_isa(ISA_NAMES.index(name)):
        reason = f"this processor or this build has no {name}"
    return reason


def best_isa() -> str:
    """Name of the instruction set that the native kernels choose here. Raises RuntimeError where they are missing."""
    reason = why_missing()
    if reason:
        raise RuntimeError(reason)
    return ISA_NAMES[torch.ops.fffsweep.best_isa()]
