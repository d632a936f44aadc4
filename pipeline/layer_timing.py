"""Timing of a trained feedforward layer against the reference's, on the inputs that both really get."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.measure import Comparison, compare_layers, draw
from fffsweep.pipeline import optimisation
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.feedforward import FeedForwardLayer
from fffsweep.pipeline.machine import provenance
from fffsweep.pipeline.model import FffModel
from fffsweep.pipeline.roofline import machine_peaks, roofline_ns
from fffsweep.pipeline.stage import Metrics, StageContext
from fffsweep.pipeline.stages.benchmark import BenchmarkConfig, BenchmarkPoint, LayerBenchmark, TimedPoint

Sides = tuple[LayerWeights, LayerWeights, Tensor, Tensor]  # candidate, reference, and the inputs [tokens, hidden] of each
SCHEMA = "fffsweep.bench/1"
BATCH = 32
NO_LAYER = "the model has no feedforward layer: there is nothing to run, so its relative time is 0"


def benchmark_layer(config: BenchmarkConfig, context: StageContext) -> Metrics:
    """Run the stage: see `fffsweep.pipeline.stages.benchmark.BenchmarkCpu`, and `time_points` for what it gives and raises."""

    def compare(sides: Sides, point: TimedPoint) -> tuple[Comparison, Metrics]:
        assert isinstance(point, BenchmarkPoint)
        given: dict[str, Any] = {"tokens": point.tokens, "dtype": point.dtype, "threads": point.threads, "mode": point.mode}
        compared = compare_layers(*sides, **given, min_time_s=config.min_time_s, seed=context.seed)
        if not compared.verified:
            raise RuntimeError(f"point {point.label}: outputs were not verified, so no time is given")
        weights, _, x, _ = sides
        drawn = draw(x, weights, point.tokens, context.seed)
        return compared, {"roofline_ns_per_token": roofline_ns(weights, drawn, point.dtype, point.threads, point.mode)}

    def peaks() -> dict[str, Any]:
        return {f"{point.dtype}_{point.threads}t": asdict(machine_peaks(point.dtype, point.threads)) for point in config.points}

    return time_points(config, context, "cpu", compare, lambda: {"peaks": peaks()})


def time_points(
    config: LayerBenchmark,
    context: StageContext,
    device: Literal["cpu", "cuda"],
    compare: Callable[[Sides, TimedPoint], tuple[Comparison, Metrics]],
    notes: Callable[[], dict[str, Any]] = dict,
) -> Metrics:
    """Metrics `ff/cpu/...` or `ff/gpu/...` of all points; `compare` times one and may add figures, `notes` are for the report.

    A model without feedforward layer takes no time: its relative time is 0, and no other figure is given.
    Raises RuntimeError if no implementation of a side gives the right outputs, ValueError for a layer that is not there.
    """
    kind = {"cpu": "cpu", "cuda": "gpu"}[device]
    held_out = PreparedData(context.inputs["prepare"]).corpus("validation")
    candidate, x_candidate = layer_and_inputs(context.inputs["pretrain"], config, held_out)
    reference, x_reference = layer_and_inputs(context.inputs["reference"], config, held_out)
    if reference is None:
        raise ValueError("the reference model has no feedforward layer: expected a dense one, to measure others by")
    report: dict[str, Any] = {"schema": SCHEMA, "provenance": provenance(), "rows": []}
    metrics: Metrics = {}
    if candidate is None:
        report["note"] = NO_LAYER
        metrics = {f"ff/{kind}/{prefix}rel_time": 0.0 for prefix in ("", *(f"{point.label}/" for point in config.points))}
    else:
        report |= notes_on(candidate)
        sides = candidate.weights(), reference.weights(), x_candidate, x_reference
        for number, point in enumerate(config.points):
            context.progress(number, len(config.points), "points")
            compared, more = compare(sides, point)
            report["rows"] += rows_of(point, compared, candidate, reference, device)
            figures = figures_of(compared) | more
            metrics |= {f"ff/{kind}/{point.label}/{name}": value for name, value in figures.items()}
            if number == 0:
                metrics |= {f"ff/{kind}/{name}": value for name, value in figures.items()}
        report |= notes()
    (context.output / "benchmark.json").write_text(json.dumps(report, indent=1))
    return metrics


def notes_on(candidate: FeedForwardLayer) -> dict[str, str]:
    """What a report says of a layer that is timed otherwise than it computes."""
    if candidate.settings.variant == "random_routing":
        return {"note": "timed along the paths that the weights choose, as many nodes as the hashed ones"}
    return {"note": "timed without the output bias"} if candidate.settings.output_bias else {}


def figures_of(compared: Comparison) -> Metrics:
    """Metrics of one point."""
    return {
        "rel_time": compared.rel_time,
        "rel_time_q20": compared.rel_time_q20,
        "rel_time_q80": compared.rel_time_q80,
        "ns_per_token": compared.ns_per_token,
        "reference_ns_per_token": compared.reference_ns_per_token,
        "path_flips": float(compared.path_flips),
        "noisy": float(compared.noisy),
        "verified": 1.0,
    }


def rows_of(
    point: TimedPoint, compared: Comparison, candidate: FeedForwardLayer, reference: FeedForwardLayer, device: str
) -> list[dict[str, Any]]:
    """Rows of `bench --json`, one for each implementation that was gated, `best` marking the chosen ones."""
    chosen = {"candidate": compared.implementation, "reference": compared.reference_implementation}
    layers = {"candidate": candidate, "reference": reference}
    common = point.model_dump(mode="json") | {"device": device, "direction": "forward", "suite": "layer", "load": compared.load}
    return [
        common
        | {"layout": layers[row["side"]].shape.layout, "hidden": layers[row["side"]].hidden_size, "role": row["side"]}
        | row
        | {"best": row["implementation"] == chosen[row["side"]]}
        for row in compared.rows
    ]


def layer_and_inputs(folder: Path, config: LayerBenchmark, held_out: NDArray[Any]) -> tuple[FeedForwardLayer | None, Tensor]:
    """The feedforward layer of a pretrained model, and its inputs [tokens, hidden] while the model reads held-out text."""
    with optimisation.quiet_transformers():
        model = FffModel.from_pretrained(folder / "model").eval()
    number = len(model.layers) // 2 if config.layer is None else config.layer
    if number >= len(model.layers):
        raise ValueError(f"layer={number}: expected 0 to {len(model.layers) - 1}, layers of the model; null takes the middle one")
    layer = model.layers[number].feedforward
    if layer is None:
        return None, torch.empty(0)
    seen: list[Tensor] = []

    def keep(_: nn.Module, arguments: tuple[Tensor, Tensor]) -> None:
        seen.append(arguments[0].detach().flatten(0, -2).clone())

    hook = layer.register_forward_pre_hook(keep)
    with torch.inference_mode():
        for start in range(0, len(held_out), BATCH):
            if sum(map(len, seen)) >= config.num_activation_tokens:
                break
            model(torch.from_numpy(held_out[start : start + BATCH].astype(np.int64)))
    hook.remove()
    return layer, torch.cat(seen)[: config.num_activation_tokens].clone()
