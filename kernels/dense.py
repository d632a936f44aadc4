"""Dense feedforward layers (DMM), the baselines: depth 0, w_in and w_out [width, 1, hidden]."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional

from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.layer import LayerWeights


def _matrices(weights: LayerWeights) -> tuple[Tensor, Tensor | None, Tensor]:
    bias = None if weights.b_in is None else weights.b_in[:, 0]
    return weights.w_in[:, 0], bias, weights.w_out[:, 0]


def eager(weights: LayerWeights) -> Callable[[Tensor], Tensor]:
    """Two torch linear layers, as every encoder has them."""
    w_in, bias, w_out = _matrices(weights)
    act = activation_of(weights.activation).apply
    # as nn.Linear stores it; a copy would cut the gradient's way to w_out
    down = w_out.t() if w_out.requires_grad else w_out.t().contiguous()
    return lambda x: functional.linear(act(functional.linear(x, w_in, bias)), down)
