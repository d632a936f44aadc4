"""Stages that put fast feedforward layers into an existing encoder.

`activations` lets the encoder read text once and keeps what goes into and comes out of its feedforward layers; all conversions
share it. `convert` trains new layers to do the same, all layers at once, and leaves a `model/` that `finetune` reads as it reads a
pretrained one. Input roles: `prepare`, and for `convert` `activations`, unless the layers are left unchanged.
"""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field, model_validator

from fffsweep.pipeline.encoder_folder import fingerprint
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.schedules import RISING
from fffsweep.pipeline.settings import Count, Number, Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext
from fffsweep.pipeline.stages.pretrain import MODEL_SOURCES, Schedule

_SOURCES = (
    "pipeline/activations.py",
    "pipeline/conversion.py",
    "pipeline/encoder_folder.py",
    "pipeline/encoders.py",
    "pipeline/masking.py",
    "pipeline/tree_health.py",
    "pipeline/data/rows.py",
    "pipeline/data/tables.py",
    "pipeline/data/text.py",
    "pipeline/data/vocabulary.py",
    *MODEL_SOURCES,
)
WITHOUT_ACTIVATIONS = ("unchanged", "none")  # variants with nothing to train


class ActivationsConfig(Settings):
    """Which encoder reads how much. Kept in float16: 4 bytes for each token, layer and hidden unit."""

    locations: ClassVar[frozenset[str]] = frozenset({"encoder"})
    encoder: str = Field(min_length=1, description="a folder as transformers saves it, or owner/name@revision of a hub")
    distinct_tokens: Count = Field(default=1_000_000, ge=1, description="tokens read for training")
    validation_tokens: Count = Field(default=16_384, ge=1, description="tokens of held-out text read for validation")
    cpus: Count = Field(default=1, ge=1, description="processor threads")


class ConvertRecipe(ActivationsConfig):
    """How new layers are trained on the activations of the old ones: mean squared error of each, over the variance of its target."""

    tokens: Count = Field(default=4_000_000, ge=1, description="budget: tokens trained on; beyond distinct_tokens they are read again")
    batch_tokens: Count = Field(default=4096, ge=1, description="tokens a step")
    learning_rate: Number = Field(default=2e-3, gt=0, description="peak")
    schedule: Schedule = "cosine"
    warmup: Number = Field(default=0.05, ge=0, lt=1, description="share of the budget")
    weight_decay: Number = Field(default=0.0, ge=0)
    beta1: Number = Field(default=0.9, ge=0, lt=1)
    beta2: Number = Field(default=0.98, ge=0, lt=1)
    epsilon: Number = Field(default=1e-8, gt=0)
    evaluations: Count = Field(default=10, ge=1, description="evenly over the budget, the last one at its end")
    checkpoint_minutes: Number = Field(default=10.0, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> ConvertRecipe:
        if self.warmup and self.schedule in RISING:
            raise ValueError(
                f"warmup={self.warmup:g} with schedule {self.schedule}, which rises by itself: expected 0; "
                "set warmup to 0, or take wsd, cosine or constant"
            )
        return self

    @property
    def activations(self) -> ActivationsConfig:
        """What the stage `activations` is to read; not more than is trained on."""
        return ActivationsConfig(
            encoder=self.encoder,
            distinct_tokens=min(self.tokens, self.distinct_tokens),
            validation_tokens=self.validation_tokens,
            cpus=self.cpus,
        )


class ConvertConfig(ConvertRecipe):
    """The recipe and the model; `model.feedforward` is the new layer, variant `unchanged` keeps the encoder, of whatever type, as it is."""

    model: ModelSettings


class Activations:
    """Artifacts, for each layer l: `train/inputs-<l>.npy`, `train/outputs-<l>.npy` [tokens, hidden]; `train/token_ids.npy`; and so
    for `validation`. Dropout is off."""

    name: ClassVar[str] = "activations"
    version: ClassVar[int] = 2
    sources: ClassVar[tuple[str, ...]] = _SOURCES
    Config: ClassVar[type[Settings]] = ActivationsConfig

    def resources(self, config: ActivationsConfig) -> Resources:
        return Resources(cpus=config.cpus)

    def fingerprints(self, config: ActivationsConfig) -> dict[str, str]:
        return {"encoder": fingerprint(config.encoder)}

    def run(self, config: ActivationsConfig, context: StageContext) -> Metrics:
        from fffsweep.pipeline.activations import record

        return record(config, context)


class Convert:
    """Artifacts: `model/` (transformers folder with the tokenizer); for new layers `curve.jsonl`, for those with trees `tree_health.json`.

    `distill/unexplained`: held-out squared error over the variance of the old layers' outputs, mean over layers; each layer's
    is `distill/layer_<n>/unexplained`.
    """

    name: ClassVar[str] = "convert"
    version: ClassVar[int] = 6
    sources: ClassVar[tuple[str, ...]] = _SOURCES
    Config: ClassVar[type[Settings]] = ConvertConfig

    def resources(self, config: ConvertConfig) -> Resources:
        return Resources(cpus=config.cpus)

    def fingerprints(self, config: ConvertConfig) -> dict[str, str]:
        return {"encoder": fingerprint(config.encoder)}

    def run(self, config: ConvertConfig, context: StageContext) -> Metrics:
        from fffsweep.pipeline.conversion import convert

        return convert(config, context)
