"""A dry run: which trials and stage runs a config stands for, which of them are stored, and what the rest will cost."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from fffsweep.pipeline.remote_store import open_store
from fffsweep.pipeline.stage import Metrics, Resources, StageRun
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.forecast import forecast
from fffsweep.sweeps.graph import PlannedStage, TrialPlan
from fffsweep.sweeps.history import History, start_cost_s
from fffsweep.sweeps.record import check_extends, load, study_folder
from fffsweep.sweeps.simulate import Cluster, Schedule, SimulatedRun, simulate

SCHEMA = "fffsweep.plan/1"
_MACS_PER_SECOND = 2e10  # of one core in training, as the quickstart runs on AVX-512; for guesses only
_GPU_MACS_PER_SECOND = 1e13  # a fifth of what an H200 reached in bfloat16 (docs/results/cmm_gpu_2026-11-26.md)
_GUESS_S = {"prepare": 30.0, "benchmark_cpu": 10.0, "benchmark_gpu": 10.0, "collect": 0.1}
_GUESS_BYTES = {"finetune": 5e4, "benchmark_cpu": 1e5, "benchmark_gpu": 1e5, "collect": 1e4}


@dataclass(frozen=True)
class TrialSummary:
    """One trial of the plan."""

    trial: str
    layout: str | None
    controls: tuple[str, ...]
    in_study: bool
    num_stages: int
    num_cached: int


@dataclass(frozen=True)
class StageSummary:
    """All runs of one stage, those that trials share counted once. seconds and num_bytes: what the runs to come take in sum."""

    stage: str
    num_runs: int
    num_cached: int
    seconds: float
    num_bytes: float
    basis: str


@dataclass(frozen=True)
class Plan:
    """What `run` would do. seconds: wall-clock on this machine's `num_cores`, benchmarks alone and the rest side by side."""

    study: str
    is_new: bool
    trials: list[TrialSummary]
    stages: list[StageSummary]
    num_cores: int
    seconds: float
    num_bytes: float
    notes: tuple[str, ...] = ()
    schedule: Schedule | None = None

    def to_json(self) -> dict[str, Any]:
        return {"schema": SCHEMA, **asdict(self)}


def make_plan(config: SweepConfig, results: Path, cluster: Cluster | None = None) -> Plan:
    """Plan of a config over a results folder, which is read and never written; with `cluster` also its schedule there.

    Raises ConfigError if the study exists with another config, ValueError if a stage run asks for more than a node of the cluster has.
    """
    stored = load(study_folder(results, config.name))
    check_extends(config, stored)
    store = open_store(results / "store")
    stored_keys = frozenset(store.keys())

    def metrics_of(key: str) -> Metrics | None:
        manifest = store.find(key) if key in stored_keys else None
        return None if manifest is None else manifest.metrics

    plans, notes = forecast(config, study_folder(results, config.name), metrics_of)
    limited = _limiter(config)
    runs = {stage.run.key: (trial, limited(stage)) for trial in plans for stage in trial.stages}
    cached = stored_keys & runs.keys()
    history = History(store)
    num_cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    core_seconds = alone_seconds = 0.0
    stages = []
    simulated: dict[str, SimulatedRun] = {}
    for name in dict.fromkeys(stage.run.stage for _, stage in runs.values()):
        here = {key: entry for key, entry in runs.items() if entry[1].run.stage == name}
        to_come = [entry for key, entry in here.items() if key not in cached]
        costs = [_cost(config, trial, stage, history) for trial, stage in to_come]
        for (_, stage), cost in zip(to_come, costs, strict=True):
            simulated[stage.run.key] = SimulatedRun(stage.run.key, tuple(stage.run.inputs.values()), stage.resources, cost[0])
            if stage.resources.exclusive:
                alone_seconds += cost[0]
            else:
                core_seconds += cost[0] * min(stage.resources.workers * stage.resources.cpus, num_cores)
        basis = ", ".join(dict.fromkeys(cost[2] for cost in costs)) or "-"
        seconds, num_bytes = sum(cost[0] for cost in costs), sum(cost[1] for cost in costs)
        stages.append(StageSummary(name, len(here), len(here) - len(to_come), seconds, num_bytes, basis))
    trials = [_summary(plan, cached) for plan in plans]
    wall_s = core_seconds / num_cores + alone_seconds
    num_bytes = sum(stage.num_bytes for stage in stages)
    schedule = None
    if cluster is not None:
        cluster = replace(cluster, overhead_s=start_cost_s(results))
        schedule = simulate([simulated[key] for key in runs if key in simulated], cached, cluster, num_bytes)
    return Plan(config.name, stored is None, trials, stages, num_cores, wall_s, num_bytes, tuple(notes), schedule)


def to_lines(plan: Plan) -> Iterator[str]:
    """The plan for reading."""
    yield f"study {plan.study}: {len(plan.trials)} trials" + ("" if plan.is_new else "; the study exists and goes on")
    yield from plan.notes
    yield from _table(
        ("trial", "control", "stage runs", "cached"),
        [(trial.trial, ", ".join(trial.controls), str(trial.num_stages), str(trial.num_cached)) for trial in plan.trials],
    )
    yield ""
    yield from _table(
        ("stage", "runs", "cached", "to run", "time", "disk", "estimated from"),
        [
            (s.stage, str(s.num_runs), str(s.num_cached), str(s.num_runs - s.num_cached), _time(s.seconds), _size(s.num_bytes), s.basis)
            for s in plan.stages
        ],
    )
    yield ""
    to_run = sum(stage.num_runs - stage.num_cached for stage in plan.stages)
    yield (
        f"{to_run} of {sum(stage.num_runs for stage in plan.stages)} stage runs to do, shared ones counted once: "
        f"about {_time(plan.seconds)} on {plan.num_cores} cores, {_size(plan.num_bytes)} of disk"
        if to_run
        else "everything is cached: nothing to run"
    )
    if (schedule := plan.schedule) is not None and to_run:
        yield (
            f"on {schedule.num_nodes} nodes: {_time(schedule.makespan_s)}, {schedule.node_hours:.1f} node-hours, "
            f"{100 * schedule.utilisation:.0f} % of their CPUs at work, {schedule.overhead_s:.2g} s to start a run"
            + (" as the newest study on Ray took" if schedule.overhead_s else ": no study here ran on Ray yet")
        )


def _summary(plan: TrialPlan, cached: frozenset[str]) -> TrialSummary:
    spec = plan.spec
    num_cached = sum(stage.run.key in cached for stage in plan.stages)
    return TrialSummary(spec.id, spec.layout, spec.controls, spec.in_study, len(plan.stages), num_cached)


def _limiter(config: SweepConfig) -> Callable[[PlannedStage], PlannedStage]:
    """What gives stage runs the resources of the config: ten thousand trials ask for few different ones."""

    @functools.cache
    def resources(stage: str, own: Resources) -> Resources:
        return config.limits_of(stage).applied(own)

    def limited(stage: PlannedStage) -> PlannedStage:
        given = resources(stage.run.stage, stage.resources)
        return stage if given == stage.resources else replace(stage, resources=given)

    return limited


def _cost(config: SweepConfig, trial: TrialPlan, stage: PlannedStage, history: History) -> tuple[float, float, str]:
    return history.median(stage.run) or _guess(config, trial, stage)


def _guess(config: SweepConfig, trial: TrialPlan, stage: PlannedStage) -> tuple[float, float, str]:
    """Seconds from the multiply-adds of training at a rate typical of one core, bytes from the parameters."""
    settings, name = stage.run.config, stage.run.stage
    model, layer = trial.spec.model, trial.spec.model.feedforward
    stored = layer.width
    used = stored if layer.execution == "masked" or layer.variant == "original_fff" else layer.active_width
    hidden, vocabulary = model.hidden_size, int(getattr(config.stages.prepare, "vocabulary_size", 2**15))
    token_macs = model.num_layers * (4 * hidden**2 + 2 * hidden * (model.sequence_length + used)) + hidden * vocabulary / 4
    num_bytes = _GUESS_BYTES.get(name, 4.0 * (model.num_layers * (4 * hidden**2 + 2 * hidden * stored) + hidden * vocabulary))
    if name == "prepare":
        num_bytes = 0.6 * float(settings["max_corpus_bytes"] or 1e8)  # two bytes a token
        if settings["source"] == "hub" and not settings["max_corpus_bytes"]:
            return _GUESS_S[name], num_bytes, "nothing: the size of the hub's data is not known"
    if name in ("pretrain", "rung"):
        share = settings.get("share", 1.0)
        if settings["wall_clock_s"]:
            return share * float(settings["wall_clock_s"]), num_bytes, "the wall-clock budget"
        tokens = share * float(settings["tokens"] or settings["steps"] * settings["batch_size"] * model.sequence_length)
    elif name in ("activations", "convert"):
        return _guess_conversion(stage.run, hidden, model.num_layers, used, num_bytes)
    elif name == "finetune":
        tokens = float(settings["max_rows"] or 10_000) * float(settings["epochs"]) * model.sequence_length / 2
    else:
        return _GUESS_S.get(name, 0.0), num_bytes, "a rough guess"
    each = _GPU_MACS_PER_SECOND * stage.resources.gpus or _MACS_PER_SECOND * stage.resources.cpus
    return 3 * tokens * token_macs / (each * stage.resources.workers), num_bytes, "a rough guess by tokens"


def _guess_conversion(run: StageRun, hidden: int, num_layers: int, used: int, num_bytes: float) -> tuple[float, float, str]:
    """As `_guess`: an encoder reads in the one stage, its new feedforward layers alone are trained in the other."""
    if run.stage == "activations":
        tokens = float(run.config["distinct_tokens"])
        macs, num_bytes = tokens * num_layers * 12 * hidden**2, tokens * 4 * num_layers * hidden
    else:
        trained = "activations" in run.inputs
        macs = 3 * float(run.config["tokens"]) * num_layers * 2 * hidden * used * trained
    return macs / (_MACS_PER_SECOND * float(run.config["cpus"])), num_bytes, "a rough guess by tokens"


def _table(header: tuple[str, ...], rows: list[tuple[str, ...]]) -> Iterator[str]:
    widths = [max(map(len, column)) for column in zip(header, *rows, strict=True)]
    for row in (header, *rows):
        yield "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()


def _time(seconds: float) -> str:
    if seconds < 120:
        return f"{seconds:.0f} s"
    return (
        f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h" if seconds < 172_800 else f"{seconds / 86400:.1f} days"
    )


def _size(num_bytes: float) -> str:
    return f"{num_bytes / 1e6:.0f} MB" if num_bytes < 1e9 else f"{num_bytes / 1e9:.1f} GB"
