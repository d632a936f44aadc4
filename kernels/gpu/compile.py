"""Compile the Triton kernels for a GPU that need not be there: `python -m fffsweep.kernels.gpu.compile`.

The host side is run on CPU tensors with launches caught on their way; each is compiled with the arguments it would have had. What the
assembler says of registers, spills and shared memory is printed; a kernel that cannot be launched for want of them fails here.
"""

from __future__ import annotations

import argparse
import contextlib
import re
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.shape import parse_layout

SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}  # bytes a program may have
TYPES = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.int32: "*i32"}
KINDS = {
    "bfloat16": (torch.bfloat16, ""),
    "float16": (torch.float16, ""),
    "float32": (torch.float32, "ieee"),
    "tf32": (torch.float32, "tf32"),
    "tf32x3": (torch.float32, "tf32x3"),
}


@dataclass(frozen=True)
class Compiled:
    """One kernel as launched: bytes of shared memory a program, registers a thread, bytes spilled."""

    name: str
    settings: str
    shared_bytes: int
    registers: int
    spilled_bytes: int


def compile_all(layout: str, hidden: int, tokens: int, dtype: torch.dtype, arch: int = 90, precision: str = "") -> list[Compiled]:
    """Every kernel that walking, the bucketed forward and the backward pass launch for this layer and batch."""
    from fffsweep.kernels.gpu import launch

    found: list[Compiled] = []
    weights = random_layer(parse_layout(layout), hidden, dtype=dtype)
    layer = (weights.w_in, weights.b_in, weights.w_out)
    levels = weights.shape.levels
    x = torch.zeros(tokens, hidden, dtype=dtype)
    with _caught(found, arch):
        launch.run_walk(x, *layer, levels=levels, activation=4)
        y, logits, leaves, order, starts = launch.run_grouped(x, *layer, levels=levels, activation=4, precision=precision)
        launch.run_backward(y, x, *layer, logits, leaves, order, starts, levels=levels, activation=4, precision=precision)
    return found


@contextlib.contextmanager
def _caught(found: list[Compiled], arch: int) -> Iterator[None]:
    from triton.runtime.jit import JITFunction

    def run(self: Any, *arguments: Any, grid: Any, warmup: bool, **options: Any) -> None:
        found.append(_compile(self, arguments, options, arch))

    with mock.patch.object(JITFunction, "run", run):
        yield


def _compile(kernel: Any, arguments: tuple[Any, ...], options: dict[str, Any], arch: int) -> Compiled:
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    compiler = {name: options.pop(name) for name in ("num_warps", "num_stages") if name in options}
    given = dict(zip(kernel.arg_names, arguments, strict=False)) | options
    types, aligned = {}, {}
    for place, name in enumerate(kernel.arg_names):
        value = given[name]
        if name in options:
            types[name] = "constexpr"
        elif isinstance(value, torch.Tensor):
            types[name] = TYPES[value.dtype]
            aligned[(place,)] = [["tt.divisibility", 16]]
        else:
            types[name] = "i32"
            if value % 16 == 0:
                aligned[(place,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=kernel, signature=types, constexprs=options, attrs=aligned)
    built = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=compiler)
    shared = built.metadata.shared
    settings = " ".join(f"{name}={value}" for name, value in (options | compiler).items())
    if shared > SHARED_LIMIT.get(arch, 99 * 1024):
        raise RuntimeError(f"{kernel.fn.__name__} takes {shared} bytes of shared memory, more than sm_{arch} has: {settings}")
    return Compiled(kernel.fn.__name__, settings, shared, *_assembled(built.asm["ptx"], arch))


def _assembled(ptx: str, arch: int) -> tuple[int, int]:
    """Registers a thread and bytes spilled, by the assembler that Triton brings."""
    from triton import knobs

    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "kernel.ptx"
        source.write_text(ptx)
        command = [
            knobs.nvidia.ptxas.path,
            "-v",
            f"-arch=sm_{arch}{'a' if arch == 90 else ''}",
            str(source),
            "-o",
            f"{folder}/kernel.cubin",
        ]
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    registers = re.search(r"Used (\d+) registers", said)
    spilled = re.search(r"(\d+) bytes spill stores", said)
    return int(registers[1]) if registers else 0, int(spilled[1]) if spilled else 0


def main() -> int:
    """Print one line a kernel."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--arch", type=int, default=90, help="compute capability, 90 for H100")
    parser.add_argument("--layout", default="1x11")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--dtype", choices=sorted(KINDS), action="append", help="by default all")
    arguments = parser.parse_args()
    for dtype, precision in (KINDS[kind] for kind in arguments.dtype or KINDS):
        for each in compile_all(arguments.layout, arguments.hidden, arguments.tokens, dtype, arguments.arch, precision):
            kind = f"{str(dtype).removeprefix('torch.')} {precision}".strip()
            print(
                f"{kind:15} {each.name:24} {each.registers:4} registers {each.spilled_bytes:5} bytes spilled {each.shared_bytes:7} shared"
            )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
