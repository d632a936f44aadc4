"""The `search:` block: which settings a sampler may choose, and how a choice is laid over a sweep's config."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError, model_validator

from fffsweep.kernels.shape import TreeShape, layout_of_width, parse_layout
from fffsweep.pipeline.settings import Count, Number, Settings
from fffsweep.sweeps.config_errors import Misfit, nearest_first

if TYPE_CHECKING:
    from fffsweep.sweeps.config import SweepConfig

Sampler = Literal["grid", "random", "qmc", "tpe", "nsga2", "nsga3", "gp"]
FIXED_IN_ADVANCE = ("grid", "random", "qmc")  # these samplers learn nothing from results, so all of their trials are known at once
SHAPES = ("layout", "depth", "trees")  # paths that stand for the shape of the layer
Point = dict[str, Any]  # path of a setting -> its value in one trial

_MOST_COMBINATIONS = 256
_MOST_SINGLE = 64
_MOST_GRID = 100_000


class FloatRange(Settings):
    """Floats from `low` to `high`; `log` draws their logarithm evenly, `step` leaves low, low + step and so on."""

    type: Literal["float"]
    low: Number
    high: Number
    log: bool = False
    step: Number | None = Field(default=None, gt=0)

    @model_validator(mode="after")
    def _consistent(self) -> FloatRange:
        _check_range(self.low, self.high, self.step, self.log)
        return self

    def values(self) -> list[Any]:
        """Every value there is. Raises ValueError if they cannot be counted."""
        if self.step is None:
            raise ValueError("a float without step has no grid; give it a step, list its values, or take another sampler")
        count = int((self.high - self.low) / self.step * (1 + 1e-9)) + 1
        return [float(f"{self.low + number * self.step:.12g}") for number in range(count)]

    def probes(self) -> list[Any]:
        """Values that show whether the range is allowed."""
        return [self.low, self.high]


class IntRange(Settings):
    """Whole numbers from `low` to `high`; `log` draws their logarithm evenly, `step` leaves low, low + step and so on."""

    type: Literal["int"]
    low: Count
    high: Count
    log: bool = False
    step: Count = Field(default=1, ge=1)

    @model_validator(mode="after")
    def _consistent(self) -> IntRange:
        _check_range(self.low, self.high, self.step if self.step != 1 else None, self.log)
        return self

    def values(self) -> Sequence[Any]:
        """Every value there is; none is made before it is asked for, as there may be a billion."""
        return range(self.low, self.high + 1, self.step)

    def probes(self) -> list[Any]:
        """Values that show whether the range is allowed: all, or the ends of many."""
        values = self.values()
        return list(values) if len(values) <= _MOST_SINGLE else [values[0], values[-1]]


class Choices(Settings):
    """One of a list of values without an order."""

    type: Literal["categorical"]
    choices: list[bool | int | float | str | None] = Field(min_length=1)

    @model_validator(mode="after")
    def _consistent(self) -> Choices:
        for index, choice in enumerate(self.choices):
            if choice in self.choices[:index]:
                raise ValueError(f"choices: {choice!r} is given twice; keep one")
        return self

    def values(self) -> list[Any]:
        """Every value there is."""
        return list(self.choices)

    probes = values


def _check_range(low: float, high: float, step: float | None, log: bool) -> None:
    if low > high:
        raise ValueError(f"low={low:g} with high={high:g}: expected low <= high; exchange them")
    if log and low <= 0:
        raise ValueError(f"low={low:g} with log: expected more than 0; raise low or leave log out")
    if log and step is not None:
        raise ValueError(f"step={step:g} with log: expected one of the two; leave one out")


def _listed(value: Any) -> Any:
    return {"type": "categorical", "choices": value} if isinstance(value, list) else value


class _OrList:
    """Tells the JSON schema of the short form."""

    @classmethod
    def __get_pydantic_json_schema__(cls, core: Any, handler: Any) -> dict[str, Any]:
        return {"anyOf": [*handler(core)["oneOf"], {"type": "array", "minItems": 1}]}


Dimension = Annotated[FloatRange | IntRange | Choices, Field(discriminator="type"), BeforeValidator(_listed), _OrList]


class Search(Settings):
    """What a sampler chooses for each trial, and how often.

    space: path of a setting, such as `stages.pretrain.learning_rate`, -> its values; a plain list is categorical. `layout`, `depth`
    (with `width`) or `depth` and `trees` stand for the shape of the layer, in the place of the grid of layouts.
    num_trials: trials for each layout of the grid, or in all where the shape is searched; as many for reference_dense. The sampler
    `grid` takes every combination instead.
    """

    space: dict[str, Dimension] = Field(min_length=1)
    num_trials: Count | None = Field(default=None, ge=1)
    seed: Count = Field(default=0, ge=0)

    @property
    def shape_paths(self) -> list[str]:
        """Dimensions that decide on the shape of the layer."""
        return [path for path in SHAPES if path in self.space]

    def grid(self, paths: list[str] | None = None) -> Iterator[Point]:
        """Every combination of values, those of the last path changing fastest."""
        names = list(self.space) if paths is None else paths
        for values in itertools.product(*(self.space[name].values() for name in names)):
            yield dict(zip(names, values, strict=True))


def lay_over(values: Mapping[str, Any], block: str, point: Mapping[str, Any]) -> dict[str, Any]:
    """A block's values with what a point says of settings below `block`."""
    laid = dict(values)
    for path, value in point.items():
        if not path.startswith(f"{block}."):
            continue
        *above, last = path.removeprefix(f"{block}.").split(".")
        holder = laid
        for name in above:
            holder[name] = deepcopy(holder.get(name, {}))
            holder = holder[name]
        holder[last] = value
    return laid


def shape_of(config: SweepConfig, point: Mapping[str, Any]) -> TreeShape:
    """Shape that a point stands for. Raises ValueError if there is none."""
    if "layout" in point:
        return parse_layout(point["layout"])
    if "trees" in point:
        return TreeShape(int(point["trees"]), int(point["depth"]))
    return layout_of_width(int(point["depth"]), config.target_width)


def searchable_shapes(config: SweepConfig) -> list[TreeShape] | None:
    """Every shape that a search over layouts or depths can meet, None where trees and depth are searched apart."""
    paths = config.search.shape_paths if config.search is not None else []
    if config.search is None or paths not in (["layout"], ["depth"]):
        return None
    return [shape_of(config, point) for point in config.search.grid(paths)]


def check_search(config: SweepConfig) -> None:
    """Raises Misfit for whatever could not be run: unknown paths, values that a setting does not take, a grid without end."""
    search = config.search
    if search is None:
        if config.sampler != "grid":
            raise Misfit(f"sampler={config.sampler}: there is nothing to search; add a search block, or take sampler grid", "sampler")
        return
    _check_budget(config, search)
    _check_shape(config, search)
    for index, text in enumerate(config.controls):
        if "trees" in search.space and text in ("dense_active", "random_routing"):
            raise Misfit(
                f"controls[{index}]={text}: trees and depth are searched, so there is no list of layouts; name one", "controls", index
            )
    for path in search.space:
        _check_path(config, path)
    for path, dimension in search.space.items():
        for value in dimension.probes():
            _check_point(config, {path: value}, path)
    ends = [[dimension.probes()[0], dimension.probes()[-1]] for dimension in search.space.values()]
    for values in itertools.islice(itertools.product(*ends), _MOST_COMBINATIONS):
        _check_point(config, dict(zip(search.space, values, strict=True)), None)


def _check_budget(config: SweepConfig, search: Search) -> None:
    if config.sampler != "grid":
        if search.num_trials is None:
            raise Misfit(f"search.num_trials: missing; sampler {config.sampler} needs a number of trials, such as 20", "search")
        return
    if search.num_trials is not None:
        raise Misfit("search.num_trials with sampler grid, which takes every combination: leave it out", "search", "num_trials")
    size = 1
    for path, dimension in search.space.items():
        try:
            size *= len(dimension.values())
        except ValueError as error:
            raise Misfit(f"search.space.{path}: {error}", "search", "space", path) from None
    if size > _MOST_GRID:
        raise Misfit(f"search.space: a grid of {size} points; expected at most {_MOST_GRID}, or another sampler", "search", "space")


def _check_shape(config: SweepConfig, search: Search) -> None:
    shapes = search.shape_paths
    place = ("search", "space", *shapes[:1])
    if shapes and (config.layouts is not None or config.depth is not None):
        raise Misfit(
            f"search.space.{shapes[0]} together with {'layouts' if config.layouts is not None else 'depth'}: the shape is either searched "
            "or a grid; remove one",
            *place,
        )
    if shapes in ([], ["layout"], ["depth", "trees"]):
        if shapes and config.width is not None:
            raise Misfit(f"width together with search.space.{shapes[0]}: it goes with a searched depth alone; remove it", "width")
        return
    if shapes != ["depth"]:
        raise Misfit(f"search.space: {' and '.join(shapes)}; expected layout, depth with a width, or depth and trees", *place)
    if config.width is None:
        raise Misfit("search.space.depth alone: expected width beside it, such as width: ~4095, or trees in the space", *place)


_SHARED = {
    "stages.convert.encoder": "the encoder is what all trials change; vary it between studies",
    "stages.prepare": "all trials share their data; vary it between studies",
    "stages.benchmark_cpu": "trials are comparable only if they are timed alike; vary it between studies",
    "stages.benchmark_gpu": "trials are comparable only if they are timed alike; vary it between studies",
    "stages.finetune.tasks": "trials are comparable only on the same tasks",
    "model.sequence_length": "it belongs to the data, which all trials share",
}


def _check_path(config: SweepConfig, path: str) -> None:
    place = ("search", "space", path)
    if path in SHAPES:
        return
    for prefix, reason in _SHARED.items():
        if path == prefix or path.startswith(f"{prefix}."):
            raise Misfit(f"search.space.{path}: {reason}", *place)
    known = [*SHAPES, *settable(config)]
    override = path.removeprefix("stages.finetune.overrides.").split(".")
    if path.startswith("stages.finetune.overrides.") and override[0] in config.task_names and len(override) == 2:
        known.append(f"stages.finetune.overrides.{override[0]}.{override[1]}" if f"stages.finetune.{override[1]}" in known else "")
    if path not in known:
        raise Misfit(f"search.space.{path}: unknown setting; expected one of {nearest_first(path, known)}", *place)


def settable(config: SweepConfig) -> list[str]:
    """Paths of the settings that a search may vary, those of the layer's shape and single tasks aside."""
    blocks = {
        "model": config.model.resolved(),
        **{f"stages.{name}": block.resolved() for name in ("pretrain", "convert") if (block := getattr(config.stages, name)) is not None},
        "stages.finetune": {name: value for name, value in config.stages.finetune.resolved().items() if name != "overrides"},
    }
    paths = [path for block, values in blocks.items() for path in _leaves(values, block)]
    return [path for path in paths if path not in _SHARED]


def _leaves(values: Mapping[str, Any], prefix: str) -> Iterator[str]:
    for name, value in values.items():
        if isinstance(value, dict):
            yield from _leaves(value, f"{prefix}.{name}")
        else:
            yield f"{prefix}.{name}"


def _check_point(config: SweepConfig, point: Point, path: str | None) -> None:
    """Raises Misfit if no trial could have these values; `path` is the single one they are of, if they are of one."""
    shown = ", ".join(f"{name}={value}" for name, value in point.items())
    place = ("search", "space") if path is None else ("search", "space", path)
    try:
        check_point(config, point)
    except ValidationError as error:
        fault = error.errors()[0]
        message = str(fault["msg"]).removeprefix("Value error, ")
        raise Misfit(f"search.space: {shown}: {message[:1].lower()}{message[1:]}", *place) from None
    except ValueError as error:
        raise Misfit(f"search.space: {shown}: {error}", *place) from None


def check_point(config: SweepConfig, point: Point) -> None:
    """Build every config that a trial with these values has. Raises ValueError."""
    shapes = [path for path in SHAPES if path in point]
    whole = shapes in (["layout"], ["depth", "trees"]) or (shapes == ["depth"] and config.width is not None)
    shape = shape_of(config, point) if whole else TreeShape(2, 1)
    model = config.model_settings("fff", shape, point)
    if config.stages.pretrain is not None:
        config.pretrain_config(model, point)
    else:
        config.convert_config(model, point)
    for task in config.task_names:
        config.finetune_config(task, point)
    for stage, benchmark in config.stages.benchmarks.items():
        if benchmark.layer is not None and benchmark.layer >= model.num_layers:
            raise ValueError(f"num_layers={model.num_layers} with stages.{stage}.layer={benchmark.layer}: there is no such layer")
        if model.feedforward.variant == "original_fff" or model.feedforward.master_leaf:
            raise ValueError(f"stages.{stage} times variant fff without a master leaf alone; leave {stage} out")
