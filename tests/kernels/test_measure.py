"""Timing and comparison of layers: what is recorded, what is refused."""

import time
from dataclasses import replace

import pytest
import torch

from fffsweep.kernels import measure, registry, timing, torch_forms
from fffsweep.kernels.activations import ACTIVATIONS
from fffsweep.kernels.gate import gate, passes
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.measure import batches_of, compare_layers, contenders, copies_of, draw, layer_call, num_batches
from fffsweep.kernels.shape import child, parse_layout


def pair(hidden: int = 16):
    x = torch.randn(50, hidden, generator=torch.Generator().manual_seed(0))
    return random_layer(parse_layout("2x3"), hidden), random_layer(parse_layout("30x0"), hidden), x, x


@pytest.mark.parametrize("direction", ["forward", "train"])
@pytest.mark.parametrize("mode", ["hot", "cold"])
def test_compare_layers_times_the_best_verified_of_both_sides(mode: str, direction: str) -> None:
    found = compare_layers(*pair(), tokens=64, mode=mode, direction=direction, min_time_s=0.02)
    assert found.verified
    assert found.path_flips == 0
    assert found.rel_time == pytest.approx(found.ns_per_token / found.reference_ns_per_token)
    assert found.rel_time_q20 <= found.rel_time_q80
    sides = {side: [row for row in found.rows if row["side"] == side] for side in ("candidate", "reference")}
    assert "torch_dense" not in {row["implementation"] for row in sides["candidate"]}
    assert {"masked", "gather"} <= {row["implementation"] for row in sides["candidate"]}
    assert "torch_dense" in {row["implementation"] for row in sides["reference"]}


def test_an_unsound_implementation_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = registry.Implementation("wrong", "cmm", lambda weights: lambda x: x * 0 + 1, variant_of=None)
    nan = registry.Implementation("nan", "cmm", lambda weights: lambda x: x * float("nan"))
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (wrong, nan, *registry.IMPLEMENTATIONS))
    found = compare_layers(*pair(), tokens=8, min_time_s=0.01)
    rows = {row["implementation"]: row for row in found.rows if row["side"] == "candidate"}
    for name in ("wrong", "nan"):
        assert not rows[name]["verified"]
        assert rows[name]["ns_per_token"] is None
        assert "output" in rows[name]["reason"]
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (wrong,))
    with pytest.raises(RuntimeError, match="passed the gate: wrong: output"):
        compare_layers(*pair(), tokens=8, min_time_s=0.01)


def test_wrong_paths_fail_the_gate(monkeypatch: pytest.MonkeyPatch) -> None:
    honest = registry.find("gather")
    liar = registry.Implementation("liar", "cmm", honest.prepare, paths=lambda weights, x: honest.paths(weights, -x))
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (liar,))
    weights, _, x, _ = pair()
    [(_, verdict)] = gate(weights, x, torch.float32)
    assert not verdict.verified
    assert "paths leave" in verdict.reason


@pytest.mark.parametrize("backward", [False, True])
def test_the_gate_holds_the_batch_and_the_calls_that_are_timed(backward: bool) -> None:
    """Wrong for a single token alone, or in batches of more than 100: a gate on a few tokens would let both pass."""
    honest = registry.find("gather")
    weights, _, x, _ = pair()
    x = x.repeat(4, 1)

    def wrong_if(condition):
        def prepare(weights):
            layer = honest.prepare(weights)
            return lambda x: layer(x) * (1.01 if condition(len(x)) else 1)

        return registry.Implementation("wrong", "cmm", prepare, supports_backward=True, paths=honest.paths)

    alone, many = wrong_if(lambda count: count == 1), wrong_if(lambda count: count > 100)
    for batch, sound, unsound in ((x[:1], many, alone), (x, alone, many), (x[:20], many, wrong_if(lambda count: count == 20))):
        assert passes(sound, weights, batch, torch.float32, backward=backward).verified
        assert not passes(unsound, weights, batch, torch.float32, backward=backward).verified


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("layout", ["1x11", "700x0"])
def test_the_gate_tells_a_wrong_layer_from_rounding(layout: str, dtype: torch.dtype) -> None:
    weights = random_layer(parse_layout(layout), 96, dtype=dtype)
    x = torch.randn(12, 96, generator=torch.Generator().manual_seed(0)).to(dtype)
    honest = registry.find("gather" if weights.shape.depth else "torch_dense")

    def changed(change, name="wrong"):
        return registry.Implementation(
            name, honest.role, lambda weights: change(weights), dtypes=honest.dtypes, supports_backward=True, paths=honest.paths
        )

    def narrow(weights):
        layer = honest.prepare(weights.to(torch.bfloat16))
        return lambda x: layer(x.bfloat16()).to(dtype)

    wrong = {
        "zeros": lambda weights: lambda x: x * 0,
        "another activation": lambda weights: honest.prepare(replace(weights, activation="relu")),
        "a token's output in another's place": lambda weights: lambda x: honest.prepare(weights)(x).roll(1, 0),
        "a column short": lambda weights: lambda x: torch.cat([honest.prepare(weights)(x)[:, :-1], x[:, :1] * 0], dim=1),
    }
    if weights.shape.depth:
        wrong["a level short"] = lambda weights: honest.prepare(
            replace(weights, w_out=weights.w_out * (torch.arange(4095) > 0).view(1, -1, 1))
        )
    if dtype != torch.bfloat16:
        wrong["bfloat16 on the way"] = narrow
    assert passes(honest, weights, x, dtype, backward=True).verified
    for name, change in wrong.items():
        assert not passes(changed(change), weights, x, dtype).verified, name


class Backward(torch.autograd.Function):
    """CMM whose backward pass is written out, so that `change(coefficients, rows)` may spoil it, both by name of the gradient.

    Coefficients [tokens, trees, levels] are those of each visited row: slopes of the loss by logits, activations for w_out.
    """

    @staticmethod
    def forward(context, x, w_in, b_in, w_out, shape, change):
        context.save_for_backward(x, w_in, b_in, w_out)
        context.given = shape, change
        return torch_forms.gather(x, w_in, b_in, w_out, shape, "gelu")

    @staticmethod
    def backward(context, grad_y):
        shape, change = context.given
        x, w_in, b_in, w_out = context.saved_tensors
        paths = torch_forms.paths(x, w_in, b_in, shape) + shape.nodes * torch.arange(shape.trees).view(1, -1, 1)
        tokens, rows_in, bias, rows_out, grads = (
            each.double() for each in (x, w_in.flatten(0, 1), b_in.flatten(), w_out.flatten(0, 1), grad_y)
        )
        logits = torch.einsum("th,tklh->tkl", tokens, rows_in[paths]) + bias[paths]
        by_logit = torch.einsum("th,tklh->tkl", grads, rows_out[paths]) * ACTIVATIONS["gelu"].slope(logits)
        coefficients = {name: by_logit.clone() for name in ("x", "w_in", "b_in")} | {"w_out": ACTIVATIONS["gelu"].apply(logits)}
        rows = {name: paths.clone() for name in coefficients}
        change(coefficients, rows)

        def scattered(name, like, each):
            return torch.zeros_like(like).index_add_(0, rows[name].flatten(), (coefficients[name].unsqueeze(3) * each).flatten(0, 2))

        return (
            torch.einsum("tkl,tklh->th", coefficients["x"], rows_in[rows["x"]]).to(x),
            scattered("w_in", rows_in, tokens.view(len(x), 1, 1, -1)).view(w_in.shape).to(x),
            scattered("b_in", bias.view(-1, 1), 1.0).view(b_in.shape).to(x),
            scattered("w_out", rows_out, grads.view(len(x), 1, 1, -1)).view(w_out.shape).to(x),
            None,
            None,
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("layout", ["1x6", "2x3"])
def test_the_gate_tells_a_wrong_backward_pass_from_rounding(layout: str, dtype: torch.dtype) -> None:
    """Gradients of the biases are few: the smallest of these hold 30."""
    shape, x = parse_layout(layout), torch.randn(60, 64, generator=torch.Generator().manual_seed(0))

    def verdict(change):
        def prepare(weights):
            return lambda x: Backward.apply(x, weights.w_in, weights.b_in, weights.w_out, shape, change)

        form = registry.Implementation(
            "m", "cmm", prepare, dtypes=registry.EVERY, supports_backward=True, paths=registry.find("gather").paths
        )
        return passes(form, random_layer(shape, 64), x, dtype, backward=True)

    assert verdict(lambda coefficients, rows: None).verified
    wrong = {
        "nothing": lambda found, rows: found.zero_(),
        "a level short": lambda found, rows: found[:, :, 1].zero_(),
        "leaves short": lambda found, rows: found[:, :, -1].zero_(),
        "the root's summed twice": lambda found, rows: found[:, :, 0].mul_(2),
        "another sign": lambda found, rows: found.neg_(),
        "half": lambda found, rows: found.mul_(0.5),
        "the children's rows swapped": lambda found, rows: rows[:, :, 1].copy_(2 * rows[:, :, 0] + 3 - rows[:, :, 1]),
    }
    for name in ("x", "w_in", "b_in", "w_out"):
        for what, spoil in wrong.items():
            found = verdict(lambda coefficients, rows, name=name, spoil=spoil: spoil(coefficients[name], rows[name]))
            assert not found.verified, f"{name}: {what}, {found.worst}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("hidden", [96, 768])
def test_the_gate_tells_another_rule_of_descent_from_rounding(hidden: int, dtype: torch.dtype) -> None:
    honest, weights = registry.find("gather"), random_layer(parse_layout("1x10"), hidden)
    x = torch.randn(60, hidden, generator=torch.Generator().manual_seed(0))

    def along(change):
        def paths(weights, x):
            return torch_forms.paths(x, weights.w_in, change(weights.b_in), weights.shape)

        def prepare(weights):
            arguments = (weights.w_in, weights.b_in, weights.w_out, weights.shape, weights.activation)
            return lambda x: torch_forms.gather(x, *arguments, paths=paths(weights, x))

        return passes(registry.Implementation("m", "cmm", prepare, dtypes=honest.dtypes, paths=paths), weights, x, dtype)

    assert along(lambda bias: bias).verified
    for wrong in (lambda bias: None, lambda bias: bias - 0.1, lambda bias: -bias):
        assert "paths leave the reference's" in along(wrong).reason


@pytest.mark.parametrize("stray", [False, True])
def test_the_gate_holds_a_path_beyond_a_turn_that_rounding_explains(stray: bool) -> None:
    """The root's logit is zero, so either child will do; from there on the path must be its own, and one of the tree."""
    honest, weights = registry.find("gather"), random_layer(parse_layout("1x4"), 16)
    weights.w_in[0, 0] = weights.b_in[0, 0] = 0
    x = torch.randn(60, 16, generator=torch.Generator().manual_seed(0))

    def along(turn):
        def paths(weights, x):
            visited, rows = [torch.zeros(len(x), dtype=torch.int64)], range(len(x))
            for level in range(4):
                logits = torch.tensor([x[t] @ weights.w_in[0, visited[-1][t]] + weights.b_in[0, visited[-1][t]] for t in rows])
                visited.append(turn(level, visited[-1], logits))
            return torch.stack(visited, dim=1).unsqueeze(1)

        def prepare(weights):
            arguments = (weights.w_in, weights.b_in, weights.w_out, weights.shape, weights.activation)
            return lambda x: torch_forms.gather(x, *arguments, paths=paths(weights, x))

        return passes(registry.Implementation("m", "cmm", prepare, dtypes=honest.dtypes, paths=paths), weights, x, torch.float32)

    sound = along(lambda level, node, logits: child(node, logits if level else 1 + 0 * logits))
    assert sound.verified, sound.reason
    assert sound.path_flips > 0
    unsound = along(lambda level, node, logits: child(node, logits * 0 + 1) - 2 * stray * (level == 3))
    assert ("leave the tree" if stray else "paths leave the reference's") in unsound.reason


def test_each_call_has_other_tokens_and_cold_ones_other_weights() -> None:
    seen = []

    def prepare(weights):
        return lambda x: seen.append((weights.w_in.data_ptr(), tuple(x.flatten().tolist())))

    spy, x = registry.Implementation("spy", "cmm", prepare), torch.randn(5000, 16, generator=torch.Generator().manual_seed(0))
    weights = random_layer(parse_layout("1x3"), 16)
    for mode, num_copies in (("hot", 1), ("cold", 12)):
        seen.clear()
        batches = batches_of(x, weights, 1, seed=0)
        call = layer_call(spy, copies_of(weights, mode), batches)
        for _ in range(1009):
            call()
        assert len({tokens for _, tokens in seen}) == len(batches) == 1009
        assert len({place for place, _ in seen}) == num_copies
        # the same layer does not meet the same token again before every other layer has met it
        for _ in range(1009):
            call()
        assert len(set(seen)) == 2018 if num_copies > 1 else 1009
    assert num_batches(16384, 768) == 1
    assert num_batches(1024, 768) == 13


def test_what_is_far_behind_in_a_small_batch_is_not_timed_in_a_large_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "FAR_BEHIND", 4.0)
    honest, calls = registry.find("gather"), []

    def slow(weights):
        layer = honest.prepare(weights)

        def call(x):
            calls.append(len(x))
            time.sleep(0.5)
            return layer(x)

        return call

    weights, _, x, _ = pair()
    crawling = registry.Implementation("crawling", "cmm", slow)
    found = {each.name: each for each in contenders([honest, crawling], weights, [x.repeat(30, 1)], torch.float32)}
    assert found["gather"].call is not None
    assert found["crawling"].call is None
    assert found["crawling"].verdict.verified
    assert "times the fastest at 128 tokens" in str(found["crawling"].left_out)
    assert max(calls) == 128


def test_a_disturbed_call_does_not_leave_out_the_best() -> None:
    """Its second call waits for something else; its third says how fast it is."""
    calls = iter(range(100))

    def best() -> None:
        if next(calls) == 1:
            time.sleep(0.2)

    def other() -> None:
        end = time.thread_time() + 5e-3
        while time.thread_time() < end:
            pass

    names, once = timing.shortlist({"best": best, "other": other}, within=1.5)
    assert names == ["best"]
    assert once["best"] < 5e-3 <= once["other"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"dtype": "int4"}, "dtype='int4'"),
        ({"mode": "warm"}, "mode='warm'"),
        ({"direction": "up"}, "direction='up'"),
        ({"tokens": 0}, "tokens=0"),
        ({"threads": 0}, "threads=0"),
    ],
)
def test_wrong_options_are_named(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        compare_layers(*pair(), **({"tokens": 4} | options))


def test_tokens_are_drawn_by_seed() -> None:
    weights, _, x, _ = pair()
    assert torch.equal(draw(x, weights, 40, 5), draw(x, weights, 40, 5))
    assert not torch.equal(draw(x, weights, 40, 5), draw(x, weights, 40, 6))
    assert len(draw(x, weights, 40, 5).unique(dim=0)) == 40
    assert draw(x, weights, 170, 5).shape == (170, 16)
    with pytest.raises(ValueError, match=r"activations have shape \[50, 8\]"):
        draw(x[:, :8], weights, 4, 0)


def test_threads_and_affinity_are_restored() -> None:
    before = torch.get_num_threads()

    def fail() -> None:
        with timing.pinned(1):
            assert torch.get_num_threads() == 1
            raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"):
        fail()
    assert torch.get_num_threads() == before


def test_interleaved_series_tell_slow_from_fast_and_spread_as_noise() -> None:
    def burn(seconds: float):
        def call() -> None:
            end = time.perf_counter() + seconds
            while time.perf_counter() < end:
                pass

        return call

    found = timing.interleave({"slow": burn(4e-3), "fast": burn(1e-3)}, min_time_s=0.02)
    assert found["slow"].median_s > 2 * found["fast"].median_s
    assert len(found["slow"].samples_s) == len(found["fast"].samples_s) >= 5
    assert timing.summarise([1.0, 1.0, 2.0, 3.0, 1.0]).noisy
    assert not timing.summarise([1.0, 1.01, 1.02, 1.0]).noisy
    assert timing.shortlist({"slow": burn(8e-3), "fast": burn(1e-3)})[0] == ["fast"]
