"""The web app over HTTP: every page, errors that help, and who is let in."""

from __future__ import annotations

import html
import io
import json
import re
import shlex
import statistics

import pyarrow.parquet
import pytest
from fastapi.testclient import TestClient

from fffsweep.dashboards.app import create_app
from fffsweep.dashboards.queries import load_study
from fffsweep.dashboards.security import is_loopback
from fffsweep.pipeline.stage import StageRun
from fffsweep.sweeps.record import study_folder

PAGES = ("study", "pareto", "depth", "training", "compare")


@pytest.fixture(scope="module")
def client(results):
    return TestClient(create_app(results), base_url="http://localhost")


def get(client, path, status=200, **query):
    response = client.get(path, params=query)
    assert response.status_code == status, response.text[:500]
    return response


@pytest.mark.parametrize("page", PAGES)
@pytest.mark.parametrize("name", ["whole", "single", "half", "fresh", "evil"])
def test_every_page_of_every_study(client, evil, page, name):
    study = evil if name == "evil" else name
    text = get(client, f"/{page}", study=study).text
    assert "<script>alert" not in text
    assert "Traceback" not in text
    for island in re.findall(r'<script type="application/json"[^>]*>(.*?)</script>', text, re.DOTALL):
        assert json.loads(island)["spec"]["data"]


def test_the_list_of_studies(client, results, evil):
    text = get(client, "/").text
    assert "whole" in text
    assert "&lt;script&gt;alert" in text
    assert 'data-live="true"' in text
    assert evil not in text


def test_a_study_that_cannot_be_read_hides_no_other(generated, tmp_path):
    generated.generate(tmp_path, "sound", layouts=("512x0",), controls=(), finished=0)
    for name, content in (("older", '{"schema": "fffsweep.study/0"}'), ("cut", "")):
        record = study_folder(tmp_path, name) / "study.json"
        record.parent.mkdir()
        record.write_text(content)
    text = get(TestClient(create_app(tmp_path), base_url="http://localhost"), "/").text
    assert "/study?study=sound" in text
    assert "fffsweep.study/0" in text
    assert "cut/study.json: damaged" in text


@pytest.mark.parametrize("value", ["inf", "-inf", "nan", "1e999", "x"])
@pytest.mark.parametrize(
    ("page", "name"),
    [("study", "page"), ("pareto", "depth_min"), ("pareto", "depth_max"), ("pareto", "active_max"), ("training", "replicate")],
)
def test_numbers_that_are_none_count_as_not_given(client, page, name, value):
    get(client, f"/{page}", study="half", **{name: value})


def test_a_study_that_cannot_be_is_not_found(client):
    assert "expected one of" in get(client, "/study", 404, study="a" * 300).text
    assert get(client, "/stamp", study="a" * 300).json() == {"stamp": ""}


def test_an_empty_folder_says_what_to_do(tmp_path):
    client = TestClient(create_app(tmp_path), base_url="http://localhost")
    assert "fffsweep run" in get(client, "/").text


def test_the_stage_grid(client, half):
    text = get(client, "/study", study="half").text
    assert "▶ 0/3" in text
    assert "120,000 of 400,000 tokens" in text
    assert get(client, "/study", study="half", q="dense_active").text.count("<td>waiting</td>") == 2
    assert "No trial matches" in get(client, "/study", study="half", q="nothing like this").text


@pytest.mark.parametrize("name", ["whole", "evil"])
def test_commands_of_a_trial_can_be_pasted(client, results, evil, name):
    study, trial = (evil, "1x8") if name == "evil" else (name, "dense_active(8x5)")
    text = get(client, "/trial", study=study, trial=trial).text
    shown = [shlex.split(html.unescape(code)) for code in re.findall(r"<code>(fffsweep (?:pick|export) .*?)</code>", text)]
    where = ["--results", str(results.resolve())]
    assert shown == [
        ["fffsweep", "pick", study, trial, "--alias", "champion", *where],
        ["fffsweep", "export", study, trial, "DIR", *where],
    ]
    assert "optuna-dashboard sqlite" not in text, "there is no such file here"


def test_trial_and_its_artifacts(client, whole):
    text = get(client, "/trial", study="whole", trial="1x8").text
    assert "feedforward.depth" in text
    assert "tree_health.json" in text
    curve = get(client, "/artifact", study="whole", trial="1x8", label="pretrain/0", name="curve.jsonl")
    assert curve.headers["content-disposition"].startswith("attachment")
    assert [json.loads(line) for line in curve.text.splitlines()] == whole.trial("1x8").curve(0)
    get(client, "/artifact", 404, study="whole", trial="1x8", label="pretrain/0", name="../../mlflow.db")


def test_pareto_axes_filters_and_picks(client):
    text = get(
        client, "/pareto", study="whole", x="mlm/validation_loss", y="quality/avg", z="ff/cpu/rel_time", depth_min="3", kept="90"
    ).text
    assert "held-out MLM loss" in text
    assert "Fastest that keeps 90 %" in text
    shown = json.loads(re.search(r'id="figure-pareto">(.*?)</script>', text, re.DOTALL)[1])
    front = next(trace for trace in shown["spec"]["data"] if trace["name"] == "Pareto front")
    assert "512x0" not in front["customdata"]
    get(client, "/pareto", study="whole", x="no such metric", depth_min="deep", kept="much")


def test_pareto_filters(client):
    def front(**query):
        text = get(client, "/pareto", study="whole", **query).text
        found = re.search(r'id="figure-pareto">(.*?)</script>', text, re.DOTALL)
        traces = json.loads(found[1])["spec"]["data"]
        return {name for trace in traces if trace["name"] in ("Pareto front", "dominated") for name in trace["customdata"]}, text

    assert len(front()[0]) == 9
    assert front(active_max="48")[0] == {"8x5", "4x6", "2x7", "1x8"}
    assert front(q="x7")[0] == {"2x7"}
    nothing, text = front(q="no such trial")
    assert nothing == set()
    assert "nothing is left to draw" in text


def test_curves_of_a_conversion(generated, tmp_path):
    """Stage runs `convert/<replicate>` log other columns than pretraining; the page offers those, and shows the held-out error first."""
    generator = generated.generate(tmp_path, "converted", layouts=("4x6", "1x8"), controls=("none",), replicates=2, finetunings=1)
    trials = json.loads((study_folder(tmp_path, "converted") / "study.json").read_text())["trials"]
    for trial in trials:
        for stage in trial["stages"]:
            if stage["name"] == "pretrain":
                run = StageRun("convert", 1, {"trial": trial["id"]}, stage["replicate"], {})
                output = tmp_path / f"{trial['id']}-{stage['replicate']}"
                output.mkdir()
                if trial["id"] != "none":
                    rows = [{"step": n, "tokens": 100 * n, "loss": 1 / n, "learning_rate": 0.1, "unexplained": 2 / n} for n in (1, 2, 3)]
                    (output / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
                generator.store.publish(run, {"distill/unexplained": 0.5}, output, {}, 0.0, 1.0)
                stage |= {"name": "convert", "label": f"convert/{stage['replicate']}", "key": run.key}
    generator.config["stages"]["convert"] = {"encoder": "of the test"}
    generator.save(trials, "complete")
    client = TestClient(create_app(tmp_path), base_url="http://localhost")
    text = get(client, "/training", study="converted").text
    shown = json.loads(re.search(r'id="figure-curve-unexplained">(.*?)</script>', text, re.DOTALL)[1])["spec"]
    assert [trace["y"] for trace in shown["data"]] == [[2.0, 1.0, 2 / 3]] * 4
    assert "share of the variance" in shown["layout"]["yaxis"]["title"]["text"]
    assert '<option value="loss">' in text
    assert '<option value="validation_loss"' not in text
    assert "figure-curve-loss" in get(client, "/training", study="converted", value="loss", replicate="1").text
    assert "figure-curve-unexplained" in get(client, "/trial", study="converted", trial="1x8").text


def test_compare_says_how_sure(client):
    text = get(client, "/compare", study="whole", trial=["512x0", "1x8"]).text
    assert "feedforward.depth" in text
    assert re.search(r"p (=|&lt;) 0\.\d+ \*", text)
    assert "One replicate gives no interval" in get(client, "/compare", study="single", trial=["512x0", "1x8"]).text


@pytest.mark.parametrize(("page", "figure"), [("pareto", "pareto"), ("depth", "quality-depth"), ("training", "curve-validation-loss")])
def test_downloads_of_a_figure(client, page, figure):
    lines = get(client, "/download", study="whole", page=page, figure=figure, format="csv").text.splitlines()
    table = pyarrow.parquet.read_table(
        io.BytesIO(get(client, "/download", study="whole", page=page, figure=figure, format="parquet").content)
    )
    assert table.num_rows == len(lines) - 1 > 0
    assert ",".join(table.column_names) == lines[0]
    get(client, "/download", 404, study="whole", page=page, figure="none", format="csv")
    get(client, "/download", 400, study="whole", page=page, figure=figure, format="exe")


def test_every_figure_is_a_table_too(client, whole):
    """For a keyboard and a screen reader: the points of a figure are links to their trials."""
    page = get(client, "/pareto", study="whole").text
    assert "/table?study=whole&amp;page=pareto&amp;figure=pareto" in page
    table = get(client, "/table", study="whole", page="pareto", figure="pareto", depth_min="0").text
    for trial in whole.finished:
        if trial.variant != "none":
            assert f">{trial.id}</a>" in table
    assert 'href="/pareto?study=whole&amp;depth_min=0#pareto"' in table
    assert "Lines " not in table
    assert "expected one of" in get(client, "/table", 404, study="whole", page="pareto", figure="other").text
    assert "expected one of" in get(client, "/table", 404, study="whole", page="nowhere", figure="pareto").text
    assert "nothing has finished yet" in get(client, "/table", 404, study="fresh", page="pareto", figure="pareto").text


@pytest.mark.parametrize("format", ["csv", "parquet", "json", "latex", "markdown"])
def test_downloads_of_a_study(client, evil, format):
    response = get(client, "/results", study=evil, format=format)
    assert response.content
    assert "<script>" not in response.headers["content-disposition"]
    get(client, "/results", 400, study=evil, format="exe")


def test_what_is_not_there_says_what_is(client):
    assert "expected one of whole" in get(client, "/study", 404, study="hole").text
    assert "expected one of 1x8" in get(client, "/trial", 404, study="whole", trial="1x9").text
    assert "expected one of study" in get(client, "/nothing", 404).text
    get(client, "/static/../app.py", 404)


def test_the_stamp_changes_with_the_study(client, results, generated):
    before = get(client, "/stamp", study="half").json()["stamp"]
    record = json.loads((load_study(results, "half").folder / "study.json").read_text())
    (load_study(results, "half").folder / "study.json").write_text(json.dumps(record, indent=1))
    assert get(client, "/stamp", study="half").json()["stamp"] != before


def test_nothing_is_changed_by_anyone(client):
    for method in ("put", "delete", "patch"):
        assert getattr(client, method)("/study?study=whole").status_code == 405
    assert client.post("/study?study=whole").status_code == 403


def test_another_name_of_this_machine_is_refused(results):
    """A page elsewhere could point a name of its own at 127.0.0.1; it must not be answered."""
    client = TestClient(create_app(results), base_url="http://evil.example")
    assert client.get("/").status_code == 421


def test_a_token_is_demanded(results):
    client = TestClient(create_app(results, token="secret-of-the-test"), base_url="http://dashboard.example", follow_redirects=False)
    assert client.get("/").status_code == 401
    assert client.get("/static/style.css").status_code == 401
    assert client.get("/?token=wrong").status_code == 401
    assert client.get("/", headers={"Authorization": "Bearer secret-of-the-test"}).status_code == 200
    entered = client.get("/study?study=whole&token=secret-of-the-test")
    assert entered.status_code == 303
    assert entered.headers["location"] == "/study?study=whole"
    assert "httponly" in entered.headers["set-cookie"].lower()
    assert client.get(entered.headers["location"]).status_code == 200


def test_headers_forbid_what_pages_do_not_need(client):
    headers = get(client, "/").headers
    assert "default-src 'none'" in headers["content-security-policy"]
    assert "script-src 'self';" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == "nosniff"


def test_pages_hold_no_inline_script(client):
    """The policy above would block one; JSON islands are data."""
    for page in PAGES:
        scripts = re.findall(
            r"<script(?![^>]*application/json)([^>]*)>(.*?)</script>", get(client, f"/{page}", study="whole").text, re.DOTALL
        )
        assert scripts
        assert all("src=" in attributes and not body for attributes, body in scripts)


def test_loopback():
    assert all(map(is_loopback, ("127.0.0.1", "127.1.2.3", "::1", "[::1]", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "localhost.evil.example")))


@pytest.mark.slow
def test_pages_of_a_thousand_trials_are_quick(generated, tmp_path):
    """300 ms of server time a page once the study has been read, in the median."""
    layouts = generated.many_layouts(998)
    points = ((128, "cold"),)
    few = {
        "controls": ("reference_dense(512)", "none"),
        "replicates": 2,
        "tasks": ("stsb",),
        "finetunings": 1,
        "steps": 5,
        "points": points,
    }
    generated.generate(tmp_path, "many", layouts=layouts, **few)
    client = TestClient(create_app(tmp_path), base_url="http://localhost")
    get(client, "/study", study="many")
    slowest = {}
    for page in PAGES:
        times = [float(re.search(r"dur=([\d.]+)", get(client, f"/{page}", study="many").headers["server-timing"])[1]) for _ in range(5)]
        slowest[page] = statistics.median(times)
    print(slowest)
    assert max(slowest.values()) < 300, slowest
