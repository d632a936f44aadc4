"""From trials to stage runs: which runs a trial needs, with their keys, seeds and inputs. Equal keys are one run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from fffsweep.pipeline.settings import Settings, canonical_json
from fffsweep.pipeline.stage import Resources, StageRun, get_stage, stage_run
from fffsweep.pipeline.stages.collect import CollectConfig
from fffsweep.pipeline.stages.convert import WITHOUT_ACTIVATIONS, ConvertConfig
from fffsweep.pipeline.stages.pretrain import PretrainConfig
from fffsweep.pipeline.stages.rung import RungConfig
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.space import TrialSpec


@dataclass(frozen=True)
class PlannedStage:
    """One stage run of one trial.

    label: `prepare`, `activations`, `rung/<r>/<rung>`, `pretrain/<r>` or `convert/<r>`, `finetune/<r>/<task>/<f>`, `benchmark_cpu/<r>`,
    `benchmark_gpu/<r>` or `collect`.
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
        # Trials differ in few settings: what a block of them comes to is found out once, as a grid has tens of thousands of runs.
        self._known: dict[tuple[str, int], tuple[Settings, StageRun, Resources]] = {}
        self._pretrain: dict[str, PretrainConfig] = {}
        self._rungs: dict[tuple[str, float], RungConfig] = {}
        self._finetune: dict[tuple[str, str], Settings] = {}
        self._collect = CollectConfig(tasks=config.task_names)
        self._prepare = self._planned("prepare", "prepare", config.stages.prepare)
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
            for name, benchmark in config.stages.benchmarks.items():
                read = {"prepare": self._prepare, "pretrain": pretrain, "reference": self._reference_pretraining(replicate)}
                keys = {role: s.run.key for role, s in read.items()}
                stages.append(self._planned(f"{name}/{replicate}", name, benchmark, replicate, keys, replicate))
        inputs = {s.label: s.run.key for s in stages[passed:] if s.label != "activations"}
        return TrialPlan(spec, (*stages, self._planned("collect", "collect", self._collect, 0, inputs)))

    def _pretraining(self, spec: TrialSpec, replicate: int, rung: PlannedStage | None = None) -> PlannedStage:
        """The stage run that a trial's model comes from; a pretraining goes on from a rung if it passed one."""
        if self._config.stages.convert is not None:
            return self._conversion(spec, replicate)
        inputs = {"prepare": self._prepare.run.key} | ({} if rung is None else {"rung": rung.run.key})
        return self._planned(f"pretrain/{replicate}", "pretrain", self._recipe(spec), replicate, inputs, replicate)

    def _recipe(self, spec: TrialSpec) -> PretrainConfig:
        if spec.id not in self._pretrain:
            self._pretrain[spec.id] = self._config.pretrain_config(spec.model, spec.point)
        return self._pretrain[spec.id]

    def _rung(self, spec: TrialSpec, replicate: int, rung: int, share: float, before: PlannedStage | None) -> PlannedStage:
        inputs = {"prepare": self._prepare.run.key} | ({} if before is None else {"rung": before.run.key})
        if (spec.id, share) not in self._rungs:
            self._rungs[spec.id, share] = RungConfig.model_validate({**self._recipe(spec).resolved(), "share": share})
        planned = self._planned(f"rung/{replicate}/{rung}", "rung", self._rungs[spec.id, share], replicate, inputs, replicate)
        return replace(planned, rung=rung)

    def _conversion(self, spec: TrialSpec, replicate: int) -> PlannedStage:
        settings = self._config.convert_config(spec.model, spec.point)
        inputs = {"prepare": self._prepare.run.key}
        if spec.model.feedforward.variant not in WITHOUT_ACTIVATIONS:
            inputs["activations"] = self._activations(settings).run.key
        return self._planned(f"convert/{replicate}", "convert", settings, replicate, inputs, replicate)

    def _activations(self, settings: ConvertConfig) -> PlannedStage:
        """The reading that all conversions share, whatever their seed."""
        return self._planned("activations", "activations", settings.activations, 0, {"prepare": self._prepare.run.key})

    def _reference_pretraining(self, replicate: int) -> PlannedStage:
        if replicate not in self._references:
            self._references[replicate] = self._pretraining(self._reference, replicate)
        return self._references[replicate]

    def _finetunings(self, spec: TrialSpec, pretrain: PlannedStage, replicate: int) -> list[PlannedStage]:
        config, inputs = self._config, {"prepare": self._prepare.run.key, "pretrain": pretrain.run.key}
        return [
            self._planned(
                f"finetune/{replicate}/{task}/{number}", "finetune", settings, finetuning_seed(replicate, number), inputs, replicate
            )
            for task in config.task_names
            for settings in [self._finetuning(task, spec.point)]
            for number in range(config.seeds.finetune)
        ]

    def _finetuning(self, task: str, point: Mapping[str, Any]) -> Settings:
        place = task, canonical_json({path: value for path, value in point.items() if path.startswith("stages.finetune.")})
        if place not in self._finetune:
            self._finetune[place] = self._config.finetune_config(task, point)
        return self._finetune[place]

    def _planned(
        self,
        label: str,
        name: str,
        settings: Settings,
        seed: int = 0,
        inputs: Mapping[str, str] | None = None,
        replicate: int | None = None,
    ) -> PlannedStage:
        """The run of stage `name` with these settings; what does not depend on seed and inputs is kept for the next one."""
        if (name, id(settings)) not in self._known:  # the settings are kept too, so no others get their id
            self._known[name, id(settings)] = settings, stage_run(name, settings), get_stage(name).resources(settings)
        _, run, resources = self._known[name, id(settings)]
        return PlannedStage(label, run.again(seed, inputs or {}), resources, replicate)


def finetuning_seed(replicate: int, number: int) -> int:
    """Seed of a replicate's finetuning `number`: another one for each, so that replicates of one unchanged encoder differ too.

    The same in all trials, which pairs them. Counted along diagonals (Cantor's pairing), so it does not depend on how many of either
    a study has: more seeds leave those that are there as they are.
    """
    diagonal = replicate + number
    return diagonal * (diagonal + 1) // 2 + number


def build(config: SweepConfig, specs: list[TrialSpec]) -> list[TrialPlan]:
    """Stage runs of every trial. Timings are relative to the first one, which `expand` puts there for its role reference_dense."""
    if not specs:
        return []
    graph = Graph(config, specs[0])
    return [graph.plan(spec, config.seeds.fewest) for spec in specs]
