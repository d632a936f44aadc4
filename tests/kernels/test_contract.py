"""The contract that every implementation of the registry keeps, forward and backward."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from fffsweep.kernels import reference, registry, torch_forms
from fffsweep.kernels.activations import ACTIVATIONS
from fffsweep.kernels.layer import LayerWeights, random_layer
from fffsweep.kernels.registry import Implementation
from fffsweep.kernels.shape import parse_layout
from fffsweep.kernels.verify import verify

ON_CPU = [each for each in registry.IMPLEMENTATIONS if "cpu" in each.devices]
FAST = [each for each in ON_CPU if each.role != "reference" and each.name != "torch_dense_compiled"]
IDS = [each.name for each in FAST]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def tokens(count: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(dtype)


def layer(implementation: Implementation, layout: str, hidden: int, dtype: torch.dtype = torch.float32, **options: object) -> LayerWeights:
    """Random layer; a dense implementation gets one of the same width at depth 0."""
    shape = parse_layout(layout)
    if implementation.role == "dense":
        shape = parse_layout(f"{shape.width}x0")
    return random_layer(shape, hidden, dtype=dtype, **options)


def check(implementation: Implementation, weights: LayerWeights, x: Tensor, *, backward: bool | None = None) -> None:
    reason = implementation.why_not(weights, x.dtype)
    if reason:
        pytest.skip(reason)
    backward = implementation.supports_backward if backward is None else backward
    verdict = verify(implementation, weights, x, backward=backward)
    assert verdict.verified, verdict.reason


@pytest.mark.parametrize("implementation", FAST, ids=IDS)
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("layout", ["1x0", "1x3", "3x2", "7x0", "1x7", "5x4"])
def test_layouts(implementation: Implementation, layout: str, dtype: str) -> None:
    check(implementation, layer(implementation, layout, 40, DTYPES[dtype]), tokens(19, 40, DTYPES[dtype]))


@pytest.mark.parametrize("implementation", FAST, ids=IDS)
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("bias", [False, True])
def test_activations(implementation: Implementation, activation: str, bias: bool) -> None:
    check(implementation, layer(implementation, "2x3", 33, activation=activation, bias=bias), tokens(17, 33))


@pytest.mark.parametrize("implementation", FAST, ids=IDS)
@pytest.mark.parametrize("hidden", [1, 2, 3, 7, 15, 16, 17, 31, 33, 63, 65, 127, 255, 257, 1023, 1025])
def test_hidden_sizes(implementation: Implementation, hidden: int) -> None:
    check(implementation, layer(implementation, "2x2", hidden), tokens(9, hidden))


@pytest.mark.parametrize("implementation", FAST, ids=IDS)
@pytest.mark.parametrize("count", [0, 1, 2, 3, 5, 8, 13, 31, 64, 129, 300])
def test_token_counts(implementation: Implementation, count: int) -> None:
    check(implementation, layer(implementation, "1x4", 24), tokens(count, 24))


@pytest.mark.parametrize("implementation", FAST, ids=IDS)
def test_many_tokens_share_leaves_or_crowd_on_one_path(implementation: Implementation) -> None:
    weights = layer(implementation, "2x3", 20)
    crowded = tokens(1, 20).repeat(700, 1)
    check(implementation, weights, crowded)
    check(implementation, weights, torch.cat([crowded[:333], tokens(412, 20)]))


@pytest.mark.parametrize("implementation", FAST, ids=IDS)
def test_leading_dimensions_and_strides(implementation: Implementation) -> None:
    weights = layer(implementation, "2x3", 24)
    reason = implementation.why_not(weights, torch.float32)
    if reason:
        pytest.skip(reason)
    call = implementation.prepare(weights)
    wide = tokens(30, 48)
    views = {
        "every other column": wide[:, ::2],
        "transposed": tokens(24, 30).t(),
        "offset by one": wide.flatten()[1 : 1 + 24 * 20].view(20, 24),
    }
    for name, x in views.items():
        verdict = verify(implementation, weights, x)
        assert verdict.verified, f"{name}: {verdict.reason}"
    x = tokens(30, 24)
    assert torch.equal(call(x.view(2, 3, 5, 24)).view(30, 24), call(x))


@pytest.mark.parametrize("implementation", FAST, ids=IDS)
def test_misaligned_weights(implementation: Implementation) -> None:
    weights = layer(implementation, "1x3", 21)
    shifted = LayerWeights(*(_shifted(each) for each in (weights.w_in, weights.b_in, weights.w_out)), weights.shape, weights.activation)
    check(implementation, shifted, tokens(12, 21), backward=False)


def _shifted(tensor: Tensor) -> Tensor:
    memory = torch.empty(tensor.numel() + 1, dtype=tensor.dtype)
    view = memory[1:].view(tensor.shape)
    view.copy_(tensor)
    return view


@pytest.mark.parametrize("implementation", [each for each in FAST if each.supports_backward], ids=lambda each: each.name)
def test_gradients_reach_only_visited_rows(implementation: Implementation) -> None:
    weights = layer(implementation, "1x6", 16)
    if implementation.role == "dense" or implementation.unavailable():
        pytest.skip("computes every row, or not available")
    leaf = LayerWeights(*(each.clone().requires_grad_() for each in (weights.w_in, weights.b_in, weights.w_out)), weights.shape, "gelu")
    x = tokens(3, 16)
    implementation.prepare(leaf)(x).sum().backward()
    visited = np.unique(reference.forward(weights, x).paths)
    untouched = np.setdiff1d(np.arange(weights.shape.nodes), visited)
    assert len(untouched) > 0
    for each in (leaf.w_in, leaf.w_out):
        assert each.grad[0, untouched].abs().max() == 0
        assert (each.grad[0, visited].abs().sum(dim=1) > 0).all()
    assert leaf.b_in.grad[0, untouched].abs().max() == 0


@pytest.mark.slow
def test_compiled_dense_layer() -> None:
    compiled = registry.find("torch_dense_compiled")
    check(compiled, layer(compiled, "20x0", 24), tokens(16, 24))


@pytest.mark.parametrize("implementation", [each for each in FAST if each.name.startswith("native")], ids=lambda each: each.name)
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("layout", "count"), [("1x8", 2500), ("1x11", 1500), ("3x5", 1200), ("1x9", 150)])
def test_deep_walks_of_many_tokens(implementation: Implementation, layout: str, count: int, threads: int) -> None:
    """Enough tokens that every stage of the depth-first walk and every way to share it between threads is taken."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        for dtype in (torch.float32, torch.bfloat16):
            weights, x = layer(implementation, layout, 32, dtype), tokens(count, 32, dtype)
            x[: count // 3] = x[:1]  # a third of them crowd on one path
            check(implementation, weights, x)
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("name", ["native", "gather", "masked"])
@pytest.mark.parametrize("layout", ["1x5", "3x2", "9x0"])
def test_float32_tokens_over_bfloat16_weights_are_computed_in_float32(name: str, layout: str) -> None:
    implementation = registry.find(name)
    if reason := implementation.unavailable():
        pytest.skip(reason)
    for count in (1, 30):
        verdict = verify(implementation, layer(implementation, layout, 96, torch.bfloat16), tokens(count, 96), backward=True)
        assert verdict.verified, verdict.reason


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize(("hidden", "count", "layout"), [(768, 1500, "1x9"), (16, 65_600, "1x3")], ids=["past the caches", "two passes"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_large_batches(dtype: str, hidden: int, count: int, layout: str, threads: int) -> None:
    """Outputs of more than 2 MiB, which are stored past the caches, and more tokens than one pass takes: every element."""
    native = registry.find("native")
    if reason := native.unavailable():
        pytest.skip(reason)
    weights, x = layer(native, layout, hidden, DTYPES[dtype]), tokens(count, hidden, DTYPES[dtype])
    grad_y = tokens(count, hidden, DTYPES[dtype], seed=2)
    assert x.numel() * x.element_size() >= 2 << 20
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        found = _outputs_and_gradients(native.prepare, weights, x, grad_y)
        paths = native.paths(weights, x)
    finally:
        torch.set_num_threads(before)

    def along(weights: LayerWeights):
        arguments = (weights.w_in, weights.b_in, weights.w_out, weights.shape, weights.activation)
        return lambda x: torch_forms.gather(x, *arguments, paths=paths)

    expected = _outputs_and_gradients(along, weights.to(torch.float64), x.double(), grad_y.double())
    slack = 64 * torch.finfo(DTYPES[dtype]).eps
    for got, want in zip(found, expected, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=slack, atol=slack * float(want.square().mean().sqrt()))


def _outputs_and_gradients(prepare, weights: LayerWeights, x: Tensor, grad_y: Tensor) -> list[Tensor]:
    leaves = [each.clone().requires_grad_() for each in (x, weights.w_in, weights.b_in, weights.w_out)]
    y = prepare(replace(weights, w_in=leaves[1], b_in=leaves[2], w_out=leaves[3]))(leaves[0])
    return [y.detach(), *torch.autograd.grad(y, leaves, grad_y)]


def test_the_suite_runs_the_implementations_it_should() -> None:
    names = {each.name for each in FAST if each.unavailable() is None}
    assert {"masked", "gather", "blas_level1", "sparse_csr", "torch_dense", "torch_dense_padded", "numpy_sgemm"} <= names
