"""CMM in plain torch, for every device and dtype: gathered rows, and the masked dense form. Autograd gives the gradients.

Everything is computed in the dtype of the tokens, which may be wider than that of the weights.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.shape import TreeShape, child

CHUNK_ELEMENTS = 1 << 24  # gathered rows held at once: 64 MiB in float32


def _rows(nodes: Tensor, shape: TreeShape) -> Tensor:
    """Rows of the flattened [trees * nodes, hidden] weights for node ids [tokens, trees, ...]."""
    offset = torch.arange(shape.trees, device=nodes.device) * shape.nodes
    return nodes + offset.view(1, -1, *[1] * (nodes.dim() - 2))


@torch.no_grad()
def paths(x: Tensor, w_in: Tensor, b_in: Tensor | None, shape: TreeShape) -> Tensor:
    """Ids of the nodes that each token visits.

    Shapes: x [..., hidden]; w_in [trees, nodes, hidden]; b_in [trees, nodes] or None -> int64 [tokens, trees, levels].
    """
    x = x.reshape(-1, x.shape[-1])
    visited = torch.zeros(x.shape[0], shape.trees, shape.levels, dtype=torch.int64, device=x.device)
    flat_w, flat_b = w_in.reshape(-1, w_in.shape[-1]), None if b_in is None else b_in.reshape(-1)
    step = max(1, CHUNK_ELEMENTS // (shape.trees * x.shape[-1]))
    for start in range(0, x.shape[0], step):
        tokens = slice(start, start + step)
        for level in range(shape.depth):
            rows = _rows(visited[tokens, :, level], shape)
            logits = torch.einsum("th,tkh->tk", x[tokens], functional.embedding(rows, flat_w).to(x.dtype))
            if flat_b is not None:
                logits = logits + flat_b[rows]
            visited[tokens, :, level + 1] = child(visited[tokens, :, level], logits)
    return visited


def gather(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, shape: TreeShape, activation: str, *, paths: Tensor | None = None
) -> Tensor:
    """CMM by gathering the visited rows; tokens go along `paths` [tokens, trees, levels] where given, else along their own.

    Shapes as `fffsweep.kernels.cmm.cmm`. Memory: the active rows of a chunk of tokens, in training too; for the backward a few
    numbers are kept of each active node of each token.
    """
    act = activation_of(activation).apply
    tokens = x.reshape(-1, x.shape[-1])
    visited = _own_paths(tokens, w_in, b_in, shape) if paths is None else _checked(paths, tokens.shape[0], shape)
    logits = visited_logits(tokens, w_in, b_in, shape, visited)
    return visited_sum(act(logits), w_out, shape, visited).to(x.dtype).reshape(x.shape)


def visited_logits(x: Tensor, w_in: Tensor, b_in: Tensor | None, shape: TreeShape, visited: Tensor) -> Tensor:
    """Logits of the nodes `visited` [tokens, trees, levels], of its shape; x [tokens, hidden]. The backward gathers the rows anew."""
    flat_in, rows = w_in.reshape(-1, w_in.shape[-1]), _rows(visited, shape).flatten(1)

    def products(tokens: Tensor, chunk: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(functional.embedding(chunk, weight).to(tokens.dtype), tokens.unsqueeze(2)).squeeze(2)

    step = _chunk(shape, x)
    logits = torch.cat([_not_kept(products, *parts, flat_in) for parts in zip(x.split(step), rows.split(step), strict=True)])
    return (logits if b_in is None else logits + b_in.reshape(-1)[rows]).view(visited.shape)


def visited_sum(values: Tensor, w_out: Tensor, shape: TreeShape, visited: Tensor) -> Tensor:
    """Rows of w_out of the nodes `visited`, weighed by `values`, summed: [tokens, hidden]. The backward gathers the rows anew."""
    flat_out, flat, rows = w_out.reshape(-1, w_out.shape[-1]), values.flatten(1), _rows(visited, shape).flatten(1)

    def sums(weights: Tensor, chunk: Tensor, weight: Tensor) -> Tensor:
        return torch.bmm(weights.unsqueeze(1), functional.embedding(chunk, weight).to(weights.dtype)).squeeze(1)

    step = _chunk(shape, w_out)
    return torch.cat([_not_kept(sums, *parts, flat_out) for parts in zip(flat.split(step), rows.split(step), strict=True)])


def _chunk(shape: TreeShape, like: Tensor) -> int:
    """Tokens whose active rows, as long as those of `like`, fit CHUNK_ELEMENTS."""
    return max(1, CHUNK_ELEMENTS // (shape.active_width * like.shape[-1]))


def _not_kept(form: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
    """form(*tensors); for its backward it is computed once more, so that nothing that it makes is kept until then."""
    if torch.is_grad_enabled() and any(each.requires_grad for each in tensors):
        y: Tensor = checkpoint(form, *tensors, use_reentrant=False, preserve_rng_state=False)
        return y
    return form(*tensors)


def masked(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, shape: TreeShape, activation: str, *, paths: Tensor | None = None
) -> Tensor:
    """CMM by computing every node of every tree and masking those not visited; `paths` as in `gather`.

    Shapes as `fffsweep.kernels.cmm.cmm`. Cost and memory are those of a dense layer of `shape.width` neurons.
    """
    act = activation_of(activation).apply
    logits = _all_logits(x, w_in, b_in, shape)
    with torch.no_grad():
        visited = _walk(logits, shape) if paths is None else _checked(paths, logits.shape[0], shape)
        unvisited = torch.ones_like(logits, dtype=torch.bool).scatter_(2, visited, False)
    # a fill and not a product, so that an infinite logit beside the path gives zero and not NaN
    hidden = act(logits).masked_fill(unvisited, 0.0)
    return (hidden.view(-1, shape.width) @ w_out.reshape(shape.width, -1).to(x.dtype)).to(x.dtype).reshape(x.shape)


@torch.no_grad()
def masked_paths(x: Tensor, w_in: Tensor, b_in: Tensor | None, shape: TreeShape) -> Tensor:
    """As `paths`, by the logits of `masked`, whose rounding differs."""
    return _walk(_all_logits(x, w_in, b_in, shape), shape)


def _all_logits(x: Tensor, w_in: Tensor, b_in: Tensor | None, shape: TreeShape) -> Tensor:
    tokens, bias = x.reshape(-1, x.shape[-1]), None if b_in is None else b_in.reshape(-1).to(x.dtype)
    return functional.linear(tokens, w_in.reshape(shape.width, -1).to(x.dtype), bias).view(-1, shape.trees, shape.nodes)


def _walk(logits: Tensor, shape: TreeShape) -> Tensor:
    """Visited nodes [tokens, trees, levels] by the logits of all nodes [tokens, trees, nodes]."""
    visited = [torch.zeros(logits.shape[:2], dtype=torch.int64, device=logits.device)]
    for _ in range(shape.depth):
        visited.append(child(visited[-1], logits.gather(2, visited[-1].unsqueeze(2)).squeeze(2)))
    return torch.stack(visited, dim=2)


def _own_paths(x: Tensor, w_in: Tensor, b_in: Tensor | None, shape: TreeShape) -> Tensor:
    return paths(x, w_in, b_in, shape)


def _checked(given: Tensor, tokens: int, shape: TreeShape) -> Tensor:
    expected = (tokens, shape.trees, shape.levels)
    if tuple(given.shape) != expected or given.dtype != torch.int64:
        raise ValueError(
            f"paths is {given.dtype} {list(given.shape)}: expected torch.int64 {list(expected)}, node ids of each tree by level"
        )
    return given
