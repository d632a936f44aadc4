"""The Optuna study of a sweep: one trial for each of ours, whatever is killed and told again."""

import optuna
import pytest

from fffsweep.sweeps.optuna_study import OptunaStudy, sqlite_url

OBJECTIVES = {"quality/avg": "maximize", "ff/cpu/rel_time": "minimize"}


@pytest.fixture
def url(tmp_path):
    return sqlite_url(tmp_path / "optuna.db")


def trials_of(url):
    return optuna.load_study(study_name="s", storage=url).trials


def test_asked_and_told(url):
    study = OptunaStudy(url, "s", OBJECTIVES)
    assert [study.ask("34x3", "key", 34, 3, {"layout": "34x3"}), study.ask("1x8", "key", 1, 8, {"layout": "1x8"})] == [0, 1]
    study.tell("1x8", [50.0, 0.1])
    first, second = trials_of(url)
    assert first.state == optuna.trial.TrialState.RUNNING
    assert second.values == [50.0, 0.1]
    assert second.params == {"trees": 1, "depth": 8}
    assert second.user_attrs["layout"] == "1x8"


def test_a_second_driver_finds_its_trials_again(url):
    OptunaStudy(url, "s", OBJECTIVES).ask("34x3", "key", 34, 3, {})
    again = OptunaStudy(url, "s", OBJECTIVES)
    assert again.ask("34x3", "key", 34, 3, {}) == 0
    again.tell("34x3", [1.0, 1.0])
    again.tell("34x3", [2.0, 2.0])
    third = OptunaStudy(url, "s", OBJECTIVES)
    third.ask("34x3", "key", 34, 3, {})
    third.tell("34x3", [3.0, 3.0])
    assert [trial.values for trial in trials_of(url)] == [[1.0, 1.0]]


def test_an_extended_study_keeps_its_trials(url):
    study = OptunaStudy(url, "s", OBJECTIVES)
    study.ask("1x8", "key", 1, 8, {})
    study.tell("1x8", [1.0, 1.0])
    extended = OptunaStudy(url, "s", OBJECTIVES)
    assert [extended.ask("1x8", "key", 1, 8, {}), extended.ask("9999x0", "key", 9999, 0, {})] == [0, 1]


def test_a_failed_trial_is_asked_anew(url):
    study = OptunaStudy(url, "s", OBJECTIVES)
    study.ask("1x8", "key", 1, 8, {})
    study.fail("1x8")
    assert OptunaStudy(url, "s", OBJECTIVES).ask("1x8", "key", 1, 8, {}) == 1


def test_a_trial_with_more_seeds_is_a_new_one(url):
    study = OptunaStudy(url, "s", OBJECTIVES)
    study.ask("1x8", "one seed", 1, 8, {})
    study.tell("1x8", [1.0, 1.0])
    grown = OptunaStudy(url, "s", OBJECTIVES)
    assert grown.ask("1x8", "two seeds", 1, 8, {}) == 1
    grown.tell("1x8", [2.0, 2.0])
    assert grown.values_of("1x8") == OptunaStudy(url, "s", OBJECTIVES).values_of("1x8") == [2.0, 2.0]
