"""Trials that come while a sweep runs, that grow, and that are left for another call."""

import shutil
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest

from fffsweep.sweeps import controller, executors
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.executors import Event
from fffsweep.sweeps.record import load, study_folder
from fffsweep.sweeps.slices import InlineOptions
from fffsweep.sweeps.strategy import Changes, FixedTrials
from tests.sweeps.toy import Toy, drive, empty_database, planned, plans_of, results, toys

__all__ = ["empty_database", "results", "toys"]  # fixtures, some for every test


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
