"""The report: one file, whole, safe, and honest about its scale."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser

import pytest
import yaml

from fffsweep.dashboards import report, tables
from fffsweep.dashboards.queries import StudyView, load_study


class Page(HTMLParser):
    """Tags with their attributes, the text outside scripts, and JSON islands."""

    def __init__(self, text):
        super().__init__()
        self.tags, self.text, self.islands, self._inside, self._island = [], "", {}, None, ""
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag in ("script", "style"):
            self._inside, self._island = dict(attrs), ""

    def handle_endtag(self, tag):
        if tag in ("script", "style") and self._inside is not None:
            if self._inside.get("type") == "application/json":
                self.islands[self._inside["id"]] = json.loads(self._island)
            self._inside = None

    def handle_data(self, data):
        if self._inside is None:
            self.text += data
        else:
            self._island += data


@pytest.fixture(scope="module")
def pages(results, evil):
    return {name: Page(report.html(load_study(results, name))) for name in ("whole", "single", "half", "fresh", evil)}


def test_it_asks_no_host_for_anything(pages):
    for page in pages.values():
        loaded = [attrs.get(name) for tag, attrs in page.tags for name in ("src", "srcset", "action") if attrs.get(name)]
        loaded += [attrs["href"] for tag, attrs in page.tags if tag == "link"]
        assert loaded == ["data:,"]
        policy = next(attrs["content"] for tag, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
        assert "default-src 'none'" in policy


def test_plotly_is_embedded_once(results, tmp_path):
    path = report.write_report(load_study(results, "whole"), tmp_path / "deep" / "report.html")
    assert len(re.findall(r"plotly\.js v\d", path.read_text())) == 1
    assert path.stat().st_size < 8e6


def test_every_number_of_the_table_is_there(pages, whole):
    for row in report.rows(whole):
        for cell in row.cells.values():
            for part in cell.replace("[", " [").split(" ["):
                assert part.strip() in pages["whole"].text


def test_an_evil_name_stays_text(pages, evil):
    page = pages[evil]
    assert evil in page.text
    scripts = [attrs for tag, attrs in page.tags if tag == "script"]
    assert len(scripts) == len(page.islands) + 2


def test_it_says_when_it_shows_mechanics_only(pages):
    assert "This shows mechanics, not quality" in pages["single"].text
    assert "not decidable at this scale" in pages["single"].text
    assert "This shows mechanics" not in pages["whole"].text
    assert "yes for 8 of 8 layouts" in pages["whole"].text


def test_it_can_be_reproduced(pages, whole):
    text = pages["whole"].text
    for command in ("fffsweep run whole.yaml", "fffsweep results whole --format json", "fffsweep pareto whole --json"):
        assert command in text
    assert yaml.safe_dump(whole.config, sort_keys=False, allow_unicode=True) in text
    for trial in whole.trials:
        assert trial.collect_key in text
    assert whole.provenance["data"] in text
    assert whole.provenance["machines"][0]["cpu"] in text


def test_an_unfinished_study_has_a_report(pages):
    assert "No trial has finished yet" in pages["fresh"].text
    assert len(pages["half"].islands) >= 5


def test_the_paper_is_marked_as_transcribed(pages):
    assert "as transcribed" in pages["whole"].text
    assert "FFF-1x11-long" in pages["whole"].text


@pytest.mark.parametrize(("format", "expected"), [("md", "## Answers"), ("latex", r"\begin{tabular}"), ("html", "<!doctype html>")])
def test_other_formats(whole, tmp_path, format, expected):
    (path,) = report.write(whole, tmp_path / f"report.{format}", format)
    assert expected in path.read_text()


def test_unknown_format(whole, tmp_path):
    with pytest.raises(ValueError, match="format 'docx': expected one of html, md, latex, figures"):
        report.write(whole, tmp_path / "x", "docx")


@pytest.mark.parametrize(("seconds", "shown"), [(0.4, "0.4 s"), (42, "42 s"), (190, "3 min 10 s"), (3600 * 5 + 120, "5 h 2 min")])
def test_durations(seconds, shown):
    assert report.duration(seconds) == shown


def test_sizes():
    assert [report.size(value) for value in (12, 1500, 2.5e6, 3e13)] == ["12 B", "1.5 kB", "2.5 MB", "30.0 TB"]


def test_tasks_stand_in_the_paper_s_columns(generated, tmp_path):
    glue = ("cola", "sst2", "mrpc", "stsb", "qqp", "mnli", "qnli", "rte", "sst2-like")
    few = {"layouts": ("512x0", "1x8"), "controls": ("reference_dense(512)",), "replicates": 1, "finetunings": 1, "steps": 5}
    generated.generate(tmp_path, "glue", tasks=glue, **few)
    view = load_study(tmp_path, "glue")
    table = tables.task_table(view, view.trials)
    assert table["titles"] == ["trial", "RTE", "MRPC", "STS-B", "SST-2", "MNLI", "QNLI", "QQP", "CoLA", "sst2-like"]
    row = next(row for row in table["rows"] if row[0] == "1x8")
    assert row[1] == f"{view.trial('1x8').metrics['task/rte/validation']:.2f}"
    assert table["rows"][-1][0] == "majority/mean baseline"
    for written, sign in ((report.markdown(view), "| RTE |"), (report.latex(view), "& RTE &")):
        assert sign in written
        assert row[1] in written


@pytest.mark.parametrize("format", ["html", "md", "latex", "figures"])
def test_a_place_that_cannot_be_written_is_named(single, tmp_path, format):
    (tmp_path / "file").touch()
    with pytest.raises(ValueError, match=r"file/inside: cannot be written .*--output"):
        report.write(single, tmp_path / "file" / "inside", format)


def test_a_study_whose_trials_all_failed_says_why(fresh):
    record = json.loads((fresh.folder / "study.json").read_text())
    assert "No trial has finished yet" in Page(report.html(fresh)).text
    failed = [{**trial, "state": "failed", "error": "step 2: the loss is nan"} for trial in record["trials"]]
    text = Page(report.html(StudyView(fresh.results, {**record, "state": "failed", "trials": failed}))).text
    assert "failed: step 2: the loss is nan" in text
    assert "No trial has finished yet" not in text
