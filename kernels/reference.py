"""CMM in float64, one token and one tree at a time over the visited rows: slow, obvious, and what everything else is held against."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.shape import child

WHOLE_ELEMENTS = 1 << 27  # of larger weights, no float64 copy is made
Array = npt.NDArray[np.float64]
Terms = tuple[Array, Array, Array, Array, npt.NDArray[np.int64], Array, Array]  # what `_scatter` takes but for the last


@dataclass(frozen=True)
class Forward:
    """Outputs y [tokens, hidden], paths and logits [tokens, trees, levels], and the sums of absolute terms that bound rounding.

    `logit_terms` [tokens, trees, levels] sums |x||w_in| + |b_in|; `y_terms` [tokens, hidden] sums |act||w_out|;
    `y_logit_terms` sums logit_terms |w_out|.
    """

    y: Array
    paths: npt.NDArray[np.int64]
    logits: Array
    logit_terms: Array
    y_terms: Array
    y_logit_terms: Array


@dataclass(frozen=True)
class Gradients:
    """Gradients of the inputs; b_in is None where the layer has none. Or, from `gradient_terms`, bounds of the same shapes."""

    x: Array
    w_in: Array
    b_in: Array | None
    w_out: Array


def _float64(tensor: Tensor) -> Array:
    return tensor.detach().to("cpu", torch.float64).numpy()


class _Rows:
    """Weights [trees, nodes, hidden] of which rows become float64 as they are visited."""

    def __init__(self, tensor: Tensor) -> None:
        self._tensor = tensor.detach()

    def __getitem__(self, at: Any) -> Array:
        return _float64(self._tensor[at])


def _rows(tensor: Tensor) -> Array | _Rows:
    return _float64(tensor) if tensor.numel() <= WHOLE_ELEMENTS else _Rows(tensor)


def forward(layer: LayerWeights, x: Tensor, paths: Tensor | None = None) -> Forward:
    """Walk every token of x [tokens, hidden] down its own path, or along `paths` [tokens, trees, levels]."""
    shape, act = layer.shape, activation_of(layer.activation).apply
    tokens, w_in, w_out = _float64(x), _rows(layer.w_in), _rows(layer.w_out)
    b_in = np.zeros(layer.w_in.shape[:2]) if layer.b_in is None else _float64(layer.b_in)
    visited = np.zeros((len(tokens), shape.trees, shape.levels), dtype=np.int64)
    logits, logit_terms = np.zeros(visited.shape), np.zeros(visited.shape)
    y, y_terms, y_logit_terms = np.zeros_like(tokens), np.zeros_like(tokens), np.zeros_like(tokens)
    for token, row in enumerate(tokens):
        for tree in range(shape.trees):
            node = 0
            for level in range(shape.levels):
                if paths is not None:
                    node = int(paths[token, tree, level])
                logit = row @ w_in[tree, node] + b_in[tree, node]
                visited[token, tree, level], logits[token, tree, level] = node, logit
                logit_terms[token, tree, level] = np.abs(row) @ np.abs(w_in[tree, node]) + abs(b_in[tree, node])
                node = child(node, logit)
            hidden = act(torch.from_numpy(logits[token, tree])).numpy()
            rows = w_out[tree, visited[token, tree]]
            y[token] += hidden @ rows
            y_terms[token] += np.abs(hidden) @ np.abs(rows)
            y_logit_terms[token] += logit_terms[token, tree] @ np.abs(rows)
    return Forward(y, visited, logits, logit_terms, y_terms, y_logit_terms)


def backward(layer: LayerWeights, x: Tensor, grad_y: Tensor, done: Forward) -> Gradients:
    """Gradients of the hard-routed layer for grad_y [tokens, hidden]: along the paths of `done`, none through the decisions."""
    activation = activation_of(layer.activation)
    logits = torch.from_numpy(done.logits)
    hidden, slope = activation.apply(logits).numpy(), activation.slope(logits).numpy()
    arrays = (_float64(layer.w_in), _float64(layer.w_out), _float64(x), _float64(grad_y))
    return _scatter(*arrays, done.paths, hidden, slope, layer.b_in is not None)


def gradient_terms(layer: LayerWeights, x: Tensor, grad_y: Tensor, done: Forward) -> Gradients:
    """Sums of absolute terms for each gradient: reduction length x epsilon x these bounds the rounding of any order of summation."""
    return _scatter(*_terms(layer, x, grad_y, done, 1.0), layer.b_in is not None)


def typical_terms(layer: LayerWeights, x: Tensor, grad_y: Tensor, done: Forward) -> Gradients:
    """Roots of the sums of squared terms: times epsilon, what roundings that are independent of each other come to."""
    w_in, w_out, tokens, grads, paths, hidden, slope = _terms(layer, x, grad_y, done, max(1, layer.hidden) ** 0.5)
    squares = _scatter(w_in**2, w_out**2, tokens**2, grads**2, paths, hidden**2, slope**2, layer.b_in is not None)
    bias = None if squares.b_in is None else np.sqrt(squares.b_in)
    return Gradients(np.sqrt(squares.x), np.sqrt(squares.w_in), bias, np.sqrt(squares.w_out))


def _terms(layer: LayerWeights, x: Tensor, grad_y: Tensor, done: Forward, row: float) -> Terms:
    """Absolute values of what `_scatter` takes; the roundings of a logit come to its terms over `row`."""
    activation, logits = activation_of(layer.activation), torch.from_numpy(done.logits)
    # activations change by little more than one for each unit of the logit, slopes by less
    hidden, slope = (np.abs(of(logits).numpy()) + done.logit_terms / row for of in (activation.apply, activation.slope))
    w_in, w_out, tokens, grads = (np.abs(_float64(each)) for each in (layer.w_in, layer.w_out, x, grad_y))
    return w_in, w_out, tokens, grads, done.paths, hidden, slope


def _scatter(
    w_in: Array, w_out: Array, x: Array, grad_y: Array, paths: npt.NDArray[np.int64], hidden: Array, slope: Array, bias: bool
) -> Gradients:
    found = Gradients(np.zeros_like(x), np.zeros_like(w_in), np.zeros(w_in.shape[:2]) if bias else None, np.zeros_like(w_out))
    for token in range(len(x)):
        for tree in range(w_in.shape[0]):
            path = paths[token, tree]
            grad_logits = (w_out[tree, path] @ grad_y[token]) * slope[token, tree]
            found.x[token] += grad_logits @ w_in[tree, path]
            # a path never visits a node twice, so fancy in-place addition drops nothing
            found.w_in[tree, path] += np.outer(grad_logits, x[token])
            found.w_out[tree, path] += np.outer(hidden[token, tree], grad_y[token])
            if found.b_in is not None:
                found.b_in[tree, path] += grad_logits
    return found
