"""Toy stages, executed inline by a real driver: they write their label and misbehave as told."""

import shutil
import sys
from types import SimpleNamespace
from typing import ClassVar

import pytest
from mlflow.tracking import MlflowClient

from fffsweep.kernels.shape import parse_layout
from fffsweep.pipeline import stage as stage_module
from fffsweep.pipeline.model_settings import FeedForward, ModelSettings
from fffsweep.pipeline.settings import Settings
from fffsweep.pipeline.stage import Resources, StageRun
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.blocks import Seeds
from fffsweep.sweeps.controller import Controller
from fffsweep.sweeps.graph import PlannedStage, TrialPlan
from fffsweep.sweeps.limits import StageLimits
from fffsweep.sweeps.record import Lease, load, study_folder
from fffsweep.sweeps.slices import InlineOptions
from fffsweep.sweeps.strategy import FixedTrials

OBJECTIVES = {"quality/avg": "maximize", "ff/cpu/rel_time": "minimize"}


class ToyConfig(Settings):
    label: str = ""


class Toy:
    """Writes its label; misbehaves as `faults` says, once for each entry."""

    name: ClassVar[str] = "toy"
    version: ClassVar[int] = 1
    sources: ClassVar[tuple[str, ...]] = ()
    Config: ClassVar[type[Settings]] = ToyConfig
    ran: ClassVar[list[str]] = []
    faults: ClassVar[dict[str, list[Exception | type]]] = {}

    def resources(self, config):
        return Resources(exclusive=config.label.startswith("benchmark"))

    def fingerprints(self, config):
        return {}

    def run(self, config, context):
        for role, folder in context.inputs.items():
            assert (folder / "label").read_text(), role
        if Toy.faults.get(config.label):
            raise Toy.faults[config.label].pop(0)
        Toy.ran.append(config.label)
        (context.output / "label").write_text(config.label)
        return {"quality/avg": float(len(config.label)), "ff/cpu/rel_time": 0.5}


@pytest.fixture(autouse=True)
def toys(monkeypatch):
    monkeypatch.setitem(sys.modules, __name__, sys.modules[Toy.__module__])
    monkeypatch.setitem(stage_module._STAGES, "toy", f"{__name__}:Toy")
    monkeypatch.setattr(Toy, "ran", [])
    monkeypatch.setattr(Toy, "faults", {})


@pytest.fixture(scope="module")
def empty_database(tmp_path_factory):
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=sqlite_url(path)).search_experiments()
    return path


@pytest.fixture(autouse=True)
def results(tmp_path, empty_database):
    """MLflow takes seconds to lay out a database; every test gets a copy of one."""
    shutil.copy(empty_database, tmp_path / "mlflow.db")


class Quiet:
    def __init__(self):
        self.lines = []

    def update(self, record, num_running):
        assert num_running >= 0

    def say(self, line):
        self.lines.append(line)


def planned(label, *inputs, exclusive=False):
    run = StageRun("toy", 1, {"label": label}, 0, {stage.label: stage.run.key for stage in inputs})
    return PlannedStage(label, run, Resources(exclusive=exclusive))


def plans_of(layouts):
    prepare = planned("prepare")
    reference = planned(f"pretrain {layouts[0]}", prepare)
    plans = []
    for layout in layouts:
        shape = parse_layout(layout)
        pretrain = planned(f"pretrain {layout}", prepare)
        benchmark = planned(f"benchmark {layout}", pretrain, reference, exclusive=True)
        model = ModelSettings(hidden_size=8, num_heads=1, feedforward=FeedForward(variant="fff", trees=shape.trees, depth=shape.depth))
        spec = SimpleNamespace(id=layout, layout=layout, controls=(), in_study=True, params={}, model=model, stratum=None, point={})
        plans.append(TrialPlan(spec, (prepare, pretrain, benchmark, planned(f"collect {layout}", pretrain, benchmark))))
    return plans


class ToySweep(SimpleNamespace):
    def resolved(self):
        return {"name": self.name, "stages": {"toy": 1}}

    identity = resolved

    def limits_of(self, stage):
        return self.limits.get(stage, StageLimits())


def drive(tmp_path, layouts=("4x1", "2x2"), retries=1, options=InlineOptions(), strategy=None, **limits):
    grid = {"search": None, "sampler": "grid", "seeds": Seeds(), "early_stopping": None}
    config = ToySweep(**grid, name="toy study", description="", objectives=OBJECTIVES, retries=retries, limits=limits)
    folder = study_folder(tmp_path, config.name)
    lease = Lease(folder)
    try:
        listener = Quiet()
        strategy = strategy or FixedTrials(plans_of(list(layouts)))
        outcome = Controller(config, strategy, tmp_path, folder, listener, "inline", None, load(folder), lease, options).run()
    finally:
        lease.release()
    return outcome, listener, load(folder)


def runs_of(tmp_path):
    client = MlflowClient(tracking_uri=sqlite_url(tmp_path / "mlflow.db"))
    return client.search_runs([client.get_experiment_by_name("toy study").experiment_id])
