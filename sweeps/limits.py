"""What a sweep's config says about the resources of its stages: how much a run may take, and how often it is tried."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field

from fffsweep.pipeline.settings import Count, Number, Settings
from fffsweep.pipeline.stage import Resources

StageName = Literal["prepare", "pretrain", "activations", "convert", "finetune", "benchmark_cpu", "benchmark_gpu", "collect"]
ON_EITHER = ("pretrain", "rung", "finetune")  # a rung is a part of pretraining, and has its resources
ON_GPU = ("pretrain", "finetune", "benchmark_gpu")


class StageLimits(Settings):
    """Resources of one stage's runs. None of it is part of a result's key."""

    cpus: Count | None = Field(default=None, ge=1, description="processors to reserve; by default as many as the stage has threads")
    gpus: Number = Field(default=0.0, ge=0, description="GPUs to reserve, a fraction shares one; more than 0 runs the stage on CUDA")
    memory_bytes: Count | None = Field(default=None, ge=2**20, description="memory of its process, beyond which it is ended and fails")
    workers: Count = Field(
        default=1, ge=1, description="pretrain: processes that share a run through Ray Train, each with these CPUs and GPUs"
    )
    timeout_s: Number | None = Field(default=None, gt=0, description="seconds after which a run is ended and tried again")
    retries: Count | None = Field(default=None, ge=0, description="tries after a fault of the machine; by default the sweep's")

    def applied(self, own: Resources) -> Resources:
        """A stage's own resources with these limits."""
        return replace(
            own,
            cpus=self.cpus or own.cpus,
            gpus=self.gpus or own.gpus,
            memory_bytes=self.memory_bytes,
            timeout_s=self.timeout_s,
            workers=self.workers,
        )
