"""Large batches: tokens are bucketed by the node they have reached, and a tile of one bucket meets a whole subtree on tensor cores.

A group of up to six levels has 63 nodes, one tile of a matrix product; the tile picks each token's path from the logits. Between two
groups tokens are sorted by node: counts a tile, a scan over tiles, a scatter; no atomics, so every order repeats. In the last group all
tokens of a tile share their ancestors, so that their outputs are two more matrix products, of the ancestors' and of the subtree's rows.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from fffsweep.kernels.gpu.device import activate, ancestor_nodes, find_bucket, subtree_nodes


@triton.jit
def tile_rows(order, starts, firsts, tile, tree, tokens, BASE: tl.constexpr, BLOCK_T: tl.constexpr):
    """Bucket of a tile, the positions of its tokens, which of them exist, and their ids; level BASE 0 is one bucket of all tokens."""
    if BASE == 0:
        bucket = tile * 0
        position = tile * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = position < tokens
        token = position
    else:
        firsts += tree * ((1 << BASE) + 1)
        starts += tree * ((1 << BASE) + 1)
        bucket = find_bucket(firsts, tile, BASE)
        position = tl.load(starts + bucket) + (tile - tl.load(firsts + bucket)) * BLOCK_T + tl.arange(0, BLOCK_T)
        valid = position < tl.load(starts + bucket + 1)
        token = tl.load(order + tree.to(tl.int64) * tokens + position, mask=valid, other=0)
    return bucket, position, valid, token.to(tl.int64)


@triton.jit
def group_kernel(
    x,
    w_in,
    b_in,
    w_out,
    y,
    logits,
    leaves,
    order,
    starts,
    firsts,
    children,
    ranks,
    counts,
    tokens,
    hidden,
    num_tiles,
    TREES: tl.constexpr,
    LEVELS: tl.constexpr,
    BASE: tl.constexpr,
    GROUP: tl.constexpr,
    NODES: tl.constexpr,
    ANCESTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """GROUP levels from level BASE on: their logits, and what is next: leaves and (FUSED) y at the end of the tree, else sort keys.

    order, starts, firsts: tokens by bucket, each bucket's first token and first tile; not read at BASE 0. children, ranks [TREES, tokens]:
    which of the 2**GROUP subtrees below comes next, and which of those of its tile a token is; counts [TREES, 2**GROUP, num_tiles].
    Grid (num_tiles, TREES).
    """
    tile = tl.program_id(0)
    tree = tl.program_id(1)
    if BASE > 0 and tile >= tl.load(firsts + tree * ((1 << BASE) + 1) + (1 << BASE)):
        return
    bucket, position, valid, token = tile_rows(order, starts, firsts, tile, tree, tokens, BASE, BLOCK_T)
    head = (1 << BASE) + bucket
    place = tl.arange(0, NODES)
    inside = place < (1 << GROUP) - 1
    row = tree.to(tl.int64) * ((1 << LEVELS) - 1) + subtree_nodes(head, GROUP, NODES)
    column = tl.arange(0, BLOCK_H)
    dots = tl.zeros([BLOCK_T, NODES], tl.float32)
    for h in range(0, hidden, BLOCK_H):
        within = h + column < hidden
        tokens_part = tl.load(x + token[:, None] * hidden + h + column[None, :], mask=valid[:, None] & within[None, :], other=0.0)
        rows_part = tl.load(w_in + row[None, :] * hidden + h + column[:, None], mask=inside[None, :] & within[:, None], other=0.0)
        dots = tl.dot(tokens_part, rows_part, dots, input_precision=PRECISION)
    if HAS_BIAS:
        dots += tl.load(b_in + row, mask=inside, other=0.0).to(tl.float32)[None, :]
    local = tl.zeros([BLOCK_T], tl.int32)
    last = local
    hit = tl.zeros([BLOCK_T, NODES], tl.int32)
    for level in tl.static_range(GROUP):
        on_path = place[None, :] == local[:, None]
        hit += on_path.to(tl.int32)
        logit = tl.sum(tl.where(on_path, dots, 0.0), axis=1)
        tl.store(logits + (token * TREES + tree) * LEVELS + BASE + level, logit, mask=valid)
        last = local
        local = 2 * local + 1 + (logit > 0).to(tl.int32)
    if BASE + GROUP < LEVELS:
        child = local - ((1 << GROUP) - 1)
        number = tl.arange(0, BLOCK_T)
        alike = (child[:, None] == child[None, :]) & valid[None, :] & (number[None, :] < number[:, None])
        at = tree.to(tl.int64) * tokens + position
        tl.store(children + at, child, mask=valid)
        tl.store(ranks + at, tl.sum(alike.to(tl.int32), axis=1), mask=valid)
        each = tl.arange(0, 1 << GROUP)
        count = tl.sum(((child[:, None] == each[None, :]) & valid[:, None]).to(tl.int32), axis=0)
        tl.store(counts + (tree * (1 << GROUP) + each).to(tl.int64) * num_tiles + tile, count)
    else:
        tl.store(leaves + token * TREES + tree, (head << (GROUP - 1)) + last - (1 << (GROUP - 1)), mask=valid)
        if FUSED:
            values = tl.where(hit > 0, activate(dots, ACTIVATION), 0.0).to(x.dtype.element_ty)
            above = tl.arange(0, ANCESTORS)
            if BASE > 0:
                kept = valid[:, None] & (above < BASE)[None, :]
                old = tl.load(logits + token[:, None] * LEVELS + above[None, :], mask=kept, other=0.0)
                old_values = tl.where(kept, activate(old, ACTIVATION), 0.0).to(x.dtype.element_ty)
            ancestors = ancestor_nodes(head, BASE, ANCESTORS).to(tl.int64)
            out_column = tl.arange(0, BLOCK_N)
            for h in range(0, hidden, BLOCK_N):
                within = h + out_column < hidden
                at = w_out + row[:, None] * hidden + h + out_column[None, :]
                rows_part = tl.load(at, mask=inside[:, None] & within[None, :], other=0.0)
                total = tl.dot(values, rows_part, input_precision=PRECISION)
                if BASE > 0:
                    at = w_out + ancestors[:, None] * hidden + h + out_column[None, :]
                    rows_part = tl.load(at, mask=(above < BASE)[:, None] & within[None, :], other=0.0)
                    total = tl.dot(old_values, rows_part, total, input_precision=PRECISION)
                at = y + token[:, None] * hidden + h + out_column[None, :]
                tl.store(at, total.to(y.dtype.element_ty), mask=valid[:, None] & within[None, :])


@triton.jit
def scan_kernel(counts, totals, firsts, num_tiles, BASE: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr):
    """Turn counts [trees, 2**GROUP, num_tiles] into sums over earlier tiles of the same bucket; totals [trees, 2**(BASE + GROUP)].

    Grid (2**(BASE + GROUP), trees).
    """
    next_bucket = tl.program_id(0)
    tree = tl.program_id(1)
    bucket = next_bucket >> GROUP
    counts += (tree * (1 << GROUP) + (next_bucket & ((1 << GROUP) - 1))).to(tl.int64) * num_tiles
    first = bucket * 0
    end = first + num_tiles
    if BASE > 0:
        first = tl.load(firsts + tree * ((1 << BASE) + 1) + bucket)
        end = tl.load(firsts + tree * ((1 << BASE) + 1) + bucket + 1)
    carry = first * 0
    for start in range(first, end, BLOCK):
        tile = start + tl.arange(0, BLOCK)
        count = tl.load(counts + tile, mask=tile < end, other=0)
        tl.store(counts + tile, carry + tl.cumsum(count, axis=0) - count, mask=tile < end)
        carry += tl.sum(count, axis=0)
    tl.store(totals + tree * (1 << (BASE + GROUP)) + next_bucket, carry)


@triton.jit
def scatter_kernel(
    order,
    starts,
    firsts,
    children,
    ranks,
    counts,
    totals,
    next_order,
    next_starts,
    next_firsts,
    tokens,
    num_tiles,
    BASE: tl.constexpr,
    GROUP: tl.constexpr,
    BLOCK_T: tl.constexpr,
    NEXT_BLOCK_T: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Put every token where its next bucket wants it; one more program writes down where buckets start. Grid (num_tiles + 1, trees)."""
    tile = tl.program_id(0)
    tree = tl.program_id(1)
    totals += tree * (1 << (BASE + GROUP))
    if tile == num_tiles:
        next_starts += tree * ((1 << (BASE + GROUP)) + 1)
        next_firsts += tree * ((1 << (BASE + GROUP)) + 1)
        carry = tile * 0
        carry_tiles = tile * 0
        for start in range(0, 1 << (BASE + GROUP), BLOCK):
            bucket = start + tl.arange(0, BLOCK)
            exists = bucket < (1 << (BASE + GROUP))
            count = tl.load(totals + bucket, mask=exists, other=0)
            tl.store(next_starts + bucket, carry + tl.cumsum(count, axis=0) - count, mask=exists)
            carry += tl.sum(count, axis=0)
            count = (count + NEXT_BLOCK_T - 1) // NEXT_BLOCK_T
            tl.store(next_firsts + bucket, carry_tiles + tl.cumsum(count, axis=0) - count, mask=exists)
            carry_tiles += tl.sum(count, axis=0)
        tl.store(next_starts + (1 << (BASE + GROUP)), carry)
        tl.store(next_firsts + (1 << (BASE + GROUP)), carry_tiles)
        return
    if BASE > 0 and tile >= tl.load(firsts + tree * ((1 << BASE) + 1) + (1 << BASE)):
        return
    bucket, position, valid, token = tile_rows(order, starts, firsts, tile, tree, tokens, BASE, BLOCK_T)
    child = tl.load(children + tree.to(tl.int64) * tokens + position, mask=valid, other=0)
    each = tl.arange(0, 1 << GROUP)
    total = tl.load(totals + (bucket << GROUP) + each)
    before = tl.cumsum(total, axis=0) - total
    start = tl.sum(tl.where(child[:, None] == each[None, :], before[None, :], 0), axis=1)
    if BASE > 0:
        start += tl.load(starts + tree * ((1 << BASE) + 1) + bucket)
    start += tl.load(counts + (tree * (1 << GROUP) + child).to(tl.int64) * num_tiles + tile, mask=valid, other=0)
    start += tl.load(ranks + tree.to(tl.int64) * tokens + position, mask=valid, other=0)
    tl.store(next_order + tree.to(tl.int64) * tokens + start, token.to(tl.int32), mask=valid)
