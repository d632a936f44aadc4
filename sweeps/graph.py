"""From trials to stage runs: which runs a trial needs, with their keys, seeds and inputs. Equal keys are one run."""

from __future__ import annotations

from dataclasses import dataclass

from fffsweep.pipeline.stage import Resources, StageRun, get_stage, stage_run
from fffsweep.pipeline.stages.collect import CollectConfig
from fffsweep.sweeps.config import SweepConfig
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
    """Stage runs of every trial. Timings are relative to the first one, which `expand` puts there for its role reference_dense."""
    prepare = _planned("prepare", stage_run("prepare", config.stages.prepare))
    references: dict[int, PlannedStage] = {}
    plans = []
    for spec in specs:
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
    return plans


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
