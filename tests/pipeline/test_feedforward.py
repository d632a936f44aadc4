"""The feedforward layer of every variant: outputs, gradients, initial weights, hashed routes, the penalty on one-sided nodes."""

import math

import pytest
import torch

from fffsweep.kernels import torch_forms
from fffsweep.kernels.shape import TreeShape
from fffsweep.pipeline import memory, node_trees
from fffsweep.pipeline.feedforward import auxiliary_loss
from fffsweep.pipeline.model_settings import FeedForward
from fffsweep.pipeline.node_trees import hashed_paths, imbalance
from fffsweep.pipeline.variants import make_feedforward

HIDDEN = 12
VARIANTS = {
    "dense": {"variant": "dense", "trees": 10},
    "dense_no_bias": {"variant": "dense", "trees": 10, "input_bias": False, "activation": "relu"},
    "fff_cmm": {"variant": "fff", "trees": 2, "depth": 3},
    "fff_masked": {"variant": "fff", "trees": 2, "depth": 3, "execution": "masked"},
    "fff_no_bias": {"variant": "fff", "trees": 1, "depth": 2, "input_bias": False, "activation": "silu"},
    "fff_leaky": {"variant": "fff", "trees": 3, "depth": 1, "activation": "leaky_relu"},
    "fff_balanced": {"variant": "fff", "trees": 2, "depth": 3, "load_balancing": 0.3},
    "fff_balanced_masked": {"variant": "fff", "trees": 2, "depth": 3, "load_balancing": 0.3, "execution": "masked"},
    "fff_master": {"variant": "fff", "trees": 2, "depth": 3, "master_leaf": 3, "output_bias": True},
    "fff_master_masked": {"variant": "fff", "trees": 1, "depth": 3, "master_leaf": 1, "output_bias": True, "execution": "masked"},
    "dense_output_bias": {"variant": "dense", "trees": 10, "output_bias": True},
    "random_cmm": {"variant": "random_routing", "trees": 2, "depth": 3},
    "random_masked": {"variant": "random_routing", "trees": 2, "depth": 3, "execution": "masked"},
}
STRAIGHT = {
    "straight_cmm": {"variant": "fff", "trees": 2, "depth": 3, "routing_gradient": "straight_through"},
    "straight_masked": {"variant": "fff", "trees": 2, "depth": 3, "routing_gradient": "straight_through", "execution": "masked"},
}

# Shapes as small as these are computed whole, unless a single node for one used is more than is worth it.
GATHERED = {
    "random_gathered": {"variant": "random_routing", "trees": 2, "depth": 3},
    "fff_balanced_gathered": {"variant": "fff", "trees": 2, "depth": 3, "load_balancing": 0.3},
    "straight_gathered": {"variant": "fff", "trees": 2, "depth": 3, "routing_gradient": "straight_through"},
}
VARIANTS |= {name: GATHERED[name] for name in ("random_gathered", "fff_balanced_gathered")}
STRAIGHT |= {"straight_gathered": GATHERED["straight_gathered"]}


@pytest.fixture(autouse=True)
def gathered(request, monkeypatch):
    """Have variants of that name gather, a few tokens at a time."""
    if "gathered" in request.node.name:
        monkeypatch.setitem(node_trees._NODES_FOR_ONE, "cpu", 1)
        monkeypatch.setattr(torch_forms, "CHUNK_ELEMENTS", 4 * 8 * HIDDEN)


def layer_of(fields, dtype=torch.float64, seed=0):
    layer = make_feedforward(FeedForward.model_validate(fields), HIDDEN, layer=1).to(dtype)
    torch.manual_seed(seed)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return layer


def tokens(count=9, dtype=torch.float64):
    generator = torch.Generator().manual_seed(5)
    return torch.randn(count, HIDDEN, generator=generator, dtype=dtype), torch.randint(50, (count,), generator=generator)


def slow_output(layer, x, ids):
    """The definition, node by node."""
    y = torch.zeros_like(x)
    visited = layer.paths(x, ids)
    act = {"gelu": torch.nn.functional.gelu, "relu": torch.relu, "silu": torch.nn.functional.silu}
    act["leaky_relu"] = lambda z: torch.nn.functional.leaky_relu(z, 0.01)
    for token in range(len(x)):
        for tree in range(layer.shape.trees):
            for node in visited[token, tree].tolist():
                logit = x[token] @ layer.w_in[tree, node] + (0 if layer.b_in is None else layer.b_in[tree, node])
                y[token] += act[layer.settings.activation](logit) * layer.w_out[tree, node]
        for neuron in range(layer.settings.master_leaf):
            logit = x[token] @ layer.master_in[neuron] + (0 if layer.master_bias is None else layer.master_bias[neuron])
            y[token] += act[layer.settings.activation](logit) * layer.master_out[neuron]
        if layer.output_bias is not None:
            y[token] += layer.output_bias
    return y


@pytest.mark.parametrize("name", [*VARIANTS, *STRAIGHT])
def test_output_is_the_sum_over_the_path(name):
    layer = layer_of({**VARIANTS, **STRAIGHT}[name])
    x, ids = tokens()
    # sums of at most 80 products of order one
    torch.testing.assert_close(layer(x, ids), slow_output(layer, x, ids), rtol=0, atol=80 * torch.finfo(torch.float64).eps)
    batched = layer(x.view(3, 3, HIDDEN), ids.view(3, 3))
    torch.testing.assert_close(batched.view(9, HIDDEN), layer(x, ids), rtol=0, atol=80 * torch.finfo(torch.float64).eps)


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients(name):
    layer = layer_of(VARIANTS[name])
    x, ids = tokens(5)
    visited = layer.paths(x, ids)
    decisions = torch_forms._all_logits(x, layer.w_in, layer.b_in, layer.shape).gather(2, visited[..., :-1])
    assert decisions.numel() == 0 or decisions.abs().min() > 1e-4  # no finite difference crosses a decision
    parameters = list(layer.parameters())

    def value(x, *weights):
        named = dict(zip([key for key, _ in layer.named_parameters()], weights, strict=True))
        y = torch.func.functional_call(layer, named, (x, ids))
        penalty = auxiliary_loss(layer)
        return y if penalty is None else (y, penalty)

    assert torch.autograd.gradcheck(value, (x.requires_grad_(), *parameters))


def test_the_penalty_is_in_the_graph_only_while_training():
    layer = layer_of(VARIANTS["fff_balanced"])
    x, ids = tokens()
    layer(x, ids)
    assert auxiliary_loss(layer).requires_grad
    assert auxiliary_loss(layer) is None
    layer.eval()
    layer(x, ids)
    assert auxiliary_loss(layer) is None


@pytest.mark.parametrize("name", STRAIGHT)
def test_straight_through_gradients_are_those_of_the_soft_choice(name):
    """Against finite differences of the layer in which each turn taken is weighed by its probability over what that was."""
    layer = layer_of(STRAIGHT[name])
    x, ids = tokens(5)
    visited = layer.paths(x, ids)
    shape = layer.shape

    def surrogate(x, frozen=None):
        logits = torch_forms._all_logits(x, layer.w_in, layer.b_in, shape).gather(2, visited)
        right = visited[..., 1:] % 2 == 0
        taken = torch.sigmoid(torch.where(right, logits[..., :-1], -logits[..., :-1]))
        gates = torch.cumprod(1 + taken - (taken if frozen is None else frozen), 2)
        values = torch.nn.functional.gelu(logits)
        values = torch.cat([values[..., :1], values[..., 1:] * gates], 2)
        rows = torch.stack([layer.w_out[tree][visited[:, tree]] for tree in range(shape.trees)], 1)
        return (values[..., None] * rows).sum((1, 2)), taken.detach()

    _, frozen = surrogate(x)
    gradient = torch.autograd.functional.jacobian(lambda x: layer(x, ids), x)
    step, numeric = 1e-6, torch.empty_like(gradient)
    for token in range(5):
        for place in range(HIDDEN):
            nudge = torch.zeros_like(x)
            nudge[token, place] = step
            numeric[:, :, token, place] = (surrogate(x + nudge, frozen)[0] - surrogate(x - nudge, frozen)[0]).detach() / (2 * step)
    torch.testing.assert_close(gradient, numeric, rtol=1e-6, atol=1e-8)
    plain = layer_of({**STRAIGHT[name], "routing_gradient": "none"})
    assert (torch.autograd.functional.jacobian(lambda x: plain(x, ids), x) - gradient).abs().max() > 1e-3


WIDE = {"trees": 96, "depth": 1}  # 1.5 nodes for one that is used
DEEP = {"trees": 1, "depth": 11}  # 341
NEED_ROWS = [
    {"variant": "random_routing"},
    {"variant": "fff", "routing_gradient": "straight_through"},
    {"variant": "fff", "load_balancing": 1.0},
]


@pytest.mark.parametrize("fields", NEED_ROWS, ids=["random", "straight", "balanced"])
@pytest.mark.parametrize("layout", [WIDE, DEEP], ids=["wide", "deep"])
def test_training_keeps_no_rows_of_weights_for_each_token(layout, fields):
    """What autograd keeps, exactly: a few numbers for each active or, computed whole, each node of a token; a row has HIDDEN of them."""
    layer = make_feedforward(FeedForward.model_validate({**fields, **layout}), 128, layer=0)
    layer.reset(0.02)
    x, ids, kept = torch.randn(512, 128, requires_grad=True), torch.arange(512), {}

    def keep(each):
        kept[each.untyped_storage().data_ptr()] = each
        return each

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda each: each):
        y = layer(x, ids)
        penalty = auxiliary_loss(layer)
    own = {each.untyped_storage().data_ptr() for each in (x, *layer.parameters())}
    held = sum(each.untyped_storage().nbytes() for place, each in kept.items() if place not in own)
    active = layer.shape.active_width
    assert 0 < held <= 512 * 128 * active
    (y.sum() if penalty is None else y.sum() + penalty).backward()
    assert x.grad.abs().sum() > 0


@pytest.mark.skipif(not (memory.PROCESS / "clear_refs").exists(), reason="only Linux sets the mark of a process back")
@pytest.mark.parametrize(("layout", "count"), [(WIDE, 2048), ({"trees": 4, "depth": 9}, 16384)], ids=["wide", "deep"])
def test_a_step_of_random_routing_takes_little_memory(layout, count):
    layer = make_feedforward(FeedForward.model_validate({"variant": "random_routing", **layout}), 256, layer=0)
    layer.reset(0.02)
    x, ids = torch.randn(count, 256, requires_grad=True), torch.arange(count)
    layer(x[:8], ids[:8]).sum().backward()
    memory.reset_peaks()
    before = memory.peak_rss_bytes()
    layer(x, ids).sum().backward()
    gathered_bytes = 2 * 4 * 256 * layer.shape.active_width * count
    assert gathered_bytes > 8e8
    assert memory.peak_rss_bytes() - before < 0.4 * gathered_bytes


@pytest.mark.parametrize("layout", [(1, 3), (4, 2), (3, 0)])
def test_hashed_paths_are_paths_and_even(layout):
    shape = TreeShape(*layout)
    ids = torch.arange(4096)
    visited = hashed_paths(ids, shape, layer=0, seed=0)
    assert visited.shape == (4096, shape.trees, shape.levels)
    assert (visited[..., 0] == 0).all()
    parents, children = visited[..., :-1], visited[..., 1:]
    assert ((children - 1) // 2 == parents).all()
    leaves = visited[..., -1] - (2**shape.depth - 1)
    for tree in range(shape.trees):
        counts = torch.bincount(leaves[:, tree], minlength=2**shape.depth)
        expected = 4096 / 2**shape.depth
        assert (counts - expected).abs().max() <= 5 * math.sqrt(expected)


def test_hashed_paths_follow_token_layer_tree_and_seed():
    shape, ids = TreeShape(2, 8), torch.tensor([5, 9, 5])
    base = hashed_paths(ids, shape, 0, 0)
    assert torch.equal(base[0], base[2])
    assert not torch.equal(base[0], base[1])
    assert not torch.equal(base[:, 0], base[:, 1])
    assert not torch.equal(base, hashed_paths(ids, shape, 1, 0))
    assert not torch.equal(base, hashed_paths(ids, shape, 0, 1))


def splitmix(z):
    """The reference in whole numbers."""
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


def test_hashed_paths_are_the_bits_of_splitmix():
    shape = TreeShape(2, 8)
    for token in (0, 5, 32767):
        for tree in range(2):
            bits = splitmix(splitmix(splitmix(splitmix(7) + 3) + tree) + token)
            node, path = 0, [0]
            for level in range(8):
                node = 2 * node + 1 + (bits >> level & 1)
                path.append(node)
            assert hashed_paths(torch.tensor([token]), shape, layer=3, seed=7)[0, tree].tolist() == path


def test_imbalance_is_nothing_when_even_and_one_when_all_go_one_way():
    shape = TreeShape(1, 1)
    nodes = torch.zeros(4, 1, 1, dtype=torch.int64)
    logits = torch.tensor([40.0, -40.0, 40.0, -40.0]).view(4, 1, 1)
    assert float(imbalance(logits, logits > 0, nodes, shape)) == pytest.approx(0, abs=1e-6)
    assert float(imbalance(logits.abs(), logits.abs() > 0, nodes, shape)) == pytest.approx(1, abs=1e-6)


def test_lowering_the_penalty_evens_the_tree_out():
    layer = layer_of({"variant": "fff", "trees": 1, "depth": 2, "load_balancing": 1.0}, torch.float32)
    x, ids = tokens(256, torch.float32)
    layer.b_in.data.fill_(2.0)  # nearly everybody goes right
    optimizer = torch.optim.Adam(layer.parameters(), lr=0.05)
    penalties = []
    for _ in range(60):
        layer(x, ids)
        penalty = auxiliary_loss(layer)
        penalties.append(penalty.item())
        optimizer.zero_grad()
        penalty.backward()
        optimizer.step()
    assert penalties[0] > 0.5
    assert penalties[-1] < 0.1


@pytest.mark.parametrize(
    ("init", "deviation_in", "deviation_out"), [("normal", 0.02, 0.02), ("fan", (1 / 128 / 3) ** 0.5, (1 / 36 / 3) ** 0.5)]
)
def test_initial_weights(init, deviation_in, deviation_out):
    torch.manual_seed(0)
    layer = make_feedforward(FeedForward(variant="fff", trees=4, depth=8, init=init), 128, layer=0)
    layer.reset(0.02)
    layer.requires_grad_(False)
    for weight, deviation in ((layer.w_in, deviation_in), (layer.w_out, deviation_out)):
        assert float(weight.std()) == pytest.approx(deviation, rel=0.02)
        assert abs(float(weight.mean())) < 5 * deviation / weight.numel() ** 0.5
    assert (float(layer.b_in.abs().max()) == 0) == (init == "normal")


def test_settings_that_a_variant_does_not_read_leave_it_equal():
    def settings(**fields):
        return FeedForward.model_validate(fields)

    assert settings(variant="fff", trees=5, depth=0, execution="masked") == settings(variant="dense", trees=5)
    assert settings(variant="none", trees=5, activation="relu") == settings(variant="none")
    assert settings(variant="random_routing", depth=2, load_balancing=1) == settings(variant="random_routing", depth=2)
    assert settings(variant="fff", depth=2, routing_seed=3) == settings(variant="fff", depth=2)
    assert settings(variant="fff", depth=2, leaf_width=3, hardening=2, transposition=0.1) == settings(variant="fff", depth=2)
    assert settings(variant="fff", trees=5, depth=0, master_leaf="2") == settings(variant="dense", trees=7)
    assert settings(variant="original_fff", trees=5, depth=0, leaf_width=4, master_leaf=2) == settings(variant="dense", trees=22)
    with pytest.raises(ValueError, match="master_leaf=2: every neuron is used anyway"):
        settings(variant="dense", trees=5, master_leaf=2)


def test_widths_count_master_leaf_and_routers():
    plain = FeedForward(variant="fff", trees=2, depth=3)
    assert (plain.width, plain.active_width) == (30, 8)
    with_master = FeedForward(variant="fff", trees=2, depth=3, master_leaf=5)
    assert (with_master.width, with_master.active_width) == (35, 13)
    original = FeedForward(variant="original_fff", trees=2, depth=3, leaf_width=4, master_leaf=5)
    assert (original.width, original.active_width) == (2 * (7 + 8 * 4) + 5, 2 * (3 + 4) + 5)
    assert FeedForward(variant="none").width == FeedForward(variant="none").active_width == 0


def test_timing_a_layer_that_no_kernel_computes_is_refused():
    with pytest.raises(ValueError, match="master_leaf=3: no kernel"):
        layer_of(VARIANTS["fff_master"]).weights()
