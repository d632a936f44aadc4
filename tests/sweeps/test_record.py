"""The record on disk is what is in memory, and only what changed is made into JSON again."""

import json
from types import SimpleNamespace

from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.stage import Resources, StageRun
from fffsweep.sweeps.graph import PlannedStage, TrialPlan
from fffsweep.sweeps.record import Record, StageState, TrialState, load
from fffsweep.sweeps.space import TrialSpec


def a_record(folder, num_trials=3):
    trials = []
    for number in range(num_trials):
        plan = TrialPlan(
            TrialSpec(
                f"{number}x1", f"{number}x1", (), True, ModelSettings(feedforward={"variant": "fff", "trees": number + 1, "depth": 1})
            ),
            (PlannedStage("collect", StageRun("collect", 1, {"n": number}, 0), Resources()),),
        )
        trials.append(TrialState(plan, [StageState(planned) for planned in plan.stages]))
    config = SimpleNamespace(name="s", objectives={"quality/avg": "maximize"}, resolved=lambda: {"a": 1}, identity=lambda: {"a": 1})
    return Record(folder, config, trials)


def test_what_is_saved_is_what_is_there(tmp_path):
    record = a_record(tmp_path)
    record.save(force=True)
    record.trials[1].stages[0].state, record.trials[1].state = "complete", "complete"
    record.trials[2].stages[0].progress = {"done": 1, "total": 2}
    record.save(force=True)
    stored = load(tmp_path)
    assert stored["trials"] == json.loads(json.dumps([trial.to_json() for trial in record.trials]))
    assert stored["trials"][1]["collect_key"] == record.trials[1].stages[0].planned.run.key
    assert [path.name for path in tmp_path.iterdir()] == ["study.json"]


def test_only_what_changed_is_made_into_json_again(tmp_path, monkeypatch):
    record = a_record(tmp_path, 50)
    record.save(force=True)
    made = []
    real = TrialState.to_json
    monkeypatch.setattr(TrialState, "to_json", lambda trial: made.append(trial) or real(trial))
    record.save(force=True)
    assert made == []
    record.trials[7].stages[0].worker = "host:1"
    record.save(force=True)
    assert made == [record.trials[7]]


def test_saving_is_left_out_until_it_is_cheap_again(tmp_path):
    record = a_record(tmp_path)
    record.save()
    first = load(tmp_path)["updated_at"]
    record.save()
    assert load(tmp_path)["updated_at"] == first
    record.save(force=True)
    assert load(tmp_path)["updated_at"] > first
