"""Stage `rung`: pretraining up to a share of its budget, to be judged and perhaps continued.

Input roles: `prepare`, and `rung`, the rung before, from which it goes on. Its seed is the pretraining seed.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from fffsweep.pipeline.settings import Number, Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext
from fffsweep.pipeline.stages.pretrain import Pretrain, PretrainConfig


class RungConfig(PretrainConfig):
    """The whole pretraining, and the share of its budget after which it is judged."""

    share: Number = Field(gt=0, lt=1)

    @model_validator(mode="after")
    def _can_be_continued(self) -> RungConfig:
        if self.schedule != "wsd":
            raise ValueError(f"schedule={self.schedule} with a rung: only wsd can be continued; set schedule to wsd")
        return self


class Rung:
    """Trains as `pretrain` would until the last fifth of the share, keeps that state, and lets the rate fall to 0 over the rest.

    The held-out loss is therefore that of a whole run with the smaller budget, and whoever goes on starts from the kept state,
    to the bits of a run that never stopped. Artifacts: `state/` (safetensors and JSON), `curve.jsonl`.
    Source: Hägele et al. 2024, arXiv 2405.18392 (decay branches of one stable run).
    """

    name: ClassVar[str] = "rung"
    version: ClassVar[int] = 6
    sources: ClassVar[tuple[str, ...]] = ("pipeline/stages/pretrain.py", *Pretrain.sources)
    Config: ClassVar[type[Settings]] = RungConfig

    def resources(self, config: RungConfig) -> Resources:
        return Pretrain().resources(config)

    def fingerprints(self, config: RungConfig) -> dict[str, str]:
        return Pretrain().fingerprints(config)

    def run(self, config: RungConfig, context: StageContext) -> Metrics:
        from fffsweep.pipeline.pretraining import pretrain_to_rung

        return pretrain_to_rung(config, context)
