"""A sweep whose MLflow and Optuna are servers on PostgreSQL: run, extended, checked, rebuilt; servers that go and come back."""

import json

import optuna
import pytest
from mlflow.tracking import MlflowClient

from fffsweep.pipeline.store import Store
from fffsweep.pipeline.tracked_run import ended_trial, open_trial
from fffsweep.pipeline.tracking import Tracker
from fffsweep.sweeps.backlog import Backlog
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.record import study_folder
from fffsweep.sweeps.verify import verify
from tests.sweeps.conftest import Heard

pytestmark = [pytest.mark.integration, pytest.mark.postgres, pytest.mark.slow]


@pytest.fixture(scope="module")
def database(servers):
    if not servers.has_postgres():
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    with servers.postgres() as running:
        yield running


@pytest.fixture(scope="module")
def address(servers, database, tmp_path_factory):
    with servers.mlflow_server(database.url("mlflow"), tmp_path_factory.mktemp("server")) as url:
        yield url


def statuses(uri, name):
    client = MlflowClient(tracking_uri=uri)
    return [run.info.status for run in client.search_runs([client.get_experiment_by_name(name).experiment_id])]


@pytest.mark.parametrize("through", ["server", "database"])
def test_a_sweep_is_told_to_servers_and_goes_on(through, database, address, servers, sweep_config, tmp_path, monkeypatch):
    uri = address if through == "server" else database.url("mlflow")
    monkeypatch.setenv("FFFSWEEP_MLFLOW_URI", uri)
    secret = tmp_path / "optuna-url"
    secret.write_text(database.url("optuna"))
    monkeypatch.setenv("FFFSWEEP_OPTUNA_URL_FILE", str(secret))
    results, name = tmp_path / "results", f"words-{through}"
    smaller = SweepConfig.model_validate({**sweep_config.resolved(), "name": name, "layouts": ["15x0"]})
    assert run_sweep(smaller, results, Heard(), "inline").state == "complete"
    larger = SweepConfig.model_validate({**sweep_config.resolved(), "name": name})
    outcome = run_sweep(larger, results, Heard(), "inline")
    assert (outcome.state, outcome.num_reused > 5) == ("complete", True)
    assert verify(name, results).problems == ()
    record = json.loads((study_folder(results, name) / "study.json").read_text())
    num_runs = len(record["trials"]) + sum(len(trial["stages"]) for trial in record["trials"])
    assert statuses(uri, name) == ["FINISHED"] * num_runs
    study = optuna.load_study(study_name=name, storage=database.url("optuna"))
    store = Store(results / "store")
    told = {trial.number: trial.values for trial in study.trials}
    for trial in (trial for trial in record["trials"] if trial["in_study"]):
        metrics = store.get(trial["collect_key"]).metrics
        assert told[trial["number"]] == [metrics["quality/avg"], metrics["ff/cpu/rel_time"]]
    assert not (results / "mlflow.db").exists()
    assert not (results / "optuna.db").exists()
    leaks = [path for path in results.rglob("*") if path.is_file() and servers.PASSWORD.encode() in path.read_bytes()]
    assert leaks == []

    client = MlflowClient(tracking_uri=uri)
    experiment = client.get_experiment_by_name(name).experiment_id
    for run in client.search_runs([experiment])[:5]:
        client.delete_run(run.info.run_id)
    optuna.delete_study(study_name=name, storage=database.url("optuna"))
    assert verify(name, results).problems != ()
    verify(name, results, repair=True)
    assert verify(name, results).problems == ()


def test_mlflow_may_be_gone_for_a_while(servers, database, tmp_path):
    """The driver does not wait, and in the end everything has arrived."""
    port, told = servers.free_port(), []
    uri = f"http://127.0.0.1:{port}"
    with servers.mlflow_server(database.url("mlflow"), tmp_path, port):
        waiting = Backlog("MLflow", lambda: Tracker(uri, "gone"), lambda error: False, told.append)
        waiting.put(lambda: open_trial("1x1", {"a": 1}, {}))
        assert waiting.wait_open(60)
        waiting.put(lambda: ended_trial("1x1", "FINISHED", {"m": 1.0}, "key"))
    for number in range(20):
        waiting.put(lambda trial=f"{number}x2": open_trial(trial, {"a": 1}, {}))
        waiting.put(lambda trial=f"{number}x2": ended_trial(trial, "FINISHED", {"m": 1.0}, "key"))
    with servers.mlflow_server(database.url("mlflow"), tmp_path, port):
        assert waiting.close(120) == 0
        assert statuses(uri, "gone") == ["FINISHED"] * 21


def test_postgres_may_restart(database, tmp_path):
    told = []
    waiting = Backlog("MLflow", lambda: Tracker(database.url("mlflow"), "restarted"), lambda error: False, told.append)
    waiting.put(lambda: open_trial("1x1", {"a": 1}, {}))
    assert waiting.wait_open(60)
    database.stop()
    waiting.put(lambda: ended_trial("1x1", "FINISHED", {"m": 1.0}, "key"))
    database.start()
    for number in range(20):
        waiting.put(lambda trial=f"{number}x2": open_trial(trial, {"a": 1}, {}))
    assert waiting.close(120) == 0
    assert sorted(statuses(database.url("mlflow"), "restarted")) == ["FINISHED"] + ["KILLED"] * 20


def test_a_wrong_password_is_refused_and_not_shown(servers, database, sweep_config, tmp_path, monkeypatch):
    wrong = database.url("optuna").replace(servers.PASSWORD, "wrong-horse-battery")
    monkeypatch.setenv("FFFSWEEP_OPTUNA_URL", wrong)
    with pytest.raises(ValueError, match="FFFSWEEP_OPTUNA_URL") as caught:
        run_sweep(sweep_config, tmp_path / "results", Heard(), "inline")
    assert "wrong-horse" not in str(caught.value)
