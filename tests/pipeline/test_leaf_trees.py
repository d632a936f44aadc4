"""The original fast feedforward layer: mixture, hardening, transposition, hard inference."""

import math

import pytest
import torch

from fffsweep.pipeline.feedforward import auxiliary_loss
from fffsweep.pipeline.model_settings import FeedForward
from fffsweep.pipeline.variants import make_feedforward

HIDDEN = 6
EPS = torch.finfo(torch.float64).eps
PLAIN = {"trees": 2, "depth": 2, "leaf_width": 3}
FORMS = {
    "plain": PLAIN,
    "one_tree": {"trees": 1, "depth": 1, "leaf_width": 5, "activation": "silu"},
    "no_bias": {**PLAIN, "input_bias": False},
    "deep": {"trees": 1, "depth": 4, "leaf_width": 1, "hardening": 0},
    "everything": {**PLAIN, "output_bias": True, "master_leaf": 4, "hardening": 0.3, "transposition": 0.2},
}


def layer_of(seed=0, scale=0.5, **fields):
    layer = make_feedforward(FeedForward.model_validate({"variant": "original_fff", **fields}), HIDDEN, layer=1).to(torch.float64)
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=scale)
    return layer


def tokens(count=9):
    return torch.randn(count, HIDDEN, generator=torch.Generator().manual_seed(5), dtype=torch.float64), torch.zeros(count)


def leaf_output(layer, x, tree, leaf):
    """Output of one leaf for one token [hidden]."""
    logits = layer.leaf_in[tree, leaf] @ x + (0 if layer.leaf_bias is None else layer.leaf_bias[tree, leaf])
    act = torch.nn.functional.silu if layer.settings.activation == "silu" else torch.nn.functional.gelu
    y = act(logits) @ layer.leaf_out[tree, leaf]
    return y if layer.output_bias is None else y + layer.output_bias[tree, leaf]


def slow_mixture(layer, x):
    """Algorithm 1 of the paper, tree by tree and leaf by leaf, without the master leaf."""

    def tree_output(tree, node):
        first_leaf = 2**layer.shape.depth - 1
        if node >= first_leaf:
            return leaf_output(layer, x, tree, node - first_leaf)
        logit = layer.router_in[tree, node] @ x + (0 if layer.router_bias is None else layer.router_bias[tree, node])
        right = torch.sigmoid(logit)
        return (1 - right) * tree_output(tree, 2 * node + 1) + right * tree_output(tree, 2 * node + 2)

    return sum(tree_output(tree, 0) for tree in range(layer.shape.trees))


@pytest.mark.parametrize("name", ["plain", "one_tree", "no_bias"])
def test_training_mixes_the_leaves(name):
    layer, (x, ids) = layer_of(**FORMS[name]), tokens()
    expected = torch.stack([slow_mixture(layer, row) for row in x])
    torch.testing.assert_close(layer(x, ids), expected, rtol=0, atol=200 * EPS)
    torch.testing.assert_close(layer(x.view(3, 3, HIDDEN), ids.view(3, 3)).view(9, HIDDEN), expected, rtol=0, atol=200 * EPS)


@pytest.mark.parametrize("execution", ["cmm", "masked"])
@pytest.mark.parametrize("name", FORMS)
def test_inference_takes_the_leaf_that_is_walked_to(name, execution):
    fields = {**FORMS[name], "master_leaf": 0, "execution": execution}
    layer, (x, ids) = layer_of(**fields).eval(), tokens()
    visited = layer.paths(x, ids)
    assert visited.shape == (9, layer.shape.trees, layer.shape.levels)
    parents = visited[..., :-1]
    assert ((visited[..., 1:] - 1) // 2 == parents).all()
    logits = torch.stack([(layer.router_in[tree][parents[:, tree]] * x[:, None]).sum(2) for tree in range(layer.shape.trees)], 1)
    if layer.router_bias is not None:
        logits += torch.stack([layer.router_bias[tree][parents[:, tree]] for tree in range(layer.shape.trees)], 1)
    assert torch.equal(visited[..., 1:] == 2 * parents + 2, logits > 0)
    leaves = (visited[..., -1] - (2**layer.shape.depth - 1)).tolist()
    expected = torch.stack(
        [sum(leaf_output(layer, row, tree, leaf) for tree, leaf in enumerate(of)) for row, of in zip(x, leaves, strict=True)]
    )
    torch.testing.assert_close(layer(x, ids), expected, rtol=0, atol=200 * EPS)
    assert auxiliary_loss(layer) is None
    assert layer(x[:0], ids[:0]).shape == (0, HIDDEN)


@pytest.mark.parametrize("name", ["plain", "one_tree", "no_bias"])
def test_saturated_routers_mix_as_inference_chooses(name):
    layer, (x, ids) = layer_of(**FORMS[name]), tokens()
    with torch.no_grad():
        layer.router_in.mul_(1e6)
        if layer.router_bias is not None:
            layer.router_bias.mul_(1e6)
    mixed = layer(x, ids)
    torch.testing.assert_close(layer.eval()(x, ids), mixed, rtol=0, atol=200 * EPS)
    assert mixed.abs().max() > 0.1


@pytest.mark.parametrize("name", ["one_tree", "no_bias", "everything"])
def test_gradients(name):
    layer, (x, ids) = layer_of(**FORMS[name]), tokens(3)
    names = [key for key, _ in layer.named_parameters()]

    def value(x, *weights):
        torch.manual_seed(3)  # the same decisions are turned round in every evaluation
        y = torch.func.functional_call(layer, dict(zip(names, weights, strict=True)), (x, ids))
        penalty = auxiliary_loss(layer)
        return y if penalty is None else (y, penalty)

    assert torch.autograd.gradcheck(value, (x.requires_grad_(), *layer.parameters()))


def test_hardening_is_the_mean_entropy_of_the_decisions():
    layer, (x, ids) = layer_of(**{**PLAIN, "hardening": 2.0}), tokens()
    layer(x, ids)
    right = torch.sigmoid(torch.einsum("th,knh->tkn", x, layer.router_in) + layer.router_bias)
    entropy = -(right * right.log() + (1 - right) * (1 - right).log()).mean()
    torch.testing.assert_close(auxiliary_loss(layer), 2 * entropy)
    with torch.no_grad():
        layer.router_in.zero_()
        layer.router_bias.zero_()
    layer(x, ids)
    assert auxiliary_loss(layer).item() == pytest.approx(2 * math.log(2))


def test_hardening_hardens():
    layer, (x, ids) = layer_of(**{**PLAIN, "hardening": 1.0}), tokens(64)
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    gaps, entropies = [], []
    for _ in range(150):
        soft = layer(x, ids)
        penalty = auxiliary_loss(layer)
        entropies.append(penalty.item())
        gaps.append((layer.eval()(x, ids) - soft).abs().mean().item())
        layer.train()
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert entropies[-1] < 0.2 * entropies[0]
    assert gaps[-1] < 0.5 * gaps[0]


def test_transposition_turns_decisions_round_in_training_alone():
    always = layer_of(trees=1, depth=1, leaf_width=2, transposition=0.5, hardening=0)
    x, ids = tokens(4000)
    with torch.no_grad():
        always.router_in.zero_()
        always.router_bias.fill_(40.0)  # every token goes right for sure
    torch.manual_seed(0)
    y = always(x, ids)
    kept = torch.stack([leaf_output(always, row, 0, 1) for row in x])
    turned = torch.stack([leaf_output(always, row, 0, 0) for row in x])
    is_kept = (y - kept).abs().amax(1) < 1e-9
    assert ((y - turned).abs().amax(1) < 1e-9).equal(~is_kept)
    assert abs(float(is_kept.double().mean()) - 0.5) < 5 * 0.5 / 4000**0.5
    torch.testing.assert_close(always.eval()(x, ids), kept)


def test_initial_weights_and_the_refused_timing():
    torch.manual_seed(0)
    layer = make_feedforward(
        FeedForward(variant="original_fff", trees=4, depth=5, leaf_width=8, init="fan", output_bias=True), 128, layer=0
    )
    layer.reset(0.02)
    layer.requires_grad_(False)
    for weight, inputs in ((layer.router_in, 128), (layer.leaf_in, 128), (layer.leaf_out, 32)):
        assert float(weight.std()) == pytest.approx((3 * inputs) ** -0.5, rel=0.03)
    assert float(layer.output_bias.abs().max()) == 0
    with pytest.raises(ValueError, match="original_fff: no kernel"):
        layer.weights()
