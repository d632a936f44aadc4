"""The cases that the GPU kernels are held to on a device: every form, layout, dtype and size, on fresh random inputs, memory poisoned."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from unittest import mock

import torch
from torch import Tensor

from fffsweep.kernels import registry
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.shape import parse_layout
from fffsweep.kernels.verify import verify

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LAYOUTS = ("1x0", "1x3", "3x2", "7x0", "1x5", "1x7", "5x4", "2x10", "1x11", "1x15")
TOKENS = (0, 1, 2, 3, 17, 64, 129)
HIDDEN = (1, 7, 33, 768)


@dataclass(frozen=True)
class Case:
    """One layer and batch; `crowded` sends a third of the tokens down one path."""

    layout: str
    hidden: int
    tokens: int
    dtype: torch.dtype
    activation: str = "gelu"
    bias: bool = True
    crowded: bool = False


def all_cases() -> Iterator[Case]:
    """Layouts by dtype, then what each of the others adds."""
    for dtype in DTYPES:
        for layout in LAYOUTS:
            yield Case(layout, 40, 37, dtype)
        for hidden in HIDDEN:
            yield Case("1x8", hidden, 65, dtype)
        for tokens in TOKENS:
            yield Case("1x8", 64, tokens, dtype)
        yield Case("1x11", 768, 700, dtype, crowded=True)
    for activation in ("identity", "relu", "leaky_relu", "silu", "gelu_tanh"):
        yield Case("2x7", 33, 40, torch.float32, activation, bias=activation == "relu")


def few_cases() -> Iterator[Case]:
    """What a sanitizer, a hundred times slower, gets through in a minute."""
    for dtype in (torch.float32, torch.bfloat16):
        yield Case("1x8", 40, 37, dtype)
        yield Case("2x3", 33, 17, dtype)


@contextlib.contextmanager
def poisoned(device: str) -> Iterator[None]:
    """Memory that nobody has written is NaN, or an absurd number: an output that a kernel forgets cannot pass for right."""
    make, alike = torch.empty, torch.empty_like

    def poison(tensor: Tensor) -> Tensor:
        if tensor.device.type == device:
            tensor.fill_(float("nan") if tensor.is_floating_point() else 1 << 30)
        return tensor

    with (
        mock.patch.object(torch, "empty", lambda *a, **k: poison(make(*a, **k))),
        mock.patch.object(torch, "empty_like", lambda *a, **k: poison(alike(*a, **k))),
    ):
        yield


def run(case: Case, seed: int, device: str = "cuda") -> list[str]:
    """What is wrong, a line each: every Triton form and the naive kernel, with gradients where they exist, held against the reference."""
    weights = random_layer(parse_layout(case.layout), case.hidden, activation=case.activation, bias=case.bias, dtype=case.dtype, seed=seed)
    weights = weights.on(device)
    x = torch.randn(case.tokens, case.hidden, generator=torch.Generator().manual_seed(seed + 1)).to(device, case.dtype)
    if case.crowded:
        x[: case.tokens // 3] = x[:1].clone()
    wrong = []
    for each in registry.applicable(weights, case.dtype, "cuda"):
        if each.role == "cmm" and (each.name.startswith("triton") or (each.name == "naive_cuda" and device == "cuda")):
            with poisoned(device):
                verdict = verify(each, weights, x, backward=each.supports_backward)
            if not verdict.verified:
                wrong.append(f"{each.name} {case}: {verdict.reason}")
    return wrong
