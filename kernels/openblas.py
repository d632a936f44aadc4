"""The BLAS that numpy's wheel brings (OpenBLAS with 64-bit integers): its threads, and the addresses of its C functions."""

from __future__ import annotations

import ctypes
import functools
from pathlib import Path

import numpy as np


@functools.cache
def _library() -> ctypes.CDLL | None:
    """The OpenBLAS inside numpy's wheel; None where numpy brings another."""
    found = sorted((Path(np.__file__).parent.parent / "numpy.libs").glob("*openblas*"))
    return ctypes.CDLL(str(found[0])) if found else None


def set_threads(threads: int) -> None:
    """Let numpy's products run on `threads` threads; without effect where its BLAS is not OpenBLAS."""
    library = _library()
    for name in ("scipy_openblas_set_num_threads64_", "openblas_set_num_threads64_", "openblas_set_num_threads"):
        if library is not None and hasattr(library, name):
            getattr(library, name)(threads)
            return


def address(name: str) -> ctypes.c_void_p | None:
    """Address of the function `cblas_{name}` that takes 64-bit integers; None where there is none."""
    library = _library()
    for prefix in ("scipy_cblas_", "cblas_"):
        function = getattr(library, f"{prefix}{name}64_", None)
        if function is not None:
            return ctypes.cast(function, ctypes.c_void_p)
    return None


def why_missing() -> str | None:
    """None if the functions are there, else the reason why not."""
    if all(address(name) is not None for name in ("sdot", "saxpy", "sgemv")):
        return None
    return "numpy brings no OpenBLAS with 64-bit integers here"
