"""Reading studies: what the store says is what is shown."""

from __future__ import annotations

import json
import os

import pytest

from fffsweep.dashboards.figures import pareto
from fffsweep.dashboards.picks import picks
from fffsweep.dashboards.queries import QUALITY, REL_TIME, StudyNotFound, StudyView, disk_bytes, list_studies, load_study, stamp
from fffsweep.dashboards.report import tiles
from fffsweep.dashboards.summary import interval_note
from fffsweep.sweeps.record import study_folder


def test_metrics_are_those_of_the_collect_manifest(whole):
    assert len(whole.finished) == len(whole.trials) == 13
    for trial in whole.finished:
        assert trial.metrics == whole.store.get(trial.collect_key).metrics


def test_replicates_and_their_mean(whole):
    trial = whole.trial("1x8")
    values = trial.replicates(QUALITY)
    assert list(values) == [0, 1, 2]
    estimate = trial.estimate(QUALITY)
    assert estimate.value == pytest.approx(sum(values.values()) / 3, rel=1e-12)
    assert estimate.interval == (min(values.values()), max(values.values()))
    assert trial.estimate("no/such") is None


def test_averages_leave_single_replicates_out(whole):
    averages = whole.trial("8x5").averages
    assert QUALITY in averages
    assert REL_TIME in averages
    assert not any(name.endswith(("/0", "/1", "/2")) for name in averages)


def test_front_is_of_study_trials_alone(whole):
    front = whole.front()
    ids = {entry.trial.id for entry in front}
    assert ids
    assert ids <= {trial.id for trial in whole.trials if trial.in_study}
    for entry in front:
        assert 0 <= entry.p_front <= 1
        assert not any(
            other.metrics[QUALITY] > entry.trial.metrics[QUALITY] and other.metrics[REL_TIME] < entry.trial.metrics[REL_TIME]
            for other in whole.competing(list(whole.objectives))
        )
    qualities = [entry.trial.metrics[QUALITY] for entry in front]
    assert qualities == sorted(qualities, reverse=True)


def test_one_replicate_has_no_probabilities(single):
    assert all(entry.p_front is None for entry in single.front())
    assert single.trial("1x8").estimate(QUALITY).interval is None
    assert single.chance_kept(single.trial("1x8"), 0.9) is None


def test_retention_is_relative_to_the_reference(whole):
    assert whole.reference.id == "512x0"
    assert whole.retention(whole.reference).value == 1.0
    trial = whole.trial("1x8")
    assert whole.retention(trial).value == pytest.approx(trial.metrics[QUALITY] / whole.reference.metrics[QUALITY], rel=1e-12)
    assert whole.chance_kept(trial, 0.0) == pytest.approx(1)
    assert whole.chance_kept(trial, 2.0) == 0


def test_flop_limit(whole):
    assert whole.flop_limit(whole.trial("1x8")) == 512 / 9
    assert whole.flop_limit(whole.trial("none")) is None


def test_controls_are_found_by_layout(whole):
    assert whole.control("dense_active", "1x8").id == "dense_active(1x8)"
    assert whole.control("none", "1x8").id == "none"
    assert whole.control("dense_active", "34x3") is None


def test_progress_counts_shared_stage_runs_once(half):
    keys = {stage["key"] for trial in half.trials for stage in trial.stages}
    assert half.progress["total"] == len(keys) < sum(len(trial.stages) for trial in half.trials)
    assert half.progress["running"] == 1
    assert 0 < half.progress["finished"] < half.progress["total"]


def test_unfinished_trials_have_no_metrics(half):
    waiting = next(trial for trial in half.trials if trial.state == "waiting")
    assert waiting.metrics == {}
    assert waiting.curve(0) == []
    assert waiting.finished_at == float("inf")


def test_points_are_read_from_the_metrics(whole):
    assert {(point.tokens, point.mode) for point in whole.points} == {(t, m) for t in (1, 16, 128, 1024) for m in ("hot", "cold")}


def test_a_study_is_read_again_only_when_its_record_changes(results):
    assert load_study(results, "half") is load_study(results, "half")
    path = study_folder(results, "half") / "study.json"
    before = stamp(results, "half")
    record = json.loads(path.read_text())
    try:
        path.write_text(json.dumps({**record, "state": "stopped"}))
        os.utime(path, ns=(1, 1))
        assert stamp(results, "half") != before
        assert load_study(results, "half").state == "stopped"
    finally:
        path.write_text(json.dumps(record))


def test_unknown_names_list_the_known(results, whole, tmp_path):
    with pytest.raises(StudyNotFound, match=r"study 'hole' in .*: expected one of whole"):
        load_study(results, "hole")
    with pytest.raises(StudyNotFound, match="there is none yet"):
        load_study(tmp_path, "hole")
    with pytest.raises(ValueError, match="trial '1x9' of study 'whole': expected one of"):
        whole.trial("1x9")


def test_any_name_is_listed_as_it_is(results, evil):
    assert set(list_studies(results)) == {"whole", "single", "half", "fresh", evil}
    assert load_study(results, evil).name == evil


def test_disk_counts_equal_content_once(whole):
    manifests = [whole.store.get(stage["key"]) for trial in whole.trials for stage in trial.stages]
    sizes = {artifact.sha256: artifact.num_bytes for manifest in manifests for artifact in manifest.artifacts.values()}
    assert disk_bytes(whole) == sum(sizes.values()) > 0


def test_a_damaged_artifact_is_not_shown(generated, tmp_path):
    generated.generate(tmp_path, "damaged", layouts=("512x0", "1x8"), controls=("reference_dense(512)",), replicates=1)
    trial = load_study(tmp_path, "damaged").trial("1x8")
    path = trial.artifact("pretrain/0", "curve.jsonl")
    assert trial.curve(0)
    path.write_text("{}")
    assert trial.artifact("pretrain/0", "curve.jsonl") is None
    assert trial.curve(0) == []


@pytest.fixture
def bound(generated, tmp_path):
    """A study whose search was to keep 96 % of the dense quality in at most half of its time."""
    generator = generated.generate(tmp_path, "bound", replicates=2, finetunings=1, steps=5)
    generator.config |= {
        "constraints": ["quality_retention >= 0.96", "ff/cpu/rel_time <= 0.5"],
        "seeds": {"pretrain": {"min": 1, "max": 3}, "finetune": 1},
    }
    record = json.loads((study_folder(tmp_path, "bound") / "study.json").read_text())
    generator.save(record["trials"], "complete")
    return load_study(tmp_path, "bound")


def test_a_search_s_constraints_are_kept_or_named(bound):
    view = bound
    assert view.num_replicates == 1
    assert view.violated(view.trial("512x0")) == ["ff/cpu/rel_time <= 0.5"]
    assert view.violated(view.trial("1x8")) == ["quality_retention >= 0.96"]
    assert view.violated(view.trial("dense_active(8x5)")) == []


def test_a_trial_beyond_a_constraint_is_drawn_but_never_on_the_front(bound):
    beyond = {trial.id for trial in bound.finished if trial.in_study and bound.violated(trial)}
    free = StudyView(
        bound.results, {**json.loads((bound.folder / "study.json").read_text()), "config": {**bound.config, "constraints": []}}
    )
    assert {"512x0", "1x8"} <= beyond
    assert {entry.trial.id for entry in free.front()} & beyond, "without constraints some of them would be on the front"
    members = {entry.trial.id for entry in bound.front()}
    assert members
    assert not members & beyond
    assert not set(bound.front_chances(tuple(bound.objectives), tuple(bound.maximize))) & beyond
    drawn = pareto(bound)
    traces = {trace["name"]: trace for trace in drawn.spec["data"]}
    assert set(traces["infeasible (beyond a constraint)"]["customdata"]) == beyond
    assert set(traces["Pareto front"]["customdata"]) == members
    assert {row["trial"] for row in drawn.rows if row["violated"] and bound.trial(row["trial"]).in_study} == beyond
    assert "infeasible (beyond a constraint)" not in {trace["name"] for trace in pareto(free).spec["data"]}
    fastest, best, bend = picks(bound, bound.competing(tuple(bound.objectives)), 0.5)
    assert best.trial.id != "512x0"
    assert fastest.trial.id in beyond, "a share chosen by hand takes the place of the constraint on quality"
    assert fastest.trial.metrics[REL_TIME] <= 0.5
    assert bend.trial is None or bend.trial.id in members


def test_a_half_written_event_hides_no_other(generated, tmp_path):
    generated.generate(tmp_path, "cut", layouts=("512x0",), controls=(), finished=0)
    view = load_study(tmp_path, "cut")
    with (view.folder / "events.jsonl").open("a") as file:
        file.write('{"time": 1.0, "eve\n{"time": 2.0, "event": "ended"}\n{"time"')
    assert [event["event"] for event in view.events()] == ["started", "ended"]


def test_seeds_that_differ_from_trial_to_trial_are_told(generated, tmp_path):
    generator = generated.generate(tmp_path, "uneven", layouts=("512x0", "1x8"), controls=("reference_dense(512)",), replicates=3)
    trials = json.loads((study_folder(tmp_path, "uneven") / "study.json").read_text())["trials"]
    few = next(trial for trial in trials if trial["id"] == "1x8")
    few["stages"] = [stage for stage in few["stages"] if stage["replicate"] in (None, 0)]
    generator.config["seeds"] = {"pretrain": {"min": 1, "max": 3}, "finetune": 1}
    generator.save(trials, "complete")
    view = load_study(tmp_path, "uneven")
    assert view.seeds_of_trials == (1, 3)
    note = interval_note(view)
    assert "1 to 3" in note
    assert "2 and 3 can carry 50 and 75 % at most" in note
    assert "One replicate" not in note
    assert ("replicates", "1 to 3", "pretraining seeds of each trial") in tiles(view)
