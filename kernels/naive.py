"""Straightforward forms of CMM that the paper and its readers reach for first; the benchmark shows what they cost."""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

from fffsweep.kernels import library as native
from fffsweep.kernels import openblas, torch_forms
from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.layer import LayerWeights

Layer = Callable[[Tensor], Tensor]
Argument = ctypes.c_void_p | ctypes.c_int64


def level1(weights: LayerWeights) -> Layer:
    """Token by token in C++ with BLAS level 1: a dot product a node, then a scaled row added a node."""

    def finish(library: ctypes.CDLL, given: list[Argument], y: Tensor) -> None:
        library.cmm_blas_level1(openblas.address("saxpy"), *given, *_addresses(y))

    return _token_by_token(weights, finish)


def level2(weights: LayerWeights) -> Layer:
    """Token by token in C++ with BLAS level 2: a dot product a node, then one matrix-vector product of the gathered rows."""

    def finish(library: ctypes.CDLL, given: list[Argument], y: Tensor) -> None:
        gathered = torch.empty(weights.shape.active_width, weights.hidden)
        library.cmm_blas_level2(openblas.address("sgemv"), *given, *_addresses(gathered, y))

    return _token_by_token(weights, finish)


def level_paths(weights: LayerWeights, x: Tensor) -> Tensor:
    """Nodes that `level1` and `level2` visit: x [tokens, hidden] -> int64 [tokens, trees, levels]."""
    rows = _walk(weights, x.detach().contiguous())[1].view(-1, weights.shape.trees, weights.shape.levels)
    return rows - weights.shape.nodes * torch.arange(weights.shape.trees).view(1, -1, 1)


def why_no_blas() -> str | None:
    """None if the forms over BLAS can run here, else the reason why not."""
    return native.why_missing() or openblas.why_missing()


def _walk(weights: LayerWeights, x: Tensor) -> tuple[Tensor, Tensor]:
    """Logits and numbers of the visited rows of w_in [trees * nodes, hidden], both [tokens, active width]."""
    openblas.set_threads(1)
    w_in, b_in = weights.w_in.detach().contiguous(), None if weights.b_in is None else weights.b_in.detach().contiguous()
    logits = torch.empty(len(x), weights.shape.active_width)
    rows = torch.empty(logits.shape, dtype=torch.int64)
    sizes = _sizes(weights.hidden, weights.shape.trees, weights.shape.levels)
    bias = ctypes.c_void_p(None if b_in is None else b_in.data_ptr())
    tokens = (*_addresses(x), *_sizes(len(x)))
    ctypes.CDLL(str(native.PATH)).cmm_blas_walk(
        openblas.address("sdot"), *tokens, *_addresses(w_in), bias, *sizes, *_addresses(logits, rows)
    )
    return logits, rows


def _token_by_token(weights: LayerWeights, finish: Callable[[ctypes.CDLL, list[Argument], Tensor], None]) -> Layer:
    act, w_out = activation_of(weights.activation).apply, weights.w_out.detach().contiguous()
    library = ctypes.CDLL(str(native.PATH))

    def layer(x: Tensor) -> Tensor:
        tokens = x.detach().reshape(-1, weights.hidden).contiguous()
        logits, rows = _walk(weights, tokens)
        activations, y = act(logits), torch.empty_like(tokens)
        given = [*_addresses(activations, rows), *_sizes(*rows.shape), *_addresses(w_out), *_sizes(weights.hidden)]
        finish(library, given, y)
        return y.reshape(x.shape)

    return layer


def _addresses(*tensors: Tensor) -> list[Argument]:
    return [ctypes.c_void_p(each.data_ptr()) for each in tensors]


def _sizes(*numbers: int) -> list[Argument]:
    return [ctypes.c_int64(each) for each in numbers]


def sparse(layout: torch.layout) -> Callable[[LayerWeights], Layer]:
    """Preparation of the sparse tensor form: activations [tokens, width] as COO or CSR, multiplied with all output rows."""

    def prepare(weights: LayerWeights) -> Layer:
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
