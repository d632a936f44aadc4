"""Stage `benchmark_cpu`: time of the trained feedforward layer over the reference's. Input roles: `prepare`, `pretrain`, `reference`."""

from __future__ import annotations

from typing import ClassVar, Literal, Self

from pydantic import Field, model_validator

from fffsweep.pipeline.machine import machine_fingerprint
from fffsweep.pipeline.settings import Count, Number, Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext


class TimedPoint(Settings):
    """One condition under which both layers are timed."""

    tokens: Count = Field(default=128, ge=1)

    @property
    def label(self) -> str:
        """Name in metrics."""
        raise AssertionError("each kind of point has its own label")


class BenchmarkPoint(TimedPoint):
    """A condition on CPUs; each call has other tokens. mode `cold`: weights of twelve layers take turns, as in a model."""

    dtype: Literal["float32", "bfloat16"] = "float32"
    threads: Count = Field(default=1, ge=1)
    mode: Literal["cold", "hot"] = "cold"

    @property
    def label(self) -> str:
        """Name in metrics."""
        return f"{self.tokens}_{self.dtype}_{self.threads}t_{self.mode}"


class LayerBenchmark(Settings):
    """Where and how long is timed. The first point is the one that a `rel_time` without a point means.

    layer: which layer of the encoder; null for the middle one. num_activation_tokens: real inputs of the layer to draw from.
    """

    points: tuple[TimedPoint, ...] = Field(min_length=1)
    layer: Count | None = Field(default=None, ge=0)
    num_activation_tokens: Count = Field(default=16384, ge=1)
    min_time_s: Number = Field(default=0.5, gt=0, description="least time of one measurement")

    @model_validator(mode="after")
    def _points_differ(self) -> Self:
        labels = [point.label for point in self.points]
        for label in labels:
            if labels.count(label) > 1:
                raise ValueError(f"points: {label} is given twice; keep one")
        return self


class BenchmarkConfig(LayerBenchmark):
    """Timing on CPUs."""

    points: tuple[BenchmarkPoint, ...] = Field(default=(BenchmarkPoint(),), min_length=1)


class BenchmarkCpu:
    """Artifact: `benchmark.json`, one row for each implementation, side and point, and the machine's peaks."""

    name: ClassVar[str] = "benchmark_cpu"
    version: ClassVar[int] = 7
    sources: ClassVar[tuple[str, ...]] = (
        "pipeline/layer_timing.py",
        "pipeline/roofline.py",
        "pipeline/model.py",
        "pipeline/feedforward.py",
        "pipeline/node_trees.py",
        "pipeline/leaf_trees.py",
        "pipeline/variants.py",
        "pipeline/optimisation.py",
        "pipeline/memory.py",
        "pipeline/order.py",
        "pipeline/data/prepared.py",
        "pipeline/tasks.py",
        "kernels/*.py",
        "kernels/native/*",
    )
    Config: ClassVar[type[Settings]] = BenchmarkConfig

    def resources(self, config: BenchmarkConfig) -> Resources:
        return Resources(cpus=max(point.threads for point in config.points), exclusive=True)

    def fingerprints(self, config: BenchmarkConfig) -> dict[str, str]:
        return {"machine": machine_fingerprint()}

    def run(self, config: BenchmarkConfig, context: StageContext) -> Metrics:
        from fffsweep.pipeline.layer_timing import benchmark_layer

        return benchmark_layer(config, context)
