"""The stage that times layers on a GPU, with a clock in the device's place."""

import json
from functools import partial

import pytest

from fffsweep.kernels.gpu.compare import compare_on_gpu
from fffsweep.kernels.timing import summarise
from fffsweep.pipeline.gpu_layer_timing import benchmark_layer_on_gpu
from fffsweep.pipeline.machine import machine, machine_fingerprint
from fffsweep.pipeline.stage import stage_run
from fffsweep.pipeline.stages.benchmark_gpu import BenchmarkGpu, GpuBenchmarkConfig, GpuBenchmarkPoint

POINTS = (GpuBenchmarkPoint(tokens=16, dtype="bfloat16", mode="hot"), GpuBenchmarkPoint(tokens=4))


def clock(calls, mode, min_time_s):
    for call in calls.values():
        call()
    return {name: summarise([2e-6 if name == "candidate" else 8e-6] * 7) for name in calls}


def measure(new_context, models, name):
    context = new_context(name, inputs={"pretrain": models / name, "reference": models / "reference"})
    config = GpuBenchmarkConfig(points=POINTS, num_activation_tokens=100)
    metrics = benchmark_layer_on_gpu(config, context, partial(compare_on_gpu, device="cpu", clock=clock))
    return metrics, json.loads((context.output / "benchmark.json").read_text())


@pytest.mark.parametrize("name", ["fff", "random", "reference"])
def test_every_point_is_told_and_the_first_stands_for_the_layer(new_context, models, name):
    metrics, report = measure(new_context, models, name)
    assert metrics["ff/gpu/rel_time"] == metrics["ff/gpu/16_bfloat16_hot/rel_time"] == pytest.approx(0.25)
    assert metrics["ff/gpu/ns_per_token"] == pytest.approx(2e3 / 16)
    assert metrics["ff/gpu/4_float32_cold/ns_per_token"] == pytest.approx(2e3 / 4)
    assert metrics["ff/gpu/verified"] == 1.0
    assert {(row["tokens"], row["dtype"], row["mode"], row["device"]) for row in report["rows"]} == {
        (16, "bfloat16", "hot", "cuda"),
        (4, "float32", "cold", "cuda"),
    }
    assert ("note" in report) == (name == "random")


def test_no_layer_takes_no_time(new_context, models):
    metrics, report = measure(new_context, models, "none")
    assert metrics == {f"ff/gpu/{prefix}rel_time": 0.0 for prefix in ("", "16_bfloat16_hot/", "4_float32_cold/")}
    assert "no feedforward layer" in report["note"]


def test_the_stage_runs_on_nothing_but_a_gpu(new_context, models):
    context = new_context("fff", inputs={"pretrain": models / "fff", "reference": models / "reference"})
    with pytest.raises(RuntimeError, match="benchmark_gpu was given device cpu"):
        BenchmarkGpu().run(GpuBenchmarkConfig(), context)


def test_planning_needs_a_gpu_and_its_name_is_in_the_key(monkeypatch):
    facts = machine()
    monkeypatch.setattr("fffsweep.pipeline.machine.machine", lambda: facts | {"gpus": ["NVIDIA H100"]})
    monkeypatch.setattr("fffsweep.pipeline.stages.benchmark_gpu.machine", lambda: facts | {"gpus": ["NVIDIA H100"]})
    one = stage_run("benchmark_gpu", GpuBenchmarkConfig())
    assert one.fingerprints == {"machine": machine_fingerprint()}
    monkeypatch.setattr("fffsweep.pipeline.machine.machine", lambda: facts | {"gpus": ["NVIDIA A100"]})
    assert stage_run("benchmark_gpu", GpuBenchmarkConfig()).key != one.key
    monkeypatch.setattr("fffsweep.pipeline.stages.benchmark_gpu.machine", lambda: facts | {"gpus": []})
    with pytest.raises(ValueError, match="nvidia-smi lists no GPU on this machine"):
        stage_run("benchmark_gpu", GpuBenchmarkConfig())


def test_points_differ():
    with pytest.raises(ValueError, match="128_float32_cold is given twice"):
        GpuBenchmarkConfig(points=(GpuBenchmarkPoint(), GpuBenchmarkPoint()))
