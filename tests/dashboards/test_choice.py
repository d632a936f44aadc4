"""Picking: what is refused at once, the evidence, and the button of the web app."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys

import pytest
from fastapi.testclient import TestClient

from fffsweep.dashboards import picking
from fffsweep.dashboards.app import Elsewhere, create_app
from fffsweep.dashboards.choice import ChoiceError, Notebook, check_alias, evidence, export_trial, pick, summary
from fffsweep.dashboards.queries import load_study
from fffsweep.sweeps.config import SweepConfig, load_config
from fffsweep.sweeps.confirm import confirming, confirming_name
from fffsweep.sweeps.graph import build
from fffsweep.sweeps.space import expand


@pytest.mark.parametrize("alias", ["champion", "Champion-2", "v", "v1a"])
def test_aliases_that_will_do(alias):
    assert check_alias(alias) == alias


@pytest.mark.parametrize("alias", ["", "latest", "v1", "V12", "two words", "a/b", "../up", "x" * 81])
def test_aliases_that_will_not(alias):
    with pytest.raises(ChoiceError, match="such as champion"):
        check_alias(alias)


def test_only_what_can_be_picked_is_tried(results, half):
    with pytest.raises(ValueError, match="expected one of 1x8"):
        pick(results, "whole", "1x9", "champion", 0, None, 0, None)
    with pytest.raises(ChoiceError, match="only a finished trial"):
        pick(results, "half", half.trials[-1].id, "champion", 0, None, 0, None)
    with pytest.raises(ChoiceError, match="the tasks of study"):
        pick(results, "whole", "1x8", "champion", 0, "cola", 0, None)
    assert not list((results / "studies").glob("*/picks/*.json"))


def test_what_cannot_be_exported_leaves_nothing(whole, tmp_path):
    with pytest.raises(ChoiceError, match="expected 0 to 2"):
        export_trial(whole, "1x8", tmp_path / "out", replicate=3)
    with pytest.raises(ValueError, match="no model among its artifacts"):
        export_trial(whole, "1x8", tmp_path / "out")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ValueError, match="absent or empty"):
        export_trial(whole, "1x8", tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_evidence_without_fresh_seeds_says_so(whole):
    found = evidence(whole, whole.trial("1x8"), None, 0)
    assert found["config"]["trial"]["model"]["feedforward"]["depth"] == 8
    assert {entry["trial"] for entry in found["pareto"]["front"]} >= {"512x0"}
    assert 0 <= found["p_front"] <= 1
    assert "flatter" in summary(found)[-1]
    json.dumps(found, allow_nan=False)


def test_fresh_seeds_stand_apart(tmp_path, generated, whole):
    """A study of the same trial with two seeds more: evidence on those two alone."""
    few = {"layouts": ("512x0", "1x8"), "controls": ("reference_dense(512)",), "replicates": 5}
    generated.generate(tmp_path, "confirmed", **few)
    confirmed = load_study(tmp_path, "confirmed")
    fresh = evidence(whole, whole.trial("1x8"), confirmed, 2)["fresh"]
    values = confirmed.trial("1x8").replicates("quality/avg")
    assert fresh["seeds"] == [3, 4]
    assert fresh["values"]["quality/avg"]["value"] == pytest.approx((values[3] + values[4]) / 2)
    theirs = confirmed.reference.replicates("quality/avg")
    assert fresh["retention"]["value"] == pytest.approx((values[3] + values[4]) / (theirs[3] + theirs[4]))


@pytest.mark.parametrize("name", ["4x3", "none", "dense_active(4x3)", "random_routing(4x3)", "reference_dense"])
def test_a_confirming_study_reuses_the_seeds_that_are_there(name, request):
    """The chosen trial's and the reference's stage runs keep their keys; seeds are added."""
    config = load_config(request.config.rootpath / "sweeps" / "tiny.yaml")
    plans = build(config, expand(config))
    chosen = next(plan for plan in plans if plan.spec.id == name or name in plan.spec.controls)
    trials = [
        {"id": p.spec.id, "layout": p.spec.layout, "controls": p.spec.controls, "model": p.spec.model.resolved(), "params": p.spec.params}
        for p in plans
    ]
    own = next(trial for trial in trials if trial["id"] == chosen.spec.id)
    study = {"name": config.name, "config": config.resolved(), "trials": trials}
    again = confirming(study, own, config.seeds.pretrain, 2)
    assert isinstance(again, SweepConfig)
    assert again.seeds.pretrain == config.seeds.pretrain + 2
    keys = {stage.run.key for plan in build(again, expand(again)) for stage in plan.stages}
    mine = {stage.run.key for stage in chosen.stages if stage.label != "collect"}
    assert mine <= keys


def test_a_searched_trial_keeps_its_settings(request):
    overrides = [
        "sampler=grid",
        "search={space: {stages.pretrain.learning_rate: [0.001, 0.002], model.feedforward.init: [normal, fan], "
        "stages.finetune.overrides.stsb.epochs: [1]}}",
    ]
    config = load_config(request.config.rootpath / "sweeps" / "tiny.yaml", overrides)
    plans = build(config, expand(config))
    chosen = [plan for plan in plans if plan.spec.in_study and plan.spec.layout == "4x3"]
    assert len(chosen) == 4
    trials = [
        {"id": p.spec.id, "layout": p.spec.layout, "controls": p.spec.controls, "model": p.spec.model.resolved(), "params": p.spec.params}
        for p in plans
    ]
    for plan in chosen:
        own = next(trial for trial in trials if trial["id"] == plan.spec.id)
        again = confirming({"name": config.name, "config": config.resolved(), "trials": trials}, own, 1, 1)
        keys = {stage.run.key for other in build(again, expand(again)) for stage in other.stages}
        assert {stage.run.key for stage in plan.stages if stage.label.startswith(("pretrain", "finetune"))} <= keys


def test_a_confirming_name_is_never_too_long():
    assert len(confirming_name("é" * 40, "dense_active(4x3)").encode()) <= 80


@pytest.fixture
def started(monkeypatch):
    """Arguments of the processes that would have been started."""
    asked = []
    monkeypatch.setattr(picking, "start", lambda arguments, log: asked.append(arguments) or os.getpid())
    return asked


def form_of(client, study="single", trial="1x8"):
    text = client.get("/trial", params={"study": study, "trial": trial}).text
    return dict(re.findall(r'<input type="hidden" name="(\w+)" value="([^"]*)"', text))


def test_the_button_starts_one_pick(results, single, started):
    client = TestClient(create_app(results), base_url="http://localhost", follow_redirects=False)
    form = form_of(client)
    bad = client.post("/pick", data={**form, "alias": "two words", "fresh_seeds": "0"})
    assert bad.status_code == 400
    assert "such as champion" in bad.text
    assert client.post("/pick", data={**form, "alias": "ok", "fresh_seeds": "-1"}).status_code == 400
    answer = client.post("/pick", data={**form, "alias": "champion", "fresh_seeds": "2"})
    assert answer.status_code == 303
    assert answer.headers["location"] == "/trial?study=single&trial=1x8#pick"
    assert started == [["pick", "--alias", "champion", "--fresh-seeds", "2", "--results", str(results), "--", "single", "1x8"]]
    assert "under way" in client.post("/pick", data={**form, "alias": "other", "fresh_seeds": "0"}).text
    page = client.get("/trial?study=single&trial=1x8").text
    assert "▶ running" in page
    assert 'data-live="true"' in page
    for path in (single.folder / "picks").iterdir():
        path.unlink()


def test_a_forged_form_is_refused(results, started):
    client = TestClient(create_app(results), base_url="http://localhost", follow_redirects=False)
    form = {**form_of(client), "alias": "champion", "fresh_seeds": "0"}
    assert client.post("/pick", data={**form, "form_secret": "guess"}).status_code == 403
    assert client.post("/pick", data={name: value for name, value in form.items() if name != "form_secret"}).status_code == 403
    assert client.post("/pick", data=form, headers={"Sec-Fetch-Site": "cross-site"}).status_code == 403
    assert client.post("/pick", content=b"x" * 20_000).status_code == 403
    assert started == []


def test_read_only_offers_and_takes_no_form(results, started):
    client = TestClient(create_app(results, read_only=True), base_url="http://localhost")
    page = client.get("/trial?study=single&trial=1x8").text
    assert "<form" not in page
    assert "fffsweep pick single 1x8" in page
    assert client.post("/pick", data={"study": "single", "trial": "1x8"}).status_code == 405
    assert started == []


def test_a_pick_whose_process_died_is_shown_as_failed(results, whole):
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    note = Notebook(whole.folder, "died")
    note.write("running", "1x8", message="starting", pid=ended.pid)
    note.path.with_suffix(".log").write_text("<b>killed</b>")
    client = TestClient(create_app(results), base_url="http://localhost")
    page = client.get("/trial?study=whole&trial=1x8").text
    assert "✗ failed" in page
    assert "&lt;b&gt;killed" in page
    note.path.unlink()


def test_links_elsewhere_need_an_address(results):
    client = TestClient(create_app(results), base_url="http://localhost")
    query = {"study": "whole", "trial": "1x8", "tool": "mlflow"}
    assert client.get("/elsewhere", params=query).status_code == 404
    assert "--mlflow-url" in client.get("/trial?study=whole&trial=1x8").text
    with pytest.raises(ValueError, match="expected an address such as"):
        create_app(results, elsewhere=Elsewhere(mlflow="javascript:alert(1)"))
