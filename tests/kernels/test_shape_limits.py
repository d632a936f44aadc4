"""What is refused before an index could overflow, in Python and at the operator itself."""

import pytest
import torch

from fffsweep.kernels import library
from fffsweep.kernels.shape import MAX_DEPTH, TreeShape, parse_layout

native = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))


def test_the_deepest_tree_still_has_32_bit_nodes() -> None:
    assert TreeShape(1, MAX_DEPTH).nodes == 2**31 - 1
    for text in (f"1x{MAX_DEPTH + 1}", "1x4000"):
        with pytest.raises(ValueError, match="expected at most 30"):
            parse_layout(text)


@native
@pytest.mark.parametrize("levels", [-1, 0, 2, 4, 32, 2**40])
def test_the_operator_refuses_levels_that_its_weights_do_not_have(levels: int) -> None:
    x, w = torch.zeros(3, 8), torch.zeros(1, 7, 8)
    with pytest.raises(ValueError, match="nodes a tree"):
        torch.ops.fffsweep.cmm(x, w, None, w, levels, 4)
