"""The naive CUDA kernel: compiled by nvcc when first wanted, kept by its source's hash, called over a plain C interface."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fffsweep.kernels.activations import ACTIVATIONS
from fffsweep.kernels.layer import LayerWeights

SOURCE = Path(__file__).with_name("naive.cu")
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def compile_library(folder: Path, arch: str) -> Path:
    """The library in `folder`, built for compute capability `arch` ("90"). Raises RuntimeError with nvcc's words if it does not build."""
    mark = hashlib.sha256(SOURCE.read_bytes() + arch.encode()).hexdigest()[:16]
    target = folder / f"cmm_naive_{mark}.so"
    if not target.exists():
        folder.mkdir(parents=True, exist_ok=True)
        aside = target.with_suffix(f".{os.getpid()}")
        command = ["nvcc", "-O3", f"-arch=sm_{arch}", "-shared", "-Xcompiler", "-fPIC", "-o", str(aside), str(SOURCE)]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"{SOURCE.name} does not compile: {' '.join(command)}\n{done.stderr}")
        aside.replace(target)
    return target


@functools.cache
def _library() -> ctypes.CDLL:
    major, minor = torch.cuda.get_device_capability()
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path(tempfile.gettempdir()) / f"fffsweep-{os.getuid()}") / "fffsweep-cuda"
    return ctypes.CDLL(str(compile_library(folder, f"{major}{minor}")))


def naive_cuda(weights: LayerWeights) -> Callable[[Tensor], Tensor]:
    """Preparation of the layer: a thread a token, as the CUDA kernel published with the paper does it."""
    w_in, b_in, w_out = (None if each is None else each.detach().contiguous() for each in (weights.w_in, weights.b_in, weights.w_out))
    shape, code = weights.shape, ACTIVATIONS[weights.activation].code

    def layer(x: Tensor) -> Tensor:
        x = x.contiguous()
        y, tokens = torch.empty_like(x), x.numel() // x.shape[-1]
        if x.numel() == 0:
            return y
        values = torch.empty(tokens, shape.active_width, device=x.device)
        rows = torch.empty(tokens, shape.active_width, dtype=torch.int32, device=x.device)
        code_of_error = _library().cmm_naive(
            DTYPES[x.dtype],
            *(ctypes.c_void_p(None if each is None else each.data_ptr()) for each in (x, w_in, b_in, w_out, y, values, rows)),
            *(ctypes.c_long(tokens), x.shape[-1], shape.trees, shape.levels, code),
            ctypes.c_void_p(torch.cuda.current_stream(x.device).cuda_stream),
        )
        if code_of_error:
            raise RuntimeError(f"the naive CUDA kernel was not launched: CUDA error {code_of_error}")
        return y

    return layer
