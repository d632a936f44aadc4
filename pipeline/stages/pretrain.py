"""Stage `pretrain`: masked-language modelling under a budget. Its seed is the pretraining seed.

Input roles: `prepare`, and `rung` where it goes on from a rung of itself, to the same bits.
"""

from __future__ import annotations

from typing import ClassVar, Literal

from pydantic import Field, model_validator

from fffsweep.pipeline.machine import machine_fingerprint
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.schedules import RISING
from fffsweep.pipeline.settings import Count, Number, Settings
from fffsweep.pipeline.stage import Metrics, Resources, StageContext

MODEL_SOURCES = (  # of every stage that trains a model
    "pipeline/model.py",
    "pipeline/feedforward.py",
    "pipeline/node_trees.py",
    "pipeline/leaf_trees.py",
    "pipeline/variants.py",
    "pipeline/optimisation.py",
    "pipeline/memory.py",
    "pipeline/order.py",
    "pipeline/schedules.py",
    "pipeline/data/prepared.py",
    "pipeline/tasks.py",
    "kernels/activations.py",
    "kernels/cmm.py",
    "kernels/shape.py",
    "kernels/torch_forms.py",
    "kernels/native/*",
    "kernels/gpu/*",
)
Schedule = Literal["triangle", "one_cycle", "wsd", "cosine", "constant"]


class PretrainRecipe(Settings):
    """Everything about pretraining but the model. Exactly one of `tokens`, `steps` and `wall_clock_s` is the budget.

    The defaults are the crammed-BERT recipe (Geiping & Goldstein 2022, arXiv 2212.14034, and its published training config), but
    the batch, which is for small budgets; the paper ramps it up to 8192 over 60 % of the budget.
    """

    tokens: Count | None = Field(default=None, ge=1, description="budget: tokens read")
    steps: Count | None = Field(default=None, ge=1, description="budget: optimiser steps")
    wall_clock_s: Number | None = Field(default=None, gt=0, description="budget: seconds of training; the result belongs to the machine")
    batch_size: Count = Field(default=128, ge=1, description="sequences a step, once the ramp is over")
    micro_batch_size: Count = Field(default=64, ge=1, description="sequences in one forward; a step accumulates over several")
    batch_ramp: Number = Field(default=0.0, ge=0, le=1, description="share of the budget over which the batch grows from one micro-batch")
    learning_rate: Number = Field(default=1e-3, gt=0, description="peak")
    schedule: Schedule = Field(default="triangle", description="of the learning rate, over the budget")
    warmup: Number = Field(default=0.0, ge=0, lt=1, description="share of the budget; wsd, cosine and constant alone")
    optimizer: Literal["adamw", "muon"] = Field(default="adamw", description="muon: for the matrices of hidden layers, AdamW for the rest")
    weight_decay: Number = Field(default=0.01, ge=0, description="not of biases, norms and the scale of positions")
    beta1: Number = Field(default=0.9, ge=0, lt=1)
    beta2: Number = Field(default=0.98, ge=0, lt=1)
    epsilon: Number = Field(default=1e-12, gt=0)
    clip: Number = Field(default=0.5, gt=0, description="largest norm of the gradient")
    mask_share: Number = Field(default=0.25, gt=0, le=0.9, description="share of each sequence's tokens to predict")
    precision: Literal["float32", "bf16"] = Field(default="float32", description="bf16: autocast; weights stay float32")
    compile: bool = Field(default=False, description="torch.compile")
    evaluations: Count = Field(default=10, ge=1, description="evenly over the budget, the last one at its end")
    validation_sequences: Count = Field(default=256, ge=1, description="held-out sequences, always the same with the same masks")
    log_every: Count = Field(default=10, ge=1, description="steps between two rows of the curve")
    spike_limit: Number = Field(default=3.0, gt=0, description="nats above its lowest that the smoothed loss may rise before giving up")
    checkpoint_minutes: Number = Field(default=10.0, gt=0)
    cpus: Count = Field(default=1, ge=1, description="processor threads")

    @model_validator(mode="after")
    def _consistent(self) -> PretrainRecipe:
        given = [name for name in ("tokens", "steps", "wall_clock_s") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                f"budget: got {' and '.join(given) or 'none'}; expected exactly one of tokens, steps and wall_clock_s; "
                + ("leave the others out" if given else "add one, such as tokens: 1M")
            )
        if self.warmup and self.schedule in RISING:
            raise ValueError(
                f"warmup={self.warmup:g} with schedule {self.schedule}, which rises by itself: expected 0; "
                "remove warmup, or take wsd, cosine or constant"
            )
        if self.micro_batch_size < self.batch_size and self.batch_size % self.micro_batch_size:
            raise ValueError(
                f"batch_size={self.batch_size} with micro_batch_size={self.micro_batch_size}: expected a multiple of it; "
                f"try {self.micro_batch_size * max(1, round(self.batch_size / self.micro_batch_size))}"
            )
        return self


class PretrainConfig(PretrainRecipe):
    """The recipe and the model."""

    model: ModelSettings


class Pretrain:
    """Artifacts: `model/` (transformers folder with the tokenizer), `curve.jsonl`, and `tree_health.json` for layers with trees."""

    name: ClassVar[str] = "pretrain"
    version: ClassVar[int] = 8
    sources: ClassVar[tuple[str, ...]] = (
        "pipeline/pretraining.py",
        "pipeline/energy.py",
        "pipeline/masking.py",
        "pipeline/portable.py",
        "pipeline/tree_health.py",
        "pipeline/workers.py",
        *MODEL_SOURCES,
    )
    Config: ClassVar[type[Settings]] = PretrainConfig

    def resources(self, config: PretrainConfig) -> Resources:
        return Resources(cpus=config.cpus)

    def fingerprints(self, config: PretrainConfig) -> dict[str, str]:
        return {} if config.wall_clock_s is None else {"machine": machine_fingerprint()}

    def run(self, config: PretrainConfig, context: StageContext) -> Metrics:
        from fffsweep.pipeline.pretraining import pretrain

        return pretrain(config, context)
