"""The driver: shared stages run once, faults are told apart, a killed or stopped sweep goes on. Toy stages, executed inline."""

import errno
import json
import shutil
import sys
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import ClassVar

import pytest
from mlflow.tracking import MlflowClient

from fffsweep.kernels.shape import parse_layout
from fffsweep.pipeline import stage as stage_module
from fffsweep.pipeline.execute import KeyBusy
from fffsweep.pipeline.model_settings import FeedForward, ModelSettings
from fffsweep.pipeline.settings import Settings
from fffsweep.pipeline.stage import Resources, StageRun, StopRequested
from fffsweep.pipeline.store import Store
from fffsweep.sweeps import controller, executors
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.controller import Controller
from fffsweep.sweeps.executors import Event
from fffsweep.sweeps.graph import PlannedStage, TrialPlan
from fffsweep.sweeps.limits import StageLimits
from fffsweep.sweeps.record import Lease, check_extends, load, study_folder
from fffsweep.sweeps.slices import InlineOptions
from fffsweep.sweeps.strategy import Changes, FixedTrials

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
    config = ToySweep(search=None, sampler="grid", name="toy study", description="", objectives=OBJECTIVES, retries=retries, limits=limits)
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


def test_shared_stages_run_once_and_upstream_runs_first(tmp_path):
    outcome, _, record = drive(tmp_path)
    assert outcome.state == "complete"
    assert outcome.num_run == len(Toy.ran) == 7
    assert max(Counter(Toy.ran).values()) == 1
    assert Toy.ran.index("prepare") < Toy.ran.index("pretrain 4x1") < Toy.ran.index("benchmark 2x2") < Toy.ran.index("collect 2x2")
    assert [trial["state"] for trial in record["trials"]] == ["complete"] * 2
    assert [trial["number"] for trial in record["trials"]] == [0, 1]


def test_again_everything_is_reused_and_nothing_is_told_twice(tmp_path):
    drive(tmp_path)
    num_runs = len(runs_of(tmp_path))
    outcome, listener, record = drive(tmp_path)
    assert len(Toy.ran) == 7
    assert (outcome.num_run, outcome.num_reused) == (0, 7)
    assert any("reused 7 of 7" in line for line in listener.lines)
    assert {stage["state"] for trial in record["trials"] for stage in trial["stages"]} == {"reused"}
    assert len(runs_of(tmp_path)) == num_runs == 2 + 2 * 4
    assert {run.info.status for run in runs_of(tmp_path)} == {"FINISHED"}


def test_work_that_a_killed_process_left_of_a_finished_run_is_cleared(tmp_path):
    drive(tmp_path)
    store = Store(tmp_path / "store")
    finished, other = store.work_path(next(store.keys())), store.work_path("0" * 64)
    for work in (finished, other):
        (work / "attempt-1" / "output").mkdir(parents=True)
    drive(tmp_path)
    assert (finished.exists(), other.exists()) == (False, True)


def test_going_on_reads_few_manifests(tmp_path, monkeypatch):
    """Of a study of ten thousand stage runs: what MLflow holds is not told again, and the record knows how long each took."""
    drive(tmp_path)
    before = runs_of(tmp_path)
    read = Counter()
    get = Store.get
    monkeypatch.setattr(Store, "get", lambda self, key: read.update([key]) or get(self, key))
    drive(tmp_path)
    collected = {trial["stages"][-1]["key"] for trial in load(study_folder(tmp_path, "toy study"))["trials"]}
    assert read.keys() == collected
    assert {run.info.run_id: run.data.to_dictionary() for run in runs_of(tmp_path)} == {
        run.info.run_id: run.data.to_dictionary() for run in before
    }


def test_a_result_that_was_removed_is_made_again_whatever_the_record_says(tmp_path):
    drive(tmp_path)
    store = Store(tmp_path / "store")
    store.forget(next(store.keys()))
    outcome, _, record = drive(tmp_path)
    assert outcome.num_run == 1
    assert {trial["state"] for trial in record["trials"]} == {"complete"}


class OneByOne(FixedTrials):
    """Brings a trial whenever none is under way, as a sampler that learns does."""

    under_way = None

    def start(self):
        return Changes()

    def finished(self, trial):
        self.under_way = None
        return Changes(tell={trial: {}})

    def more(self, num_slots):
        if self.under_way is not None or not self._plans:
            return Changes()
        self.under_way = self._plans.pop(0)
        return Changes([self.under_way])


@pytest.mark.parametrize("order", [(0, 0, 0, 1), (0, 1, 1, 0)])
def test_a_trial_that_ends_as_it_comes_does_not_end_the_sweep(tmp_path, order):
    """A sampler over a few choices draws a point again: all of that trial's stage runs have their results."""
    plans = plans_of(["4x1", "2x2"])
    drawn = [replace(plans[n], spec=SimpleNamespace(**{**vars(plans[n].spec), "id": f"t{i}"})) for i, n in enumerate(order)]
    drive(tmp_path)
    for _ in range(2):
        outcome, _, record = drive(tmp_path, strategy=OneByOne(list(drawn)))
        assert [(trial["id"], trial["state"]) for trial in record["trials"]] == [(f"t{i}", "complete") for i in range(len(order))]
        assert (outcome.state, len(Toy.ran)) == ("complete", 7)
        shutil.rmtree(tmp_path / "store")
        Toy.ran.clear()


def test_an_extended_study_runs_only_what_is_new(tmp_path):
    drive(tmp_path)
    Toy.ran.clear()
    outcome, _, record = drive(tmp_path, layouts=("4x1", "2x2", "1x3"))
    assert sorted(Toy.ran) == ["benchmark 1x3", "collect 1x3", "pretrain 1x3"]
    assert outcome.state == "complete"
    assert [trial["number"] for trial in record["trials"]] == [0, 1, 2]


def test_a_code_fault_fails_its_trial_alone_and_is_not_tried_again(tmp_path):
    Toy.faults["pretrain 2x2"] = [ValueError("loss is NaN")]
    outcome, _, record = drive(tmp_path)
    assert outcome.failed_trials == ("2x2",)
    assert outcome.state == "complete"
    good, bad = record["trials"]
    assert good["state"] == "complete"
    assert bad["state"] == "failed"
    assert "loss is NaN" in bad["error"]
    assert Counter(run.info.status for run in runs_of(tmp_path)) == {"FINISHED": 6, "FAILED": 2}
    Toy.ran.clear()
    outcome, _, record = drive(tmp_path)  # mended: only what was missing is run
    assert outcome.failed_trials == ()
    assert sorted(Toy.ran) == ["benchmark 2x2", "collect 2x2", "pretrain 2x2"]


def test_a_failed_reference_fails_whoever_is_measured_against_it(tmp_path):
    Toy.faults["pretrain 4x1"] = [ValueError("broken")]
    outcome, _, record = drive(tmp_path)
    assert outcome.failed_trials == ("4x1", "2x2")
    assert outcome.state == "failed"
    assert "of trial 4x1" in record["trials"][1]["error"]


def test_an_infrastructure_fault_is_tried_again(tmp_path, monkeypatch):
    monkeypatch.setattr("fffsweep.sweeps.controller._RETRY_WAIT_S", 0.0)
    Toy.faults["pretrain 2x2"] = [ConnectionError("node gone")]
    outcome, listener, _ = drive(tmp_path)
    assert (outcome.state, outcome.failed_trials) == ("complete", ())
    assert any("node gone; trying again" in line for line in listener.lines)


def test_tries_are_bounded(tmp_path, monkeypatch):
    monkeypatch.setattr("fffsweep.sweeps.controller._RETRY_WAIT_S", 0.0)
    Toy.faults["pretrain 2x2"] = [ConnectionError("node gone")] * 3
    assert drive(tmp_path, retries=1)[0].failed_trials == ("2x2",)
    assert len(Toy.faults["pretrain 2x2"]) == 1


def test_a_busy_key_costs_no_try(tmp_path, monkeypatch):
    monkeypatch.setattr("fffsweep.sweeps.controller._RETRY_WAIT_S", 0.0)
    Toy.faults["pretrain 2x2"] = [KeyBusy("being run by process 1 on node-7")] * 5
    outcome, listener, _ = drive(tmp_path, retries=0)
    assert (outcome.state, outcome.failed_trials) == ("complete", ())
    assert sum("node-7; trying again" in line for line in listener.lines) == 1


def test_a_stage_may_be_tried_more_often_than_others(tmp_path, monkeypatch):
    monkeypatch.setattr("fffsweep.sweeps.controller._RETRY_WAIT_S", 0.0)
    Toy.faults["pretrain 2x2"] = [OSError(errno.ENOSPC, "No space left on device")] * 3
    assert drive(tmp_path, retries=0, toy=StageLimits(retries=3))[0].failed_trials == ()


def test_a_driver_that_lost_its_lease_ends_and_records_nothing_more(tmp_path, monkeypatch):
    def lost(self):
        raise ConfigError("this driver was cut off for too long")

    monkeypatch.setattr(Lease, "require", lost)
    with pytest.raises(ConfigError, match="cut off"):
        drive(tmp_path)
    assert Toy.ran == []
    assert load(study_folder(tmp_path, "toy study"))["state"] == "running"


def test_a_results_folder_that_does_not_answer_for_a_while_is_waited_for(tmp_path, monkeypatch):
    monkeypatch.setattr("fffsweep.sweeps.patience._FIRST_WAIT_S", 0.0)
    refusals, require = [OSError(errno.ESTALE, "Stale file handle"), OSError(errno.EIO, "Input/output error")], Lease.require
    exists, flags = type(tmp_path).exists, [OSError(errno.EIO, "Input/output error")]

    def asked(self):
        if refusals:
            raise refusals.pop()
        require(self)

    def looked(self):
        if self.name == "stop" and flags and not refusals:
            raise flags.pop()
        return exists(self)

    monkeypatch.setattr(Lease, "require", asked)
    monkeypatch.setattr(type(tmp_path), "exists", looked)
    outcome, listener, _ = drive(tmp_path)
    assert (outcome.state, refusals, flags) == ("complete", [], [])
    assert sum("results folder: it answers again" in line for line in listener.lines) == 2


def test_a_stop_request_ends_the_sweep_resumable(tmp_path):
    Toy.faults["pretrain 2x2"] = [StopRequested()]
    outcome, _, record = drive(tmp_path)
    assert outcome.state == record["state"] == "stopped"
    assert [trial["state"] for trial in record["trials"]] == ["waiting", "waiting"]
    assert {run.info.status for run in runs_of(tmp_path)} <= {"FINISHED", "KILLED"}
    assert drive(tmp_path)[0].state == "complete"
    assert max(Counter(Toy.ran).values()) == 1
    assert {run.info.status for run in runs_of(tmp_path)} == {"FINISHED"}


def test_a_flag_for_this_attempt_was_set_before_it_began_and_counts(tmp_path, monkeypatch):
    monkeypatch.setenv("FFFSWEEP_ATTEMPT", "second")
    folder = study_folder(tmp_path, "toy study")
    folder.mkdir(parents=True)
    for name in ("stop", "stop-first", "stop-second"):
        (folder / name).touch()
    outcome, listener, record = drive(tmp_path)
    assert (outcome.state, record["state"], Toy.ran) == ("stopped", "stopped", [])
    assert [path.name for path in folder.glob("stop*")] == ["stop-second"]
    assert sum(line.startswith("stopping: ") for line in listener.lines) == 1
    monkeypatch.setenv("FFFSWEEP_ATTEMPT", "third")
    assert drive(tmp_path)[0].state == "complete"
    assert list(folder.glob("stop*")) == []


def test_a_flag_that_names_nobody_is_of_an_earlier_driver(tmp_path):
    folder = study_folder(tmp_path, "toy study")
    folder.mkdir(parents=True)
    (folder / "stop").touch()
    assert drive(tmp_path)[0].state == "complete"


def test_named_trials_run_alone_with_what_they_read_of_others(tmp_path):
    outcome, _, record = drive(tmp_path, layouts=("4x1", "2x2", "1x3"), options=InlineOptions(only=("2x2",)))
    assert Toy.ran == ["prepare", "pretrain 2x2", "pretrain 4x1", "benchmark 2x2", "collect 2x2"]
    assert (outcome.state, outcome.remainder.trials, outcome.remainder.hindrance) == ("stopped", ("4x1", "1x3"), None)
    assert [trial["state"] == "complete" for trial in record["trials"]] == [False, True, False]
    outcome, _, _ = drive(tmp_path, layouts=("4x1", "2x2", "1x3"))
    assert (outcome.state, max(Counter(Toy.ran).values())) == ("complete", 1)


def test_a_name_that_no_trial_has_is_refused_before_anything_is_started(tmp_path):
    with pytest.raises(ConfigError, match="--only 2x3: no such trial; expected one of 2x2, 1x3, 4x1"):
        drive(tmp_path, layouts=("4x1", "2x2", "1x3"), options=InlineOptions(only=("2x3",)))
    assert Toy.ran == []
    assert load(study_folder(tmp_path, "toy study")) is None


def test_a_slice_is_whole_trials_and_the_next_one_goes_on(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr("fffsweep.sweeps.slices.History.median", lambda self, run: told.append(run) or (60.0, 0, ""))
    layouts = ("4x1", "2x2", "1x3")
    outcome, _, _ = drive(tmp_path, layouts=layouts, options=InlineOptions(slice_minutes=4.5))  # four runs of a minute, then three
    assert Toy.ran[-1] == "collect 1x3"  # these take no time, whatever they are expected to
    assert outcome.state == "complete"
    assert len(told) == 4 + 3 + 3
    assert outcome.remainder.trials == ()


def test_what_does_not_fit_a_slice_is_not_begun(tmp_path, monkeypatch):
    monkeypatch.setattr("fffsweep.sweeps.slices.History.median", lambda self, run: (60.0, 0, ""))
    outcome, _, _ = drive(tmp_path, options=InlineOptions(slice_minutes=3.5))
    assert (Toy.ran, outcome.state, outcome.remainder.trials) == ([], "stopped", ("4x1", "2x2"))
    assert "trial 4x1 takes about 4.0 min: expected --slice-minutes 4.1 or more" in outcome.remainder.hindrance


class Growing(FixedTrials):
    """Once both trials are complete, both get a further seed; the second is timed against the first."""

    def __init__(self, plans):
        super().__init__(plans)
        again = planned("pretrain again", plans[0].stages[0])
        more = [again], [planned("benchmark again", again, plans[1].stages[1])]
        self._grown = [
            replace(plan, stages=(*plan.stages[:-1], *stages, planned(f"collect {number}", *stages)))
            for number, (plan, stages) in enumerate(zip(plans, more, strict=True))
        ]
        self._complete = []

    def finished(self, trial):
        self._complete.append(trial)
        return Changes(self._grown if len(self._complete) == 2 else [], tell={trial: {}})


@pytest.mark.parametrize(("minutes", "left"), [(100.0, ()), (4.5, ("2x2",))])
def test_further_seeds_are_slices_of_their_own_and_wait_for_nothing_that_is_not_begun(tmp_path, monkeypatch, minutes, left):
    monkeypatch.setattr("fffsweep.sweeps.slices.History.median", lambda self, run: (60.0, 0, ""))
    clock = iter(range(0, 10**6, 60))  # a minute goes by between two looks
    slice_type = controller.Slice
    monkeypatch.setattr(controller, "Slice", lambda options, store: slice_type(options, store, lambda: next(clock)))
    wait = executors.InlineExecutor.wait

    def waited(self, timeout_s):
        assert self._queue, "the sweep goes on and nothing is begun"
        return wait(self, timeout_s)

    monkeypatch.setattr(executors.InlineExecutor, "wait", waited)
    strategy = Growing(plans_of(["4x1", "2x2"]))
    drive(tmp_path, strategy=strategy, options=InlineOptions(only=("4x1",)))
    strategy._complete = []
    outcome, _, _ = drive(tmp_path, strategy=strategy, options=InlineOptions(slice_minutes=minutes))
    assert outcome.remainder.trials == left
    assert ("pretrain again" in Toy.ran, "benchmark again" in Toy.ran) == (True, not left)
    assert drive(tmp_path, strategy=Growing(plans_of(["4x1", "2x2"])))[0].state == "complete"
    assert max(Counter(Toy.ran).values()) == 1


def test_figures_of_a_run_that_has_ended_are_left_out(tmp_path, monkeypatch):
    """They travel by another way than its end, and by then a trial that has grown may not need the run any more."""
    wait = executors.InlineExecutor.wait

    def late(self, timeout_s):
        ended = wait(self, timeout_s)
        return [*ended, *(Event(event.key, "progress", {"done": 1}, "late") for event in ended), Event("0" * 40, "progress")]

    monkeypatch.setattr(executors.InlineExecutor, "wait", late)
    outcome, _, record = drive(tmp_path)
    assert outcome.state == "complete"
    assert {stage["progress"] is None for trial in record["trials"] for stage in trial["stages"]} == {True}
    assert "late" not in {stage["worker"] for trial in record["trials"] for stage in trial["stages"]}


def test_a_damaged_artifact_is_made_again(tmp_path, monkeypatch):
    monkeypatch.setattr("fffsweep.sweeps.controller._RETRY_WAIT_S", 0.0)
    drive(tmp_path)
    plans = plans_of(["4x1", "2x2", "1x3"])
    store = tmp_path / "store"
    manifest = json.loads((store / "manifests" / (key := plans[0].stages[0].run.key)[:2] / f"{key}.json").read_text())
    sha256 = manifest["artifacts"]["label"]["sha256"]
    (store / "objects" / sha256[:2] / sha256).write_text("scribble")
    Toy.ran.clear()
    outcome, _, _ = drive(tmp_path, layouts=("4x1", "2x2", "1x3"))
    assert (outcome.state, outcome.failed_trials) == ("complete", ())
    assert sorted(Toy.ran) == ["benchmark 1x3", "collect 1x3", "prepare", "pretrain 1x3"]
    assert (store / "objects" / sha256[:2] / sha256).read_text() == "prepare"


def test_an_input_that_is_gone_is_made_again(tmp_path, monkeypatch):
    """As when one reader finds it damaged, and another one, submitted before that, comes to read it."""
    monkeypatch.setattr("fffsweep.sweeps.controller._RETRY_WAIT_S", 0.0)
    drive(tmp_path)
    key = plans_of(["1x3"])[0].stages[0].run.key
    manifest = tmp_path / "store" / "manifests" / key[:2] / f"{key}.json"
    execute = executors.execute

    def beaten_to_it(run, *arguments, **more):
        if run.config["label"] == "pretrain 1x3" and "prepare" not in Toy.ran:
            manifest.unlink()
        return execute(run, *arguments, **more)

    monkeypatch.setattr(executors, "execute", beaten_to_it)
    Toy.ran.clear()
    outcome, listener, _ = drive(tmp_path, layouts=("4x1", "2x2", "1x3"))
    assert (outcome.state, outcome.failed_trials) == ("complete", ())
    assert sorted(Toy.ran) == ["benchmark 1x3", "collect 1x3", "prepare", "pretrain 1x3"]
    assert any(f"input prepare {key} is gone" in line for line in listener.lines)


def test_one_driver_at_a_time(tmp_path):
    lease = Lease(tmp_path / "study")
    with pytest.raises(ConfigError, match=r"is driven by process \d+"):
        Lease(tmp_path / "study")
    lease.release()
    Lease(tmp_path / "study").release()


def test_a_study_may_grow_but_not_change():
    def config(**changes):
        identity = {"layouts": ["1x8"], "stages": {"pretrain": {"tokens": 10}}, "retries": 1, **changes}
        return SimpleNamespace(name="s", identity=lambda: identity)

    stored = {"identity": config().identity()}
    check_extends(config(layouts=["1x8", "2x7"], retries=3), stored)
    with pytest.raises(ConfigError, match=r"stages.pretrain.tokens: 10 there, 20 here.*--name s-2"):
        check_extends(config(stages={"pretrain": {"tokens": 20}}), stored)


@pytest.mark.parametrize("name", ["plain", "../escape", "a/b", "..", "<script>", "é", ".hidden", "a b"])
def test_names_never_become_paths(tmp_path, name):
    folder = study_folder(tmp_path, name)
    assert folder.parent == tmp_path / "studies"
    assert folder.resolve().parent == (tmp_path / "studies").resolve()
