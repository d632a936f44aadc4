"""What a driver waits for: a node that can hold a run, a store that refuses for a while. Stages that do nothing, executed inline."""

import errno
import os
import shutil
import signal
from collections import Counter
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from fffsweep.pipeline.remote_store import StoreUnreachable
from fffsweep.pipeline.stage import Resources
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.bench import NUM_STAGES, noop_study
from fffsweep.sweeps.capacity import Capacity, Node
from fffsweep.sweeps.controller import Controller
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.executors import InlineExecutor
from fffsweep.sweeps.patience import Patience, patient
from fffsweep.sweeps.ray_executor import RayExecutor
from fffsweep.sweeps.record import Lease, load, study_folder
from fffsweep.sweeps.strategy import FixedTrials


@pytest.fixture(autouse=True)
def impatient(monkeypatch, empty_mlflow, tmp_path):
    monkeypatch.setattr("fffsweep.sweeps.patience._FIRST_WAIT_S", 0.0)
    monkeypatch.setattr("fffsweep.sweeps.controller._RETRY_WAIT_S", 0.0)
    shutil.copyfile(empty_mlflow, tmp_path / "mlflow.db")


class Heard:
    def __init__(self, hear=lambda record: None):
        self.lines, self._hear = [], hear

    def update(self, record, num_running):
        self._hear(record)

    def say(self, line):
        self.lines.append(line)


def refusing(call, num_refusals, concerned=lambda *arguments: True):
    """`call` on a full disk that has room after so many refusals, of those that are `concerned`."""
    left = [OSError(errno.ENOSPC, "No space left on device")] * num_refusals

    def called(*arguments, **named):
        if concerned(*arguments) and left:
            raise left.pop()
        return call(*arguments, **named)

    return called


def drive(folder, cpus_of=lambda stage: 1, hear=lambda record: None):
    """A study of one trial; cpus_of: what a stage run asks for. hear: told of every change."""
    config, plans = noop_study(1)
    plans = [replace(plan, stages=tuple(replace(each, resources=Resources(cpus_of(each))) for each in plan.stages)) for plan in plans]
    study, heard = study_folder(folder, config.name), Heard(hear)
    lease = Lease(study)
    try:
        outcome = Controller(config, FixedTrials(plans), folder, study, heard, "inline", None, load(study), lease).run()
    finally:
        lease.release()
    return outcome, heard.lines, load(study)


def test_a_run_that_no_node_can_hold_waits_and_says_so_once(tmp_path, monkeypatch):
    num_idle = []

    class OneNode(InlineExecutor):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.capacity = Capacity((Node(4),))

        def wait(self, timeout_s):
            events = super().wait(timeout_s)
            num_idle.append(not events)
            if sum(num_idle) == 3:
                (study_folder(tmp_path, "orchestration") / "stop").touch()
            return events

    monkeypatch.setattr("fffsweep.sweeps.controller.InlineExecutor", OneNode)
    outcome, said, record = drive(tmp_path, lambda stage: 8 if stage.label == "benchmark_cpu/0" else 1)
    assert (outcome.state, outcome.num_run) == ("stopped", NUM_STAGES + 1 - 2)  # all but that one and what reads it
    states = {stage["label"]: stage["state"] for trial in record["trials"] for stage in trial["stages"]}
    assert [label for label, state in states.items() if state == "waiting"] == ["benchmark_cpu/0", "collect"]
    assert [line for line in said if "waits for" in line] == [
        "benchmark_cpu/0: waits for a larger cluster: it asks for 8 CPUs on one node; nodes there are: 1 with 4 CPUs"
    ]


class Hesitant(Store):
    """Refuses the driver: the first `get` of every key, that after the one that publishing ends with, and the first `forget`."""

    def __init__(self, root):
        super().__init__(root)
        self.asked = Counter()

    def refuse(self, call, key, *numbers):
        self.asked[call, key] += 1
        if self.asked[call, key] in numbers:
            raise StoreUnreachable(f"FFFSWEEP_STORE=s3://me:sesame@sweeps: AWS Error SLOW_DOWN during {call}")

    def get(self, key):
        self.refuse("get", key, 1, 4)
        return super().get(key)

    def forget(self, key):
        self.refuse("forget", key, 1)
        super().forget(key)


def test_a_store_that_refuses_the_driver_is_waited_for(tmp_path, monkeypatch):
    store = Hesitant(tmp_path / "store")
    monkeypatch.setattr("fffsweep.sweeps.controller.open_store", lambda root: store)
    outcome, said, _ = drive(tmp_path)
    num_runs = NUM_STAGES + 1
    assert (outcome.state, outcome.failed_trials, outcome.num_run) == ("complete", (), num_runs)
    assert sum(call == "get" and number > 1 for (call, _), number in store.asked.items()) == num_runs
    waits = [line for line in said if "AWS Error" in line]
    assert waits[0] == "result store: FFFSWEEP_STORE=s3://me:***@sweeps: AWS Error SLOW_DOWN during get; the sweep waits for it"
    assert said.count("result store: it answers again") == len(waits) == 2 * num_runs
    key = next(store.keys())
    patient(store, Patience(said.append)).forget(key)
    assert not store.has(key)
    assert "during forget; the sweep waits for it" in said[-2]


class Outage(Store):
    """From the first publication on it refuses twenty calls: the one under way, and more than a run has tries."""

    num_left: int | None = None

    def refuse(self):
        if self.num_left:
            self.num_left -= 1
            raise StoreUnreachable("AWS Error NETWORK_CONNECTION")

    def has(self, key):
        self.refuse()
        return super().has(key)

    def _put_manifest(self, manifest):
        self.num_left = 20 if self.num_left is None else self.num_left
        self.refuse()
        super()._put_manifest(manifest)


def test_an_outage_of_the_store_costs_a_run_one_try(tmp_path, monkeypatch):
    store = Outage(tmp_path / "store")
    monkeypatch.setattr("fffsweep.sweeps.controller.open_store", lambda root: store)
    outcome, said, record = drive(tmp_path)
    assert (outcome.state, outcome.failed_trials, store.num_left) == ("complete", (), 0)
    (prepare,) = (stage for trial in record["trials"] for stage in trial["stages"] if stage["label"] == "prepare")
    assert prepare["attempts"] == 2
    assert said.count("result store: AWS Error NETWORK_CONNECTION; the sweep waits for it") == 1


def test_what_the_code_does_wrong_is_not_waited_for():
    said = []
    for call in (lambda: Path("/nowhere/at/all").read_text(), lambda: {}["absent"]):
        with pytest.raises((FileNotFoundError, KeyError)):
            Patience(said.append).insist("result store", call)
    assert said == []


FULL = ["results folder: [Errno 28] No space left on device; the sweep waits for it", "results folder: it answers again"]


def test_an_outage_is_told_of_once():
    said = []
    assert Patience(said.append).insist("results folder", refusing(lambda: "written", 5)) == "written"
    assert said == FULL


@pytest.mark.parametrize("kept", [0.0, 0.5, 1.0])
def test_a_decision_that_a_full_disk_refused_is_written_once(tmp_path, monkeypatch, kept):
    """kept: share of its line that is on disk all the same."""
    config, _ = noop_study(1)
    study, heard = study_folder(tmp_path, config.name), Heard()
    lease = Lease(study)
    decisions = Controller(config, None, tmp_path, study, heard, "inline", None, None, lease)._strategy._decisions
    decisions.write(trial="a", promoted=1)
    whole = (study / "decisions.jsonl").stat().st_size

    def sync(descriptor):
        os.ftruncate(descriptor, int(whole * (1 + kept)))
        raise OSError(errno.ENOSPC, "No space left on device")

    syncs = iter([sync] * 3)
    monkeypatch.setattr("fffsweep.sweeps.decisions.os.fsync", lambda descriptor: next(syncs, lambda _: None)(descriptor))
    decisions.write(trial="b", promoted=1)
    decisions.write(trial="c", promoted=1)
    lease.release()
    assert heard.lines == FULL
    assert [each["trial"] for each in Decisions(study).read()] == ["a", "b", "c"]


def test_a_stop_that_a_full_disk_refuses_is_heeded_all_the_same(tmp_path, monkeypatch):
    signals = [signal.SIGTERM]

    def stop(record):
        if signals and any(stage.state == "complete" for trial in record.trials for stage in trial.stages):
            os.kill(os.getpid(), signals.pop())

    monkeypatch.setattr(Path, "touch", refusing(Path.touch, 1, lambda path, *more: path.name == "stop"))
    outcome, said, _ = drive(tmp_path, hear=stop)
    assert outcome.state == "stopped"
    assert 0 < outcome.num_run < NUM_STAGES + 1
    assert sum(line.startswith("stopping: ") for line in said) == 1
    assert (study_folder(tmp_path, "orchestration") / "stop").exists()  # set when there was room


def test_a_drained_node_is_asked_again_if_the_disk_was_full(tmp_path, monkeypatch):
    executor = RayExecutor.__new__(RayExecutor)
    draining = SimpleNamespace(get_draining_nodes=lambda: {"node-7": 0})
    executor._ray = SimpleNamespace(_private=SimpleNamespace(state=SimpleNamespace(state=draining)))
    executor._stop_file = tmp_path / "stop"
    monkeypatch.setattr(Path, "touch", refusing(Path.touch, 1))
    executor._have_drained_nodes_saved()
    assert not (tmp_path / "yield-node-7").exists()
    executor._have_drained_nodes_saved()
    assert (tmp_path / "yield-node-7").exists()
