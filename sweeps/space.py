"""The trials of a sweep: its layouts, its controls, and what a search makes of them. Two that resolve to one model are one trial."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from fffsweep.kernels.shape import TreeShape, parse_layout
from fffsweep.pipeline.encoder_folder import encoder_sizes
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.settings import canonical_json
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.controls import Control
from fffsweep.sweeps.search import SHAPES, shape_of

REFERENCE = "reference_dense"


@dataclass(frozen=True)
class TrialSpec:
    """One configuration.

    id: the layout, or the control's text where no layout has that model; a searched trial adds its index, as `1x8-t3`.
    controls: the control roles it plays. in_study: it competes for the front. params: where it lies in the space, for reading.
    point: the searched settings. stratum: whose tuning it belongs to, a layout of the grid, `reference_dense`, or "" where
    the shape itself is searched; None if it is not searched. index: its number within the stratum.
    """

    id: str
    layout: str | None
    controls: tuple[str, ...]
    in_study: bool
    model: ModelSettings
    params: dict[str, Any] = field(default_factory=dict)
    point: dict[str, Any] = field(default_factory=dict)
    stratum: str | None = None
    index: int = 0


@dataclass(frozen=True)
class Stratum:
    """What is tuned with a budget of its own: `num_trials`, None for the whole grid. shape: its layout, None where that is searched."""

    name: str
    shape: TreeShape | None
    paths: tuple[str, ...]
    num_trials: int | None


def expand(config: SweepConfig) -> list[TrialSpec]:
    """Trials that a config fixes by itself: the one in the role reference_dense first, then the layouts, then the other controls.

    With a search the layouts are left to `strata`, unless the sampler is the grid.
    """
    trials: dict[str, TrialSpec] = {}
    if config.search is None:
        for shape in config.shapes:
            model = config.model_settings("fff", shape)
            trials[_identity(model)] = _spec(shape.layout, model, (), in_study=True)
    for control in config.parsed_controls:
        role = REFERENCE if control.kind == REFERENCE else control.text
        model = _controlled(config, control)
        identity = _identity(model)
        known = trials.get(identity)
        if known is None:
            trials[identity] = _spec(role, model, (role,), in_study=False)
        else:
            trials[identity] = _spec(known.id, model, (*known.controls, role), known.in_study)
    controls = sorted(trials.values(), key=lambda trial: REFERENCE not in trial.controls)
    if config.search is None or config.sampler != "grid":
        return controls
    searched = [spec for stratum in strata(config) for spec in grid_trials(config, stratum)]
    return [*controls[:1], *searched, *controls[1:]] if config.parsed_controls else searched


def strata(config: SweepConfig) -> list[Stratum]:
    """Whatever the search tunes: reference_dense, if there is one with a setting to search, then each layout, or the whole space."""
    search = config.search
    if search is None:
        return []
    found = []
    reference = reference_shape(config)
    paths = tuple(path for path in search.space if path not in SHAPES and _applies_to_dense(config, path))
    if reference is not None and paths:
        found.append(Stratum(REFERENCE, reference, paths, search.num_trials))
    if search.shape_paths:
        return [*found, Stratum("", None, tuple(search.space), search.num_trials)]
    return [*found, *(Stratum(shape.layout, shape, tuple(search.space), search.num_trials) for shape in config.shapes)]


def grid_trials(config: SweepConfig, stratum: Stratum) -> Iterator[TrialSpec]:
    """Every combination of the values that a stratum searches, those left out that do not go together."""
    assert config.search is not None
    for index, point in enumerate(config.search.grid(list(stratum.paths))):
        with contextlib.suppress(ValueError):
            yield searched_trial(config, stratum, index, point)


def searched_trial(config: SweepConfig, stratum: Stratum, index: int, point: Mapping[str, Any]) -> TrialSpec:
    """The trial of a stratum at a point. Raises ValueError if the settings do not go together."""
    shape = stratum.shape or shape_of(config, point)
    is_reference = stratum.name == REFERENCE
    model = config.model_settings("dense" if is_reference else "fff", shape, point)
    settings = {path: value for path, value in point.items() if path not in SHAPES}
    return TrialSpec(
        id=f"{REFERENCE if is_reference else shape.layout}-t{index}",
        layout=shape.layout,
        controls=(REFERENCE,) if is_reference else (),
        in_study=not is_reference,
        model=model,
        params={"trees": shape.trees, "depth": shape.depth, **settings},
        point=dict(point),
        stratum=stratum.name,
        index=index,
    )


def reference_shape(config: SweepConfig) -> TreeShape | None:
    """Shape of the dense layer that times and quality are relative to."""
    width = next((control.width for control in config.parsed_controls if control.kind == REFERENCE), None)
    return None if width is None else TreeShape(width, 0)


def _applies_to_dense(config: SweepConfig, path: str) -> bool:
    """Whether a setting makes a difference to a model without trees."""
    if not path.startswith("model.feedforward."):
        return True
    assert config.search is not None
    models = [config.model_settings("dense", TreeShape(1, 0), {path: value}) for value in config.search.space[path].probes()]
    return any(_identity(model) != _identity(models[0]) for model in models)


def _spec(name: str, model: ModelSettings, controls: tuple[str, ...], in_study: bool) -> TrialSpec:
    shape = model.feedforward.shape
    params = {"trees": shape.trees, "depth": shape.depth} if shape else {}
    return TrialSpec(name, shape.layout if shape else None, controls, in_study, model, params)


def _identity(model: ModelSettings) -> str:
    return canonical_json(model.resolved())


def _controlled(config: SweepConfig, control: Control) -> ModelSettings:
    if control.kind == REFERENCE:
        return config.model_settings("dense", TreeShape(control.width or 0, 0))
    if control.kind == "none":
        return config.model_settings("none")
    if control.kind == "unchanged":
        assert config.stages.convert is not None  # the config was checked
        return config.model_settings("unchanged", TreeShape(encoder_sizes(config.stages.convert.encoder).feedforward, 0))
    shape = parse_layout(control.layout or "")
    if control.kind == "dense_active":
        return config.model_settings("dense", TreeShape(config.model_settings("fff", shape).feedforward.active_width, 0))
    return config.model_settings("random_routing", shape)
