"""A further seed that fails takes nothing from a trial that was whole without it, now and after a restart."""

import json

import pytest
from mlflow.tracking import MlflowClient

from fffsweep.dashboards.queries import load_study
from fffsweep.pipeline.stages.pretrain import Pretrain
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.blocks import Replicates, Seeds
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.decisions import Decisions
from fffsweep.sweeps.record import load, study_folder
from fffsweep.sweeps.verify import verify
from tests.sweeps.conftest import Heard

NAME = "tiny-directory"
TREE = "1x3"


@pytest.fixture
def config(tiny_directory_config):
    return tiny_directory_config.model_copy(update={"seeds": Seeds(pretrain=Replicates(min=1, max=3))})


def fail(monkeypatch, stage, when):
    """Have `stage` fail where `when(config, seed)` says so. Returns what was tried in vain."""
    run, tried = stage.run, []

    def failing(self, config, context):
        if when(config, context):
            tried.append(stage.name)
            raise ValueError("loss is NaN")
        return run(self, config, context)

    monkeypatch.setattr(stage, "run", failing)
    return tried


def seeds_of(results):
    record = load(study_folder(results, NAME))
    return {t["id"]: len({s["replicate"] for s in t["stages"]} - {None}) for t in record["trials"]}


def is_reference(config):
    return config.model.feedforward.variant == "dense"


CASES = {
    "a tree's pretraining": (Pretrain, lambda config, context: context.seed == 1 and not is_reference(config)),
    "the reference's pretraining": (Pretrain, lambda config, context: context.seed == 1 and is_reference(config)),
    "everybody's third pretraining": (Pretrain, lambda config, context: context.seed == 2),
}


@pytest.mark.parametrize("case", CASES)
def test_what_was_whole_stays(results, config, monkeypatch, case):
    stage, when = CASES[case]
    if "third" in case:  # whether two seeds tell trials apart depends on how long things took
        monkeypatch.setattr("fffsweep.sweeps.strategy.undecided", lambda trials, _: [t.id for t in trials if t.num_replicates < t.most])
    tried = fail(monkeypatch, stage, when)
    before = {trial["id"]: trial["collect_key"] for trial in load(study_folder(results, NAME))["trials"]}
    listener = Heard()
    outcome = run_sweep(config, results, listener, "inline")
    assert (outcome.state, outcome.failed_trials) == ("complete", ())
    assert tried
    record = load(study_folder(results, NAME))
    assert [trial["state"] for trial in record["trials"]] == ["complete"] * 3
    found = seeds_of(results)
    assert found[TREE] == (2 if "third" in case else 1)
    kept = [each for each in Decisions(study_folder(results, NAME)).read() if "seeds" in each]
    assert kept
    for each in kept:
        assert found[each["trial"]] == each["seeds"]
        if each["seeds"] == 1:
            assert next(t for t in record["trials"] if t["id"] == each["trial"])["collect_key"] == before[each["trial"]]
        assert any(line.startswith(f"trial {each['trial']} stays as it was, with {each['seeds']} of its seeds") for line in listener.lines)
    events = [json.loads(line) for line in (study_folder(results, NAME) / "events.jsonl").read_text().splitlines()]
    assert {each["trial"] for each in events if each["event"] == "kept"} == {each["trial"] for each in kept}
    client = MlflowClient(tracking_uri=sqlite_url(results / "mlflow.db"))
    runs = client.search_runs([client.get_experiment_by_name(NAME).experiment_id])
    parents = [run for run in runs if "fffsweep.label" not in run.data.tags]
    assert len(parents) == 3
    assert {run.info.status for run in parents} == {"FINISHED"}
    assert verify(NAME, results).problems == ()
    assert all(trial.metrics for trial in load_study(results, NAME).trials)

    tried.clear()
    again = run_sweep(config, results, Heard(), "inline")
    assert (again.state, again.num_run, again.failed_trials, tried) == ("complete", 0, (), [])
    assert seeds_of(results) == found
    assert [each for each in Decisions(study_folder(results, NAME)).read() if "seeds" in each] == kept
