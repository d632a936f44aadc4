"""What someone sees who opens MLflow: named, nested, described runs, and the report beside them. Read back by MLflow's public calls."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from mlflow.artifacts import download_artifacts
from mlflow.tracking import MlflowClient

from fffsweep.dashboards import published
from fffsweep.dashboards.queries import load_study
from fffsweep.pipeline.store import Store
from fffsweep.pipeline.tracked_run import ended_trial, finished_stage, open_trial
from fffsweep.pipeline.tracking import Tracker
from fffsweep.sweeps.backends import artifact_root, mlflow_uri
from fffsweep.sweeps.record import study_folder


@pytest.fixture(scope="module")
def told(generated, tmp_path_factory):
    """A generated study, told to MLflow as its driver tells it."""
    results = tmp_path_factory.mktemp("told")
    generated.generate(results, "told", layouts=("512x0", "1x8"), controls=("reference_dense(512)",), replicates=2, steps=5)
    store, runs = Store(results / "store"), []
    for trial in json.loads((study_folder(results, "told") / "study.json").read_text())["trials"]:
        runs.append(open_trial(trial["id"], {"trial": {"id": trial["id"]}}, {"layout": trial["layout"], "mlflow.note.content": "A trial"}))
        runs += [finished_stage(trial["id"], stage["label"], store.get(stage["key"]), store) for stage in trial["stages"]]
        runs.append(ended_trial(trial["id"], "FINISHED", store.get(trial["collect_key"]).metrics, trial["collect_key"]))
    tracker = Tracker(mlflow_uri(results), "told", artifact_root(results))
    tracker.write(runs)
    tracker.close()
    return results


def test_mlflow_is_good_to_browse(told, tmp_path):
    client, view = MlflowClient(tracking_uri=mlflow_uri(told)), load_study(told, "told")
    first = published.publish_report(view)
    assert published.publish_report(view) == first, "made of the same results, it stays as it is"
    experiment = client.get_experiment_by_name("told")
    assert "depth" in experiment.tags["mlflow.note.content"]
    runs = client.search_runs([experiment.experiment_id], max_results=1000)
    parents = {run.info.run_name: run for run in runs if "mlflow.parentRunId" not in run.data.tags}
    assert set(parents) == {"report", *(trial.id for trial in view.trials)}
    for trial in view.trials:
        own = parents[trial.id]
        children = [run for run in runs if run.data.tags.get("mlflow.parentRunId") == own.info.run_id]
        assert {run.info.run_name for run in children} == {stage["label"] for stage in trial.stages}
        assert own.data.metrics.keys() == trial.metrics.keys()
        for run in children:
            assert trial.id in run.data.tags["mlflow.note.content"]
            assert all("/" in name for name in run.data.metrics), "grouped by the page"
    for run in runs:
        assert run.info.status == "FINISHED"
        assert run.data.tags["mlflow.note.content"]
    figures = {each.path for each in client.list_artifacts(first, "figures")}
    assert {"figures/pareto.svg", "figures/quality-depth.svg"} <= figures
    page = download_artifacts(run_id=first, artifact_path="report.html", dst_path=str(tmp_path), tracking_uri=mlflow_uri(told))
    assert "<h1>told</h1>" in Path(page).read_text()


def test_a_newer_report_takes_the_place_of_the_old(told, monkeypatch):
    client, view = MlflowClient(tracking_uri=mlflow_uri(told)), load_study(told, "told")
    before = published.publish_report(view)
    monkeypatch.setattr(published.fffsweep, "__version__", "of the test")
    after = published.publish_report(view)
    assert after != before
    experiment = client.get_experiment_by_name("told").experiment_id
    assert [run.info.run_id for run in client.search_runs([experiment], "attributes.run_name = 'report'")] == [after]
    assert not [line for line in Tracker(mlflow_uri(told), "told").audit({}, view.store) if "report" in line or "RUNNING" in line]


def test_what_cannot_be_given_is_said(told, fresh, monkeypatch):
    assert published.publish_report(fresh) is None
    with monkeypatch.context() as without:
        without.setattr(published, "is_installed", lambda module: False)
        assert published.publish_report(load_study(told, "told")) is None
    monkeypatch.setenv("FFFSWEEP_MLFLOW_URI", "http://127.0.0.1:9")
    with pytest.raises(published.NotLogged, match="--repair"):
        published.publish_report(load_study(told, "told"))
