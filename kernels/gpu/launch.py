"""Host side of the Triton kernels: their launches on contiguous tensors.

They run on CUDA devices, and on CPU tensors when TRITON_INTERPRET=1 was set before Triton was first imported.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fffsweep.kernels.gpu import gradients, route, walk
from fffsweep.kernels.gpu.plan import Group, ceil_div, num_pieces, plan_groups, power_of_two, product_precision

SCAN = 1024  # counts that a scan takes in at once
MOST_PARTS = 8  # parts of a row that a walk has under way at once; longer rows are read in a loop
CHUNK = 512  # tokens whose row gradients one program sums: large enough that most buckets are one chunk


@dataclass(frozen=True)
class Sizes:
    """What every launch needs: tokens, hidden, trees, levels, and how products of this dtype are computed and tiled."""

    tokens: int
    hidden: int
    trees: int
    levels: int
    precision: str
    block_h: int
    groups: tuple[Group, ...]

    @property
    def last(self) -> Group:
        """The group that ends at the leaves."""
        return self.groups[-1]


def sizes_of(x: Tensor, w_in: Tensor, levels: int, precision: str = "") -> Sizes:
    """Sizes for x [..., hidden]. precision: of float32 products, "ieee", "tf32" or "tf32x3"; by default what torch is set to."""
    hidden = x.shape[-1]
    tokens = x.numel() // hidden if hidden else 0
    kind = product_precision(x.dtype, precision)
    block_h = min(max(power_of_two(hidden), 16), 64 if kind == "half" else 32)
    # what is not float32 has one way to be multiplied, and the argument is then not looked at
    return Sizes(tokens, hidden, w_in.shape[0], levels, "ieee" if kind == "half" else kind, block_h, plan_groups(levels, tokens, kind))


def run_walk(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, levels: int, activation: int) -> tuple[Tensor, Tensor]:
    """Outputs as x, and leaves [tokens, trees], a program a token and tree."""
    sizes = sizes_of(x, w_in, levels)
    y, trees = torch.empty_like(x), sizes.trees
    leaves = torch.empty(sizes.tokens, trees, dtype=torch.int32, device=x.device)
    if x.numel() == 0:
        return y, leaves
    fused = trees == 1
    logits = leaves if fused else torch.empty(sizes.tokens, trees, levels, device=x.device)
    group = min(levels, levels_at_once(sizes.tokens * trees))
    nodes = power_of_two(2**group - 1)
    block_h = min(power_of_two(sizes.hidden), 256 if group > 2 else 512)  # columns a program holds at once
    parts = ceil_div(sizes.hidden, block_h)
    walk.walk_kernel[(sizes.tokens, trees)](
        *(x, w_in, w_in if b_in is None else b_in, w_out, y, logits, leaves, sizes.hidden),
        TREES=trees,
        LEVELS=levels,
        GROUP=group,
        NODES=nodes,
        PATH=power_of_two(levels),
        BLOCK_H=block_h,
        PARTS=parts if parts <= MOST_PARTS else 0,
        BLOCK_N=min(power_of_two(sizes.hidden), 1024),
        HAS_BIAS=b_in is not None,
        ACTIVATION=activation,
        FUSED=fused,
        num_warps=8 if group > 2 else 4 if group == 2 else 2,
    )
    if not fused:
        combine(logits, leaves, w_out, y, sizes, activation)
    return y, leaves


def levels_at_once(walks: int) -> int:
    """Levels whose nodes a walk reads together: in advance costs bandwidth, one by one latency; few walks have bandwidth to spare.

    The bounds are those of an H200 at 1x11 and hidden 768.
    """
    return 3 if walks <= 128 else 2 if walks <= 512 else 1


def combine(values: Tensor, leaves: Tensor, w: Tensor, y: Tensor, sizes: Sizes, activation: int) -> None:
    """Fill y with the visited rows of w, scaled by the activations of values [tokens, trees, levels]; -1 takes them as they are."""
    block_n = min(power_of_two(sizes.hidden), 256)
    walk.combine_kernel[(sizes.tokens, ceil_div(sizes.hidden, block_n))](
        *(values, leaves, w, y, sizes.hidden),
        TREES=sizes.trees,
        LEVELS=sizes.levels,
        ROWS=min(power_of_two(sizes.trees * sizes.levels), 16),
        BLOCK_N=block_n,
        ACTIVATION=activation,
        num_warps=2,
    )


def run_grouped(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, levels: int, activation: int, precision: str = ""
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Outputs as x; logits [tokens, trees, levels]; leaves [tokens, trees]; order [trees, tokens] and starts [trees, buckets + 1].

    The last two are the buckets of the last group: what the backward pass goes by.
    """
    sizes = sizes_of(x, w_in, levels, precision)
    tokens, trees = sizes.tokens, sizes.trees
    integers: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    y = torch.empty_like(x)
    logits = torch.empty(tokens, trees, levels, device=x.device)
    leaves = torch.empty(tokens, trees, **integers)
    order = torch.empty(trees, tokens if len(sizes.groups) > 1 else 0, **integers)
    if x.numel() == 0:
        return y, logits, leaves, order, torch.zeros(trees, 2**sizes.last.base + 1, **integers)
    starts = torch.arange(2, **integers).mul_(tokens).repeat(trees, 1) if len(sizes.groups) == 1 else leaves
    firsts = starts
    children, ranks = (torch.empty(trees, tokens, **integers) for _ in range(2)) if len(sizes.groups) > 1 else (leaves, leaves)
    for number, group in enumerate(sizes.groups):
        is_last = group is sizes.last
        num_tiles = num_pieces(tokens, group.base, group.block_t)
        counts = leaves if is_last else torch.empty(trees, 2**group.levels, num_tiles, **integers)
        route.group_kernel[(num_tiles, trees)](
            *(x, w_in, w_in if b_in is None else b_in, w_out, y, logits, leaves, order, starts, firsts, children, ranks, counts),
            *(tokens, sizes.hidden, num_tiles),
            TREES=trees,
            LEVELS=levels,
            BASE=group.base,
            GROUP=group.levels,
            NODES=group.nodes,
            ANCESTORS=group.ancestors,
            BLOCK_T=group.block_t,
            BLOCK_H=sizes.block_h,
            BLOCK_N=block_n_of(sizes),
            HAS_BIAS=b_in is not None,
            ACTIVATION=activation,
            FUSED=trees == 1,
            PRECISION=sizes.precision,
            num_warps=4,
            num_stages=3,
        )
        if is_last:
            break
        next_group, buckets = sizes.groups[number + 1], 2 ** (group.base + group.levels)
        totals = torch.empty(trees, buckets, **integers)
        next_order = torch.empty(trees, tokens, **integers)
        next_starts, next_firsts = (torch.empty(trees, buckets + 1, **integers) for _ in range(2))
        levels_of = {"BASE": group.base, "GROUP": group.levels}
        route.scan_kernel[(buckets, trees)](counts, totals, firsts, num_tiles, **levels_of, BLOCK=SCAN, num_warps=4)
        route.scatter_kernel[(num_tiles + 1, trees)](
            *(order, starts, firsts, children, ranks, counts, totals, next_order, next_starts, next_firsts, tokens, num_tiles),
            **levels_of,
            BLOCK_T=group.block_t,
            NEXT_BLOCK_T=next_group.block_t,
            BLOCK=min(SCAN, buckets),
            num_warps=4,
        )
        order, starts, firsts = next_order, next_starts, next_firsts
    if trees > 1:
        combine(logits, leaves, w_out, y, sizes, activation)
    return y, logits, leaves, order, starts


def block_n_of(sizes: Sizes) -> int:
    """Columns of an output tile."""
    return min(max(power_of_two(sizes.hidden), 16), 128 if sizes.block_h == 64 else 64)


def run_backward(
    grad_y: Tensor,
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    logits: Tensor,
    leaves: Tensor,
    order: Tensor,
    starts: Tensor,
    levels: int,
    activation: int,
    precision: str = "",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of x, w_in, b_in (empty without one) and w_out; rows that no token visits get zeros. Repeats bit for bit."""
    sizes = sizes_of(x, w_in, levels, precision)
    tokens, hidden, trees, last = sizes.tokens, sizes.hidden, sizes.trees, sizes.last
    grad_x, grad_in, grad_out = (torch.empty_like(each) for each in (x, w_in, w_out))
    grad_bias = torch.empty(0, dtype=w_in.dtype, device=x.device) if b_in is None else torch.empty_like(b_in)
    if x.numel() == 0:
        return grad_x, grad_in.zero_(), grad_bias.zero_(), grad_out.zero_()
    block_n = block_n_of(sizes)
    parts_of_hidden, buckets = ceil_div(hidden, block_n), 2**last.base
    layer: dict[str, Any] = {"LEVELS": levels, "BASE": last.base}
    tree: dict[str, Any] = {"GROUP": last.levels, "NODES": last.nodes}

    def pieces(size: int) -> tuple[Tensor, Tensor]:
        firsts, shared = torch.empty_like(starts), torch.empty_like(starts)
        gradients.plan_kernel[(1, trees)](starts, firsts, shared, BASE=last.base, BLOCK_T=size, BLOCK=min(SCAN, buckets))
        return firsts, shared

    tiles, _ = pieces(last.block_t)
    grad_logits = torch.empty_like(logits)
    gradients.logit_gradients_kernel[(num_pieces(tokens, last.base, last.block_t), trees)](
        *(grad_y, w_in, w_out, logits, leaves, order, starts, tiles, grad_logits, grad_x, tokens, hidden),
        **layer,
        **tree,
        TREES=trees,
        ANCESTORS=last.ancestors,
        BLOCK_T=last.block_t,
        BLOCK_H=sizes.block_h,
        BLOCK_N=block_n,
        ACTIVATION=activation,
        FUSED=trees == 1,
        PRECISION=sizes.precision,
        num_warps=4,
        num_stages=3,
    )
    if trees > 1:
        combine(grad_logits, leaves, w_in, grad_x, sizes, -1)
    chunks, shared = pieces(CHUNK)
    num_chunks, num_shared = num_pieces(tokens, last.base, CHUNK), 2 * (tokens // CHUNK) + 1
    wide: dict[str, Any] = {"dtype": torch.float32, "device": x.device}
    parts = torch.empty(2, trees, num_shared, last.nodes, hidden, **wide)
    bias_parts = torch.empty(trees, num_shared, last.nodes, **wide)
    old_parts = torch.empty(2, trees, num_chunks, last.ancestors if last.base else 0, hidden, **wide)
    old_bias_parts = torch.empty(trees, num_chunks, last.ancestors, **wide)
    has_bias = {"HAS_BIAS": b_in is not None, "BLOCK_N": block_n}
    gradients.row_gradients_kernel[(num_chunks, parts_of_hidden, trees)](
        *(x, grad_y, logits, grad_logits, leaves, order, starts, chunks, shared, grad_in, grad_out, grad_bias),
        *(parts, bias_parts, old_parts, old_bias_parts, tokens, hidden, num_chunks, num_shared),
        **layer,
        **tree,
        **has_bias,
        TREES=trees,
        ANCESTORS=last.ancestors,
        CHUNK=CHUNK,
        BLOCK_T=min(last.block_t, 32) if sizes.block_h == 32 else last.block_t,
        ACTIVATION=activation,
        PRECISION=sizes.precision,
        num_warps=8,
        num_stages=2,
    )
    gradients.add_chunks_kernel[(buckets, parts_of_hidden, trees)](
        *(chunks, shared, parts, bias_parts, grad_in, grad_out, grad_bias, hidden, num_shared), **layer, **tree, **has_bias, num_warps=8
    )
    if last.base:
        gradients.add_ancestors_kernel[(buckets - 1, parts_of_hidden, trees)](
            *(chunks, old_parts, old_bias_parts, grad_in, grad_out, grad_bias, hidden, num_chunks),
            **layer,
            **has_bias,
            ANCESTORS=last.ancestors,
            BLOCK_C=16,
            num_warps=4,
        )
    return grad_x, grad_in, grad_bias, grad_out
