"""As `layer_timing`, on a GPU: a trained feedforward layer against the reference's, on the inputs that both really get."""

from __future__ import annotations

from collections.abc import Callable

from fffsweep.kernels.gpu.compare import compare_on_gpu
from fffsweep.kernels.measure import Comparison
from fffsweep.pipeline import optimisation
from fffsweep.pipeline.layer_timing import Sides, time_points
from fffsweep.pipeline.stage import Metrics, StageContext
from fffsweep.pipeline.stages.benchmark import TimedPoint
from fffsweep.pipeline.stages.benchmark_gpu import GpuBenchmarkConfig, GpuBenchmarkPoint


def benchmark_layer_on_gpu(
    config: GpuBenchmarkConfig, context: StageContext, compare: Callable[..., Comparison] = compare_on_gpu
) -> Metrics:
    """Run the stage: see `fffsweep.pipeline.stages.benchmark_gpu.BenchmarkGpu`, and `time_points` for what it gives and raises.

    `compare` is replaced where there is no GPU, in tests.
    """
    optimisation.prepare_cublas()  # the next stage of this process may train

    def compared(sides: Sides, point: TimedPoint) -> tuple[Comparison, Metrics]:
        assert isinstance(point, GpuBenchmarkPoint)
        fields = {"tokens": point.tokens, "dtype": point.dtype, "mode": point.mode}
        return compare(*sides, **fields, min_time_s=config.min_time_s, seed=context.seed), {}

    return time_points(config, context, "cuda", compared)
