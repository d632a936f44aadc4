"""From trials to stage runs: which runs a trial needs, with their keys, seeds and inputs. Equal keys are one run."""

from __future__ import annotations

from dataclasses import dataclass, replace

from fffsweep.pipeline.stage import Resources, StageRun, get_stage, stage_run
from fffsweep.pipeline.stages.collect import CollectConfig
from fffsweep.pipeline.stages.convert import WITHOUT_ACTIVATIONS, ConvertConfig
from fffsweep.pipeline.stages.rung import RungConfig
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.space import TrialSpec


@dataclass(frozen=True)
class PlannedStage:
    """One stage run of one trial.

    label: `prepare`, `activations`, `rung/<r>/<rung>`, `pretrain/<r>` or `convert/<r>`, `finetune/<r>/<task>/<f>`, `benchmark_cpu/<r>` or
    `collect`.
    """

    label: str
    run: StageRun
    resources: Resources
    replicate: int | None = None
    rung: int | None = None


@dataclass(frozen=True)
class TrialPlan:
    """A trial and its stage runs, upstream before downstream; `collect` last, unless the trial is to stop at a rung."""

    spec: TrialSpec
    stages: tuple[PlannedStage, ...]

    @property
    def is_whole(self) -> bool:
        """Whether it leads to a collected result."""
        return self.stages[-1].label.startswith("collect")


class Graph:
    """Stage runs of a config's trials, made one trial at a time: a search finds out about its trials as it goes."""

    def __init__(self, config: SweepConfig, reference: TrialSpec) -> None:
        """`reference` is the trial whose trained layers timings are relative to."""
        self._config, self._reference = config, reference
        self._prepare = _planned("prepare", stage_run("prepare", config.stages.prepare))
        self._references: dict[int, PlannedStage] = {}

    def plan(self, spec: TrialSpec, num_replicates: int, rung: int | None = None) -> TrialPlan:
        """Stage runs of one trial with so many pretraining seeds.

        With early stopping `rung` is the rung up to which the trial may go, the number of rungs for the whole budget; replicates
        beyond the config's fewest come when nothing is to be stopped any more, and pass no rungs.
        """
        stopping, stages = self._config.early_stopping, [self._prepare]
        if rung is None or stopping is None:
            return self._whole(spec, stages, [self._pretraining(spec, replicate) for replicate in range(num_replicates)])
        last: dict[int, PlannedStage] = {}
        for number in range(min(rung + 1, stopping.rungs)):
            for replicate in range(self._config.seeds.fewest):
                last[replicate] = self._rung(spec, replicate, number, stopping.shares[number], last.get(replicate))
                stages.append(last[replicate])
        if rung < stopping.rungs:
            return TrialPlan(spec, tuple(stages))
        return self._whole(spec, stages, [self._pretraining(spec, replicate, last.get(replicate)) for replicate in range(num_replicates)])

    def _whole(self, spec: TrialSpec, stages: list[PlannedStage], pretrainings: list[PlannedStage]) -> TrialPlan:
        """The plan that follows whole pretrainings to their end."""
        config, passed = self._config, len(stages)
        for replicate, pretrain in enumerate(pretrainings):
            if "activations" in pretrain.run.inputs and replicate == 0:
                stages.append(self._activations(config.convert_config(spec.model, spec.point)))
            stages += [pretrain, *self._finetunings(spec, pretrain, replicate)]
            if config.stages.benchmark_cpu is not None:
                read = {"prepare": self._prepare, "pretrain": pretrain, "reference": self._reference_pretraining(replicate)}
                run = stage_run("benchmark_cpu", config.stages.benchmark_cpu, replicate, {role: s.run.key for role, s in read.items()})
                stages.append(_planned(f"benchmark_cpu/{replicate}", run, replicate))
        inputs = {s.label: s.run.key for s in stages[passed:] if s.label != "activations"}
        collect = stage_run("collect", CollectConfig(tasks=config.task_names), 0, inputs)
        return TrialPlan(spec, (*stages, _planned("collect", collect)))

    def _pretraining(self, spec: TrialSpec, replicate: int, rung: PlannedStage | None = None) -> PlannedStage:
        """The stage run that a trial's model comes from; a pretraining goes on from a rung if it passed one."""
        if self._config.stages.convert is not None:
            return self._conversion(spec, replicate)
        inputs = {"prepare": self._prepare.run.key} | ({} if rung is None else {"rung": rung.run.key})
        settings = self._config.pretrain_config(spec.model, spec.point)
        return _planned(f"pretrain/{replicate}", stage_run("pretrain", settings, replicate, inputs), replicate)

    def _rung(self, spec: TrialSpec, replicate: int, rung: int, share: float, before: PlannedStage | None) -> PlannedStage:
        inputs = {"prepare": self._prepare.run.key} | ({} if before is None else {"rung": before.run.key})
        settings = RungConfig.model_validate({**self._config.pretrain_config(spec.model, spec.point).resolved(), "share": share})
        planned = _planned(f"rung/{replicate}/{rung}", stage_run("rung", settings, replicate, inputs), replicate)
        return replace(planned, rung=rung)

    def _conversion(self, spec: TrialSpec, replicate: int) -> PlannedStage:
        settings = self._config.convert_config(spec.model, spec.point)
        inputs = {"prepare": self._prepare.run.key}
        if spec.model.feedforward.variant not in WITHOUT_ACTIVATIONS:
            inputs["activations"] = self._activations(settings).run.key
        return _planned(f"convert/{replicate}", stage_run("convert", settings, replicate, inputs), replicate)

    def _activations(self, settings: ConvertConfig) -> PlannedStage:
        """The reading that all conversions share, whatever their seed."""
        return _planned("activations", stage_run("activations", settings.activations, 0, {"prepare": self._prepare.run.key}))

    def _reference_pretraining(self, replicate: int) -> PlannedStage:
        if replicate not in self._references:
            self._references[replicate] = self._pretraining(self._reference, replicate)
        return self._references[replicate]

    def _finetunings(self, spec: TrialSpec, pretrain: PlannedStage, replicate: int) -> list[PlannedStage]:
        config, inputs = self._config, {"prepare": self._prepare.run.key, "pretrain": pretrain.run.key}
        return [
            _planned(
                f"finetune/{replicate}/{task}/{number}",
                stage_run("finetune", config.finetune_config(task, spec.point), number, inputs),
                replicate,
            )
            for task in config.task_names
            for number in range(config.seeds.finetune)
        ]


def build(config: SweepConfig, specs: list[TrialSpec]) -> list[TrialPlan]:
    """Stage runs of every trial. Timings are relative to the first one, which `expand` puts there for its role reference_dense."""
    if not specs:
        return []
    graph = Graph(config, specs[0])
    return [graph.plan(spec, config.seeds.fewest) for spec in specs]


def _planned(label: str, run: StageRun, replicate: int | None = None) -> PlannedStage:
    stage = get_stage(run.stage)
    return PlannedStage(label, run, stage.resources(stage.Config.model_validate(run.config)), replicate)
