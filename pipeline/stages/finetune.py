"""Stage `finetune`: one task, on one pretrained or converted model. Input roles: `prepare`, `pretrain`. Its seed is the finetuning seed."""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fffsweep.pipeline.schedules import RISING
from fffsweep.pipeline.settings import Count, Number, Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext
from fffsweep.pipeline.stages.pretrain import MODEL_SOURCES, Schedule


class FinetuneRecipe(Settings):
    """Everything about finetuning but the task. The defaults are cramming's "GLUE-sane" recipe (arXiv 2212.14034, section 4.3), but the
    head, whose published width is 1024, and the dropout of attention, which there is 0.1.

    dropout: of the embeddings, both halves of each layer and the head, while training. An existing encoder keeps its own head, reads the
    first token and keeps the dropout of its attention.
    """

    epochs: Count = Field(default=5, ge=1)
    batch_size: Count = Field(default=16, ge=1)
    group_by_length: bool = Field(
        default=False, description="batches of texts of like length: the same rows each epoch, less padding to compute, another order"
    )
    max_rows: Count | None = Field(default=None, ge=1, description="training rows used at most, drawn by a seed of its own; null for all")
    learning_rate: Number = Field(default=4e-5, gt=0, description="peak")
    schedule: Schedule = "cosine"
    warmup: Number = Field(default=0.1, ge=0, lt=1, description="share of the steps")
    weight_decay: Number = Field(default=0.0, ge=0)
    beta1: Number = Field(default=0.9, ge=0, lt=1)
    beta2: Number = Field(default=0.98, ge=0, lt=1)
    epsilon: Number = Field(default=1e-6, gt=0)
    clip: Number | None = Field(default=None, gt=0, description="largest norm of the gradient; null for no limit")
    dropout: Number = Field(default=0.1, ge=0, lt=1)
    pooling: Literal["first", "mean"] = Field(default="first", description="what the head reads: the first token, or the mean over tokens")
    head_size: Count | None = Field(default=None, ge=1, description="width of the head; null for the model's hidden size")
    precision: Literal["float32", "bf16"] = "float32"
    submission: bool = Field(default=True, description="predict the task's test splits, where they were prepared, for the GLUE server")
    keep_weights: bool = Field(default=False, description="keep the finetuned model as artifact")
    checkpoint_minutes: Number = Field(default=10.0, gt=0)
    cpus: Count = Field(default=1, ge=1, description="processor threads")

    @model_validator(mode="after")
    def _consistent(self) -> FinetuneRecipe:
        if self.warmup and self.schedule in RISING:
            raise ValueError(
                f"warmup={self.warmup:g} with schedule {self.schedule}, which rises by itself: expected 0; "
                "set warmup to 0, or take wsd, cosine or constant"
            )
        return self


class FinetuneConfig(FinetuneRecipe):
    """The recipe and the task's name."""

    task: str


class Finetune:
    """Artifacts: `curve.jsonl`, `predictions/<split>.tsv`, and `model/` with `keep_weights`.

    A GLUE task's test splits are predicted too, where they were prepared: `predictions/SST-2.tsv` and so on, as the GLUE server takes them.

    Metrics of a split bear its name; `validation/primary` is the mean over a task's validation splits (MNLI has two).
    `data/complete` is 1 if all labelled rows of a GLUE task were there and used.
    """

    name: ClassVar[str] = "finetune"
    version: ClassVar[int] = 9
    sources: ClassVar[tuple[str, ...]] = (
        "pipeline/finetuning.py",
        "pipeline/encoders.py",
        "pipeline/metrics.py",
        "pipeline/glue.py",
        *MODEL_SOURCES,
    )
    Config: ClassVar[type[Settings]] = FinetuneConfig

    def resources(self, config: FinetuneConfig) -> Resources:
        return Resources(cpus=config.cpus)

    def fingerprints(self, config: FinetuneConfig) -> dict[str, str]:
        return {}

    def run(self, config: FinetuneConfig, context: StageContext) -> Metrics:
        from fffsweep.pipeline.finetuning import finetune

        return finetune(config, context)
