"""As `layer_timing`, on a GPU: a trained feedforward layer against the reference's, on the inputs that both really get."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from fffsweep.kernels.gpu.compare import compare_on_gpu
from fffsweep.kernels.measure import Comparison
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.layer_timing import NO_LAYER, SCHEMA, figures_of, layer_and_inputs, notes_on, rows_of
from fffsweep.pipeline.machine import provenance
from fffsweep.pipeline.stage import Metrics, StageContext
from fffsweep.pipeline.stages.benchmark_gpu import GpuBenchmarkConfig


def benchmark_layer_on_gpu(
    config: GpuBenchmarkConfig, context: StageContext, compare: Callable[..., Comparison] = compare_on_gpu
) -> Metrics:
    """Run the stage: see `fffsweep.pipeline.stages.benchmark_gpu.BenchmarkGpu`. `compare` is replaced where there is no GPU, in tests.

    A model without feedforward layer takes no time: its relative time is 0, and no other figure is given.
    Raises RuntimeError if no implementation of a side gives the right outputs, ValueError for a layer that is not there.
    """
    held_out = PreparedData(context.inputs["prepare"]).corpus("validation")
    candidate, x_candidate = layer_and_inputs(context.inputs["pretrain"], config, held_out)
    reference, x_reference = layer_and_inputs(context.inputs["reference"], config, held_out)
    if reference is None:
        raise ValueError("the reference model has no feedforward layer: expected a dense one, to measure others by")
    report: dict[str, Any] = {"schema": SCHEMA, "provenance": provenance(), "rows": []}
    metrics: Metrics = {}
    if candidate is None:
        report["note"] = NO_LAYER
        metrics = {f"ff/gpu/{prefix}rel_time": 0.0 for prefix in ("", *(f"{point.label}/" for point in config.points))}
    else:
        report |= notes_on(candidate)
        for number, point in enumerate(config.points):
            context.progress(number, len(config.points), "points")
            compared = compare(
                candidate.weights(),
                reference.weights(),
                x_candidate,
                x_reference,
                tokens=point.tokens,
                dtype=point.dtype,
                mode=point.mode,
                min_time_s=config.min_time_s,
                seed=context.seed,
            )
            report["rows"] += rows_of(point, compared, candidate, reference, "cuda")
            figures = figures_of(compared)
            metrics |= {f"ff/gpu/{point.label}/{name}": value for name, value in figures.items()}
            if number == 0:
                metrics |= {f"ff/gpu/{name}": value for name, value in figures.items()}
    (context.output / "benchmark.json").write_text(json.dumps(report, indent=1))
    return metrics
