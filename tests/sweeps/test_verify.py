"""`verify` on a small real study: it finds each kind of damage, and what it mends is whole afterwards."""

import json
import sqlite3

import optuna
import pytest
from mlflow.tracking import MlflowClient

from fffsweep.cli import main
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.config import ConfigError, SweepConfig
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.plan import make_plan
from fffsweep.sweeps.record import load, study_folder
from fffsweep.sweeps.slices import InlineOptions
from fffsweep.sweeps.verify import verify
from tests.sweeps.conftest import Heard

NAME = "tiny-directory"


def test_a_finished_study_is_sound(results):
    found = verify(NAME, results)
    assert found.problems == ()
    assert found.num_artifacts > found.num_stage_runs > 10


def test_a_damaged_artifact_is_named_and_its_result_withdrawn(results):
    store = Store(results / "store")
    manifest = next(m for m in map(store.get, store.keys()) if m.run.stage == "pretrain")
    store.object_path(manifest.artifacts["curve.jsonl"].sha256).write_text("{}")
    (problem,) = verify(NAME, results).problems
    assert "'curve.jsonl' of pretrain" in problem
    assert "damaged" in problem
    assert store.has(manifest.key)
    verify(NAME, results, repair=True)
    assert not store.has(manifest.key)


def test_a_store_that_cannot_be_reached_withdraws_nothing(results, monkeypatch):
    store = Store(results / "store")
    keys = list(store.keys())
    with monkeypatch.context() as gone:
        gone.setattr(Store, "get", lambda self, key: (_ for _ in ()).throw(ConnectionError("no answer")))
        with pytest.raises(ConnectionError, match="no answer"):
            verify(NAME, results, repair=True)
    assert list(store.keys()) == keys


def test_lost_projections_are_rebuilt(results):
    with sqlite3.connect(results / "mlflow.db") as database:
        database.execute("update runs set status = 'RUNNING' where name = 'pretrain/0'")
        database.execute("delete from tags where key = 'fffsweep.key' and value in (select value from tags limit 1)")
    (results / "optuna.db").unlink()
    problems = verify(NAME, results).problems
    assert any("left RUNNING" in problem for problem in problems)
    assert any("Optuna holds None" in problem for problem in problems)
    verify(NAME, results, repair=True)
    assert verify(NAME, results).problems == ()
    (study,) = optuna.get_all_study_summaries(sqlite_url(results / "optuna.db"))
    assert study.n_trials == 2


def test_a_record_that_was_cut_off_is_named_and_can_be_written_anew(results, tiny_directory_config):
    path = study_folder(results, NAME) / "study.json"
    path.write_text(path.read_text()[:1000])
    for call in (lambda: verify(NAME, results), lambda: run_sweep(tiny_directory_config, results, Heard(), "inline")):
        with pytest.raises(ConfigError, match=r"study.json: damaged .*, cut off or overwritten; move it away and run"):
            call()
    path.unlink()
    assert run_sweep(tiny_directory_config, results, Heard(), "inline").num_run == 0
    assert verify(NAME, results).problems == ()


def test_unknown_study(tmp_path):
    with pytest.raises(ConfigError, match="there is none"):
        verify("missing", tmp_path)


def test_mlflow_and_optuna_are_built_from_the_manifests_alone(results):
    (results / "mlflow.db").unlink()
    (results / "optuna.db").unlink()
    assert verify(NAME, results).problems != ()
    verify(NAME, results, repair=True)
    found = verify(NAME, results)
    assert found.problems == ()
    client = MlflowClient(tracking_uri=sqlite_url(results / "mlflow.db"))
    runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    assert {run.info.status for run in runs} == {"FINISHED"}
    trials = json.loads((study_folder(results, NAME) / "study.json").read_text())["trials"]
    assert len(runs) == len(trials) + sum(len(trial["stages"]) for trial in trials)
    (study,) = [optuna.load_study(study_name=NAME, storage=sqlite_url(results / "optuna.db"))]
    store = Store(results / "store")
    for trial in (trial for trial in trials if trial["in_study"]):
        metrics = store.get(trial["collect_key"]).metrics
        assert study.trials[trial["number"]].values == [metrics["quality/avg"], metrics["ff/cpu/rel_time"]]


def test_a_record_that_says_more_than_the_store_has_is_corrected(results):
    store, path = Store(results / "store"), study_folder(results, NAME) / "study.json"
    record = json.loads(path.read_text())
    store.forget(record["trials"][0]["collect_key"])
    record["trials"][1]["state"] = record["trials"][1]["stages"][1]["state"] = "running"
    path.write_text(json.dumps(record))
    problems = verify(NAME, results).problems
    assert any("collect of trial" in problem and "recorded as done and has no result" in problem for problem in problems)
    assert any("recorded as running, and no driver is at work" in problem for problem in problems)
    verify(NAME, results, repair=True)
    assert verify(NAME, results).problems == ()
    mended = json.loads(path.read_text())
    assert [trial["state"] for trial in mended["trials"][:2]] == ["waiting", "complete"]
    assert mended["state"] == "stopped"


def test_a_manifest_that_is_not_what_its_key_says_is_withdrawn(results):
    store = Store(results / "store")
    manifest = next(m for m in map(store.get, store.keys()) if m.run.stage == "finetune")
    path = store.manifest_path(manifest.key)
    content = json.loads(path.read_text())
    path.write_text(json.dumps({**content, "run": {**content["run"], "seed": 99}}))
    assert any("holds the result of" in problem for problem in verify(NAME, results).problems)
    path.write_text("{")
    assert any("is damaged" in problem for problem in verify(NAME, results).problems)
    verify(NAME, results, repair=True)
    assert not store.has(manifest.key)


def test_values_whose_constraints_wait_for_the_reference_are_told_when_it_has_come(tiny_directory_config, here):
    values = tiny_directory_config.resolved()
    values["stages"].pop("benchmark_cpu")
    values |= {
        "layouts": ["1x3"],
        "controls": ["reference_dense(15)"],
        "search": {"space": {"stages.finetune.epochs": [1, 2]}},
        "constraints": ["quality_retention >= 0.9"],
        "objectives": {"quality/avg": "maximize", "ff/active_width": "minimize"},
    }
    config = SweepConfig.model_validate(values)
    assert run_sweep(config, here, Heard(), "inline", options=InlineOptions(only=("1x3-t0",))).state == "stopped"
    assert verify(NAME, here).problems == ()
    (here / "optuna.db").unlink()
    assert verify(NAME, here).problems == ()
    assert verify(NAME, here, repair=True).problems == ()
    assert run_sweep(config, here, Heard(), "inline").state == "complete"
    assert verify(NAME, here).problems == ()

    def told():
        (competing, references) = (
            optuna.load_study(study_name=name, storage=sqlite_url(here / "optuna.db")) for name in (NAME, f"{NAME} (reference_dense)")
        )
        assert all(not trial.constraints for trial in references.trials)
        assert len(references.trials) == len(competing.trials) == 2
        return {trial.user_attrs["fffsweep.trial"]: (trial.values, trial.constraints) for trial in competing.trials}

    before, quality = told(), {}
    for trial in load(study_folder(here, NAME))["trials"]:
        quality[trial["id"]] = Store(here / "store").get(trial["collect_key"]).metrics["quality/avg"]
    best = max(quality[f"reference_dense{end}"] for end in ("", "-t0", "-t1"))
    for name, (values, constraints) in before.items():
        assert values[0] == quality[name]
        assert constraints == {"quality_retention >= 0.9": pytest.approx(0.9 - quality[name] / best)}
    (here / "optuna.db").unlink()
    verify(NAME, here, repair=True)
    assert verify(NAME, here).problems == ()
    assert told() == before


@pytest.mark.parametrize("where", ["study", "manifest"])
def test_a_folder_of_another_version_says_what_to_do(results, where, capsys):
    path = study_folder(results, NAME) / "study.json"
    if where == "manifest":
        store = Store(results / "store")
        path = store.manifest_path(next(store.keys()))
    path.write_text(path.read_text().replace(f"fffsweep.{where}/1", f"fffsweep.{where}/0"))
    if where == "study":
        with pytest.raises(ConfigError, match=r"schema 'fffsweep.study/0', expected .*use the fffsweep that wrote it"):
            verify(NAME, results)
    else:
        before = path.read_text()
        found = verify(NAME, results, repair=True)
        assert any("written by another version of fffsweep: use that one" in problem for problem in found.problems)
        assert found.num_left == 1
        assert path.read_text() == before
        for repair in ([], ["--repair"]):
            with pytest.raises(SystemExit) as ended:
                main(["verify", NAME, "--results", str(results), *repair])
            printed = capsys.readouterr().out
            assert (ended.value.code, "mends this" in printed, "repaired" in printed) == (1, False, False)
            assert "left as they are: 1 results" in printed


@pytest.mark.parametrize("stage", ["prepare", "pretrain", "collect"])
def test_a_truncated_manifest_is_named_withdrawn_and_made_again(results, tiny_directory_config, stage):
    store = Store(results / "store")
    manifest = next(m for m in map(store.get, store.keys()) if m.run.stage == stage)
    path = store.manifest_path(manifest.key)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    (problem,) = verify(NAME, results).problems
    assert problem == f"manifest {path} is damaged: it is not a manifest"
    found = verify(NAME, results, repair=True)
    assert (problem in found.problems, found.num_left) == (True, 0)
    assert not store.has(manifest.key)
    assert run_sweep(tiny_directory_config, results, Heard(), "inline").num_run == 1
    assert verify(NAME, results).problems == ()
    assert store.get(manifest.key).metrics.keys() == manifest.metrics.keys()


@pytest.mark.parametrize("record", ["with", "without"])
@pytest.mark.parametrize("stage", ["pretrain", "collect"])
def test_a_run_makes_again_what_it_cannot_read(results, tiny_directory_config, monkeypatch, stage, record):
    monkeypatch.setattr("fffsweep.sweeps.controller._RETRY_WAIT_S", 0.0)
    store = Store(results / "store")
    trial = load(study_folder(results, NAME))["trials"][-1]
    keys = {each["name"]: each["key"] for each in trial["stages"]}
    path = store.manifest_path(keys[stage])
    path.write_bytes(path.read_bytes()[:40])
    if stage == "pretrain":
        store.forget(keys["finetune"])  # it reads the one that is damaged
    if record == "without":
        (study_folder(results, NAME) / "study.json").unlink()
    listener = Heard()
    outcome = run_sweep(tiny_directory_config, results, listener, "inline")
    assert (outcome.state, outcome.failed_trials, outcome.num_run) == ("complete", (), 1 if stage == "collect" else 2)
    assert any(f"manifest {path} is damaged" in line for line in listener.lines)
    assert store.get(keys[stage]).run.stage == stage
    assert verify(NAME, results).problems == ()


def test_a_damaged_manifest_does_not_keep_plans_from_being_made(results, tiny_directory_config):
    for path in (results / "store" / "manifests").glob("*/*.json"):
        path.write_text("{")
    assert make_plan(tiny_directory_config, results).study == NAME
