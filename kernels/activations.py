"""The activations of a feedforward layer: one table that every implementation, native ones too, takes them from."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional

LEAKY_SLOPE = 0.01


@dataclass(frozen=True)
class Activation:
    """One activation: its name, the `code` that native kernels know it by, the torch function and its derivative."""

    name: str
    code: int
    apply: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor], Tensor]


def _gelu_slope(z: Tensor) -> Tensor:
    return 0.5 * (1 + torch.erf(z / math.sqrt(2))) + z * torch.exp(-0.5 * z * z) / math.sqrt(2 * math.pi)


def _gelu_tanh_slope(z: Tensor) -> Tensor:
    scale = math.sqrt(2 / math.pi)
    tanh = torch.tanh(scale * (z + 0.044715 * z**3))
    return 0.5 * (1 + tanh) + 0.5 * z * (1 - tanh**2) * scale * (1 + 3 * 0.044715 * z**2)


def _silu_slope(z: Tensor) -> Tensor:
    sigmoid = torch.sigmoid(z)
    return sigmoid * (1 + z * (1 - sigmoid))


ACTIVATIONS = {
    each.name: each
    for each in (
        Activation("identity", 0, lambda z: z, torch.ones_like),
        Activation("relu", 1, torch.relu, lambda z: (z > 0).to(z.dtype)),
        Activation(
            "leaky_relu",
            2,
            lambda z: functional.leaky_relu(z, LEAKY_SLOPE),
            lambda z: torch.where(z > 0, torch.ones_like(z), LEAKY_SLOPE),
        ),
        Activation("silu", 3, functional.silu, _silu_slope),
        Activation("gelu", 4, functional.gelu, _gelu_slope),
        Activation("gelu_tanh", 5, lambda z: functional.gelu(z, approximate="tanh"), _gelu_tanh_slope),
    )
}


def activation_of(name: str) -> Activation:
    """Activation called `name`. Raises ValueError that lists the names, the nearest first."""
    try:
        return ACTIVATIONS[name]
    except (KeyError, TypeError):
        raise ValueError(f"activation={name!r}: expected one of {', '.join(nearest_first(str(name), list(ACTIVATIONS)))}") from None


def nearest_first(name: str, choices: list[str]) -> list[str]:
    """`choices`, the ones that look most like `name` first."""
    return sorted(choices, key=lambda choice: -difflib.SequenceMatcher(None, name, choice).ratio())
