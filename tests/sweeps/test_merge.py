"""A search begun at two sites: what both drew under one name are two trials, and none is lost or mixed up when one is imported."""

import json
import shutil
from collections import Counter

import optuna
import pytest

from fffsweep.dashboards.queries import load_study
from fffsweep.sweeps import optuna_study
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.import_results import import_results, to_lines
from fffsweep.sweeps.merge import Names, decisions_of
from fffsweep.sweeps.optuna_study import OptunaStudy
from fffsweep.sweeps.record import load, study_folder
from fffsweep.sweeps.search import Search
from fffsweep.sweeps.verify import verify
from tests.sweeps.conftest import Heard

NAME = "begun-twice"
RATE = "stages.pretrain.learning_rate"


@pytest.fixture(scope="module")
def config(tiny_directory_config):
    values = tiny_directory_config.resolved()
    values["stages"].pop("benchmark_cpu")
    values["stages"]["pretrain"] |= {"steps": 24, "schedule": "wsd"}
    values |= {
        "name": NAME,
        "layouts": ["1x3"],
        "controls": ["reference_dense(15)"],
        "sampler": "tpe",
        "search": {"num_trials": 3, "space": {RATE: {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}},
        "early_stopping": {"eta": 3, "rungs": 1},
        "objectives": {"quality/avg": "maximize", "ff/active_width": "minimize"},
    }
    return SweepConfig.model_validate(values)


@pytest.fixture(scope="module")
def sites(tmp_path_factory, config):
    """Two results folders in which the same search drew other points: at another site it knew of other results."""
    here, there = (tmp_path_factory.mktemp(name) / "results" for name in ("here", "there"))
    derived = optuna_study.derived_seed
    with pytest.MonkeyPatch.context() as patch:
        for folder, shift in ((here, 0), (there, 1)):
            patch.setattr(optuna_study, "derived_seed", lambda seed, name, shift=shift: derived(seed + shift, name))
            assert run_sweep(config, folder, Heard(), "inline").state == "complete"
    return here, there


def trials_of(results):
    """Point and model -> what became of it, whatever its name."""
    record, view = load(study_folder(results, NAME)), load_study(results, NAME)
    metrics = {trial.id: trial.metrics for trial in view.trials}
    found = {
        json.dumps([trial["point"], trial["layout"], trial["stratum"]]): (trial["state"], trial["collect_key"], metrics[trial["id"]])
        for trial in record["trials"]
    }
    assert len(found) == len(record["trials"])
    return found


def check_optuna(results):
    """Every trial of ours has a trial of Optuna with its point, and its values if it has any."""
    for name, in_study in ((NAME, True), (f"{NAME} (reference_dense)", False)):
        study = optuna.load_study(study_name=name, storage=sqlite_url(results / "optuna.db"))
        ours = [t for t in load(study_folder(results, NAME))["trials"] if t["in_study"] == in_study and t["stratum"] is not None]
        metrics = {trial.id: trial.metrics for trial in load_study(results, NAME).trials}
        assert len({trial["number"] for trial in ours}) == len(ours) > 0
        for trial in ours:
            told = study.trials[trial["number"]]
            assert told.params[RATE] == trial["point"][RATE]
            assert told.state.name == {"complete": "COMPLETE", "pruned": "PRUNED"}[trial["state"]]
            if trial["state"] == "complete":
                assert told.values == [metrics[trial["id"]][name] for name in ("quality/avg", "ff/active_width")]


def test_no_trial_is_lost_or_mixed_up(sites, config, tmp_path):
    here = shutil.copytree(sites[0], tmp_path / "here")
    expected = trials_of(sites[1]) | trials_of(sites[0])
    assert len(expected) == 1 + 2 * 6
    imported = import_results(sites[1], here)
    assert len(imported.renamed) == 6
    assert f"{NAME}: trial 1x3-t0 of there is 1x3-t3 here, where that name is another point's" in to_lines(imported)
    assert trials_of(here) == expected
    assert Counter(state for state, *_ in expected.values())["pruned"] == 8
    check_optuna(here)
    assert verify(NAME, here).problems == ()

    for _ in range(2):  # the second time after an import of the same again
        outcome = run_sweep(config, here, Heard(), "inline")
        assert (outcome.state, outcome.num_run) == ("complete", 0)
        assert trials_of(here) == expected
        check_optuna(here)
        assert verify(NAME, here).problems == ()
        decisions = list(Decisions(study_folder(here, NAME)).read())
        assert import_results(sites[1], here).num_new == 0
        assert trials_of(here) == expected
        assert list(Decisions(study_folder(here, NAME)).read()) == decisions


def test_a_trial_that_is_unfinished_here_keeps_its_point(sites, config, tmp_path):
    here = shutil.copytree(sites[0], tmp_path / "here")
    path = study_folder(here, NAME) / "study.json"
    record = json.loads(path.read_text())
    ours = next(trial for trial in record["trials"] if trial["stratum"] == "1x3" and trial["state"] == "complete")
    ours["state"], ours["collect_key"], ours["stages"][-1]["state"] = "waiting", None, "waiting"
    path.write_text(json.dumps(record))
    import_results(sites[1], here)
    after = {trial["id"]: trial for trial in load(study_folder(here, NAME))["trials"]}
    assert after[ours["id"]]["point"] == ours["point"]
    assert run_sweep(config, here, Heard(), "inline").num_run == 0
    assert trials_of(here) == trials_of(sites[1]) | trials_of(sites[0])


def test_what_cannot_have_another_name_is_refused_before_anything_is_written(sites, tmp_path):
    here, there = (shutil.copytree(site, tmp_path / name) for site, name in zip(sites, ("here", "there"), strict=True))
    for folder in (here, there):  # such a sampler has one point for each name
        path = study_folder(folder, NAME) / "study.json"
        path.write_text(path.read_text().replace('"sampler": "tpe"', '"sampler": "random"'))
    before = {path: path.read_bytes() for path in here.rglob("*") if path.is_file() and "driver" not in path.parts}
    with pytest.raises(ConfigError, match=r"1x3-t0 and 2 more of there are other trials than .*nothing was imported: import them into"):
        import_results(there, here)
    assert {path: path.read_bytes() for path in here.rglob("*") if path.is_file() and "driver" not in path.parts} == before


def test_a_seed_that_failed_elsewhere_takes_none_from_a_trial_that_stays_as_it_is_here():
    names = Names({"4x3": "4x3", "1x8": "1x8"})
    theirs = [{"trial": "4x3", "seeds": 1}, {"trial": "1x8", "seeds": 2}, {"trial": "4x3", "promoted": 1}]
    assert list(decisions_of(theirs, [], names, {"1x8"})) == theirs[1:]


def test_optuna_tells_points_of_one_name_apart(tmp_path):
    space = Search.model_validate({"space": {"rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}}).space
    url = f"sqlite:///{tmp_path}/optuna.db"
    objectives = {"quality/avg": "maximize"}
    study = OptunaStudy(url, "s", objectives, "tpe")
    orphan = study.draw("1x3-t0", 3, space, {})
    assert study.open("1x3-t0", orphan, space, {}) == 0
    assert study.open("1x3-t0", {"rate": 2e-3}, space, {}) == 1
    study.tell("1x3-t0", [0.5])
    again = OptunaStudy(url, "s", objectives, "tpe")
    assert again.open("1x3-t0", {"rate": 2e-3}, space, {}) == 1
    assert again.values_of("1x3-t0") == [0.5]
    trials = optuna.load_study(study_name="s", storage=url).trials
    assert [(trial.state.name, trial.values) for trial in trials] == [("FAIL", None), ("COMPLETE", [0.5])]
    assert trials[1].params == {"rate": 2e-3}
