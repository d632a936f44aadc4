"""Pick, export and predict through the command line, on a small study that is really trained; MLflow and optuna-dashboard beside them.

Needs the wheels that `make data` downloads.
"""

from __future__ import annotations

import contextlib
import json
import socket
import sqlite3
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest

from fffsweep.sweeps.record import study_folder

pytestmark = pytest.mark.integration


def test_the_pick_is_written_down(trained):
    pick = json.loads((study_folder(trained, "tiny") / "picks" / "champion.json").read_text())
    assert (pick["state"], pick["model"]) == ("complete", {"name": "tiny stsb", "version": "1"})
    fresh = pick["evidence"]["fresh"]
    assert fresh["seeds"] == [1]
    assert set(fresh["values"]) == {"quality/avg", "quality/validation_avg", "ff/cpu/rel_time"}
    assert fresh["values"]["quality/avg"] != pick["evidence"]["values"]["quality/avg"]
    record = json.loads((study_folder(trained, fresh["study"]) / "study.json").read_text())
    states = [stage["state"] for trial in record["trials"] for stage in trial["stages"] if stage["replicate"] == 0]
    assert set(states) == {"reused"}, "the seeds it was chosen on must not be run again"


def test_mlflow_holds_model_alias_and_evidence(trained, fffsweep):
    program = """
import json, mlflow, sys
mlflow.set_tracking_uri(sys.argv[1])
client = mlflow.MlflowClient()
version = client.get_model_version_by_alias("tiny stsb", "champion")
evidence = json.loads(open(mlflow.artifacts.download_artifacts(run_id=version.run_id, artifact_path="evidence.json")).read())
predicted = mlflow.pyfunc.load_model("models:/tiny stsb@champion").predict(["a man plays\\ta man sings", "one\\ttwo"])
run = client.get_run(version.run_id)
print(json.dumps([version.tags, version.description, evidence["trial"], predicted, run.info.status, run.info.run_name]))
"""
    uri = f"sqlite:///{trained / 'mlflow.db'}"
    ended = subprocess.run([sys.executable, "-P", "-c", program, uri], capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    tags, description, trial, predicted, status, name = json.loads(ended.stdout.splitlines()[-1])
    assert (tags["trial"], trial, status, name) == ("4x3", "4x3", "FINISHED", "pick champion")
    assert "fresh seed" in description
    assert len(predicted) == 2
    assert all(0 <= float(value) <= 5 for value in predicted)
    assert "all sound" in fffsweep("verify", "tiny", "--results", str(trained))


def test_exported_models_load_without_our_import_and_predict(trained, fffsweep, tmp_path):
    for task, folder in (((), "mlm"), (("--task", "sst2-like"), "classifier")):
        fffsweep("export", "tiny", "4x3", str(tmp_path / folder), *task, "--results", str(trained))
    program = """
import sys, torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
for auto, folder in ((AutoModelForMaskedLM, "mlm"), (AutoModelForSequenceClassification, "classifier")):
    tokenizer = AutoTokenizer.from_pretrained(f"{sys.argv[1]}/{folder}", trust_remote_code=True)
    model = auto.from_pretrained(f"{sys.argv[1]}/{folder}", trust_remote_code=True).eval()
    with torch.profiler.profile() as profile, torch.inference_mode():
        print(tuple(model(**tokenizer("a [MASK]", return_tensors="pt")).logits.shape))
    assert any("fffsweep::cmm" in event.key for event in profile.key_averages())
"""
    ended = subprocess.run([sys.executable, "-P", "-c", program, str(tmp_path)], capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    assert ended.stdout.split("\n")[1] == "(1, 2)"
    lines = fffsweep("predict", str(tmp_path / "classifier"), "--json", stdin="a fine film\nawful\n").splitlines()
    assert [set(json.loads(line)["scores"]) for line in lines] == [{"0", "1"}] * 2
    words = fffsweep("predict", str(tmp_path / "mlm"), stdin="a [MASK] film\n")
    assert len(words.split("\t")) == 2
    assert "line 2: no [MASK]" in fffsweep("predict", str(tmp_path / "mlm"), stdin="[MASK]\nfilm\n", code=2)
    assert "absent or empty" in fffsweep("export", "tiny", "4x3", str(tmp_path / "mlm"), "--results", str(trained), code=2)
    assert "expected one of" in fffsweep("pick", "tiny", "4x9", "--alias", "a", "--results", str(trained), code=2)


def test_a_pick_goes_to_an_mlflow_server(trained, fffsweep, servers, tmp_path, monkeypatch):
    """The whole registration over HTTP: run, model, alias and evidence are at the server, and nothing in the file beside the results."""
    before = sqlite_picks(trained / "mlflow.db")
    with servers.mlflow_server(f"sqlite:///{tmp_path / 'server.db'}", tmp_path) as url:
        monkeypatch.setenv("FFFSWEEP_MLFLOW_URI", url)
        fffsweep("verify", "tiny", "--repair", "--results", str(trained))  # the trials' runs, as a sweep would have told them
        told = fffsweep("pick", "tiny", "4x3", "--alias", "served", "--fresh-seeds", "0", "--results", str(trained))
        assert "models:/tiny@served (version 1)" in told
        program = """
import json, mlflow, sys
mlflow.set_tracking_uri(sys.argv[1])
client = mlflow.MlflowClient()
version = client.get_model_version_by_alias("tiny", "served")
run = client.get_run(version.run_id)
evidence = json.loads(open(mlflow.artifacts.download_artifacts(run_id=version.run_id, artifact_path="evidence.json")).read())
predicted = mlflow.pyfunc.load_model("models:/tiny@served").predict(["a [MASK] film"])
runs = client.search_runs([run.info.experiment_id])
print(json.dumps([run.info.status, evidence["trial"], len(predicted), sorted({each.info.status for each in runs}), len(runs)]))
"""
        ended = subprocess.run([sys.executable, "-P", "-c", program, url], capture_output=True, text=True, timeout=200, check=False)
    assert ended.returncode == 0, ended.stderr
    status, trial, predicted, statuses, num_runs = json.loads(ended.stdout.splitlines()[-1])
    assert (status, trial, predicted, statuses) == ("FINISHED", "4x3", 1, ["FINISHED"])
    assert num_runs > 10
    assert sqlite_picks(trained / "mlflow.db") == before


def sqlite_picks(path):
    with contextlib.closing(sqlite3.connect(path)) as database:
        return database.execute("SELECT COUNT(*) FROM runs WHERE name LIKE 'pick %'").fetchone()[0]


@contextlib.contextmanager
def optuna_dashboard(storage):
    """Address of an optuna-dashboard over a storage."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(Path(sys.executable).with_name("optuna-dashboard")), storage, "--port", str(port)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert any("Listening at" in line for line in process.stderr), "it ended before it listened"
        yield f"http://127.0.0.1:{port}"
    finally:
        process.terminate()
        process.wait(30)


def fetched(address):
    with urllib.request.urlopen(address, timeout=60) as answer:
        return json.loads(answer.read())


def test_optuna_dashboard_opens_the_study(trained):
    with optuna_dashboard(f"sqlite:///{trained / 'optuna.db'}") as address:
        studies = {each["study_name"]: each for each in fetched(f"{address}/api/studies")["study_summaries"]}
        assert studies["tiny"]["directions"] == ["maximize", "minimize"]
        study = fetched(f"{address}/api/studies/{studies['tiny']['study_id']}?after=0")
    trials = [trial for trial in study["trials"] if trial["state"] == "Complete"]
    assert [len(trial["values"]) for trial in trials] == [2]
    assert {"trees", "depth"} <= {param["name"] for param in trials[0]["params"]}


def test_the_dashboard_s_links_lead_to_the_runs(trained):
    from fffsweep.dashboards.links import address
    from fffsweep.dashboards.queries import load_study
    from fffsweep.pipeline.tracking import MlflowClient

    view = load_study(trained, "tiny")
    client = MlflowClient(tracking_uri=f"sqlite:///{trained / 'mlflow.db'}")
    for label in ("", "pretrain/0"):
        found = address(view, view.trial("4x3"), "mlflow", "http://mlflow", label)
        tags = client.get_run(found.rpartition("/")[2]).data.tags
        assert (tags["fffsweep.trial"], tags.get("fffsweep.label", "")) == ("4x3", label)
    assert address(view, view.trial("4x3"), "optuna", "http://optuna").startswith("http://optuna/dashboard/studies/1/trials?numbers=")
