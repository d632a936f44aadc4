"""The blocks that a sweep's config is made of, and how their values may be written."""

from __future__ import annotations

from collections.abc import Iterable
from copy import copy
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema, create_model, field_serializer, model_validator

from fffsweep.kernels.shape import parse_layout
from fffsweep.pipeline.model_settings import FeedForward, ModelSettings
from fffsweep.pipeline.settings import Count, Settings, parse_count
from fffsweep.pipeline.stages.benchmark import BenchmarkConfig, LayerBenchmark
from fffsweep.pipeline.stages.benchmark_gpu import GpuBenchmarkConfig
from fffsweep.pipeline.stages.convert import ConvertRecipe
from fffsweep.pipeline.stages.finetune import FinetuneRecipe
from fffsweep.pipeline.stages.prepare import PrepareConfig
from fffsweep.pipeline.stages.pretrain import PretrainRecipe
from fffsweep.sweeps.constraints import parse_constraint
from fffsweep.sweeps.controls import parse_control


def _width(value: Any) -> Any:
    """Whole number of "~4095"."""
    text = str(value).strip()
    width = parse_count(text[1:]) if text.startswith("~") else None
    if not isinstance(width, int) or width < 1:
        raise ValueError(f"width={value}: expected ~ and a whole number, such as ~4095: the largest layout within 10 % below it is taken")
    return f"~{width}"


def _listed(value: Any) -> Any:
    return [value] if isinstance(value, int | float | str) else value


def _name(value: str) -> str:
    if not value.strip() or not value.isprintable() or len(value.encode()) > 80:
        raise ValueError(f"name={value!r}: expected 1 to 80 printable characters")
    return value


Layout = Annotated[
    str,
    BeforeValidator(lambda value: parse_layout(value).layout),
    WithJsonSchema({"type": "string", "pattern": r"^\s*[0-9]+\s*x\s*[0-9]+\s*$", "description": "trees x depth, such as 1x11"}),
]
ControlText = Annotated[
    str,
    BeforeValidator(lambda value: parse_control(value).text),
    WithJsonSchema(
        {"type": "string", "pattern": r"^\s*(none|unchanged|reference_dense\s*\(.+\)|(dense_active|random_routing)(\s*\(.+\))?)\s*$"}
    ),
]
ConstraintText = Annotated[
    str,
    BeforeValidator(lambda value: parse_constraint(value).text),
    WithJsonSchema(
        {"type": "string", "pattern": r"^\s*[^\s<>=]+\s*[<>]=\s*[-+0-9.eE]+\s*$", "description": "such as quality_retention >= 0.96"}
    ),
]
_DEPTH = {"type": "integer", "minimum": 0}
Depths = Annotated[
    list[Annotated[int, Field(ge=0), BeforeValidator(parse_count)]],
    BeforeValidator(_listed),
    WithJsonSchema({"anyOf": [_DEPTH, {"type": "array", "items": _DEPTH, "minItems": 1}]}),
]
Width = Annotated[str, BeforeValidator(_width), WithJsonSchema({"type": "string", "pattern": r"^\s*~"})]
Name = Annotated[str, AfterValidator(_name)]


def _like(name: str, base: type[Settings], without: Iterable[str] = (), optional: bool = False) -> type[Settings]:
    """Block with the fields of `base` except `without`; with `optional`, every field may be left out."""
    fields: dict[str, Any] = {}
    for field_name, info in base.model_fields.items():
        if field_name not in without:
            info = copy(info)
            if optional:
                info.default, info.default_factory = None, None
            fields[field_name] = (info.annotation, info)
    return create_model(name, __base__=Settings, __doc__=base.__doc__, **fields)


if TYPE_CHECKING:
    FeedForwardDefaults = Settings
    FinetuneOverride = Settings
else:
    FeedForwardDefaults = _like("FeedForwardDefaults", FeedForward, without=("variant", "trees", "depth"))
    FinetuneOverride = _like("FinetuneOverride", FinetuneRecipe, optional=True)


class SweepFeedForward(FeedForwardDefaults):
    """What every layout has in common. variant: which kind of fast feedforward layer the layouts are."""

    variant: Literal["fff", "original_fff"] = "fff"


class SweepModel(ModelSettings):
    """The encoder that all trials share; `feedforward` holds what every layout has in common."""

    feedforward: SweepFeedForward = SweepFeedForward()  # type: ignore[assignment]


class SweepFinetune(FinetuneRecipe):
    """Finetuning: the recipe, the tasks it is run on, and what single tasks do otherwise."""

    tasks: tuple[str, ...] = Field(min_length=1)
    overrides: dict[str, FinetuneOverride] = Field(default_factory=dict)

    @field_serializer("overrides")
    def _only_what_was_set(self, overrides: dict[str, Settings]) -> dict[str, Any]:
        return {task: override.model_dump(mode="json", exclude_unset=True) for task, override in overrides.items()}


class Stages(Settings):
    """Settings of each stage: one of `pretrain` and `convert`. Without `benchmark_cpu` and `benchmark_gpu` nothing is timed."""

    prepare: PrepareConfig
    pretrain: PretrainRecipe | None = None
    convert: ConvertRecipe | None = None
    finetune: SweepFinetune
    benchmark_cpu: BenchmarkConfig | None = None
    benchmark_gpu: GpuBenchmarkConfig | None = None

    @property
    def benchmarks(self) -> dict[str, LayerBenchmark]:
        """The configured stages that time layers."""
        both = {"benchmark_cpu": self.benchmark_cpu, "benchmark_gpu": self.benchmark_gpu}
        return {name: benchmark for name, benchmark in both.items() if benchmark is not None}


class Replicates(Settings):
    """Adaptive: `min` pretrainings at first, up to `max` where configurations near the front are not yet told apart."""

    min: Count = Field(default=1, ge=1)
    max: Count = Field(ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> Replicates:
        if self.min > self.max:
            raise ValueError(f"min={self.min} with max={self.max}: expected min <= max; exchange them")
        return self


class Seeds(Settings):
    """How many pretrainings (replicates) a trial has, and how many finetunings of each task a replicate has."""

    pretrain: Annotated[Count, Field(ge=1)] | Replicates = 1
    finetune: Count = Field(default=1, ge=1)

    @property
    def fewest(self) -> int:
        """Replicates that every trial has."""
        return self.pretrain if isinstance(self.pretrain, int) else self.pretrain.min

    @property
    def most(self) -> int:
        """Replicates that a trial may come to."""
        return self.pretrain if isinstance(self.pretrain, int) else self.pretrain.max
