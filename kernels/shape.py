"""Shape of a fast feedforward layer: `trees` binary trees of `depth` branch decisions, and the one rule that walks them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property

MAX_DEPTH = 30  # node indices stay below 2**31, so kernels may hold them in 32 bits


@dataclass(frozen=True, order=True)
class TreeShape:
    """`trees` complete binary trees of `2**(depth + 1) - 1` nodes each, written KxD as in the paper ("1x11").

    Every node, leaves too, holds one input row, one optional bias and one output row. A token visits `levels = depth + 1`
    nodes of each tree. Depth 0 is a dense layer of `trees` neurons.
    Raises ValueError if trees < 1, depth < 0, or depth > 30 (a node index would not fit 32 bits).
    Source: Belcak & Wattenhofer 2023, arXiv 2311.10770, section 2.
    """

    trees: int
    depth: int

    def __post_init__(self) -> None:
        for name, least in (("trees", 1), ("depth", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"{name}={value!r}: expected an integer >= {least}")
        if self.depth > MAX_DEPTH:
            raise ValueError(f"depth={self.depth}: expected at most {MAX_DEPTH}; a tree of that depth has 2**{self.depth + 1} - 1 nodes")

    @property
    def nodes(self) -> int:
        """Nodes of one tree."""
        return int(2 ** (self.depth + 1) - 1)

    @property
    def levels(self) -> int:
        """Nodes of one tree that a token visits."""
        return self.depth + 1

    @property
    def width(self) -> int:
        """Neurons stored."""
        return self.trees * self.nodes

    @property
    def active_width(self) -> int:
        """Neurons used for one token."""
        return self.trees * self.levels

    @cached_property
    def layout(self) -> str:
        """KxD, the paper's notation; `parse_layout` reads it back."""
        return f"{self.trees}x{self.depth}"


def parse_layout(text: str) -> TreeShape:
    """TreeShape of a layout written KxD: "1x11" is one tree of depth 11. Raises ValueError for anything else."""
    match = re.fullmatch(r"\s*([0-9]+)\s*x\s*([0-9]+)\s*", str(text))
    if not match:
        raise ValueError(f"layout {text!r}: expected trees x depth, two whole numbers, such as 1x11 (one tree of depth 11)")
    return TreeShape(int(match[1]), int(match[2]))


def layout_of_width(depth: int, width: int) -> TreeShape:
    """Layout of `depth` whose width comes nearest to `width` from below: floor(width / nodes) trees.

    Raises ValueError if not one tree fits, or if the layout falls short of `width` by more than 10 %.
    """
    nodes = TreeShape(1, depth).nodes
    trees = width // nodes
    if trees == 0 or trees * nodes < 0.9 * width:
        reachable = f"{trees * nodes} or {(trees + 1) * nodes}" if trees else f"{nodes}"
        raise ValueError(
            f"width ~{width} at depth {depth}: no layout within 10 % below it; "
            f"a tree of depth {depth} has {nodes} nodes, so try width ~{reachable} or another depth"
        )
    return TreeShape(trees, depth)


def child(node, logit):  # type: ignore[no-untyped-def]
    """Child of `node` that a token with `logit` goes to: the right one iff logit > 0, so zero and NaN go left.

    Works on ints and on integer tensors alike; nodes are numbered breadth-first from 0.
    """
    return 2 * node + 1 + (logit > 0)
