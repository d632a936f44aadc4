"""Searches without training: results are made up from each run's config, drivers are killed, decisions stay."""

import hashlib
import math

import optuna
import pytest

from fffsweep.sweeps.config import load_config
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.forecast import forecast
from fffsweep.sweeps.search import Search
from fffsweep.sweeps.strategy import SearchTrials
from fffsweep.sweeps.studies import Studies

BASE = """
model: {hidden_size: 32, num_layers: 1, num_heads: 2, sequence_length: 64}
layouts: [60x0, 4x3]
controls: [reference_dense(60), none]
stages:
  prepare: {vocabulary_size: 1024}
  pretrain: {tokens: 200k, batch_size: 8, schedule: wsd}
  finetune: {tasks: [sst2-like]}
objectives: {quality/avg: maximize, ff/active_width: minimize}
search:
  num_trials: 7
  space: {stages.pretrain.learning_rate: {type: float, low: 1e-4, high: 1e-2, log: true}}
"""


class Made:
    """Draws for a sampler that learns, without Optuna: a function of the name."""

    def draw(self, name, budget, space, fixed):
        assert Search.model_validate({"space": {path: each.model_dump() for path, each in space.items()}})
        part = int(hashlib.sha256(name.encode()).hexdigest()[:8], 16) / 2**32
        return dict.fromkeys(space, 10 ** (-4 + 2 * part))


class World:
    """A store and a driver that runs one stage after another; `kill_after` stage runs it is killed, its results stay."""

    def __init__(self, folder, text="", *overrides, noise=0.01):
        folder.mkdir(exist_ok=True)
        path = folder / "made.yaml"
        path.write_text(BASE + text)
        self.folder, self.config, self.noise = folder, load_config(path, overrides), noise
        self.metrics, self.ran, self.told, self.pruned = {}, [], {}, {}
        self.breaks = lambda plan, stage: False
        self.broken, self.kept = {}, {}

    def drive(self, kill_after=math.inf):
        strategy = SearchTrials(self.config, self.folder, self.metrics.get, lambda stratum: Made())
        self.plans, waiting, over, self.broken = {}, [], set(), {}
        self._take(strategy.start(), waiting, over)
        while True:
            if not waiting:
                self._take(strategy.more(1), waiting, over)
                if not waiting:
                    return True
            name = waiting.pop(0)
            if name in over:
                continue
            broken = None
            for stage in self.plans[name].stages:
                broken = broken or next((key for key in stage.run.inputs.values() if key in self.broken), None)
                if broken is None and stage.run.key not in self.metrics and self.breaks(self.plans[name], stage):
                    broken = self.broken[stage.run.key] = name
                if broken is None and stage.run.key not in self.metrics:
                    if not all(key in self.metrics for key in stage.run.inputs.values()):
                        made = self.metrics.keys() | {each.run.key for plan in self.plans.values() for each in plan.stages}
                        assert waiting, f"{stage.label} of {name} waits for ever"
                        assert made >= set(stage.run.inputs.values()), f"{stage.label} of {name} reads what nobody makes"
                        waiting.append(name)
                        break
                    if kill_after <= 0:
                        return False
                    kill_after -= 1
                    self.metrics[stage.run.key] = self._run(self.plans[name], stage)
                    self.ran.append((name, stage.label))
            else:
                self._take(strategy.finished(name) if broken is None else strategy.failed(name), waiting, over)

    def _take(self, changes, waiting, over):
        for plan in changes.plans:
            self.plans[plan.spec.id] = plan
            waiting.append(plan.spec.id)
        over |= set(changes.pruned)
        self.pruned |= changes.pruned
        self.told |= changes.tell
        self.kept |= changes.kept

    def _run(self, plan, stage):
        rate = stage.run.config.get("learning_rate", plan.spec.point.get("stages.pretrain.learning_rate", 1e-3))
        key = f"{plan.spec.layout}{rate:.9g}/{stage.replicate}"
        wobble = self.noise * (int(hashlib.sha256(key.encode()).hexdigest()[:8], 16) / 2**32 - 0.5)
        loss = abs(math.log10(rate) + 3) + wobble
        if stage.run.stage != "collect":
            return {"mlm/validation_loss": loss}
        width = plan.spec.model.feedforward.active_width
        values = {}
        for number in range(len({each.replicate for each in plan.stages} - {None})):
            wobble = self.noise * math.sin(1 + number + 1e4 * rate)
            values |= {f"quality/avg/{number}": 50 - loss + wobble, f"ff/active_width/{number}": float(width)}
        means = {name: sum(v for n, v in values.items() if n.startswith(name)) / (len(values) / 2) for name in self.config.objectives}
        return values | means


STOPPING = "early_stopping: {eta: 3, rungs: 2}\nseeds: {pretrain: 2}\n"
ALL = """early_stopping: {eta: 3, rungs: 2}
seeds: {pretrain: {min: 2, max: 4}}
constraints: [quality_retention >= 0.9]
"""


@pytest.mark.parametrize("sampler", ["tpe", "random"])
def test_halving_leaves_a_third_of_a_third_of_each_layout(tmp_path, sampler):
    world = World(tmp_path, STOPPING, f"sampler={sampler}", "search.num_trials=9")
    assert world.drive()
    for layout in ("60x0", "4x3", "reference_dense"):
        mine = [plan for name, plan in world.plans.items() if name.startswith(f"{layout}-t")]
        assert len(mine) == 9
        whole = [plan for plan in mine if plan.is_whole]
        assert 1 <= len(whole) <= 3
        assert len([plan for plan in mine if plan.spec.id in world.pruned]) == 9 - len(whole)
        best = min(mine, key=lambda plan: abs(math.log10(plan.spec.point["stages.pretrain.learning_rate"]) + 3))
        assert best.is_whole or layout == "60x0"
    assert world.plans["reference_dense"].is_whole
    assert world.plans["none"].is_whole


@pytest.mark.parametrize("text", [STOPPING, ALL], ids=["rungs", "rungs, constraints, adaptive seeds"])
@pytest.mark.parametrize("sampler", ["tpe", "qmc"])
def test_a_study_killed_at_every_step_decides_and_runs_what_an_undisturbed_one_does(tmp_path, sampler, text):
    whole = World(tmp_path / "whole", text, f"sampler={sampler}")
    assert whole.drive()
    killed = World(tmp_path / "killed", text, f"sampler={sampler}")
    num_kills = 0
    while not killed.drive(kill_after=1):
        num_kills += 1
    assert num_kills > 40
    assert sorted(killed.ran) == sorted(whole.ran)
    assert {name: [s.run.key for s in plan.stages] for name, plan in killed.plans.items()} == {
        name: [s.run.key for s in plan.stages] for name, plan in whole.plans.items()
    }
    assert killed.pruned == whole.pruned
    assert {name: told for name, told in killed.told.items() if name in whole.told} == whole.told
    assert len(killed.ran) == len(set(killed.ran))


def test_again_nothing_is_decided_and_nothing_is_run(tmp_path):
    world = World(tmp_path, ALL, "sampler=tpe")
    world.drive()
    decisions, world.ran = list(Decisions(tmp_path).read()), []
    assert world.drive()
    assert not world.ran
    assert list(Decisions(tmp_path).read()) == decisions
    assert len([each for each in decisions if "drawn" in each]) == 21


def test_more_trials_extend_a_study(tmp_path):
    world = World(tmp_path, "", "sampler=tpe", "search.num_trials=2")
    world.drive()
    before = dict(world.plans)
    bigger = World(tmp_path, "", "sampler=tpe", "search.num_trials=4")
    bigger.metrics = world.metrics
    bigger.drive()
    assert set(bigger.plans) - set(before) == {f"{name}-t{index}" for name in ("60x0", "4x3", "reference_dense") for index in (2, 3)}
    assert all(bigger.plans[name] == plan for name, plan in before.items())


def test_values_wait_for_the_reference_that_constraints_look_at(tmp_path):
    world = World(tmp_path, "constraints: [quality_retention >= 0.999, ff/active_width <= 30]\n", "sampler=tpe", "search.num_trials=3")
    world.drive()
    told = {name: values for name, values in world.told.items() if name.startswith("4x3")}
    assert len(told) == 3
    best = max(world.metrics[world.plans[f"reference_dense{n}"].stages[-1].run.key]["quality/avg"] for n in ("", "-t0", "-t1", "-t2"))
    for name, values in told.items():
        quality = world.metrics[world.plans[name].stages[-1].run.key]["quality/avg"]
        assert list(values) == ["quality_retention >= 0.999", "ff/active_width <= 30"]
        assert values["quality_retention >= 0.999"] == pytest.approx(0.999 - quality / best)
        assert values["ff/active_width <= 30"] == 16 - 30


def test_seeds_go_to_those_near_the_front_that_are_not_told_apart(tmp_path):
    world = World(tmp_path, "seeds: {pretrain: {min: 1, max: 4}}\n", "sampler=random", "search.num_trials=5", noise=0.2)
    world.drive()
    seeds = {name: len({stage.replicate for stage in plan.stages} - {None}) for name, plan in world.plans.items()}
    assert max(seeds.values()) > 1
    assert min(seeds.values()) == 1
    assert max(seeds.values()) <= 4
    assert seeds["reference_dense"] == max(seeds.values()), "pairs need the reference's seeds too"


SEEDED = "seeds: {pretrain: {min: 1, max: 4}}\n"
BREAKS = {
    "the reference's second pretraining": lambda plan, stage: plan.spec.id == "reference_dense" and stage.label == "pretrain/1",
    "the reference's third finetuning": lambda plan, stage: plan.spec.id == "reference_dense" and stage.label.startswith("finetune/2"),
    "somebody's second": lambda plan, stage: plan.spec.id.startswith("4x3") and stage.label == "benchmark_cpu/1",
    "everybody's third": lambda plan, stage: stage.label == "pretrain/2",
}


@pytest.mark.parametrize("case", BREAKS)
def test_a_further_seed_that_fails_takes_nothing_away_and_is_not_tried_again(tmp_path, case):
    def world(name):
        overrides = ("sampler=random", "search.num_trials=9", "stages.benchmark_cpu.num_activation_tokens=64")
        made = World(tmp_path / name, SEEDED, *overrides, noise=0.05)
        made.breaks = BREAKS[case]
        return made

    def seeds(world):
        return {name: len({stage.replicate for stage in plan.stages} - {None}) for name, plan in world.plans.items()}

    whole = world("whole")
    assert whole.drive()
    assert whole.kept
    assert all(plan.is_whole and plan.stages[-1].run.key in whole.metrics for plan in whole.plans.values())
    assert all(seeds(whole)[name] == number for name, number in whole.kept.items())
    before, decided, ran = seeds(whole), list(Decisions(whole.folder).read()), list(whole.ran)
    whole.kept = {}
    assert whole.drive()
    assert (seeds(whole), list(Decisions(whole.folder).read()), whole.ran, whole.kept, whole.broken) == (before, decided, ran, {}, {})

    killed = world("killed")
    while not killed.drive(kill_after=1):
        pass
    assert all(plan.is_whole and plan.stages[-1].run.key in killed.metrics for plan in killed.plans.values())
    if "reference" not in case:
        assert seeds(killed) == before


@pytest.mark.parametrize("label", ["finetune/0/sst2-like/0", "benchmark_cpu/0"])
def test_no_further_seed_is_timed_against_one_that_a_failed_reference_never_gets(tmp_path, label):
    overrides = ("sampler=random", "search.num_trials=5", "stages.benchmark_cpu.num_activation_tokens=64")
    world = World(tmp_path, SEEDED, *overrides, noise=0.2)
    world.breaks = lambda plan, stage: plan.spec.id == "reference_dense" and stage.label == label
    for _ in range(2):
        assert world.drive()
        assert list(world.broken.values()) == ["reference_dense"]
        others = [plan for name, plan in world.plans.items() if name != "reference_dense"]
        assert all(plan.stages[-1].run.key in world.metrics for plan in others)
        made = {stage.run.key for plan in world.plans.values() for stage in plan.stages}
        assert all(key in made for plan in others for stage in plan.stages for key in stage.run.inputs.values())

    world.breaks = lambda plan, stage: False  # mended
    assert world.drive()
    assert max(len({stage.replicate for stage in plan.stages}) for plan in world.plans.values()) > 2


def test_a_searched_shape_is_drawn_and_told_as_one_trial(tmp_path):
    """Its name has the layout, which nobody knows before it is drawn."""
    overrides = ("sampler=tpe", "search.num_trials=3", "search.space={layout: [60x0, 4x3, 2x4]}")
    path = tmp_path / "made.yaml"
    path.write_text(BASE.replace("layouts: [60x0, 4x3]\n", ""))
    config, url = load_config(path, overrides), f"sqlite:///{tmp_path}/optuna.db"

    def driven():
        studies = Studies(config, url, print)
        strategy = SearchTrials(config, tmp_path, lambda key: None, lambda stratum: studies.of_stratum(stratum.name))
        specs = [plan.spec for changes in (strategy.start(), strategy.more(3)) for plan in changes.plans]
        return {spec.id: studies.open(spec) for spec in specs if spec.in_study}

    assert sorted(driven().values()) == [0, 1, 2]
    assert driven() == (again := driven())
    trials = optuna.load_study(study_name="made", storage=url).trials
    assert {trial.user_attrs["fffsweep.trial"]: trial.number for trial in trials} == again
    assert all(name.rpartition("-t")[0] == trials[number].params["layout"] for name, number in again.items())


def test_a_decision_cut_short_by_a_kill_was_never_made(tmp_path):
    decisions = Decisions(tmp_path)
    decisions.write(trial="a", promoted=1)
    with (tmp_path / "decisions.jsonl").open("a") as file:
        file.write('{"trial": "b", "prom')
    assert list(Decisions(tmp_path).read()) == [{"trial": "a", "promoted": 1}]
    Decisions(tmp_path).write(trial="c", stopped="why")
    assert [each["trial"] for each in Decisions(tmp_path).read()] == ["a", "c"]


def test_a_forecast_counts_what_may_come_and_decides_nothing(tmp_path):
    config = World(tmp_path, ALL, "sampler=tpe", "search.num_trials=9").config
    plans, notes = forecast(config, tmp_path / "study", lambda key: None)
    labels = [stage.label for plan in plans for stage in plan.stages if plan.spec.stratum]
    counts = [sum(label.startswith(start) for label in labels) for start in ("rung/0/0", "rung/0/1", "pretrain/0")]
    assert counts == [27, 9, 3]
    assert not (tmp_path / "study").exists()
    assert any("9 trials for each of reference_dense, 60x0, 4x3" in note for note in notes)
