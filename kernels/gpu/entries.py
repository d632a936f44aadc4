"""The registry's entries for CUDA devices. Nothing here is imported from Triton before it is called."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from fffsweep.kernels import dense, torch_forms
from fffsweep.kernels.activations import ACTIVATIONS, activation_of
from fffsweep.kernels.gpu import availability, naive, operator
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.shape import TreeShape

Layer = Callable[[Tensor], Tensor]
WALK_TOKENS = 4096  # of 16 bits, on an H200: up to here a program a token and tree is as fast as buckets
TRITON_DTYPES = frozenset({torch.float32, torch.bfloat16, torch.float16})


def form_of(tokens: int, trees: int, dtype: torch.dtype) -> str:
    """Name of the forward form for a batch: "walk", a program a token, or "grouped", tokens bucketed by node.

    Buckets pay by products on tensor cores. Those of float32 are none, or TF32's, and even these lose against a walk at 16,384 tokens.
    """
    return "walk" if dtype == torch.float32 or tokens * trees <= WALK_TOKENS else "grouped"


def suits(shape: TreeShape) -> bool:
    """Whether the Triton kernels are expected to beat the masked dense form, whose products run on tensor cores: an estimate too.

    A dense product of every node is about eight times as fast an operation as the kernels' own.
    """
    return 8 * shape.active_width <= shape.width


def triton_layer(form: str | None, precision: str = "") -> Callable[[LayerWeights], Layer]:
    """Preparation of the Triton kernels in one form; None takes `form_of` at each call."""

    def prepare(weights: LayerWeights) -> Layer:
        code, shape = ACTIVATIONS[weights.activation].code, weights.shape

        def layer(x: Tensor) -> Tensor:
            chosen = form or form_of(x.numel() // max(1, x.shape[-1]), shape.trees, x.dtype)
            return operator.cmm(x, weights.w_in, weights.b_in, weights.w_out, shape.levels, code, chosen, precision)

        return layer

    return prepare


def triton_paths(form: str | None, precision: str = "") -> Callable[[LayerWeights, Tensor], Tensor]:
    """Nodes that the form visits, int64 [tokens, trees, levels]."""

    @torch.no_grad()
    def paths(weights: LayerWeights, x: Tensor) -> Tensor:
        from fffsweep.kernels.gpu import launch

        # a layer that wants gradients is always computed in the grouped form
        chosen = form or ("grouped" if weights.w_in.requires_grad else form_of(len(x), weights.shape.trees, x.dtype))
        x, w_in, b_in, w_out = operator.contiguous(x, weights.w_in, weights.b_in, weights.w_out)
        levels, code = weights.shape.levels, ACTIVATIONS[weights.activation].code
        if chosen == "walk":
            leaves = launch.run_walk(x, w_in, b_in, w_out, levels, code)[1]
        else:
            leaves = launch.run_grouped(x, w_in, b_in, w_out, levels, code, precision)[2]
        visited = [leaves.long()]
        for _ in range(weights.shape.depth):
            visited.append((visited[-1] - 1) // 2)
        return torch.stack(visited[::-1], dim=2)

    return paths


def gather_compiled(weights: LayerWeights) -> Layer:
    """Gathered rows and batched products, through torch.compile: what a framework makes of CMM by itself."""
    form = torch.compile(torch_forms.gather, dynamic=False)
    return lambda x: form(x, weights.w_in, weights.b_in, weights.w_out, weights.shape, weights.activation)


def sparse_vectors(weights: LayerWeights) -> Layer:
    """Activations as a sparse matrix [tokens, width] in compressed rows, multiplied with all output rows by cuSPARSE."""
    shape, act = weights.shape, activation_of(weights.activation).apply
    w_in, w_out = weights.w_in.reshape(shape.width, -1), weights.w_out.reshape(shape.width, -1)
    offset = shape.nodes * torch.arange(shape.trees, device=w_in.device).view(1, -1, 1)

    def layer(x: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        rows = (torch_forms.paths(tokens, weights.w_in, weights.b_in, shape) + offset).flatten(1)
        logits = torch.bmm(functional.embedding(rows, w_in), tokens.unsqueeze(2)).squeeze(2)
        if weights.b_in is not None:
            logits = logits + weights.b_in.reshape(-1)[rows]
        starts = shape.active_width * torch.arange(len(tokens) + 1, device=x.device)
        size = (len(tokens), shape.width)
        hidden = torch.sparse_csr_tensor(starts, rows.flatten(), act(logits).flatten(), size, check_invariants=False)
        y: Tensor = torch.sparse.mm(hidden, w_out)
        return y.reshape(x.shape)

    return layer


def dense_tf32(weights: LayerWeights) -> Layer:
    """As `dense.padded`, products of float32 rounded to TF32 whatever torch is set to."""
    layer = dense.padded(weights)

    def rounded(x: Tensor) -> Tensor:
        before = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("high")
        try:
            return layer(x)
        finally:
            torch.set_float32_matmul_precision(before)

    return rounded


def fields() -> Iterator[dict[str, Any]]:
    """Fields of each entry, as `fffsweep.kernels.registry.Implementation` takes them."""
    cuda, f32 = frozenset({"cuda"}), frozenset({torch.float32})
    forms: tuple[tuple[str, str | None, str], ...] = (
        ("triton", None, ""),
        ("triton_walk", "walk", ""),
        ("triton_grouped", "grouped", ""),
        ("triton_tf32", "grouped", "tf32"),
        ("triton_tf32x3", "grouped", "tf32x3"),
    )
    for name, form, precision in forms:
        yield {
            "name": name,
            "role": "cmm",
            "prepare": triton_layer(form, precision),
            "devices": cuda,
            "dtypes": f32 if precision else TRITON_DTYPES,
            "supports_backward": form != "walk",
            "unavailable": availability.no_triton,
            "paths": triton_paths(form, precision),
            "variant_of": None if name == "triton" else "triton",
            "tf32": precision == "tf32",
        }
    common: dict[str, Any] = {"devices": cuda, "slow": True}
    yield {
        **common,
        "name": "naive_cuda",
        "role": "cmm",
        "prepare": naive.naive_cuda,
        "dtypes": TRITON_DTYPES,
        "unavailable": availability.no_cuda_compiler,
    }
    yield {**common, "name": "cusparse_csr", "role": "cmm", "prepare": sparse_vectors, "dtypes": f32}
    yield {
        **common,
        "name": "gather_compiled",
        "role": "cmm",
        "prepare": gather_compiled,
        "dtypes": TRITON_DTYPES,
        "supports_backward": True,
        "unavailable": availability.no_triton,
    }
    yield {
        "name": "torch_dense_tf32",
        "role": "dense",
        "prepare": dense_tf32,
        "devices": cuda,
        "dtypes": f32,
        "supports_backward": True,
        "tf32": True,
    }
