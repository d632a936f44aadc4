"""Small batches: one program a token and tree walks down by itself, some levels at a time.

A walk is a chain of memory round trips, one for every level. Where few tokens are under way, that latency is the time: a program
therefore reads all nodes of the next GROUP levels at once and chooses among them afterwards, 2**GROUP - 1 rows for GROUP of use.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from fffsweep.kernels.gpu.device import activate, subtree_levels, subtree_nodes


@triton.jit
def walk_kernel(
    x,
    w_in,
    b_in,
    w_out,
    y,
    logits,
    leaves,
    hidden,
    TREES: tl.constexpr,
    LEVELS: tl.constexpr,
    GROUP: tl.constexpr,
    NODES: tl.constexpr,
    PATH: tl.constexpr,
    BLOCK_H: tl.constexpr,
    PARTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FUSED: tl.constexpr,
):
    """Leaves [tokens, TREES], and with FUSED (one tree) y, else logits [tokens, TREES, LEVELS]. Grid (tokens, TREES)."""
    token = tl.program_id(0).to(tl.int64)
    tree = tl.program_id(1)
    first = tree.to(tl.int64) * ((1 << LEVELS) - 1)
    column = tl.arange(0, BLOCK_H)
    place = tl.arange(0, NODES)
    path_level = tl.arange(0, PATH)
    path_logits = tl.zeros([PATH], tl.float32)
    head = tree * 0 + 1
    leaf = tree * 0
    for base in tl.static_range(0, LEVELS, GROUP):
        node = first + subtree_nodes(head, GROUP, NODES)
        inside = (place < (1 << GROUP) - 1) & (subtree_levels(GROUP, NODES) + base < LEVELS)
        # products are added up where they are, and over columns once: until then nothing waits for anything but memory
        products = tl.zeros([NODES, BLOCK_H], tl.float32)
        if PARTS > 0:
            for part in tl.static_range(PARTS):
                within = part * BLOCK_H + column < hidden
                token_part = tl.load(x + token * hidden + part * BLOCK_H + column, mask=within, other=0.0).to(tl.float32)
                at = w_in + node[:, None] * hidden + part * BLOCK_H + column[None, :]
                products += tl.load(at, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32) * token_part[None, :]
        else:
            for h in range(0, hidden, BLOCK_H):
                within = h + column < hidden
                token_part = tl.load(x + token * hidden + h + column, mask=within, other=0.0).to(tl.float32)
                at = w_in + node[:, None] * hidden + h + column[None, :]
                products += tl.load(at, mask=inside[:, None] & within[None, :], other=0.0).to(tl.float32) * token_part[None, :]
        dots = tl.sum(products, axis=1)
        if HAS_BIAS:
            dots += tl.load(b_in + node, mask=inside, other=0.0).to(tl.float32)
        # one sum brings every decision of the group into one number, from which a path is read bit by bit
        rights = tl.sum((dots > 0).to(tl.int32) << place, axis=0)
        local = head * 0
        taken = tl.zeros([PATH], tl.int32) - 1
        for level in tl.static_range(GROUP):
            if base + level < LEVELS:
                taken = tl.where(path_level == base + level, local, taken)
                if base + level == LEVELS - 1:
                    leaf = (head << level) + local - (1 << level)
                local = 2 * local + 1 + ((rights >> local) & 1)
        path_logits += tl.sum(tl.where(taken[:, None] == place[None, :], dots[None, :], 0.0), axis=1)
        head = (head << GROUP) + local - ((1 << GROUP) - 1)
    tl.store(leaves + token * TREES + tree, leaf)
    if FUSED:
        on_path = path_level < LEVELS
        values = tl.where(on_path, activate(path_logits, ACTIVATION), 0.0)
        node = ((leaf + 1) >> tl.maximum(LEVELS - 1 - path_level, 0)) - 1
        out_column = tl.arange(0, BLOCK_N)
        for out in range(0, hidden, BLOCK_N):
            out_within = out + out_column < hidden
            out_at = w_out + node.to(tl.int64)[:, None] * hidden + out + out_column[None, :]
            out_rows = tl.load(out_at, mask=on_path[:, None] & out_within[None, :], other=0.0)
            total = tl.sum(out_rows.to(tl.float32) * values[:, None], axis=0)
            tl.store(y + token * hidden + out + out_column, total.to(y.dtype.element_ty), mask=out_within)
    else:
        tl.store(logits + (token * TREES + tree) * LEVELS + path_level, path_logits, mask=path_level < LEVELS)


@triton.jit
def combine_kernel(
    values,
    leaves,
    w,
    y,
    hidden,
    TREES: tl.constexpr,
    LEVELS: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
):
    """y [tokens, hidden]: sum over all visited rows of w, scaled by activate(values) [tokens, TREES, LEVELS].

    Grid (tokens, parts of hidden). The trees of a token are summed in one order, so the result repeats bit for bit.
    """
    token = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = column < hidden
    total = tl.zeros([BLOCK_N], tl.float32)
    for start in range(0, TREES * LEVELS, ROWS):
        row = start + tl.arange(0, ROWS)
        used = row < TREES * LEVELS
        tree = row // LEVELS
        leaf = tl.load(leaves + token * TREES + tree, mask=used, other=0)
        node = ((leaf + 1) >> (LEVELS - 1 - row % LEVELS)) - 1
        value = activate(tl.load(values + token * TREES * LEVELS + row, mask=used, other=0.0), ACTIVATION)
        at = w + (tree.to(tl.int64) * ((1 << LEVELS) - 1) + node)[:, None] * hidden + column[None, :]
        rows = tl.load(at, mask=used[:, None] & within[None, :], other=0.0)
        total += tl.sum(rows.to(tl.float32) * value[:, None], axis=0)
    tl.store(y + token * hidden + column, total.to(y.dtype.element_ty), mask=within)
