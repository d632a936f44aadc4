"""From trials to stage runs: which runs a trial needs, with their keys, seeds and inputs. Equal keys are one run."""

from __future__ import annotations

from dataclasses import dataclass

from fffsweep.pipeline.stage import Resources, StageRun, get_stage, stage_run
from fffsweep.pipeline.stages.collect import CollectConfig
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.space import TrialSpec


@dataclass(frozen=True)
class PlannedStage:
    """One stage run of one trial. label: `prepare`, `pretrain/<r>`, `finetune/<r>/<task>/<f>`, `benchmark_cpu/<r>` or `collect`."""

    label: str
    run: StageRun
    resources: Resources
    replicate: int | None = None


@dataclass(frozen=True)
class TrialPlan:
    """A trial and its stage runs, upstream before downstream, `collect` last."""

    spec: TrialSpec
    stages: tuple[PlannedStage, ...]


def build(config: SweepConfig, specs: list[TrialSpec]) -> list[TrialPlan]:
    """Stage runs of every trial. Raises ConfigError if timings are asked for and no reference_dense control is given."""
    prepare = _planned("prepare", stage_run("prepare", config.stages.prepare))
    references: dict[int, PlannedStage] = {}
    plans = []
    if config.stages.benchmark_cpu is not None and not any("reference_dense" in spec.controls for spec in specs):
        raise ConfigError(
            "stage benchmark_cpu without the control reference_dense: relative times need the layer they are relative to; "
            "add reference_dense(WIDTH) to controls, or set stages.benchmark_cpu to null"
        )
    for spec in sorted(specs, key=lambda spec: "reference_dense" not in spec.controls):
        stages = [prepare]
        for replicate in range(config.seeds.pretrain):
            pretrain = _planned(
                f"pretrain/{replicate}",
                stage_run("pretrain", config.pretrain_config(spec.model), replicate, {"prepare": prepare.run.key}),
                replicate,
            )
            references.setdefault(replicate, pretrain)
            stages += [pretrain, *_finetunings(config, prepare, pretrain, replicate)]
            if config.stages.benchmark_cpu is not None:
                inputs = {"prepare": prepare, "pretrain": pretrain, "reference": references[replicate]}
                run = stage_run("benchmark_cpu", config.stages.benchmark_cpu, replicate, {role: s.run.key for role, s in inputs.items()})
                stages.append(_planned(f"benchmark_cpu/{replicate}", run, replicate))
        collect = stage_run("collect", CollectConfig(tasks=config.task_names), 0, {s.label: s.run.key for s in stages[1:]})
        plans.append(TrialPlan(spec, (*stages, _planned("collect", collect))))
    order = {spec.id: number for number, spec in enumerate(specs)}
    return sorted(plans, key=lambda plan: order[plan.spec.id])


def _finetunings(config: SweepConfig, prepare: PlannedStage, pretrain: PlannedStage, replicate: int) -> list[PlannedStage]:
    inputs = {"prepare": prepare.run.key, "pretrain": pretrain.run.key}
    return [
        _planned(f"finetune/{replicate}/{task}/{number}", stage_run("finetune", config.finetune_config(task), number, inputs), replicate)
        for task in config.task_names
        for number in range(config.seeds.finetune)
    ]


def _planned(label: str, run: StageRun, replicate: int | None = None) -> PlannedStage:
    stage = get_stage(run.stage)
    return PlannedStage(label, run, stage.resources(stage.Config.model_validate(run.config)), replicate)
