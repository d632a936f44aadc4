"""Stage `noop`: returns the metrics that it is given, after a pause. What remains of its time is the sweep's own: for measuring that."""

from __future__ import annotations

import time
from typing import ClassVar

from pydantic import Field

from fffsweep.pipeline.settings import Number, Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext


class NoopConfig(Settings):
    """name: tells runs apart. pause_s: how long it takes."""

    name: str
    metrics: dict[str, Number] = Field(default_factory=dict)
    pause_s: Number = Field(default=0.0, ge=0)


class Noop:
    """No artifacts."""

    name: ClassVar[str] = "noop"
    version: ClassVar[int] = 1
    sources: ClassVar[tuple[str, ...]] = ()
    Config: ClassVar[type[Settings]] = NoopConfig

    def resources(self, config: NoopConfig) -> Resources:
        return Resources(cpus=1)

    def fingerprints(self, config: NoopConfig) -> dict[str, str]:
        return {}

    def run(self, config: NoopConfig, context: StageContext) -> Metrics:
        time.sleep(config.pause_s)
        return config.metrics
