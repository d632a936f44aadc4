"""Backward: first the gradients of logits and tokens, tile by tile as forward, then the rows', bucket by bucket.

A bucket's tokens meet only the 2**GROUP - 1 rows of its subtree and its ancestors, so a row's gradient is a sum over tokens that lie
together. Buckets are cut into chunks; a bucket of one chunk writes its rows at once, the chunks of larger ones are added up in their
order by a second kernel, and so are the ancestors'. No atomics: gradients repeat bit for bit.
"""

# mypy: ignore-errors

import triton
import triton.language as tl

from fffsweep.kernels.gpu.device import activate, ancestor_nodes, find_bucket, place_on_path, slope, subtree_nodes
from fffsweep.kernels.gpu.route import tile_rows


@triton.jit
def plan_kernel(starts, firsts, shared, BASE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK: tl.constexpr):
    """From starts [trees, 2**BASE + 1] of buckets: their first piece of BLOCK_T tokens, and their first among pieces that share a bucket.

    Grid (1, trees).
    """
    tree = tl.program_id(1)
    starts += tree * ((1 << BASE) + 1)
    firsts += tree * ((1 << BASE) + 1)
    shared += tree * ((1 << BASE) + 1)
    carry = tree * 0
    carry_shared = tree * 0
    for start in range(0, 1 << BASE, BLOCK):
        bucket = start + tl.arange(0, BLOCK)
        exists = bucket < (1 << BASE)
        size = tl.load(starts + bucket + 1, mask=exists, other=0) - tl.load(starts + bucket, mask=exists, other=0)
        count = (size + BLOCK_T - 1) // BLOCK_T
        tl.store(firsts + bucket, carry + tl.cumsum(count, axis=0) - count, mask=exists)
        carry += tl.sum(count, axis=0)
        count = tl.where(count > 1, count, 0)
        tl.store(shared + bucket, carry_shared + tl.cumsum(count, axis=0) - count, mask=exists)
        carry_shared += tl.sum(count, axis=0)
    tl.store(firsts + (1 << BASE), carry)
    tl.store(shared + (1 << BASE), carry_shared)


@triton.jit
def logit_gradients_kernel(
    grad_y,
    w_in,
    w_out,
    logits,
    leaves,
    order,
    starts,
    firsts,
    grad_logits,
    grad_x,
    tokens,
    hidden,
    TREES: tl.constexpr,
    LEVELS: tl.constexpr,
    BASE: tl.constexpr,
    GROUP: tl.constexpr,
    NODES: tl.constexpr,
    ANCESTORS: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_H: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ACTIVATION: tl.constexpr,
    FUSED: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """grad_logits [tokens, TREES, LEVELS] and, with FUSED (one tree), grad_x. Grid (tiles of BLOCK_T tokens of one bucket, TREES)."""
    tile = tl.program_id(0)
    tree = tl.program_id(1)
    if BASE > 0 and tile >= tl.load(firsts + tree * ((1 << BASE) + 1) + (1 << BASE)):
        return
    bucket, _, valid, token = tile_rows(order, starts, firsts, tile, tree, tokens, BASE, BLOCK_T)
    head = (1 << BASE) + bucket
    place = tl.arange(0, NODES)
    inside = place < (1 << GROUP) - 1
    above = tl.arange(0, ANCESTORS)
    first = tree.to(tl.int64) * ((1 << LEVELS) - 1)
    row = first + subtree_nodes(head, GROUP, NODES)
    ancestors = first + ancestor_nodes(head, BASE, ANCESTORS)
    column = tl.arange(0, BLOCK_H)
    dots = tl.zeros([BLOCK_T, NODES], tl.float32)
    old_dots = tl.zeros([BLOCK_T, ANCESTORS], tl.float32)
    for h in range(0, hidden, BLOCK_H):
        within = h + column < hidden
        grad_part = tl.load(grad_y + token[:, None] * hidden + h + column[None, :], mask=valid[:, None] & within[None, :], other=0.0)
        rows_part = tl.load(w_out + row[None, :] * hidden + h + column[:, None], mask=inside[None, :] & within[:, None], other=0.0)
        dots = tl.dot(grad_part, rows_part, dots, input_precision=PRECISION)
        if BASE > 0:
            at = w_out + ancestors[None, :] * hidden + h + column[:, None]
            rows_part = tl.load(at, mask=(above < BASE)[None, :] & within[:, None], other=0.0)
            old_dots = tl.dot(grad_part, rows_part, old_dots, input_precision=PRECISION)
    leaf = tl.load(leaves + token * TREES + tree, mask=valid, other=0)
    on_token = (token * TREES + tree) * LEVELS
    grads = tl.zeros([BLOCK_T, NODES], tl.float32)
    for level in tl.static_range(GROUP):
        on_path = place[None, :] == place_on_path(leaf, head, level, GROUP)[:, None]
        logit = tl.load(logits + on_token + BASE + level, mask=valid, other=0.0)
        grad = tl.sum(tl.where(on_path, dots, 0.0), axis=1) * slope(logit, ACTIVATION)
        tl.store(grad_logits + on_token + BASE + level, grad, mask=valid)
        grads = tl.where(on_path & valid[:, None], grad[:, None], grads)
    if BASE > 0:
        kept = valid[:, None] & (above < BASE)[None, :]
        old = tl.load(logits + on_token[:, None] + above[None, :], mask=kept, other=0.0)
        old_grads = tl.where(kept, old_dots * slope(old, ACTIVATION), 0.0)
        tl.store(grad_logits + on_token[:, None] + above[None, :], old_grads, mask=kept)
    if FUSED:
        out_column = tl.arange(0, BLOCK_N)
        for h in range(0, hidden, BLOCK_N):
            within = h + out_column < hidden
            at = w_in + row[:, None] * hidden + h + out_column[None, :]
            rows_part = tl.load(at, mask=inside[:, None] & within[None, :], other=0.0)
            total = tl.dot(grads.to(w_in.dtype.element_ty), rows_part, input_precision=PRECISION)
            if BASE > 0:
                at = w_in + ancestors[:, None] * hidden + h + out_column[None, :]
                rows_part = tl.load(at, mask=(above < BASE)[:, None] & within[None, :], other=0.0)
                total = tl.dot(old_grads.to(w_in.dtype.element_ty), rows_part, total, input_precision=PRECISION)
            at = grad_x + token[:, None] * hidden + h + out_column[None, :]
            tl.store(at, total.to(grad_x.dtype.element_ty), mask=valid[:, None] & within[None, :])


@triton.jit
def row_gradients_kernel(
    x,
    grad_y,
    logits,
    grad_logits,
    leaves,
    order,
    starts,
    firsts,
    shared,
    grad_in,
    grad_out,
    grad_bias,
    parts,
    bias_parts,
    old_parts,
    old_bias_parts,
    tokens,
    hidden,
    num_chunks,
    num_shared,
    TREES: tl.constexpr,
    LEVELS: tl.constexpr,
    BASE: tl.constexpr,
    GROUP: tl.constexpr,
    NODES: tl.constexpr,
    ANCESTORS: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_T: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    ACTIVATION: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One chunk's sums for BLOCK_N columns: gradients of w_in from grad_logits and x, of w_out from activations and grad_y.

    Rows of a bucket of one chunk go to grad_in, grad_out, grad_bias, others to parts [2, TREES, num_shared, NODES, hidden] and bias_parts;
    the ancestors' to old_parts [2, TREES, num_chunks, ANCESTORS, hidden] and old_bias_parts. Grid (num_chunks, parts of hidden, TREES).
    """
    chunk = tl.program_id(0)
    tree = tl.program_id(2)
    starts += tree * ((1 << BASE) + 1)
    firsts += tree * ((1 << BASE) + 1)
    shared += tree * ((1 << BASE) + 1)
    if chunk >= tl.load(firsts + (1 << BASE)):
        return
    bucket = find_bucket(firsts, chunk, BASE)
    number = chunk - tl.load(firsts + bucket)
    alone = tl.load(firsts + bucket + 1) - tl.load(firsts + bucket) == 1
    begin = tl.load(starts + bucket) + number * CHUNK
    end = tl.minimum(begin + CHUNK, tl.load(starts + bucket + 1))
    head = (1 << BASE) + bucket
    place = tl.arange(0, NODES)
    above = tl.arange(0, ANCESTORS)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = column < hidden
    sum_in = tl.zeros([NODES, BLOCK_N], tl.float32)
    sum_out = tl.zeros([NODES, BLOCK_N], tl.float32)
    sum_bias = tl.zeros([NODES], tl.float32)
    old_in = tl.zeros([ANCESTORS, BLOCK_N], tl.float32)
    old_out = tl.zeros([ANCESTORS, BLOCK_N], tl.float32)
    old_bias = tl.zeros([ANCESTORS], tl.float32)
    for start in range(begin, end, BLOCK_T):
        position = start + tl.arange(0, BLOCK_T)
        valid = position < end
        token = position.to(tl.int64)
        if BASE > 0:
            token = tl.load(order + tree.to(tl.int64) * tokens + position, mask=valid, other=0).to(tl.int64)
        leaf = tl.load(leaves + token * TREES + tree, mask=valid, other=0)
        on_token = (token * TREES + tree) * LEVELS
        grads = tl.zeros([NODES, BLOCK_T], tl.float32)
        values = tl.zeros([NODES, BLOCK_T], tl.float32)
        for level in tl.static_range(GROUP):
            on_path = (place[:, None] == place_on_path(leaf, head, level, GROUP)[None, :]) & valid[None, :]
            grad = tl.load(grad_logits + on_token + BASE + level, mask=valid, other=0.0)
            value = activate(tl.load(logits + on_token + BASE + level, mask=valid, other=0.0), ACTIVATION)
            grads = tl.where(on_path, grad[None, :], grads)
            values = tl.where(on_path, value[None, :], values)
        rows = token[:, None] * hidden + column[None, :]
        tokens_part = tl.load(x + rows, mask=valid[:, None] & within[None, :], other=0.0)
        grads_part = tl.load(grad_y + rows, mask=valid[:, None] & within[None, :], other=0.0)
        sum_in = tl.dot(grads.to(x.dtype.element_ty), tokens_part, sum_in, input_precision=PRECISION)
        sum_out = tl.dot(values.to(x.dtype.element_ty), grads_part, sum_out, input_precision=PRECISION)
        sum_bias += tl.sum(grads, axis=1)
        if BASE > 0:
            kept = (above < BASE)[:, None] & valid[None, :]
            at = on_token[None, :] + above[:, None]
            grads = tl.load(grad_logits + at, mask=kept, other=0.0)
            values = tl.where(kept, activate(tl.load(logits + at, mask=kept, other=0.0), ACTIVATION), 0.0)
            old_in = tl.dot(grads.to(x.dtype.element_ty), tokens_part, old_in, input_precision=PRECISION)
            old_out = tl.dot(values.to(x.dtype.element_ty), grads_part, old_out, input_precision=PRECISION)
            old_bias += tl.sum(grads, axis=1)
    inside = (place < (1 << GROUP) - 1)[:, None] & within[None, :]
    if alone:
        row = tree.to(tl.int64) * ((1 << LEVELS) - 1) + subtree_nodes(head, GROUP, NODES)
        at = row[:, None] * hidden + column[None, :]
        tl.store(grad_in + at, sum_in.to(grad_in.dtype.element_ty), mask=inside)
        tl.store(grad_out + at, sum_out.to(grad_out.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            first_column = (place < (1 << GROUP) - 1) & (tl.program_id(1) == 0)
            tl.store(grad_bias + row, sum_bias.to(grad_bias.dtype.element_ty), mask=first_column)
    else:
        part = tree.to(tl.int64) * num_shared + tl.load(shared + bucket) + number
        at = (part * NODES + place)[:, None] * hidden + column[None, :]
        second = tl.num_programs(2).to(tl.int64) * num_shared * NODES * hidden
        tl.store(parts + at, sum_in, mask=inside)
        tl.store(parts + second + at, sum_out, mask=inside)
        if HAS_BIAS:
            first_column = (place < (1 << GROUP) - 1) & (tl.program_id(1) == 0)
            tl.store(bias_parts + part * NODES + place, sum_bias, mask=first_column)
    if BASE > 0:
        part = tree.to(tl.int64) * num_chunks + chunk
        at = (part * ANCESTORS + above)[:, None] * hidden + column[None, :]
        kept = (above < BASE)[:, None] & within[None, :]
        second = tl.num_programs(2).to(tl.int64) * num_chunks * ANCESTORS * hidden
        tl.store(old_parts + at, old_in, mask=kept)
        tl.store(old_parts + second + at, old_out, mask=kept)
        if HAS_BIAS:
            first_column = (above < BASE) & (tl.program_id(1) == 0)
            tl.store(old_bias_parts + part * ANCESTORS + above, old_bias, mask=first_column)


@triton.jit
def add_chunks_kernel(
    firsts,
    shared,
    parts,
    bias_parts,
    grad_in,
    grad_out,
    grad_bias,
    hidden,
    num_shared,
    LEVELS: tl.constexpr,
    BASE: tl.constexpr,
    GROUP: tl.constexpr,
    NODES: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Rows of buckets of several chunks, summed in their order, and zeros for an empty bucket. Grid (2**BASE, parts of hidden, trees)."""
    bucket = tl.program_id(0)
    tree = tl.program_id(2)
    firsts += tree * ((1 << BASE) + 1)
    shared += tree * ((1 << BASE) + 1)
    if tl.load(firsts + bucket + 1) - tl.load(firsts + bucket) == 1:
        return
    place = tl.arange(0, NODES)
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = (place < (1 << GROUP) - 1)[:, None] & (column < hidden)[None, :]
    second = tl.num_programs(2).to(tl.int64) * num_shared * NODES * hidden
    sum_in = tl.zeros([NODES, BLOCK_N], tl.float32)
    sum_out = tl.zeros([NODES, BLOCK_N], tl.float32)
    sum_bias = tl.zeros([NODES], tl.float32)
    for chunk in range(tl.load(shared + bucket), tl.load(shared + bucket + 1)):
        part = tree.to(tl.int64) * num_shared + chunk
        at = (part * NODES + place)[:, None] * hidden + column[None, :]
        sum_in += tl.load(parts + at, mask=inside, other=0.0)
        sum_out += tl.load(parts + second + at, mask=inside, other=0.0)
        if HAS_BIAS:
            sum_bias += tl.load(bias_parts + part * NODES + place, mask=place < (1 << GROUP) - 1, other=0.0)
    row = tree.to(tl.int64) * ((1 << LEVELS) - 1) + subtree_nodes((1 << BASE) + bucket, GROUP, NODES)
    at = row[:, None] * hidden + column[None, :]
    tl.store(grad_in + at, sum_in.to(grad_in.dtype.element_ty), mask=inside)
    tl.store(grad_out + at, sum_out.to(grad_out.dtype.element_ty), mask=inside)
    if HAS_BIAS:
        first_column = (place < (1 << GROUP) - 1) & (tl.program_id(1) == 0)
        tl.store(grad_bias + row, sum_bias.to(grad_bias.dtype.element_ty), mask=first_column)


@triton.jit
def add_ancestors_kernel(
    firsts,
    old_parts,
    old_bias_parts,
    grad_in,
    grad_out,
    grad_bias,
    hidden,
    num_chunks,
    LEVELS: tl.constexpr,
    BASE: tl.constexpr,
    ANCESTORS: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HAS_BIAS: tl.constexpr,
):
    """Rows above level BASE: the chunks of all buckets below a node lie together. Grid (2**BASE - 1, parts of hidden, trees)."""
    node = tl.program_id(0)
    tree = tl.program_id(2)
    firsts += tree * ((1 << BASE) + 1)
    level = node * 0
    for each in tl.static_range(1, BASE):
        level += (node + 1 >= (1 << each)).to(tl.int32)
    bucket = (node + 1 - (1 << level)) << (BASE - level)
    begin = tl.load(firsts + bucket)
    end = tl.load(firsts + bucket + (1 << (BASE - level)))
    column = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    within = column < hidden
    second = tl.num_programs(2).to(tl.int64) * num_chunks * ANCESTORS * hidden
    sum_in = tl.zeros([BLOCK_N], tl.float32)
    sum_out = tl.zeros([BLOCK_N], tl.float32)
    sum_bias = (node * 0).to(tl.float32)
    for start in range(begin, end, BLOCK_C):
        chunk = start + tl.arange(0, BLOCK_C)
        part = (tree.to(tl.int64) * num_chunks + chunk) * ANCESTORS + level
        at = part[:, None] * hidden + column[None, :]
        there = (chunk < end)[:, None] & within[None, :]
        sum_in += tl.sum(tl.load(old_parts + at, mask=there, other=0.0), axis=0)
        sum_out += tl.sum(tl.load(old_parts + second + at, mask=there, other=0.0), axis=0)
        if HAS_BIAS:
            sum_bias += tl.sum(tl.load(old_bias_parts + part, mask=chunk < end, other=0.0), axis=0)
    row = tree.to(tl.int64) * ((1 << LEVELS) - 1) + node
    tl.store(grad_in + row * hidden + column, sum_in.to(grad_in.dtype.element_ty), mask=within)
    tl.store(grad_out + row * hidden + column, sum_out.to(grad_out.dtype.element_ty), mask=within)
    if HAS_BIAS and tl.program_id(1) == 0:
        tl.store(grad_bias + row, sum_bias.to(grad_bias.dtype.element_ty))
