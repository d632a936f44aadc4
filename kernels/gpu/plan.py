"""How a batch is computed: precision of products, levels in groups, tokens in tiles. Plain arithmetic, without Triton."""

from __future__ import annotations

from dataclasses import dataclass

import torch

TENSOR_CORE_LEVELS = 6  # 63 nodes fill one 64-wide tile of a tensor-core product
PLAIN_LEVELS = 4  # products without tensor cores are worth less waste: 15 nodes for 4 of use
MIN_BLOCK_T, MAX_BLOCK_T = 16, 64  # tokens a tile: the least that a product takes, and what one warp group's instruction takes


@dataclass(frozen=True)
class Group:
    """`levels` levels from level `base` on, met by tiles of `block_t` tokens that share their node at `base`."""

    base: int
    levels: int
    block_t: int

    @property
    def nodes(self) -> int:
        """Width of a tile: the subtree's nodes, padded to what a product takes."""
        return max(16, 1 << self.levels)

    @property
    def ancestors(self) -> int:
        """Padded number of levels above."""
        return max(16, power_of_two(self.base))


def product_precision(dtype: torch.dtype, precision: str) -> str:
    """How Triton multiplies: `precision` for float32 ("ieee", "tf32", "tf32x3"; "" is what torch is set to); "half" for the others."""
    if dtype != torch.float32:
        return "half"
    return precision or _float32_precision()


@torch.compiler.assume_constant_result
def _float32_precision() -> str:
    return "ieee" if torch.get_float32_matmul_precision() == "highest" else "tf32"


def plan_groups(levels: int, tokens: int, precision: str) -> tuple[Group, ...]:
    """Groups of about equal levels, and tiles about as large as a bucket is on average."""
    most = PLAIN_LEVELS if precision == "ieee" else TENSOR_CORE_LEVELS
    count = ceil_div(levels, most)
    groups, base = [], 0
    for number in range(count):
        size = levels // count + (number < levels % count)
        block_t = min(max(power_of_two(ceil_div(tokens, 2**base)), MIN_BLOCK_T), MAX_BLOCK_T)
        groups.append(Group(base, size, block_t))
        base += size
    return tuple(groups)


def num_pieces(tokens: int, base: int, size: int) -> int:
    """Pieces of at most `size` tokens into which `tokens` in 2**base buckets can fall at most."""
    return ceil_div(tokens, size) if base == 0 else min(tokens, tokens // size + 2**base)


def ceil_div(value: int, by: int) -> int:
    """value / by, rounded up."""
    return -(-value // by)


def power_of_two(value: int) -> int:
    """The least power of two >= value, at least 1."""
    return int(2 ** max(value - 1, 0).bit_length())
