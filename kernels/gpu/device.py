"""Device functions that the Triton kernels share: activations, the numbering of nodes, and which bucket a tile belongs to."""

# mypy: ignore-errors

import triton
import triton.language as tl


@triton.jit
def sigmoid(z):
    """1 / (1 + exp(-z)), of float32."""
    return 1.0 / (1.0 + tl.exp(-z))


@triton.jit
def activate(z, ACTIVATION: tl.constexpr):
    """Activation of float32 logits by its code in `fffsweep.kernels.activations`; NaN stays NaN. -1 is no activation."""
    result = z
    if ACTIVATION == 1:
        result = tl.where(z <= 0, 0.0, z)
    elif ACTIVATION == 2:
        result = tl.where(z > 0, z, 0.01 * z)
    elif ACTIVATION == 3:
        result = z * sigmoid(z)
    elif ACTIVATION == 4:
        result = 0.5 * z * (1.0 + tl.erf(z * 0.7071067811865476))
    elif ACTIVATION == 5:
        result = z * sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
    return result


@triton.jit
def slope(z, ACTIVATION: tl.constexpr):
    """Derivative of `activate`."""
    result = tl.full(z.shape, 1.0, tl.float32)
    if ACTIVATION == 1:
        result = tl.where(z > 0, 1.0, 0.0)
    elif ACTIVATION == 2:
        result = tl.where(z > 0, 1.0, 0.01)
    elif ACTIVATION == 3:
        chance = sigmoid(z)
        result = chance * (1.0 + z * (1.0 - chance))
    elif ACTIVATION == 4:
        result = 0.5 * (1.0 + tl.erf(z * 0.7071067811865476)) + 0.3989422804014327 * z * tl.exp(-0.5 * z * z)
    elif ACTIVATION == 5:
        chance = sigmoid(1.5957691216057308 * (z + 0.044715 * z * z * z))
        result = chance + z * chance * (1.0 - chance) * 1.5957691216057308 * (1.0 + 0.134145 * z * z)
    return result


@triton.jit
def subtree_levels(GROUP: tl.constexpr, NODES: tl.constexpr):
    """Level of each place 0 .. NODES - 1 of a subtree of GROUP levels, breadth-first; of places beyond it, the last level."""
    place = tl.arange(0, NODES)
    level = tl.zeros([NODES], tl.int32)
    for each in tl.static_range(1, GROUP):
        level += (place + 1 >= (1 << each)).to(tl.int32)
    return level


@triton.jit
def subtree_nodes(head, GROUP: tl.constexpr, NODES: tl.constexpr):
    """Node ids of the places of the subtree whose top node has id head - 1.

    head - 1 is node `o` of its level l, so head is 2**l + o, and the children of a head are 2 head and 2 head + 1.
    """
    level = subtree_levels(GROUP, NODES)
    return (head << level) + tl.arange(0, NODES) - (1 << level)


@triton.jit
def ancestor_nodes(head, BASE: tl.constexpr, ANCESTORS: tl.constexpr):
    """Node ids above the node of id head - 1 and level BASE, one a level from the root on."""
    above = tl.maximum(BASE - tl.arange(0, ANCESTORS), 0)
    return (head >> above) - 1


@triton.jit
def place_on_path(leaf, head, level: tl.constexpr, GROUP: tl.constexpr):
    """Place, in the subtree below head of GROUP levels that end at the leaves, of the node of `level` on the way to each leaf."""
    return ((leaf + 1) >> (GROUP - 1 - level)) - (head << level) + (1 << level) - 1


@triton.jit
def find_bucket(firsts, number, BASE: tl.constexpr):
    """The bucket b of 2**BASE with firsts[b] <= number < firsts[b + 1]; empty buckets are stepped over."""
    bucket = number * 0
    for step in tl.static_range(BASE):
        middle = bucket + (1 << (BASE - 1 - step))
        bucket = tl.where(tl.load(firsts + middle) <= number, middle, bucket)
    return bucket
