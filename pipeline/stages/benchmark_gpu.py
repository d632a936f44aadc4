"""Stage `benchmark_gpu`: time of the trained feedforward layer over the reference's, on a GPU. Input roles: as of `benchmark_cpu`."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field

from fffsweep.pipeline.machine import machine, machine_fingerprint
from fffsweep.pipeline.settings import Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext
from fffsweep.pipeline.stages.benchmark import BenchmarkCpu, LayerBenchmark, TimedPoint


class GpuBenchmarkPoint(TimedPoint):
    """A condition on a GPU. mode `cold`: the device's caches are overwritten before each sample; float32 is timed without TF32."""

    dtype: Literal["float32", "bfloat16", "float16"] = "float32"
    mode: Literal["cold", "hot"] = "cold"

    @property
    def label(self) -> str:
        """Name in metrics."""
        return f"{self.tokens}_{self.dtype}_{self.mode}"


class GpuBenchmarkConfig(LayerBenchmark):
    """Timing on a GPU."""

    points: tuple[GpuBenchmarkPoint, ...] = Field(default=(GpuBenchmarkPoint(),), min_length=1)


class BenchmarkGpu:
    """Artifact: `benchmark.json`, one row for each implementation, side and point."""

    name: ClassVar[str] = "benchmark_gpu"
    version: ClassVar[int] = 2
    sources: ClassVar[tuple[str, ...]] = (
        *BenchmarkCpu.sources,
        "pipeline/gpu_layer_timing.py",
        "pipeline/stages/benchmark.py",
        "kernels/gpu/*",
    )
    Config: ClassVar[type[Settings]] = GpuBenchmarkConfig

    def resources(self, config: GpuBenchmarkConfig) -> Resources:
        return Resources(cpus=1, gpus=1.0, exclusive=True)

    def fingerprints(self, config: GpuBenchmarkConfig) -> dict[str, str]:
        """Raises ValueError on a machine without a GPU: its name is a part of what a time is filed under."""
        if not machine()["gpus"]:
            raise ValueError(
                "stages.benchmark_gpu: nvidia-smi lists no GPU on this machine, and times are filed under one; plan and run where there is "
                "one, or leave the stage out with --set stages.benchmark_gpu=null"
            )
        return {"machine": machine_fingerprint()}

    def run(self, config: GpuBenchmarkConfig, context: StageContext) -> Metrics:
        import torch

        from fffsweep.pipeline.gpu_layer_timing import benchmark_layer_on_gpu

        if context.device != "cuda" or not torch.cuda.is_available():
            raise RuntimeError(
                f"benchmark_gpu was given device {context.device}, and torch {torch.__version__} finds no CUDA device for it"
            )
        return benchmark_layer_on_gpu(config, context)
