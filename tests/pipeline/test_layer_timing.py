"""Timing of trained layers: verified, on real inputs, against the reference."""

import json

import pytest
import torch

from fffsweep.pipeline import layer_timing
from fffsweep.pipeline.model import FffForMaskedLM
from fffsweep.pipeline.stages.benchmark import BenchmarkConfig, BenchmarkCpu, BenchmarkPoint


@pytest.fixture
def run(new_context, models):
    def measure(name, **fields):
        context = new_context(name, inputs={"pretrain": models / name, "reference": models / "reference"})
        config = BenchmarkConfig(min_time_s=0.01, num_activation_tokens=200, **fields)
        return BenchmarkCpu().run(config, context), json.loads((context.output / "benchmark.json").read_text())

    return measure


@pytest.mark.parametrize("name", ["fff", "random", "reference"])
def test_times_are_relative_to_the_reference(name, run):
    metrics, report = run(name)
    assert metrics["ff/cpu/verified"] == 1.0
    assert metrics["ff/cpu/rel_time"] == pytest.approx(metrics["ff/cpu/ns_per_token"] / metrics["ff/cpu/reference_ns_per_token"])
    assert metrics["ff/cpu/rel_time"] == metrics["ff/cpu/128_float32_1t_cold/rel_time"] > 0
    best = {row["role"]: row for row in report["rows"] if row["best"]}
    assert set(best) == {"candidate", "reference"}
    assert best["candidate"]["layout"] == ("127x0" if name == "reference" else "1x6")
    assert all(row["verified"] for row in best.values())
    assert ("note" in report) == (name == "random")


def test_every_point_is_measured(run):
    points = (BenchmarkPoint(tokens=4), BenchmarkPoint(tokens=16, dtype="bfloat16", mode="hot"))
    metrics, report = run("fff", points=points)
    assert metrics["ff/cpu/rel_time"] == metrics["ff/cpu/4_float32_1t_cold/rel_time"]
    assert metrics["ff/cpu/16_bfloat16_1t_hot/ns_per_token"] > 0
    assert {row["tokens"] for row in report["rows"]} == {4, 16}


def test_no_layer_takes_no_time(run):
    metrics, report = run("none")
    assert metrics == {"ff/cpu/rel_time": 0.0, "ff/cpu/128_float32_1t_cold/rel_time": 0.0}
    assert "no feedforward layer" in report["note"]


def test_inputs_are_those_of_the_middle_layer(new_context, models, tiny_data):
    held_out = layer_timing.PreparedData(tiny_data).corpus("validation")
    layer, seen = layer_timing.layer_and_inputs(models / "fff", BenchmarkConfig(num_activation_tokens=100), held_out)
    assert layer.layer == 1
    model = FffForMaskedLM.from_pretrained(models / "fff" / "model").eval().encoder
    ids = torch.from_numpy(held_out[:32].astype("int64"))
    x = model.layers[0](model.embeddings(ids), None, ids)
    x = x + model.layers[1].attention(model.layers[1].attention_norm(x), None)
    torch.testing.assert_close(seen, model.layers[1].feedforward_norm(x).flatten(0, 1)[:100].detach())


def test_a_layer_that_is_not_there_is_refused(run):
    with pytest.raises(ValueError, match="layer=3: expected 0 to 2"):
        run("fff", layer=3)
    with pytest.raises(ValueError, match="128_float32_1t_cold is given twice"):
        BenchmarkConfig(points=(BenchmarkPoint(), BenchmarkPoint()))
