"""Timing and comparison of layers: what is recorded, what is refused."""

import time

import pytest
import torch

from fffsweep.kernels import registry, timing
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.measure import compare_layers, draw, gate
from fffsweep.kernels.shape import parse_layout


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
