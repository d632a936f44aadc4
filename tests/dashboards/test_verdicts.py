"""Verdicts: decided only where the scale allows it, both test and interval agree, and the direction is right."""

from __future__ import annotations

import json

import pytest

from fffsweep.dashboards.pages import Query, compare_page
from fffsweep.dashboards.picks import picks
from fffsweep.dashboards.queries import GPU_REL_TIME, QUALITY, QUALITY_VALIDATION, REL_TIME, StudyView, load_study
from fffsweep.dashboards.report import tiles
from fffsweep.dashboards.speed_figures import speedups
from fffsweep.dashboards.summary import rows, used_columns
from fffsweep.dashboards.trial import TrialView
from fffsweep.dashboards.verdicts import NOT_DECIDABLE, UNDECIDED, claims, decidability


def by_slug(view):
    return {claim.slug: claim for claim in claims(view)}


def test_nothing_is_decided_with_one_replicate(single):
    assert not decidability(single).decidable
    assert "one replicate" in decidability(single).reason
    found = [finding for claim in claims(single) for finding in claim.findings]
    assert found
    assert {finding.answer for finding in found} == {NOT_DECIDABLE}


def test_nothing_is_decided_below_the_baseline(generated, tmp_path):
    generated.generate(tmp_path, "dull", learned=False)
    view = load_study(tmp_path, "dull")
    judged = decidability(view)
    assert not judged.decidable
    assert "not surely above it" in judged.reason
    assert {claim.answer for claim in claims(view) if claim.findings} == {NOT_DECIDABLE}


def test_nothing_is_decided_without_a_reference(fresh):
    assert not decidability(fresh).decidable
    assert all(not claim.findings for claim in claims(fresh))


def test_clear_differences_are_decided(whole):
    """The generator makes every layer faster than dense, better than none, and worse than the dense layer of its active width."""
    assert decidability(whole).decidable
    found = by_slug(whole)
    assert {f.answer for f in found["speed"].findings} == {"yes"}
    assert {f.answer for f in found["feedforward"].findings} == {"yes"}
    assert {f.trial for f in found["depth"].findings} == {"8x5", "1x8"}
    assert {f.answer for f in found["depth"].findings} == {"no"}
    assert found["depth"].answer == "no for 2 of 2 layouts"


def recorded(view, **changes):
    """The study with other entries in its record."""
    return StudyView(view.results, {**json.loads((view.folder / "study.json").read_text()), **changes})


def test_a_missing_reference_is_told_from_an_unfinished_one(whole, fresh):
    assert "reference_dense has not finished" in decidability(fresh).reason
    trials = json.loads((whole.folder / "study.json").read_text())["trials"]
    without = recorded(whole, trials=[{**trial, "controls": []} for trial in trials if trial["controls"] != ["reference_dense"]])
    assert "reference_dense is not in the study" in decidability(without).reason


def test_what_no_layer_keeps_stands_beside_what_trees_keep(whole):
    kept = whole.retention(whole.no_feedforward, QUALITY_VALIDATION)
    low, high = kept.interval
    assert by_slug(whole)["quality"].measure.endswith(f"; none keeps {100 * kept.value:.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
    trials = json.loads((whole.folder / "study.json").read_text())["trials"]
    without = recorded(whole, trials=[trial for trial in trials if trial["controls"] != ["none"]])
    assert "none" not in by_slug(without)["quality"].measure


def test_claims_name_the_budget_and_what_they_count(whole):
    assert "same number of training tokens" in by_slug(whole)["quality"].measure
    stages = {**whole.config["stages"], "pretrain": {"wall_clock_s": 60}}
    assert "same time of training" in by_slug(recorded(whole, config={**whole.config, "stages": stages}))["quality"].measure
    record = json.loads((whole.folder / "study.json").read_text())
    tree = next(trial for trial in record["trials"] if trial["id"] == "1x8")
    twice = recorded(whole, trials=[*record["trials"], {**tree, "id": "1x8-t1"}])
    assert by_slug(twice)["depth"].answer == "no for 3 of 3 trials"


@pytest.fixture
def on_a_gpu(whole, monkeypatch):
    """The study as if its layers had been timed on a GPU alone."""

    def moved(name):
        return name.replace("ff/cpu/", "ff/gpu/").replace("_1t_", "_")

    metrics = {trial.id: {moved(name): value for name, value in trial.metrics.items()} for trial in whole.trials}
    averages = {trial.id: {moved(name): value for name, value in trial.averages.items()} for trial in whole.trials}
    monkeypatch.setattr(TrialView, "metrics", property(lambda trial: metrics[trial.id]))
    monkeypatch.setattr(TrialView, "averages", property(lambda trial: averages[trial.id]))
    return recorded(whole)


def test_layers_timed_on_a_gpu_are_judged_too(on_a_gpu):
    found = by_slug(on_a_gpu)
    assert "speed" not in found
    assert {finding.answer for finding in found["speed-gpu"].findings} == {"yes"}
    assert found["speed-gpu"].question.endswith("on a GPU?")
    assert any(name == "fastest tree layer" and hint.endswith("on a GPU") for name, _, hint in tiles(on_a_gpu))


def test_what_was_timed_on_a_gpu_alone_is_picked_by_and_shown(on_a_gpu):
    fastest, best, _ = picks(on_a_gpu, on_a_gpu.competing([QUALITY]), 0.5)
    assert fastest.trial.metrics[GPU_REL_TIME] == min(trial.metrics[GPU_REL_TIME] for trial in on_a_gpu.competing([QUALITY]))
    assert "as fast as the dense reference on a GPU" in best.why
    shown = rows(on_a_gpu)
    keys = [column.key for column in used_columns(shown)]
    assert "gpu_speedup" in keys
    assert "speedup" not in keys
    drawn = speedups(on_a_gpu)
    assert [figure.slug for figure in drawn] == ["speedup-gpu-cold", "speedup-gpu-hot"]
    assert not any("roofline" in figure.caption.lower() for figure in drawn), "no peaks of a GPU are measured"
    assert {row["threads"] for row in drawn[0].rows} == {None}
    one = next(row for row in drawn[0].rows if (row["trial"], row["tokens"]) == ("1x8", 128))
    assert one["speedup"] == 1 / on_a_gpu.trial("1x8").metrics[GPU_REL_TIME]


def test_answers_agree_with_their_intervals(whole):
    for claim in claims(whole):
        for finding in claim.findings:
            low, high = finding.difference.interval
            assert finding.answer in {"yes" if low > 0 else "", "no" if high < 0 else "", UNDECIDED}


@pytest.fixture
def alike(generated, tmp_path, monkeypatch):
    """A study whose replicates all scored the same."""
    generated.generate(tmp_path, "alike")
    replicates = TrialView.replicates

    def equal(trial, metric):
        found = replicates(trial, metric)
        return dict.fromkeys(found, min(found.values(), default=0.0))

    monkeypatch.setattr(TrialView, "replicates", equal)
    return load_study(tmp_path, "alike")


def test_replicates_that_do_not_differ_decide_nothing(alike):
    judged = decidability(alike)
    assert not judged.decidable
    assert "the same in all replicates" in judged.reason
    findings = [finding for claim in claims(alike) for finding in claim.findings]
    assert len(findings) > 5
    assert all(finding.confidence.startswith("no test: the difference is the same in all 3 replicates") for finding in findings)


def test_comparing_trials_whose_replicates_do_not_differ_shows_no_star(alike):
    table = compare_page(alike, Query({"trial": ["512x0", "1x8"]}))["metrics"]
    assert len(table) > 3
    assert not [cell for row in table for cell in row if "p < " in cell or "*" in cell]


def test_conversions_are_compared_by_what_they_leave_unexplained_too(whole, monkeypatch):
    for name in ("512x0", "1x8"):
        averages = {QUALITY: 80.0, "distill/unexplained": 0.2, "distill/tokens": 300.0}
        monkeypatch.setitem(vars(whole.trial(name)), "averages", averages)
    table = compare_page(whole, Query({"trial": ["512x0", "1x8"]}))["metrics"]
    assert [row[0] for row in table] == [QUALITY, "distill/unexplained"]


def test_picks_satisfy_their_constraint(whole):
    floor = 0.96 * whole.reference.metrics[QUALITY]
    fastest, best, _ = picks(whole, whole.finished, 0.96)
    allowed = [t for t in whole.finished if t.metrics[QUALITY] >= floor and t.metrics[REL_TIME] > 0]
    assert fastest.trial.metrics[REL_TIME] == min(trial.metrics[REL_TIME] for trial in allowed)
    assert best.trial.metrics[QUALITY] == max(trial.metrics[QUALITY] for trial in whole.finished)
    assert "probability of being on the front" in best.why


def test_picks_compare_on_the_same_seeds(whole, monkeypatch):
    """The reference did well on a seed that the others have not: what they keep is measured without it."""
    replicates = TrialView.replicates

    def uneven(trial, metric):
        found = dict(replicates(trial, metric))
        if trial.has_role("reference_dense"):
            return found
        found.pop(2, None)
        return found

    monkeypatch.setattr(TrialView, "replicates", uneven)
    reference = whole.reference
    monkeypatch.setitem(reference.metrics, QUALITY, 10 * reference.metrics[QUALITY])
    fastest = picks(recorded(whole), whole.finished, 0.96)[0]
    assert fastest.trial is not None
    assert f"({100 * whole.retention(fastest.trial).value:.1f} % of dense)" in fastest.why
    assert whole.retention(fastest.trial).value >= 0.96


def test_an_impossible_constraint_picks_nothing(whole, single, fresh):
    impossible = picks(whole, whole.finished, 2.0)[0]
    assert impossible.trial is None
    assert "lower the share" in impossible.why
    assert "cannot be told" in picks(single, single.finished, 0.5)[0].why
    assert picks(fresh, fresh.finished, 0.96) == []


@pytest.mark.parametrize("name", ["whole", "single"])
def test_every_claim_says_something(results, name):
    for claim in claims(load_study(results, name)):
        assert claim.answer
        assert claim.question.endswith("?")
