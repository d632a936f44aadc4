"""Comparing layers as on a GPU: gated and timed by a clock that stands in for the device's."""

import pytest
import torch

from fffsweep.kernels import registry
from fffsweep.kernels.gpu.compare import compare_on_gpu
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.shape import TreeShape
from fffsweep.kernels.timing import summarise

SECONDS = {"masked": 6e-6, "gather": 5e-6, "torch_dense": 8e-6, "torch_dense_padded": 4e-6, "candidate": 1e-6, "reference": 4e-6}


class Clock:
    """Runs each call once, and says how long it took by its name."""

    def __init__(self):
        self.asked = []

    def __call__(self, calls, mode, min_time_s):
        for call in calls.values():
            assert call().shape == (16, 24)
        self.asked.append((tuple(calls), mode, min_time_s))
        return {name: summarise([SECONDS.get(name, 1.0)] * 7) for name in calls}


def compared(clock, **fields):
    candidate, reference = random_layer(TreeShape(1, 4), 24), random_layer(TreeShape(31, 0), 24, seed=1)
    x = torch.randn(64, 24, generator=torch.Generator().manual_seed(2))
    fields = {"dtype": "bfloat16", "mode": "hot"} | fields
    return compare_on_gpu(candidate, reference, x, x, tokens=16, min_time_s=0.8, device="cpu", clock=clock, **fields)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_the_quickest_sound_implementations_meet_at_the_end(dtype):
    clock = Clock()
    found = compared(clock, dtype=dtype)
    assert (found.implementation, found.reference_implementation) == ("gather", "torch_dense_padded")
    assert found.rel_time == pytest.approx(0.25)
    assert (found.ns_per_token, found.reference_ns_per_token) == (pytest.approx(1e3 / 16), pytest.approx(4e3 / 16))
    assert clock.asked[-1] == (("candidate", "reference"), "hot", 0.8)
    assert {entry[1:] for entry in clock.asked[:-1]} == {("hot", 0.1)}
    assert {row["side"] for row in found.rows if row["verified"]} == {"candidate", "reference"}


def test_what_is_wrong_is_not_timed(monkeypatch):
    wrong = registry.find("gather")
    broken = registry.Implementation("gather", "cmm", lambda weights: torch.zeros_like, wrong.devices, wrong.dtypes)
    kept = tuple(broken if each is wrong else each for each in registry.IMPLEMENTATIONS if each.name in ("gather", "masked", "torch_dense"))
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", kept)
    clock = Clock()
    found = compared(clock)
    assert found.implementation == "masked"
    assert ("gather",) not in [entry[0] for entry in clock.asked]
    assert next(row for row in found.rows if row["implementation"] == "gather" and row["side"] == "candidate")["ns_per_token"] is None
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", tuple(each for each in kept if each.name != "masked"))
    with pytest.raises(RuntimeError, match="no implementation of the candidate 1x4 passed the gate: gather: output"):
        compared(clock)


def test_float32_is_timed_without_tf32_and_the_setting_is_put_back():
    before, seen = torch.get_float32_matmul_precision(), []

    def clock(calls, mode, min_time_s):
        seen.append(torch.get_float32_matmul_precision())
        return {name: summarise([1.0] * 7) for name in calls}

    torch.set_float32_matmul_precision("high")
    try:
        compared(clock, dtype="float32")
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision(before)
    assert set(seen) == {"highest"}


@pytest.mark.parametrize(("name", "value"), [("dtype", "float64"), ("mode", "warm")])
def test_other_conditions_are_refused(name, value):
    with pytest.raises(ValueError, match=f"{name}='{value}': expected one of"):
        compared(Clock(), **{name: value})
