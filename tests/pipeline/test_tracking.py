"""MLflow as a projection: complete, nested, and the same however often it is told."""

import json
import subprocess
import sys
import time

import pytest
from mlflow.exceptions import MlflowException
from mlflow.tracking import MlflowClient

from fffsweep.pipeline.stage import StageRun
from fffsweep.pipeline.store import Store
from fffsweep.pipeline.tracked_run import ended_trial, failed_stage, finished_stage, open_trial
from fffsweep.pipeline.tracking import Tracker, register_model


@pytest.fixture(scope="module")
def uri(tmp_path_factory):
    return f"sqlite:///{tmp_path_factory.mktemp('mlflow')}/mlflow.db"


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


def published(store, tmp_path):
    prepare = StageRun("prepare", 1, {"source": "wheels"}, 0, {}, {"data": "abc"})
    output = tmp_path / "output"
    output.mkdir()
    store.publish(prepare, {}, output, {}, 1.0, 1.0)
    (output / "curve.jsonl").write_text("".join(json.dumps({"step": n, "loss": 9.0 - n, "validation_loss": None}) + "\n" for n in range(3)))
    pretrain = StageRun("pretrain", 1, {"model": {"hidden_size": 8}, "tokens": 10}, 7, {"prepare": prepare.key})
    where = {"commit": "c0ffee", "dirty": False, "versions": {"torch": "2"}, "device": "cpu", "machine": {"cpu": "x"}, "data": "abc"}
    return store.publish(pretrain, {"mlm/validation_loss": 6.5}, output, where, 100.0, 2.5)


def runs_of(uri, experiment):
    client = MlflowClient(tracking_uri=uri)
    return client.search_runs([client.get_experiment_by_name(experiment).experiment_id])


def test_a_trial_is_a_parent_run_and_its_stages_are_children(uri, store, tmp_path):
    manifest = published(store, tmp_path)
    for _ in range(2):  # a second driver tells everything again and changes nothing
        tracker = Tracker(uri, "nested", tmp_path / "artifacts")
        tracker.write(
            [
                open_trial("1x8", {"name": "nested", "model": {"depth": 8}}, {"layout": "1x8"}),
                finished_stage("1x8", "pretrain/0", manifest, store),
                ended_trial("1x8", "FINISHED", {"quality/avg": 50.0}, "key"),
            ]
        )
        tracker.close()
    runs = {run.info.run_name: run for run in runs_of(uri, "nested")}
    assert sorted(runs) == ["1x8", "pretrain/0"]
    parent, child = runs["1x8"], runs["pretrain/0"]
    assert child.data.tags["mlflow.parentRunId"] == parent.info.run_id
    assert {run.info.status for run in runs.values()} == {"FINISHED"}
    assert parent.data.metrics == {"quality/avg": 50.0}
    assert parent.data.params["model.depth"] == "8"
    assert child.data.metrics == {"mlm/validation_loss": 6.5, "curve/loss": 7.0}
    assert child.data.params == {"model.hidden_size": "8", "tokens": "10"}
    expected = {"seed": "7", "commit": "c0ffee", "dirty": "False", "device": "cpu", "data": "abc", "fffsweep.key": manifest.key}
    assert {name: child.data.tags[name] for name in expected} == expected
    assert child.info.end_time - child.info.start_time == 2500
    curve = MlflowClient(tracking_uri=uri).get_metric_history(child.info.run_id, "curve/loss")
    assert [(point.step, point.value) for point in curve] == [(0, 9.0), (1, 8.0), (2, 7.0)]


def test_a_process_killed_while_it_lays_out_the_database_leaves_none(tmp_path):
    """Of MLflow's migrations no half can be mended: every later driver would be refused."""
    program = "import sys; from fffsweep.pipeline.tracking import Tracker; Tracker(sys.argv[1], 'killed')"
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    killed = subprocess.Popen([sys.executable, "-P", "-c", program, uri])
    while not any(path.stat().st_size for path in tmp_path.glob(".mlflow.db.*")):
        assert killed.poll() is None
        time.sleep(0.001)
    killed.kill()
    killed.wait()
    assert not (tmp_path / "mlflow.db").exists()
    tracker = Tracker(uri, "again")
    tracker.write([open_trial("1x8", {}, {})])
    assert len(runs_of(uri, "again")) == 1


def test_no_run_is_left_running_and_a_resumed_trial_is_finished(uri, store, tmp_path):
    Tracker(uri, "killed", tmp_path).write([open_trial("1x8", {}, {})])
    second = Tracker(uri, "killed", tmp_path)
    second.close()
    assert [run.info.status for run in runs_of(uri, "killed")] == ["KILLED"]
    third = Tracker(uri, "killed", tmp_path)
    third.write([open_trial("1x8", {}, {})])
    third.write([ended_trial("1x8", "FINISHED", {"quality/avg": 1.0}, "key")])
    third.close()
    assert [run.info.status for run in runs_of(uri, "killed")] == ["FINISHED"]


def test_the_run_of_a_pick_or_report_under_way_is_not_the_tracker_s(uri, store, tmp_path):
    """They lie in the same experiment and are other processes', which end them themselves."""
    tracker = Tracker(uri, "shared", tmp_path)
    tracker.write([open_trial("1x8", {}, {})])
    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name("shared").experiment_id
    client.create_run(experiment, tags={"fffsweep.pick": "champion"}, run_name="pick champion")
    second = Tracker(uri, "shared", tmp_path)
    assert second.audit({}, store, repair=True) == ["MLflow run 1x8 of 1x8 is left RUNNING"]
    second.close()
    statuses = {run.info.run_name: run.info.status for run in runs_of(uri, "shared")}
    assert statuses == {"1x8": "KILLED", "pick champion": "RUNNING"}


def test_a_model_that_cannot_be_registered_leaves_a_failed_run(uri, tmp_path):
    Tracker(uri, "unregistered", tmp_path)
    with pytest.raises((OSError, MlflowException)):
        register_model(uri, "unregistered", "no model", "champion", tmp_path / "nothing there", "", {}, {})
    assert [run.info.status for run in runs_of(uri, "unregistered")] == ["FAILED"]


def test_a_trial_that_grew_shows_its_new_values(uri, tmp_path):
    tracker = Tracker(uri, "grown", tmp_path)
    tracker.write([open_trial("1x8", {}, {})])
    tracker.write([ended_trial("1x8", "FINISHED", {"quality/avg": 1.0}, "one seed")])
    tracker.write([ended_trial("1x8", "FINISHED", {"quality/avg": 9.0}, "one seed")])
    assert [run.data.metrics for run in runs_of(uri, "grown")] == [{"quality/avg": 1.0}]
    tracker.write([ended_trial("1x8", "FINISHED", {"quality/avg": 2.0}, "two seeds")])
    assert [run.data.metrics for run in runs_of(uri, "grown")] == [{"quality/avg": 2.0}]


def test_an_audit_finds_and_mends_what_no_result_backs(uri, store, tmp_path):
    manifest = published(store, tmp_path)
    tracker = Tracker(uri, "audited", tmp_path)
    tracker.write([open_trial("1x8", {}, {})])
    expected = {("1x8", "pretrain/0"): manifest.key}
    assert tracker.audit(expected, store) == ["MLflow run 1x8 of 1x8 is left RUNNING", "MLflow has no run pretrain/0 of 1x8"]
    tracker.write([finished_stage("1x8", "pretrain/0", manifest, store)])
    tracker.write([ended_trial("1x8", "FINISHED", {}, "key")])
    assert tracker.audit(expected, store) == []
    store.forget(manifest.key)
    assert tracker.audit({}, store, repair=True) == ["MLflow run pretrain/0 of 1x8 has no result of its own"]
    assert tracker.audit({}, store) == []


def test_a_failed_stage_is_a_failed_run_with_its_reason(uri, tmp_path):
    tracker = Tracker(uri, "failed", tmp_path)
    tracker.write([open_trial("1x8", {}, {})])
    tracker.write([failed_stage("1x8", "pretrain/0", "k" * 40, "ValueError: loss is NaN")])
    tracker.write([ended_trial("1x8", "FAILED", {}, "")])
    runs = {run.info.run_name: run for run in runs_of(uri, "failed")}
    assert {run.info.status for run in runs.values()} == {"FAILED"}
    assert runs["pretrain/0"].data.tags["error"] == "ValueError: loss is NaN"
