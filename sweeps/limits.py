"""What a sweep's config says about the resources of its stages: how much a run may take, and how often it is tried."""

from __future__ import annotations

import os
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

import psutil
from pydantic import Field

from fffsweep.pipeline.settings import Count, Number, Settings
from fffsweep.pipeline.stage import Resources
from fffsweep.sweeps.yaml_source import ConfigError

if TYPE_CHECKING:
    from fffsweep.sweeps.config import SweepConfig

StageName = Literal["prepare", "pretrain", "activations", "convert", "finetune", "benchmark_cpu", "benchmark_gpu", "collect"]
ON_EITHER = ("pretrain", "rung", "activations", "convert", "finetune")  # a rung is a part of pretraining, and has its resources
ON_GPU = ("pretrain", "activations", "convert", "finetune", "benchmark_gpu")


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


def check_fits_here(config: SweepConfig) -> None:
    """Raises ConfigError if a stage asks for more than this machine has: its runs would wait for ever."""
    for name, settings in config.stages:
        if settings is None:
            continue
        wanted = config.limits_of(name).applied(Resources(cpus=getattr(settings, "cpus", 1)))
        asked = {
            "cpus": (wanted.workers * wanted.cpus, len(os.sched_getaffinity(0))),
            "gpus": (wanted.workers * wanted.gpus, _num_gpus() if wanted.gpus else 0),
            "memory_bytes": (wanted.memory_bytes or 0, psutil.virtual_memory().total),
        }
        for what, (number, there) in asked.items():
            if number > there:
                workers = f" for {wanted.workers} workers" if wanted.workers > 1 else ""
                raise ConfigError(
                    f"stage {name} asks for {number:,.15g} {what}{workers}, and this machine has {there:,.15g}: lower stages.{name} or "
                    f"resources.{name}, or name a cluster with --address"
                )


def _num_gpus() -> int:
    import torch

    return torch.cuda.device_count()
