"""The trials of a sweep: its layouts and its controls. Two that resolve to the same model are one trial."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from fffsweep.kernels.shape import TreeShape, parse_layout
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.settings import canonical_json
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.controls import Control


@dataclass(frozen=True)
class TrialSpec:
    """One configuration of the model.

    id: the layout, or the control's text where no layout has that model. in_study: it is a layout of the space.
    controls: the control roles it plays. params: where it lies in the space.
    """

    id: str
    layout: str | None
    controls: tuple[str, ...]
    in_study: bool
    model: ModelSettings
    params: dict[str, Any] = field(default_factory=dict)


def expand(config: SweepConfig) -> list[TrialSpec]:
    """Trials of a config, each model once: the one in the role reference_dense first, then the layouts, then the other controls."""
    trials: dict[str, TrialSpec] = {}
    for shape in config.shapes:
        model = _tree(config, shape)
        trials[_identity(model)] = _spec(shape.layout, model, (), in_study=True)
    for control in config.parsed_controls:
        role = "reference_dense" if control.kind == "reference_dense" else control.text
        model = _controlled(config, control)
        identity = _identity(model)
        known = trials.get(identity)
        if known is None:
            trials[identity] = _spec(role, model, (role,), in_study=False)
        else:
            trials[identity] = _spec(known.id, model, (*known.controls, role), known.in_study)
    return sorted(trials.values(), key=lambda trial: "reference_dense" not in trial.controls)


def _spec(name: str, model: ModelSettings, controls: tuple[str, ...], in_study: bool) -> TrialSpec:
    shape = model.feedforward.shape
    params = {"trees": shape.trees, "depth": shape.depth} if shape else {}
    return TrialSpec(name, shape.layout if shape else None, controls, in_study, model, params)


def _identity(model: ModelSettings) -> str:
    return canonical_json(model.resolved())


def _tree(config: SweepConfig, shape: TreeShape) -> ModelSettings:
    return config.model_settings("fff", shape)


def _controlled(config: SweepConfig, control: Control) -> ModelSettings:
    if control.kind == "reference_dense":
        return config.model_settings("dense", TreeShape(control.width or 0, 0))
    if control.kind == "none":
        return config.model_settings("none")
    shape = parse_layout(control.layout or "")
    if control.kind == "dense_active":
        return config.model_settings("dense", TreeShape(shape.active_width, 0))
    return config.model_settings("random_routing", shape)
