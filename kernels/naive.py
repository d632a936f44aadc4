"""Straightforward forms of CMM that the paper and its readers reach for first; the benchmark shows what they cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.nn import functional

from fffsweep.kernels import torch_forms
from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.shape import child

Rows = npt.NDArray[np.float32]


def level1(weights: LayerWeights) -> Callable[[Tensor], Tensor]:
    """A token at a time by BLAS level 1: a dot product a node, then a scaled row added a node."""

    def finish(hidden: Rows, rows: Rows) -> Rows:
        y = np.zeros(rows.shape[1], dtype=np.float32)
        for scale, row in zip(hidden, rows, strict=True):
            y += scale * row
        return y

    return _token_by_token(weights, finish)


def level2(weights: LayerWeights) -> Callable[[Tensor], Tensor]:
    """A token at a time by BLAS level 2: a dot product a node, then one matrix-vector product of the visited rows."""
    return _token_by_token(weights, lambda hidden, rows: hidden @ rows)


def _token_by_token(weights: LayerWeights, finish: Callable[[Rows, Rows], Any]) -> Callable[[Tensor], Tensor]:
    shape, act = weights.shape, activation_of(weights.activation).apply
    w_in, w_out = (each.detach().reshape(shape.width, -1).numpy() for each in (weights.w_in, weights.w_out))
    b_in = None if weights.b_in is None else weights.b_in.detach().reshape(-1).numpy()

    def layer(x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1]).contiguous().numpy()
        y = np.empty_like(tokens)
        rows, logits = np.empty(shape.active_width, np.int64), np.empty(shape.active_width, np.float32)
        for token, row in enumerate(tokens):
            at = 0
            for tree in range(shape.trees):
                node = 0
                for _ in range(shape.levels):
                    rows[at] = tree * shape.nodes + node
                    logits[at] = row @ w_in[rows[at]] + (0 if b_in is None else b_in[rows[at]])
                    node = child(node, logits[at])
                    at += 1
            y[token] = finish(act(torch.from_numpy(logits)).numpy(), w_out[rows])
        return torch.from_numpy(y).reshape(x.shape)

    return layer


def sparse(layout: torch.layout) -> Callable[[LayerWeights], Callable[[Tensor], Tensor]]:
    """Preparation of the sparse tensor form: activations [tokens, width] as COO or CSR, multiplied with all output rows."""

    def prepare(weights: LayerWeights) -> Callable[[Tensor], Tensor]:
        shape, act = weights.shape, activation_of(weights.activation).apply
        w_in, w_out = weights.w_in.reshape(shape.width, -1), weights.w_out.reshape(shape.width, -1)
        offset = shape.nodes * torch.arange(shape.trees).view(1, -1, 1)

        def layer(x: Tensor) -> Tensor:
            tokens = x.reshape(-1, x.shape[-1])
            rows = (torch_forms.paths(tokens, weights.w_in, weights.b_in, shape) + offset).flatten(1)
            logits = torch.bmm(functional.embedding(rows, w_in), tokens.unsqueeze(2)).squeeze(2)
            if weights.b_in is not None:
                logits = logits + weights.b_in.reshape(-1)[rows]
            size = (len(tokens), shape.width)
            # columns of a row must ascend: those of a path do, level by level and tree by tree
            if layout == torch.sparse_csr:
                starts = shape.active_width * torch.arange(len(tokens) + 1)
                hidden = torch.sparse_csr_tensor(starts, rows.flatten(), act(logits).flatten(), size, check_invariants=False)
            else:
                token = torch.arange(len(tokens)).repeat_interleave(shape.active_width)
                hidden = torch.sparse_coo_tensor(
                    torch.stack([token, rows.flatten()]), act(logits).flatten(), size, is_coalesced=True, check_invariants=False
                )
            y: Tensor = torch.sparse.mm(hidden, w_out)
            return y.reshape(x.shape)

        return layer

    return prepare
