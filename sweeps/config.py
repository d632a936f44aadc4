"""A sweep's config: what is varied, what every stage does, what counts. `load_config` reads one from YAML."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Literal

from pydantic import Field, ValidationError, model_validator

from fffsweep.kernels.shape import TreeShape, layout_of_width, parse_layout
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.settings import Count, Settings
from fffsweep.pipeline.stages.convert import ConvertConfig
from fffsweep.pipeline.stages.finetune import FinetuneConfig
from fffsweep.pipeline.stages.pretrain import PretrainConfig
from fffsweep.sweeps.blocks import ConstraintText, ControlText, Depths, Layout, Name, Seeds, Stages, SweepModel, Width
from fffsweep.sweeps.config_errors import Misfit, explain, nearest_first
from fffsweep.sweeps.constraints import check_constraints
from fffsweep.sweeps.controls import Control, parse_control
from fffsweep.sweeps.conversion import check_conversion, share_vocabulary
from fffsweep.sweeps.limits import ON_GPU, StageLimits, StageName
from fffsweep.sweeps.objectives import metrics_of, unknown_metric
from fffsweep.sweeps.rungs import EarlyStopping, check_early_stopping
from fffsweep.sweeps.search import Sampler, Search, check_search, lay_over, searchable_shapes
from fffsweep.sweeps.yaml_source import ConfigError, Source, read_source

__all__ = ["ConfigError", "SweepConfig", "load_config"]

NOTHING: Mapping[str, Any] = {}


class SweepConfig(Settings):
    """One sweep. The space is `layouts`, or every `depth` at about one `width`.

    resources: what the runs of single stages may take. retries: how often a run is tried again after a fault of the machine.
    """

    name: Name
    description: str = ""
    model: SweepModel
    layouts: list[Layout] | None = None
    depth: Depths | None = None
    width: Width | None = None
    controls: list[ControlText] = Field(default_factory=list)
    stages: Stages
    objectives: dict[str, Literal["maximize", "minimize"]] = Field(min_length=1)
    sampler: Sampler = "grid"
    search: Search | None = None
    constraints: list[ConstraintText] = Field(default_factory=list)
    early_stopping: EarlyStopping | None = None
    seeds: Seeds = Seeds()
    resources: dict[StageName, StageLimits] = Field(default_factory=dict)
    retries: Count = Field(default=2, ge=0)

    @model_validator(mode="after")
    def _fits_together(self) -> SweepConfig:
        check_conversion(self)
        self._check_space()
        self._check_controls()
        self._check_tasks()
        check_search(self)
        check_constraints(self)
        check_early_stopping(self)
        self._check_resources()
        for metric in self.objectives:
            if metric not in metrics_of(self):
                raise Misfit(unknown_metric(metric, self), "objectives", metric)
        return self

    def _check_space(self) -> None:
        by_width = self.depth is not None or self.width is not None
        if self.layouts is not None and by_width:
            raise Misfit(
                "layouts together with depth and width: expected one of the two; remove the other", "width" if self.width else "depth"
            )
        searched = self.search is not None and bool(self.search.shape_paths)
        if by_width and not searched and (self.depth is None or self.width is None):
            given, lacking = ("depth", "width: ~4095") if self.width is None else ("width", "depth: [0, 4, 8]")
            raise Misfit(f"{given} alone: expected depth and width together; add {lacking}", given)
        for field, values in (("layouts", self.layouts), ("depth", self.depth)):
            if values is not None and len(values) == 0 and not (field == "layouts" and self._is_of_controls_alone):
                raise Misfit(
                    f"{field}=[]: the space is empty; expected at least one, such as {'1x11' if field == 'layouts' else '11'}", field
                )
            seen: set[object] = set()
            for index, value in enumerate(values or []):
                if value in seen:
                    raise Misfit(f"{field}[{index}]={value}: given twice; keep one", field, index)
                seen.add(value)
        if self.layouts is None and not by_width and not searched:
            raise Misfit(
                "layouts: missing, so the space is empty; expected a list such as [1x11, 4x9], depth and width, or a layout in search.space"
            )
        for index, depth in enumerate(self.depth or []):
            try:
                layout_of_width(depth, self.target_width)
            except ValueError as error:
                raise Misfit(str(error), "depth", index) from None

    @property
    def _is_of_controls_alone(self) -> bool:
        """Whether nothing but an encoder as it is, and other controls, is asked for."""
        return self.stages.convert is not None and "unchanged" in self.controls and self.search is None

    def _check_controls(self) -> None:
        for index, text in enumerate(self.controls):
            if text in self.controls[:index]:
                raise Misfit(f"controls[{index}]={text}: given twice; keep one", "controls", index)
        references = [index for index, text in enumerate(self.controls) if text.startswith("reference_dense")]
        if len(references) > 1:
            raise Misfit(
                "controls: more than one reference_dense; relative times need a single reference, keep one", "controls", references[1]
            )
        kind = self.model_settings("fff", TreeShape(1, 1)).feedforward
        for index, text in enumerate(self.controls):
            if kind.variant == "original_fff" and text.startswith("random_routing"):
                raise Misfit(
                    f"controls[{index}]={text} with model.feedforward.variant original_fff: random routing is a control of variant fff; "
                    "remove it",
                    *("controls", index),
                )
        for stage, benchmark in self.stages.benchmarks.items():
            if not references:
                raise Misfit(
                    f"stages.{stage} without the control reference_dense: relative times need the layer they are relative to; "
                    f"add reference_dense(WIDTH) to controls, or leave {stage} out",
                    *("stages", stage),
                )
            if kind.variant == "original_fff" or kind.master_leaf:
                raise Misfit(
                    f"stages.{stage} with model.feedforward.variant {kind.variant}, master_leaf {kind.master_leaf}: the kernels compute "
                    f"variant fff without a master leaf; leave {stage} out",
                    *("stages", stage),
                )
            if benchmark.layer is not None and benchmark.layer >= self.model.num_layers:
                raise Misfit(
                    f"stages.{stage}.layer={benchmark.layer}: expected a layer from 0 to {self.model.num_layers - 1}, or null for the "
                    "middle one",
                    *("stages", stage, "layer"),
                )

    def _check_tasks(self) -> None:
        prepared = self.stages.prepare.task_names
        for index, task in enumerate(self.task_names):
            if task not in prepared:
                raise Misfit(
                    f"stages.finetune.tasks[{index}]={task}: expected one of the tasks that stages.prepare.tasks lists: "
                    f"{nearest_first(task, prepared)}; add it there",
                    *("stages", "finetune", "tasks", index),
                )
            if task in self.task_names[:index]:
                raise Misfit(f"stages.finetune.tasks[{index}]={task}: given twice; keep one", "stages", "finetune", "tasks", index)
        if self.stages.prepare.sequence_length != self.model.sequence_length:
            raise Misfit(
                f"stages.prepare.sequence_length={self.stages.prepare.sequence_length} with model.sequence_length="
                f"{self.model.sequence_length}: expected equal; leave the former out",
                *("stages", "prepare", "sequence_length"),
            )
        for task in self.stages.finetune.overrides:
            if task not in self.task_names:
                raise Misfit(
                    f"stages.finetune.overrides.{task}: expected one of the tasks of this sweep: {', '.join(self.task_names)}",
                    *("stages", "finetune", "overrides", task),
                )
        for task in self.task_names:
            try:
                self.finetune_config(task)
            except ValidationError as error:
                message = str(error.errors()[0]["msg"]).removeprefix("Value error, ")
                raise Misfit(f"stages.finetune for task {task}: {message}", "stages", "finetune", "overrides", task) from None

    def _check_resources(self) -> None:
        for stage, limits in self.resources.items():
            if limits.gpus and stage not in ON_GPU:
                raise Misfit(
                    f"resources.{stage}.gpus={limits.gpus:g}: this stage computes on CPUs; expected 0, GPUs are for {', '.join(ON_GPU)}",
                    *("resources", stage, "gpus"),
                )
            if limits.workers > 1:
                self._check_workers(stage, limits)
            threads = getattr(getattr(self.stages, stage, None), "cpus", 1)
            if limits.cpus is not None and limits.cpus < threads:
                raise Misfit(
                    f"resources.{stage}.cpus={limits.cpus}: expected at least {threads}, its threads by stages.{stage}.cpus; leave it out",
                    *("resources", stage, "cpus"),
                )

    def _check_workers(self, stage: str, limits: StageLimits) -> None:
        at, recipe = ("resources", stage, "workers"), self.stages.pretrain
        if stage != "pretrain" or recipe is None:
            raise Misfit(f"resources.{stage}.workers={limits.workers}: expected 1; pretraining alone is shared by workers", *at)
        parts = recipe.batch_size // min(recipe.micro_batch_size, recipe.batch_size)
        if parts % limits.workers:
            raise Misfit(
                f"resources.pretrain.workers={limits.workers}: expected a divisor of the {parts} micro-batches of a step; "
                f"set stages.pretrain.micro_batch_size to {max(1, recipe.batch_size // limits.workers)}, or another number of workers",
                *at,
            )
        if limits.memory_bytes is not None or self.early_stopping is not None:
            raise Misfit(
                f"resources.pretrain.workers={limits.workers} with memory_bytes or early_stopping: expected 1; leave the other out", *at
            )

    def limits_of(self, stage: str) -> StageLimits:
        """Resources that the config gives to a stage; a rung is a part of pretraining."""
        stage = "pretrain" if stage == "rung" else stage
        return next((limits for name, limits in self.resources.items() if name == stage), StageLimits())

    @property
    def target_width(self) -> int:
        """Neurons that every depth is to come near to."""
        return int((self.width or "~0")[1:])

    @property
    def shapes(self) -> list[TreeShape]:
        """Layouts of the grid, in the config's order; none where the shape is searched."""
        if self.layouts is not None:
            return [parse_layout(layout) for layout in self.layouts]
        return [layout_of_width(depth, self.target_width) for depth in self.depth or []]

    @property
    def parsed_controls(self) -> list[Control]:
        """Controls, each once; those for every layout are for each with trees: a dense one is its own active width and routes nothing."""
        shapes = self.shapes or (searchable_shapes(self) or [] if self.search is not None else [])
        layouts = list(dict.fromkeys(shape.layout for shape in shapes if shape.depth))
        return list(dict.fromkeys(single for text in self.controls for single in parse_control(text).over(layouts)))

    @property
    def task_names(self) -> tuple[str, ...]:
        """Finetuning tasks, in the config's order."""
        return self.stages.finetune.tasks

    def model_settings(self, variant: str, shape: TreeShape | None = None, point: Mapping[str, Any] = NOTHING) -> ModelSettings:
        """The encoder with this feedforward layer and a point's values; what a variant does not have is left out of its settings.

        `fff` is the kind of tree that the config says; a layer asked for as `dense` has the neurons of `shape` and no master leaf.
        """
        model = lay_over(self.model.resolved(), "model", point)
        layer = model["feedforward"]
        if variant != "fff":
            layer = {**layer, "variant": variant, "master_leaf": 0 if variant == "dense" else layer["master_leaf"]}
        if shape is not None:
            layer |= {"trees": shape.trees, "depth": shape.depth}
        return ModelSettings.model_validate({**model, "feedforward": layer})

    def pretrain_config(self, model: ModelSettings, point: Mapping[str, Any] = NOTHING) -> PretrainConfig:
        """Config of the pretraining of `model`, a point's values laid over it."""
        assert self.stages.pretrain is not None  # else the model is a converted one
        recipe = lay_over(self.stages.pretrain.resolved(), "stages.pretrain", point)
        return PretrainConfig.model_validate({**recipe, "model": model.resolved()})

    def convert_config(self, model: ModelSettings, point: Mapping[str, Any] = NOTHING) -> ConvertConfig:
        """Config of the conversion of the encoder into `model`, a point's values laid over it."""
        assert self.stages.convert is not None  # else there is no encoder
        recipe = lay_over(self.stages.convert.resolved(), "stages.convert", point)
        return ConvertConfig.model_validate({**recipe, "model": model.resolved()})

    def finetune_config(self, task: str, point: Mapping[str, Any] = NOTHING) -> FinetuneConfig:
        """Config of the finetuning on `task`: a point's values laid over the recipe, and over both what is said of the task alone."""
        recipe = lay_over(self.stages.finetune.resolved(), "stages.finetune", point)
        overrides = recipe.pop("overrides").get(task, {})
        del recipe["tasks"]
        return FinetuneConfig.model_validate({**recipe, **overrides, "task": task})


def load_config(path: Path | str, overrides: Iterable[str] = (), name: str | None = None) -> SweepConfig:
    """The sweep config at `path`; `overrides` are texts `path=value`; `name` replaces the config's, whose default is the file's stem.

    Raises ConfigError: one line with what was got, what is allowed, and the file and line or the override it comes from.
    """
    path = Path(path)
    source = read_source(path, overrides)
    source.values.setdefault("name", path.stem)
    if name is not None:
        source.put(("name",), name, f"--name {name}")
    _share(source)
    share_vocabulary(source)
    try:
        return SweepConfig.model_validate(source.values)
    except ValidationError as error:
        raise ConfigError(explain(error, source, SweepConfig)) from None


def _share(source: Source) -> None:
    """Let `prepare` take the tasks and the sequence length that are said elsewhere, unless it names its own."""
    for key, shared in ((("tasks",), ("stages", "finetune", "tasks")), (("sequence_length",), ("model", "sequence_length"))):
        prepare, value = source.get(("stages", "prepare")), source.get(shared)
        if isinstance(prepare, dict) and key[0] not in prepare and value is not None:
            source.put(("stages", "prepare", *key), value, source.origin(shared))
