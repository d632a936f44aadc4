"""Properties that hold for every layout, size and input: hypothesis looks for the one that breaks them."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fffsweep.kernels import library, reference, torch_forms
from fffsweep.kernels.activations import ACTIVATIONS
from fffsweep.kernels.cmm import cmm
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.registry import applicable, find
from fffsweep.kernels.shape import TreeShape
from fffsweep.kernels.verify import output_tolerance, verify

cases = st.builds(
    lambda trees, depth, hidden, tokens, seed, activation, bias: (
        random_layer(TreeShape(trees, depth), hidden, activation=activation, bias=bias, seed=seed),
        torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed)),
    ),
    st.integers(1, 3),
    st.integers(0, 5),
    st.integers(1, 70),
    st.integers(0, 40),
    st.integers(0, 2**16),
    st.sampled_from(sorted(ACTIVATIONS)),
    st.booleans(),
)
quick = settings(max_examples=25, deadline=None)


@quick
@given(cases)
def test_a_path_visits_one_node_a_level_and_goes_to_children(case) -> None:
    weights, x = case
    paths = torch_forms.paths(x, weights.w_in, weights.b_in, weights.shape)
    assert paths.shape == (len(x), weights.shape.trees, weights.shape.levels)
    assert (paths[:, :, 0] == 0).all()
    step = paths[:, :, 1:] - 2 * paths[:, :, :-1]
    assert ((step == 1) | (step == 2)).all()


@quick
@given(cases)
def test_all_implementations_agree_with_the_reference(case) -> None:
    weights, x = case
    checked = [each for each in applicable(weights, torch.float32) if each.role == "cmm"]
    assert checked
    for each in checked:
        verdict = verify(each, weights, x, backward=each.supports_backward)
        assert verdict.verified, f"{each.name}: {verdict.reason}"


@quick
@given(cases, st.randoms(use_true_random=False))
def test_permuted_tokens_permute_outputs(case, random) -> None:
    weights, x = case
    order = list(range(len(x)))
    random.shuffle(order)
    arguments = (weights.w_in, weights.b_in, weights.w_out, weights.shape, weights.activation)
    tolerance = torch.from_numpy(output_tolerance(weights, reference.forward(weights, x)))[order]
    assert ((cmm(x[order], *arguments).double() - cmm(x, *arguments)[order].double()).abs() <= 2 * tolerance).all()


@quick
@given(st.integers(1, 30), st.integers(1, 40), st.integers(0, 20), st.integers(0, 2**16))
def test_depth_zero_is_a_dense_layer(width, hidden, tokens, seed) -> None:
    weights = random_layer(TreeShape(width, 0), hidden, seed=seed)
    x = torch.randn(tokens, hidden, generator=torch.Generator().manual_seed(seed))
    dense = find("torch_dense").prepare(weights)(x).double().numpy()
    expected = reference.forward(weights, x)
    for name in ("masked", "gather", *(["native"] if library.why_missing() is None else [])):
        assert (np.abs(find(name).prepare(weights)(x).double().numpy() - dense) <= 2 * output_tolerance(weights, expected)).all()


@pytest.mark.parametrize("scale", [0.0, 1e-8])
def test_logits_within_rounding_of_zero_may_flip_and_are_counted(scale: float) -> None:
    weights = random_layer(TreeShape(1, 3), 64, bias=False)
    x = scale * torch.randn(30, 64, generator=torch.Generator().manual_seed(0))
    for each in applicable(weights, torch.float32):
        if each.role == "cmm":
            assert verify(each, weights, x).verified
    if scale == 0:  # exactly zero is decided, and goes left
        assert (torch_forms.paths(x, weights.w_in, None, weights.shape) == torch.tensor([0, 1, 3, 7])).all()
