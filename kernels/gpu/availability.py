"""What a machine needs for the GPU implementations, and the reason if it lacks it."""

from __future__ import annotations

import functools
import importlib.util
import os
import shutil

import torch


@functools.cache
def no_triton() -> str | None:
    """None if Triton kernels can run here, on a device or interpreted; else the reason why not."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed: pip install 'fffsweep[gpu]'"
    if not torch.cuda.is_available() and os.environ.get("TRITON_INTERPRET") != "1":
        return "there is no CUDA device; TRITON_INTERPRET=1 runs the kernels in Triton's interpreter"
    return None


@functools.cache
def no_cuda_compiler() -> str | None:
    """None if CUDA C++ can be compiled here, else the reason why not."""
    return None if shutil.which("nvcc") else "CUDA C++ needs nvcc, which is not on the path"
