"""Dense feedforward layers (DMM), the baselines: depth 0, w_in and w_out [width, 1, hidden]."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional

from fffsweep.kernels import openblas
from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.shape import TreeShape

Layer = Callable[[Tensor], Tensor]
PADDED = 16  # leading dimensions that are a multiple of this many elements suit vector units and caches


def _matrices(weights: LayerWeights) -> tuple[Tensor, Tensor | None, Tensor]:
    # squeezed: the gradient of a selection would be a second matrix, zeroed and copied into
    bias = None if weights.b_in is None else weights.b_in.squeeze(1)
    return weights.w_in.squeeze(1), bias, weights.w_out.squeeze(1)


def eager(weights: LayerWeights) -> Layer:
    """Two torch linear layers, as every encoder has them."""
    return _two_linears(weights, *_matrices(weights))


def padded(weights: LayerWeights) -> Layer:
    """As `eager`, with neurons of zero weights up to the next multiple of `PADDED`."""
    return _two_linears(weights, *_matrices(pad(weights)))


def why_not_padded(weights: LayerWeights) -> str | None:
    """None if `padded` differs from `eager`, else the reason why not."""
    return None if weights.shape.width % PADDED else f"{weights.shape.width} neurons need no padding"


def compiled(weights: LayerWeights) -> Layer:
    """As `padded`, through torch.compile; the first call compiles, a minute on a slow machine."""
    return torch.compile(_two_linears(weights, *_matrices(pad(weights))), dynamic=False)


def pad(weights: LayerWeights) -> LayerWeights:
    """The same dense layer with neurons of zero weights up to the next multiple of `PADDED`; itself if that is what it has."""
    missing = -weights.shape.width % PADDED
    if missing == 0:
        return weights
    # an activation of the table is zero at zero, and the output rows beside it are zero too
    w_in, w_out = (functional.pad(each, (0, 0, 0, 0, 0, missing)) for each in (weights.w_in, weights.w_out))
    bias = None if weights.b_in is None else functional.pad(weights.b_in, (0, 0, 0, missing))
    return replace(weights, w_in=w_in, b_in=bias, w_out=w_out, shape=TreeShape(weights.shape.width + missing, 0))


def _two_linears(weights: LayerWeights, w_in: Tensor, bias: Tensor | None, w_out: Tensor) -> Layer:
    act = activation_of(weights.activation).apply
    # as nn.Linear stores it; a copy would cut the gradient's way to w_out
    down = w_out.t() if w_out.requires_grad else w_out.t().contiguous()
    return lambda x: functional.linear(act(functional.linear(x, w_in, bias)), down)


def int8_dynamic(weights: LayerWeights) -> Layer:
    """Weights and tokens in 8 bits, scales of tokens found at each call: torch's dynamic quantisation."""
    w_in, bias, w_out = _matrices(pad(weights))
    up, down = nn.Linear(w_in.shape[1], len(w_in), bias is not None), nn.Linear(len(w_in), w_in.shape[1], False)
    with torch.no_grad():
        up.weight.copy_(w_in)
        down.weight.copy_(w_out.t())
        if bias is not None:
            up.bias.copy_(bias)
    act = activation_of(weights.activation).apply
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecated in favour of torchao, which is no dependency here
        first, second = torch.ao.quantization.quantize_dynamic(nn.Sequential(up, down), {nn.Linear}, torch.qint8)
    return lambda x: second(act(first(x)))


def numpy_sgemm(weights: LayerWeights) -> Layer:
    """Two products by numpy's own BLAS (OpenBLAS in its wheels), on as many threads as torch has."""
    w_in, bias, w_out = (None if each is None else each.detach().contiguous().numpy() for each in _matrices(pad(weights)))
    assert w_in is not None, "weights exist"
    assert w_out is not None, "weights exist"
    up = np.ascontiguousarray(w_in.T)
    act = activation_of(weights.activation).apply

    def layer(x: Tensor) -> Tensor:
        openblas.set_threads(torch.get_num_threads())
        logits = x.reshape(-1, x.shape[-1]).numpy() @ up
        if bias is not None:
            logits += bias
        y = act(torch.from_numpy(logits)).numpy() @ w_out
        return torch.from_numpy(y).reshape(x.shape)

    return layer
