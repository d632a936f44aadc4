"""Figures: plotly accepts every specification, and what is drawn is what was measured."""

from __future__ import annotations

import json
import re
from types import SimpleNamespace

import plotly.graph_objects as go
import pytest

from fffsweep.dashboards import depth_figures, figures, paper, print_figures, report, speed_figures, training_figures
from fffsweep.dashboards.figures import COLOURS
from fffsweep.dashboards.queries import QUALITY, QUALITY_VALIDATION, REL_TIME, StudyView, load_study
from fffsweep.dashboards.verdicts import layouts


def accepted(figure):
    """The figure as plotly reads it, colours filled in; raises ValueError if plotly refuses a property."""
    text = re.sub(r'"@(\w+)"', lambda match: json.dumps(COLOURS[match[1]][0]), json.dumps(figure.spec))
    return go.Figure(json.loads(text))


@pytest.mark.parametrize("name", ["whole", "single", "half"])
def test_plotly_accepts_every_figure(results, name):
    view = load_study(results, name)
    drawn = report.report_figures(view)
    assert {"pareto", "quality-depth", "quality-active-width", "speedup-cold", "retention-depth"} <= {figure.slug for figure in drawn}
    assert len({figure.slug for figure in drawn}) == len(drawn)
    for figure in drawn:
        assert accepted(figure).data
        assert figure.rows
        assert len({tuple(row) for row in figure.rows}) == 1, f"rows of {figure.slug} must share their columns"


def test_no_results_no_figures(fresh):
    assert report.report_figures(fresh) == []


def test_pareto_draws_front_controls_and_the_level_of_none(whole):
    drawn = figures.pareto(whole)
    traces = {trace["name"]: trace for trace in drawn.spec["data"]}
    assert set(traces["Pareto front"]["customdata"]) == {entry.trial.id for entry in whole.front()}
    assert set(traces["dense_active"]["customdata"]) == {"dense_active(1x8)", "dense_active(8x5)"}
    assert drawn.spec["layout"]["xaxis"]["type"] == "log"
    none = whole.trial("none").metrics[QUALITY]
    everywhere = [value for name, trace in traces.items() for value in trace["x"] if name != f"none: {none:.2f} (no layer to time)"]
    assert min(everywhere) > 0, "a layer that is absent takes no time and has no place on a logarithmic axis"
    assert drawn.spec["layout"]["shapes"][0]["y0"] == none
    assert traces[paper.AS_TRANSCRIBED]["visible"] == "legendonly"


def test_a_logarithm_where_it_fits_on_either_axis(whole):
    assert figures.pareto(whole, "mlm/validation_loss", REL_TIME).spec["layout"]["yaxis"]["type"] == "log"
    assert "type" not in figures.pareto(whole, REL_TIME, QUALITY).spec["layout"]["yaxis"]
    assert not figures.is_wide([-1.0, 1.0, 100.0]), "what is not positive has no place on a logarithmic axis"


def test_three_objectives(whole):
    drawn = figures.pareto(whole, REL_TIME, QUALITY, "mlm/validation_loss")
    front = next(trace for trace in drawn.spec["data"] if trace["name"] == "Pareto front")
    assert front["marker"]["color"] == [whole.trial(name).metrics["mlm/validation_loss"] for name in front["customdata"]]
    assert accepted(drawn).layout.coloraxis.colorbar.title.text


def test_controls_stay_where_a_metric_is_not_positive(single):
    drawn = figures.pareto(single, "task/stsb/selection")
    shown = {name for trace in drawn.spec["data"] for name in trace.get("customdata", ())}
    assert min(trial.metrics["task/stsb/selection"] for trial in single.finished) < 0
    assert {"dense_active(1x8)", "none"} <= shown
    assert "paper" not in drawn.caption, "the paper has no such metric"
    assert "paper" in figures.pareto(single).caption


def with_objectives(view, *names):
    record = json.loads((view.folder / "study.json").read_text())
    return StudyView(view.results, {**record, "objectives": {name: "maximize" if name == QUALITY else "minimize" for name in names}})


def test_the_printed_front_is_the_study_s_own(single, tmp_path):
    """svg text is kept as text, so axis titles can be read."""
    view = with_objectives(single, QUALITY, "mlm/validation_loss", REL_TIME)
    print_figures.write_figures(view, tmp_path / "three", ("svg",))
    text = (tmp_path / "three" / "pareto.svg").read_text()
    for name in (QUALITY, "mlm/validation_loss", REL_TIME):
        assert figures.label(name) in text
    untimed = with_objectives(single, QUALITY, "ff/gpu/rel_time")
    written = {path.name for path in print_figures.write_figures(untimed, tmp_path / "untimed", ("svg",))}
    assert "quality-depth.svg" in written
    assert "pareto.svg" not in written, "no trial has both objectives: an empty picture says nothing"


def test_a_caption_speaks_of_no_line_that_is_not_there(whole, results, evil):
    without = load_study(results, evil)
    for of in (depth_figures.quality_by_depth, depth_figures.quality_by_active_width):
        assert "Dashed: no feedforward layers." in of(whole).caption
        assert "Dashed" not in of(without).caption


def test_quality_figures_hold_the_measured_values(whole):
    for drawn in (depth_figures.quality_by_depth(whole), depth_figures.quality_by_active_width(whole)):
        trials = [trace for trace in drawn.spec["data"] if "customdata" in trace]
        assert len(drawn.spec["data"]) == len(trials) + 1, "and the entry of none in the legend"
        shown = {name: y for trace in trials for name, y in zip(trace["customdata"], trace["y"], strict=True)}
        assert shown == {trial.id: trial.metrics[QUALITY_VALIDATION] for trial in whole.finished if trial.shape}
    at = {
        name: x
        for trace in depth_figures.quality_by_depth(whole).spec["data"]
        for name, x in zip(trace.get("customdata", ()), trace["x"], strict="customdata" in trace)
    }
    assert at["dense_active(8x5)"] == at["8x5"] == 5


def test_the_loss_of_pretraining_stands_beside_the_active_width(whole):
    drawn = depth_figures.loss_by_active_width(whole)
    shown = {
        name: y for trace in drawn.spec["data"] if "customdata" in trace for name, y in zip(trace["customdata"], trace["y"], strict=True)
    }
    assert shown == {trial.id: trial.metrics["mlm/validation_loss"] for trial in whole.finished if trial.shape}
    assert drawn.spec["layout"]["yaxis"]["title"]["text"] == "held-out MLM loss, nats"
    assert drawn.slug != depth_figures.quality_by_active_width(whole).slug
    assert "below the dense_active controls" in drawn.caption
    assert "baseline" not in drawn.caption, "that is one of the tasks"


def test_a_loss_by_itself_is_not_drawn(whole):
    assert depth_figures.loss_by_active_width(SimpleNamespace(finished=whole.finished[:1])) is None


def test_speedup_stands_beside_the_limit_and_the_roofline(whole):
    cold, hot = speed_figures.speedups(whole)
    assert (cold.slug, hot.slug) == ("speedup-cold", "speedup-hot")
    for drawn, mode in ((cold, "cold"), (hot, "hot")):
        count = sum(point.mode == mode for point in whole.points)
        limit = next(trace for trace in drawn.spec["data"] if trace["name"] == "limit by arithmetic")
        assert dict(zip(limit["x"], limit["y"], strict=True))[8] == 512 / 9
        roofs = [trace for trace in drawn.spec["data"] if trace["name"] == "roofline"]
        assert len(drawn.spec["data"]) == 2 * count + 1
        assert [trace["showlegend"] for trace in roofs] == [True, False, False, False]
        assert {row["mode"] for row in drawn.rows} == {mode}
        assert {row["roofline"] is None for row in drawn.rows} == {False}
    one = next(trace for trace in cold.spec["data"] if "roofline, 1 token:" in trace.get("hovertemplate", ""))
    assert dict(zip(one["x"], one["y"], strict=True))[8] == pytest.approx(9000 / (9 * 15)), "9 nodes of 15 ns from memory"


def test_a_study_without_peaks_says_so(whole, monkeypatch):
    monkeypatch.setattr(speed_figures, "roofline", lambda trial, point: None)
    for drawn in speed_figures.speedups(whole):
        assert "No roofline" in drawn.caption
        assert not any("roofline" in trace["name"] for trace in drawn.spec["data"])


def test_curves_have_a_line_for_each_replicate(whole):
    drawn = training_figures.curves(whole, [whole.trial("1x8"), whole.trial("none")])
    assert [trace["name"] for trace in drawn.spec["data"]] == ["1x8"] * 3 + ["none"] * 3
    assert training_figures.curves(whole, [whole.trial("1x8")], "no such column") is None


def test_leaf_usage_is_relative_to_even_use(whole):
    drawn = training_figures.leaf_usage(whole.trial("34x3"))
    for line in drawn.spec["data"][0]["z"]:
        assert sum(line) / len(line) == pytest.approx(1)
    assert training_figures.leaf_usage(whole.trial("512x0")) is None
    assert layouts(whole)


def test_hypervolume_grows_to_one(whole):
    shares = [row["hypervolume"] for row in figures.hypervolume_over_time(whole).rows]
    assert shares == sorted(shares)
    assert shares[-1] == 1.0


def test_names_on_hover_are_escaped(results, evil):
    trial = load_study(results, evil).trial("1x8")
    trial.id = "<b onclick=x>"
    try:
        assert "&lt;b onclick" in figures.hover(load_study(results, evil), trial, ())
    finally:
        trial.id = "1x8"


def test_paper_averages_recompute():
    """Its averages count MNLI's single column twice, once for each of its splits; transcription rounds to a tenth."""
    checked = 0
    for row in paper.table():
        if "external" in row.note:
            continue
        tasks = [row.scores[name] for name in ("rte", "mrpc", "stsb", "sst2", "mnli", "mnli", "qnli", "qqp")]
        assert sum(tasks) / 8 == pytest.approx(row.scores["avg_without_cola"], abs=0.1001)
        assert (sum(tasks) + row.scores["cola"]) / 9 == pytest.approx(row.scores["avg"], abs=0.1001)
        checked += 1
    assert checked == 15


@pytest.mark.slow
def test_figures_for_print(whole, fresh, tmp_path):
    written = report.write(whole, tmp_path / "figures", "figures")
    assert {path.suffix for path in written} == {".svg", ".pdf"}
    assert len(written) == 16
    assert all(path.stat().st_size > 5000 for path in written)
    with pytest.raises(ValueError, match="no trial has finished yet"):
        report.write(fresh, tmp_path / "none", "figures")
