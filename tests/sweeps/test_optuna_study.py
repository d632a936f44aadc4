"""The Optuna study of a sweep. Every sampler passes the same suite, with a made-up objective, killed and resumed too."""

import os
import tempfile
from pathlib import Path

import optuna
import pytest
import torch

from fffsweep.sweeps import optuna_study
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.optuna_study import OptunaStudy, derived_seed, distribution, draw_in_advance
from fffsweep.sweeps.search import Search

OBJECTIVES = {"quality/avg": "maximize", "ff/cpu/rel_time": "minimize"}
SPACE = Search.model_validate(
    {
        "space": {
            "rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True},
            "batch": {"type": "int", "low": 8, "high": 30, "step": 8},
            "clip": {"type": "float", "low": 0.1, "high": 0.55, "step": 0.1},
            "activation": ["gelu", "relu", None],
        }
    }
).space
LEARNING = ["tpe", "nsga2", "nsga3", "gp"]
NUM_TRIALS = 13  # ten of them start up


@pytest.fixture
def folder(tmp_path):
    """In memory where the system has such a place: SQLite waits for a disk at every step."""
    memory = Path("/dev/shm")
    with tempfile.TemporaryDirectory(dir=memory if os.access(memory, os.W_OK) else tmp_path) as name:
        yield Path(name)


@pytest.fixture
def url(folder):
    return sqlite_url(folder / "optuna.db")


@pytest.fixture(autouse=True)
def one_thread():
    """GP's small matrices are quickest on one thread."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def trials_of(url):
    return optuna.load_study(study_name="s", storage=url).trials


def score(point):
    return [point["rate"] * 1000 - point["clip"], point["batch"] / 10]


def search(make_study, sampler, start=0, stop=NUM_TRIALS, parallel=3):
    """Draw and tell with a few trials under way. Returns the points; `make_study` is called anew where a driver would be killed."""
    study, under_way, points = make_study(), [], []
    for number in range(start, stop):
        name = f"1x8-t{number}"
        points.append(study.draw(name, NUM_TRIALS, SPACE, {"trees": 1, "depth": 8}))
        under_way.append((name, points[-1]))
        if len(under_way) == parallel:
            name, point = under_way.pop(0)
            if number % 5 == 4:
                study.prune(name)
            elif number % 7 == 6:
                study.fail(name)
            else:
                study.tell(name, score(point), {"quality_retention >= 0.96": 0.5 - point["clip"]})
        study = make_study() if number % 6 == 5 else study
    return points


@pytest.mark.parametrize("sampler", ["tpe", "nsga2", *(pytest.param(slow, marks=pytest.mark.integration) for slow in ("nsga3", "gp"))])
def test_a_study_killed_again_and_again_draws_what_an_undisturbed_one_draws(sampler, folder):
    whole = OptunaStudy(sqlite_url(folder / "whole.db"), "s", OBJECTIVES, sampler, seed=3)
    expected = search(lambda: whole, sampler)
    found = search(lambda: OptunaStudy(sqlite_url(folder / "killed.db"), "s", OBJECTIVES, sampler, seed=3), sampler)
    assert found == expected
    other = OptunaStudy(sqlite_url(folder / "other.db"), "s", OBJECTIVES, sampler, seed=4)
    assert search(lambda: other, sampler, stop=2) != expected[:2]


@pytest.mark.parametrize("sampler", LEARNING)
def test_points_lie_in_their_ranges_and_start_up_points_do_not_repeat(sampler, url):
    study = OptunaStudy(url, "s", OBJECTIVES, sampler)
    points = [study.draw(f"t{number}", NUM_TRIALS, SPACE, {}) for number in range(6)]
    assert len({point["rate"] for point in points}) == 6
    for point in points:
        assert list(point) == list(SPACE)
        assert 1e-4 <= point["rate"] <= 1e-2
        assert point["batch"] in (8, 16, 24)
        assert round(10 * point["clip"], 9) in (1, 2, 3, 4, 5)
        assert point["activation"] in ("gelu", "relu", None)


@pytest.mark.parametrize("sampler", LEARNING)
def test_a_draw_that_its_driver_never_wrote_down_is_drawn_again_alike(sampler, url):
    first = OptunaStudy(url, "s", OBJECTIVES, sampler).draw("t0", NUM_TRIALS, SPACE, {})
    again = OptunaStudy(url, "s", OBJECTIVES, sampler)
    assert again.draw("t0", NUM_TRIALS, SPACE, {}) == first
    assert len(trials_of(url)) == 1
    optuna.load_study(study_name="s", storage=url).ask({path: distribution(each) for path, each in SPACE.items()})  # killed in between
    third = OptunaStudy(url, "s", OBJECTIVES, sampler)
    assert trials_of(url)[1].state == optuna.trial.TrialState.FAIL
    third.draw("t1", NUM_TRIALS, SPACE, {})
    third.tell("t1", [1.0, 2.0])
    assert trials_of(url)[2].values == [1.0, 2.0]


@pytest.mark.parametrize("sampler", ["random", "qmc"])
def test_points_known_in_advance_depend_on_seed_and_index_alone(sampler):
    points = [draw_in_advance(sampler, 0, "", index, SPACE) for index in range(8)]
    assert points == [draw_in_advance(sampler, 0, "", index, SPACE) for index in range(8)]
    assert len({point["rate"] for point in points}) == 8
    assert points[0] != draw_in_advance(sampler, 1, "", 0, SPACE)
    assert all(list(point) == list(SPACE) and point["batch"] in (8, 16, 24) for point in points)


def test_qmc_fills_the_range_evenly():
    rates = sorted(draw_in_advance("qmc", 0, "", index, {"x": SPACE["clip"].model_copy(update={"step": None})})["x"] for index in range(8))
    places = [int((rate - 0.1) / 0.45 * 8) for rate in rates]
    assert places == list(range(8))


def test_constraints_bear_the_same_names_on_every_finished_trial(url):
    search(lambda: OptunaStudy(url, "s", OBJECTIVES, "nsga2"), "nsga2")
    finished = [trial for trial in trials_of(url) if trial.state == optuna.trial.TrialState.COMPLETE]
    assert len(finished) > 5
    assert {tuple(trial.constraints) for trial in finished} == {("quality_retention >= 0.96",)}


def test_opened_and_told(url):
    study = OptunaStudy(url, "s", OBJECTIVES)
    opened = [study.open(f"{k}x{d}", {"trees": k, "depth": d}, {}, {"layout": f"{k}x{d}"}) for k, d in ((34, 3), (1, 8), (9999, 0))]
    assert opened == [0, 1, 2]
    study.tell("1x8", [50.0, 0.1])
    first, second, _ = trials_of(url)
    assert first.state == optuna.trial.TrialState.RUNNING
    assert (second.values, second.params, second.user_attrs["layout"]) == ([50.0, 0.1], {"trees": 1, "depth": 8}, "1x8")


def test_a_second_driver_finds_its_trials_again(url):
    def opened():
        study = OptunaStudy(url, "s", OBJECTIVES)
        assert study.open("34x3", {"trees": 34, "depth": 3}, {}, {}) == 0
        return study

    opened()
    opened().tell("34x3", [1.0, 1.0])
    opened().tell("34x3", [1.0, 1.0])
    assert [trial.values for trial in trials_of(url)] == [[1.0, 1.0]]


def test_a_pruned_trial_is_not_opened_again_and_a_failed_one_is(url):
    study = OptunaStudy(url, "s", OBJECTIVES)
    for name in ("a", "b"):
        study.open(name, {"trees": 1, "depth": 8}, {}, {})
    study.prune("a")
    study.fail("b")
    again = OptunaStudy(url, "s", OBJECTIVES)
    assert again.is_pruned("a")
    assert again.open("a", {"trees": 1, "depth": 8}, {}, {}) == 0
    assert again.open("b", {"trees": 1, "depth": 8}, {}, {}) == 2
    again.prune("a")
    states = [trial.state.name for trial in trials_of(url)]
    assert states == ["PRUNED", "FAIL", "RUNNING"]


def test_more_seeds_make_a_new_trial_once(url):
    """Optuna cannot change told values; a study that is started again tells both, in order."""
    for _ in range(2):
        study = OptunaStudy(url, "s", OBJECTIVES)
        study.open("1x8", {"trees": 1, "depth": 8}, {}, {"layout": "1x8"})
        for values in ([1.0, 1.0], [2.0, 2.0]):
            study.tell("1x8", values)
        assert study.values_of("1x8") == [2.0, 2.0]
    assert [trial.values for trial in trials_of(url)] == [[1.0, 1.0], [2.0, 2.0]]


def test_seeds_differ_by_name():
    assert len({derived_seed(seed, name) for seed in (0, 1) for name in ("1x8-t0", "1x8-t1", "8x5-t0")}) == 6


@pytest.mark.parametrize("written", [False, True], ids=["nothing was written", "all was written"])
def test_a_database_that_goes_away_is_waited_for(url, monkeypatch, written):
    monkeypatch.setattr(optuna_study, "_FIRST_WAIT_S", 0.0)
    told = []
    study = OptunaStudy(url, "s", OBJECTIVES, "tpe", seed=3, say=told.append)
    whole = OptunaStudy("sqlite://", "s", OBJECTIVES, "tpe", seed=3)

    def lose(name):
        """Have the next call of an Optuna study's method lose its answer."""
        method = getattr(study._study, name)

        def losing(*arguments, **named):
            monkeypatch.setattr(study._study, name, method)
            if written:
                method(*arguments, **named)
            raise optuna.exceptions.StorageInternalError("gone")

        monkeypatch.setattr(study._study, name, losing)

    lose("ask")
    assert study.draw("new", 9, SPACE, {}) == whole.draw("new", 9, SPACE, {})
    lose("add_trial")
    number = study.open("4x1", {"trees": 4, "depth": 1}, {}, {"layout": "4x1"})
    lose("tell")
    study.tell("4x1", [50.0, 0.5])
    lose("tell")
    study.prune("new")
    assert told == ["Optuna's database cannot be reached; the sweep waits for it", "Optuna's database can be reached again"] * 4
    ended = {trial.user_attrs.get("fffsweep.trial"): (trial.state.name, trial.values) for trial in trials_of(url)}
    orphan = {None: ("FAIL", None)} if written else {}
    assert ended == {"new": ("PRUNED", None), "4x1": ("COMPLETE", [50.0, 0.5])} | orphan
    assert trials_of(url)[number].user_attrs["fffsweep.trial"] == "4x1"


def test_a_database_that_stays_away_ends_it(url, monkeypatch):
    monkeypatch.setattr(optuna_study, "_PATIENCE_S", 0.0)
    study = OptunaStudy(url, "s", OBJECTIVES)

    def gone(*arguments, **named):
        raise optuna.exceptions.StorageInternalError("gone")

    monkeypatch.setattr(study._study, "add_trial", gone)
    with pytest.raises(optuna.exceptions.StorageInternalError, match="gone"):
        study.open("4x1", {"trees": 4, "depth": 1}, {}, {})


def test_a_study_of_that_name_with_other_objectives_is_refused(url):
    OptunaStudy(url, "s", OBJECTIVES, "tpe")
    for objectives in ({"quality/avg": "minimize", "ff/cpu/rel_time": "minimize"}, {"quality/avg": "maximize"}, {"a": "maximize"}):
        with pytest.raises(ConfigError, match=r"study 's' with other objectives \(quality/avg: maximize, .* choose another --name"):
            OptunaStudy(url, "s", objectives, "tpe")
    assert OptunaStudy(url, "s", OBJECTIVES, "tpe").values_of("1x8-t0") is None


def test_a_point_of_another_space_under_that_name_is_not_taken(url):
    """The results folder is new, the database is not: the name means a trial of an earlier sweep."""
    before = OptunaStudy(url, "s", OBJECTIVES, "tpe")
    before.draw("1x8-t0", 3, {"rate": SPACE["rate"]}, {"trees": 1, "depth": 8})
    other = Search.model_validate(
        {"space": {"rate": {"type": "float", "low": 0.5, "high": 0.6, "log": True}, "activation": ["tanh"]}}
    ).space
    study = OptunaStudy(url, "s", OBJECTIVES, "tpe")
    point = study.draw("1x8-t0", 3, other, {"trees": 1, "depth": 8})
    assert 0.5 <= point["rate"] <= 0.6
    assert study.draw("1x8-t0", 3, other, {"trees": 1, "depth": 8}) == point
    assert study.draw("1x8-t0", 3, other, {"trees": 2, "depth": 8}).keys() == point.keys()
    assert [trial.state.name for trial in trials_of(url)] == ["FAIL", "FAIL", "RUNNING"]
    assert [trial.params["trees"] for trial in trials_of(url)] == [1, 1, 2]
    other = Search.model_validate({"space": {"activation": ["tanh", "relu"]}}).space
    for call in (lambda again: again.draw("1x8-t1", 3, other, {}), lambda again: again.open("1x8-t2", {"activation": "relu"}, other, {})):
        with pytest.raises(ConfigError, match=r"study 's' with another range of activation \(.*\), of another sweep of that name"):
            call(OptunaStudy(url, "s", OBJECTIVES, "tpe"))
    assert len(trials_of(url)) == 3


def test_values_that_an_earlier_extent_gave_again_are_known(url):
    study = OptunaStudy(url, "s", OBJECTIVES, "tpe")
    study.draw("1x8-t0", 3, SPACE, {})
    for values in ([1.0, 2.0], [1.5, 2.0], [1.0, 2.0]):  # one seed, two, and one again
        study.tell("1x8-t0", values)
    again = OptunaStudy(url, "s", OBJECTIVES, "tpe")
    assert [again.has_told("1x8-t0", values) for values in ([1.0, 2.0], [1.5, 2.0], [1.2, 2.0])] == [True, True, False]
    assert not again.has_told("1x8-t1", [1.0, 2.0])
    assert len(trials_of(url)) == 2
