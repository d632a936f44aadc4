"""Results made elsewhere become results made here: whole, verified, and told to MLflow and Optuna; what is damaged stays out."""

import json
import shutil

import optuna
import pytest
from mlflow.tracking import MlflowClient

from fffsweep.dashboards.choice import ChoiceError, export_trial
from fffsweep.dashboards.queries import load_study
from fffsweep.pipeline.store import AbsentArtifact, Store
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.import_results import SUMS, export_results, import_results
from fffsweep.sweeps.record import study_folder
from fffsweep.sweeps.verify import verify

NAME = "tiny-directory"


@pytest.fixture
def exported(swept, tmp_path):
    export_results(NAME, swept, tmp_path / "export", without_weights=True)
    return tmp_path / "export"


def figures(results):
    return {trial.id: (trial.state, trial.metrics) for trial in load_study(results, NAME).trials}


def test_a_whole_results_folder_is_merged(swept, here):
    imported = import_results(swept, here)
    num_runs = len(list(Store(swept / "store").keys()))
    assert (imported.studies, imported.num_new, imported.num_known, imported.problems) == ((NAME,), num_runs, 0, ())
    assert figures(here) == figures(swept)
    assert verify(NAME, here).problems == ()
    client = MlflowClient(tracking_uri=sqlite_url(here / "mlflow.db"))
    runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    (study,) = optuna.get_all_study_summaries(sqlite_url(here / "optuna.db"))
    assert study.n_trials == 2
    again = import_results(swept, here)
    assert (again.num_new, again.num_known) == (0, num_runs)
    assert verify(NAME, here).problems == ()


def test_a_server_that_is_gone_keeps_no_study_from_being_imported(swept, here, tmp_path, monkeypatch):
    there = shutil.copytree(swept, tmp_path / "there")
    other = study_folder(there, "another one")
    shutil.copytree(study_folder(there, NAME), other)
    (other / "study.json").write_text((other / "study.json").read_text().replace(f'"name": "{NAME}"', '"name": "another one"'))
    monkeypatch.setattr("fffsweep.sweeps.import_results.project", lambda *arguments: 3)
    expected = "not told of 6 runs: fffsweep verify 'another one' --repair and fffsweep verify tiny-directory --repair tells them"
    with pytest.raises(ConfigError, match=expected):
        import_results(there, here)
    for name in (NAME, "another one"):
        assert {trial.state for trial in load_study(here, name).trials} == {"complete"}


def test_weights_may_stay_behind(swept, exported, here):
    imported = import_results(exported, here)
    assert imported.problems == ()
    assert imported.num_absent > 0
    assert figures(here) == figures(swept)
    found = verify(NAME, here)
    assert found.problems == ()
    assert found.num_absent == imported.num_absent
    assert f"{imported.num_absent} artifacts were left behind" in found.sound
    view = load_study(here, NAME)
    with pytest.raises(ChoiceError, match="left behind where it was made; import it with its weights"):
        export_trial(view, view.finished[0].id, here / "model")
    assert not (here / "model").exists()
    store = Store(here / "store")
    pretrain = next(m for m in map(store.get, store.keys()) if m.run.stage == "pretrain")
    assert pretrain.artifacts["model/model.safetensors"].absent
    with pytest.raises(AbsentArtifact, match="left behind where it was made"):
        store.read(pretrain, "model/model.safetensors")
    assert store.read(pretrain, "curve.jsonl").exists()
    import_results(swept, here)  # now with them
    assert verify(NAME, here).num_absent == 0
    assert store.read(store.get(pretrain.key), "model/model.safetensors").exists()


def test_what_is_damaged_is_named_and_left_out(exported, here):
    source = Store(exported / "store")
    pretrain = next(m for m in map(source.get, source.keys()) if m.run.stage == "pretrain")
    source.object_path(pretrain.artifacts["curve.jsonl"].sha256).write_text("{}")
    collect = next(m for m in map(source.get, source.keys()) if m.run.stage == "collect")
    path = source.manifest_path(collect.key)
    path.write_text(path.read_text().replace('"quality/avg": ', '"quality/avg": 1'))
    problems = import_results(exported, here).problems
    assert any("'curve.jsonl' of pretrain" in problem and problem.endswith("left out") for problem in problems)
    assert any(collect.key in problem and SUMS in problem for problem in problems)
    assert not Store(here / "store").has(pretrain.key)
    assert not Store(here / "store").has(collect.key)
    assert verify(NAME, here).problems == ()
    for trial in load_study(here, NAME).trials:
        lacks = {pretrain.key, collect.key} & {stage["key"] for stage in trial.stages}
        assert trial.state == ("waiting" if lacks else "complete")


def test_a_key_is_computed_again(exported, here):
    (exported / SUMS).unlink()
    source = Store(exported / "store")
    path = source.manifest_path(next(m for m in map(source.get, source.keys()) if m.run.stage == "collect").key)
    content = json.loads(path.read_text())
    content["run"]["version"] += 1
    path.write_text(json.dumps(content))
    (problem,) = import_results(exported, here).problems
    assert "holds the result of" in problem


def test_another_study_of_that_name_is_refused(exported, swept, here):
    shutil.copytree(swept, here, dirs_exist_ok=True)
    path = study_folder(here, NAME) / "study.json"
    path.write_text(path.read_text().replace('"steps": 4', '"steps": 5'))
    before = sorted((path, path.stat().st_size) for path in (here / "store").rglob("*"))
    with pytest.raises(ConfigError, match=r"exists with another config .*steps"):
        import_results(exported, here)
    assert sorted((path, path.stat().st_size) for path in (here / "store").rglob("*")) == before


def test_there_must_be_something_to_import(tmp_path, swept):
    with pytest.raises(ConfigError, match="expected a results folder"):
        import_results(tmp_path, tmp_path / "here")
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        export_results(NAME, swept, swept)
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match="expected a new or empty folder"):
        export_results(NAME, swept, tmp_path / "file")
    with pytest.raises(ConfigError, match="there is none"):
        export_results("missing", swept, tmp_path / "export")
