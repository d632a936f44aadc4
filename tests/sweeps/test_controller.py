"""The driver: shared stages run once, faults are told apart, a killed or stopped sweep goes on. Toy stages, executed inline."""

import errno
import json
from collections import Counter
from types import SimpleNamespace

import pytest

from fffsweep.pipeline import execute
from fffsweep.pipeline.execute import KeyBusy
from fffsweep.pipeline.stage import StopRequested
from fffsweep.pipeline.store import Store
from fffsweep.sweeps import executors
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.controller import Controller
from fffsweep.sweeps.limits import StageLimits
from fffsweep.sweeps.record import Lease, check_extends, load, study_folder
from tests.sweeps.toy import Toy, drive, empty_database, plans_of, results, runs_of, toys

__all__ = ["empty_database", "results", "toys"]  # fixtures, some for every test


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


def test_work_of_a_process_that_was_killed_in_the_course_of_the_sweep_is_cleared_at_its_end(tmp_path, monkeypatch):
    monkeypatch.setattr(execute, "shutil", SimpleNamespace(rmtree=lambda *_, **__: None))
    left = []
    end = Controller._save
    monkeypatch.setattr(Controller, "_save", lambda self, **how: left.append(len(list(work.iterdir()))) or end(self, **how))
    work = tmp_path / "store" / "work"
    work.mkdir(parents=True)
    drive(tmp_path)
    assert max(left) > 0
    assert list(work.iterdir()) == []


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


def test_a_smaller_grid_says_what_it_no_longer_asks_for(tmp_path):
    _, first, _ = drive(tmp_path)
    _, smaller, record = drive(tmp_path, layouts=("4x1",))
    outcome, whole, _ = drive(tmp_path)
    assert [trial["id"] for trial in record["trials"]] == ["4x1"]
    assert outcome.num_reused == 7
    said = [[line for line in listener.lines if "no longer in the study" in line] for listener in (first, smaller, whole)]
    assert said[0] == said[2] == []
    assert "3 finished stage runs, of 2x2 (3); they stay in the store" in said[1][0]


def test_a_result_that_was_removed_is_made_again_whatever_the_record_says(tmp_path):
    drive(tmp_path)
    store = Store(tmp_path / "store")
    store.forget(next(store.keys()))
    outcome, _, record = drive(tmp_path)
    assert outcome.num_run == 1
    assert {trial["state"] for trial in record["trials"]} == {"complete"}


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
