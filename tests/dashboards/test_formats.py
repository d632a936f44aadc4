"""Tables and files: the promised shapes, and the store's numbers with all their digits."""

from __future__ import annotations

import csv
import io
import json

import jsonschema
import pyarrow.parquet
import pytest

from fffsweep.dashboards import formats
from fffsweep.dashboards.queries import StudyView, load_study
from fffsweep.dashboards.summary import number
from fffsweep.sweeps.record import study_folder

INTERVALS = {
    "type": "object",
    "additionalProperties": {"anyOf": [{"type": "null"}, {"type": "array", "items": {"type": "number"}, "minItems": 2, "maxItems": 2}]},
}
RESULTS = {
    "type": "object",
    "required": ["schema", "study", "trials"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": "fffsweep.results/1"},
        "study": {"type": "string"},
        "trials": {
            "type": "array",
            "items": {
                "type": "object",
                "required": ["trial", "layout", "control", "state", "params", "metrics", "intervals"],
                "additionalProperties": False,
                "properties": {
                    "trial": {"type": "string"},
                    "layout": {"type": ["string", "null"]},
                    "control": {"type": ["string", "null"]},
                    "state": {"enum": ["waiting", "running", "complete", "failed", "pruned"]},
                    "params": {"type": "object"},
                    "metrics": {"type": "object", "additionalProperties": {"type": "number"}},
                    "intervals": INTERVALS,
                },
            },
        },
    },
}
ENTRY = {
    "type": "object",
    "required": ["trial", "layout", "values", "intervals", "p_front"],
    "properties": {"values": {"type": "object"}, "intervals": INTERVALS, "p_front": {"type": ["number", "null"]}},
}
PARETO = {
    "type": "object",
    "required": ["schema", "study", "objectives", "front", "controls"],
    "additionalProperties": False,
    "properties": {
        "schema": {"const": "fffsweep.pareto/1"},
        "study": {"type": "string"},
        "objectives": {"type": "object", "additionalProperties": {"enum": ["maximize", "minimize"]}},
        "front": {"type": "array", "items": ENTRY},
        "controls": {"type": "array", "items": ENTRY},
    },
}


@pytest.fixture(params=["whole", "single", "half", "fresh", "evil"])
def view(request, results, evil):
    return load_study(results, evil if request.param == "evil" else request.param)


def printed(view, format):
    out = io.StringIO()
    formats.print_results(view, format, out)
    return out.getvalue()


def test_results_json(view):
    content = json.loads(printed(view, "json"))
    jsonschema.validate(content, RESULTS)
    assert {trial["trial"]: trial["metrics"] for trial in content["trials"]} == {trial.id: trial.metrics for trial in view.trials}


def test_pareto_json(view):
    content = json.loads(formats.pareto_json(view))
    jsonschema.validate(content, PARETO)
    assert [entry["trial"] for entry in content["front"]] == [entry.trial.id for entry in view.front()]
    assert len(content["controls"]) == sum(bool(trial.controls) for trial in view.finished)


def test_csv_and_parquet_hold_the_same(view):
    lines = list(csv.DictReader(io.StringIO(printed(view, "csv"))))
    table = pyarrow.parquet.read_table(io.BytesIO(formats.parquet(view)))
    assert table.num_rows == len(lines) == len(view.trials)
    assert table.column_names == list(lines[0])
    for trial, line in zip(view.trials, lines, strict=True):
        for name, value in trial.averages.items():
            assert float(line[name]) == value


def test_table_is_plain_lines_where_there_is_no_terminal(whole):
    lines = printed(whole, "table").splitlines()
    assert lines[0].split()[:2] == ["trial", "role"]
    assert sum(line.startswith("*") and "Pareto" not in line for line in lines) == len(whole.front())
    assert not any(character in "\n".join(lines) for character in "│┃\x1b")


def test_table_says_what_one_replicate_cannot(single):
    text = printed(single, "table")
    assert "no intervals and no probability" in text
    assert "mechanics are shown, not quality" in text
    assert "stand-ins, not GLUE scores" in text


def test_pareto_table_holds_front_and_controls(whole):
    out = io.StringIO()
    formats.pareto_table(whole, out)
    for trial in (*(entry.trial for entry in whole.front()), whole.trial("none"), whole.trial("dense_active(1x8)")):
        assert trial.id in out.getvalue()
    assert "no layer" in out.getvalue()


@pytest.mark.parametrize("name", ["whole", "half"])
def test_every_objective_has_a_column(results, name):
    record = json.loads((study_folder(results, name) / "study.json").read_text())
    view = StudyView(results, {**record, "objectives": {"quality/avg": "maximize", "mlm/validation_loss": "minimize"}})
    title, *lines = printed(view, "table").splitlines()
    assert title.endswith("mlm/validation_loss")
    losses = {trial.id: f"{trial.metrics['mlm/validation_loss']:.3f}" for trial in view.finished}
    shown = {line.split()[line.startswith("*")]: line for line in lines[: len(view.trials)]}
    assert losses
    assert all(loss in shown[trial].rpartition("]  ")[2] for trial, loss in losses.items())
    assert r"mlm/validation\_loss" in printed(view, "markdown")
    assert r"mlm/validation\_loss" in printed(view, "latex")
    assert "mlm/validation_loss" not in printed(load_study(results, name), "table")


def test_a_study_without_results_still_prints(fresh):
    assert "waiting" in printed(fresh, "table")
    assert json.loads(formats.pareto_json(fresh))["front"] == []


def test_latex_is_escaped(whole):
    text = printed(whole, "latex")
    assert r"dense\_active(1x8)" in text
    assert r"kept \%" in text
    body = text.partition("\\midrule")[2].partition("\\bottomrule")[0].strip().splitlines()
    assert len(body) == len(whole.trials)
    assert len({line.count("&") for line in body}) == 1


def test_markdown_rows_have_equal_cells(whole):
    table = [line for line in printed(whole, "markdown").splitlines() if line.startswith("|")]
    assert len(table) == len(whole.trials) + 2
    assert len({line.count("|") for line in table}) == 1


def test_unknown_format_lists_the_known(whole):
    with pytest.raises(ValueError, match="format 'xml': expected one of table, json"):
        printed(whole, "xml")


@pytest.mark.parametrize(
    ("value", "shown"), [(None, "–"), (64.128, "64.13"), (0.0, "0.00"), (0.00214, "0.00214"), (9400.5, "9,400"), (-3.0, "-3.00")]
)
def test_numbers_for_people(value, shown):
    assert number(value) == shown
