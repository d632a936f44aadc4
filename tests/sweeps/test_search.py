"""The search block: what it allows, what it refuses before any work, and the trials that it stands for."""

import pytest

from fffsweep.sweeps.config import ConfigError, load_config
from fffsweep.sweeps.constraints import parse_constraint
from fffsweep.sweeps.graph import build
from fffsweep.sweeps.optuna_study import distribution
from fffsweep.sweeps.search import Search, lay_over
from fffsweep.sweeps.space import REFERENCE, expand, strata

RATE = "stages.pretrain.learning_rate"
BASE = """
model: {hidden_size: 32, num_layers: 1, num_heads: 2, sequence_length: 64, feedforward: {load_balancing: 0.1}}
controls: [reference_dense(60), none]
stages:
  prepare: {vocabulary_size: 1024}
  pretrain: {tokens: 20k, batch_size: 16, micro_batch_size: 8}
  finetune: {tasks: [sst2-like, stsb], overrides: {stsb: {epochs: 3}}}
objectives: {quality/avg: maximize, params/total: minimize}
"""


def load(tmp_path, text, *overrides):
    path = tmp_path / "searched.yaml"
    path.write_text(BASE + text)
    return load_config(path, overrides)


GRID = """
layouts: [60x0, 4x3]
search:
  space:
    stages.pretrain.learning_rate: {type: float, low: 1e-3, high: 3e-3, step: 1e-3}
    model.feedforward.activation: [gelu, relu]
"""


def test_a_grid_takes_every_combination_for_each_layout_and_the_reference(tmp_path):
    config = load(tmp_path, GRID)
    assert [(stratum.name, stratum.num_trials) for stratum in strata(config)] == [(REFERENCE, None), ("60x0", None), ("4x3", None)]
    specs = expand(config)
    assert [spec.id for spec in specs[:2]] == ["reference_dense", "reference_dense-t0"]
    assert len(specs) == 2 + 3 * 6
    assert len({spec.id for spec in specs}) == len(specs)
    last = next(spec for spec in specs if spec.id == "4x3-t5")
    assert last.point == {RATE: 0.003, "model.feedforward.activation": "relu"}
    assert last.params == {"trees": 4, "depth": 3, RATE: 0.003, "model.feedforward.activation": "relu"}
    assert (last.model.feedforward.activation, last.in_study) == ("relu", True)
    assert {spec.in_study for spec in specs if REFERENCE in spec.controls} == {False}


def test_a_point_reaches_the_stages_that_it_names_and_no_others(tmp_path):
    plans = {
        plan.spec.id: {stage.label: stage.run for stage in plan.stages}
        for plan in build(load(tmp_path, GRID), expand(load(tmp_path, GRID)))
    }
    assert plans["4x3-t0"]["pretrain/0"].config["learning_rate"] == 0.001
    assert plans["4x3-t2"]["pretrain/0"].config["learning_rate"] == 0.002
    assert plans["4x3-t0"]["pretrain/0"].config["model"]["feedforward"]["activation"] == "gelu"
    assert len({runs["prepare"].key for runs in plans.values()}) == 1
    assert plans["60x0-t3"]["pretrain/0"].key == plans["reference_dense-t3"]["pretrain/0"].key, "equal work is done once"


def test_a_task_of_its_own_keeps_what_is_said_of_it(tmp_path):
    config = load(
        tmp_path, "layouts: [4x3]\nsearch: {space: {stages.finetune.epochs: [1, 2], stages.finetune.overrides.stsb.dropout: [0.1, 0.2]}}"
    )
    runs = {stage.label: stage.run.config for stage in build(config, expand(config))[-2].stages}
    assert (runs["finetune/0/sst2-like/0"]["epochs"], runs["finetune/0/sst2-like/0"]["dropout"]) == (2, 0.1)
    assert (runs["finetune/0/stsb/0"]["epochs"], runs["finetune/0/stsb/0"]["dropout"]) == (3, 0.2)


def test_the_reference_is_tuned_over_what_applies_to_it(tmp_path):
    config = load(tmp_path, "layouts: [4x3]\nsearch: {space: {model.feedforward.load_balancing: [0, 0.1], stages.pretrain.clip: [0.5, 1]}}")
    assert {stratum.name: stratum.paths for stratum in strata(config)} == {
        REFERENCE: ("stages.pretrain.clip",),
        "4x3": ("model.feedforward.load_balancing", "stages.pretrain.clip"),
    }
    config = load(tmp_path, "layouts: [4x3]\nsearch: {space: {model.feedforward.load_balancing: [0, 0.1]}}")
    assert [stratum.name for stratum in strata(config)] == ["4x3"]


@pytest.mark.parametrize(
    ("text", "layouts"),
    [
        ("search: {space: {layout: [60x0, 4x3, 2x4]}}", ["60x0", "4x3", "2x4"]),
        ("width: ~62\nsearch: {space: {depth: {type: int, low: 0, high: 4, step: 2}}}", ["62x0", "8x2", "2x4"]),
        ("search: {space: {trees: [1, 2], depth: [1, 3]}}", ["1x1", "1x3", "2x1", "2x3"]),
    ],
)
def test_the_shape_itself_may_be_searched(tmp_path, text, layouts):
    specs = [spec for spec in expand(load(tmp_path, text)) if spec.in_study]
    assert [spec.layout for spec in specs] == layouts
    assert [spec.id for spec in specs] == [f"{layout}-t{index}" for index, layout in enumerate(layouts)]


def test_controls_for_every_layout_follow_a_searched_layout(tmp_path):
    config = load(tmp_path, "search: {space: {layout: [60x0, 4x3]}}", "controls=[reference_dense(60), dense_active]")
    assert [spec.id for spec in expand(config)] == [REFERENCE, "60x0-t0", "4x3-t1", "dense_active(4x3)"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "layouts: [4x3]\nsearch: {space: {stages.pretrain.learnig_rate: [1, 2]}}",
            "search.space.stages.pretrain.learnig_rate: unknown setting; expected one of stages.pret",
        ),
        (
            "layouts: [4x3]\nsearch: {space: {stages.pretrain.clip: [1, -1]}}",
            "search.space: stages.pretrain.clip=-1: input should be greater than 0",
        ),
        (
            "layouts: [4x3]\nsearch: {space: {model.num_heads: {type: int, low: 1, high: 3}}}",
            "search.space: model.num_heads=3: hidden_size=32 with num_heads=3",
        ),
        (
            "layouts: [4x3]\nsearch: {space: {stages.prepare.vocabulary_size: [512, 1024]}}",
            "search.space.stages.prepare.vocabulary_size: all trials share their data",
        ),
        ("layouts: [4x3]\nsearch: {space: {layout: [4x3]}}", "search.space.layout together with layouts"),
        ("search: {space: {depth: [1, 2]}}", "search.space.depth alone: expected width"),
        ("search: {space: {trees: [1, 2]}}", "search.space: trees; expected layout, depth with a width, or depth and trees"),
        ("search: {space: {layout: [4x3, 4y3]}}", "search.space: layout=4y3: "),
        (
            "layouts: [4x3]\nsearch: {space: {stages.pretrain.clip: {type: float, low: 1, high: 2}}}",
            "search.space.stages.pretrain.clip: a float without step has no grid",
        ),
        ("layouts: [4x3]\nsearch: {num_trials: 3, space: {stages.pretrain.clip: [1, 2]}}", "search.num_trials with sampler grid"),
        ("layouts: [4x3]\nsampler: tpe\nsearch: {space: {stages.pretrain.clip: [1, 2]}}", "search.num_trials: missing; sampler tpe needs"),
        ("layouts: [4x3]\nsampler: tpe", "sampler=tpe: there is nothing to search"),
        (
            "layouts: [4x3]\nsearch: {space: {stages.pretrain.clip: {type: float, low: 2, high: 1}}}",
            "search.space.stages.pretrain.clip: low=2 with high=1",
        ),
        (
            "layouts: [4x3]\nsearch: {space: {stages.pretrain.clip: {type: float, low: 0, high: 1, log: true}}}",
            "search.space.stages.pretrain.clip: low=0 with log",
        ),
        (
            "layouts: [4x3]\nsearch: {space: {stages.pretrain.clip: {type: float, low: 1, high: 9, log: true, step: 1}}}",
            "search.space.stages.pretrain.clip: step=1 with log: expected one of the two; leave one out",
        ),
        (
            "layouts: [4x3]\nsearch: {space: {stages.pretrain.batch_size: {type: int, low: 8, high: 64, log: true, step: 8}}}",
            "search.space.stages.pretrain.batch_size: step=8 with log: expected one of the two; leave one out",
        ),
        ("layouts: [4x3]\nsearch: {space: {stages.pretrain.clip: {type: flaot, low: 0, high: 1}}}", "search.space.stages.pretrain.clip"),
        ("layouts: [4x3]\nsearch: {space: {stages.pretrain.clip: [1, 1]}}", "search.space.stages.pretrain.clip: choices: 1 is given twice"),
        (
            "search: {space: {trees: [1, 2], depth: [1, 3]}}\nscale: {controls: [reference_dense(60), dense_active]}",
            "controls[1]=dense_active: trees and depth are searched",
        ),
    ],
)
def test_refusals_name_the_line(tmp_path, text, message):
    with pytest.raises(ConfigError) as error:
        load(tmp_path, text)
    assert str(error.value).startswith(message)
    assert f"{tmp_path / 'searched.yaml'}, line " in str(error.value)


def test_what_does_not_go_together_is_refused_at_the_ends(tmp_path):
    text = "layouts: [4x3]\nsearch: {space: {stages.pretrain.batch_size: [8, 16], stages.pretrain.micro_batch_size: [8, 16]}}"
    load(tmp_path, text)  # 8 sequences in micro-batches of 16 are one micro-batch of 8
    text = "layouts: [4x3]\nsearch: {space: {stages.pretrain.batch_size: [16, 24], stages.pretrain.micro_batch_size: [8, 16]}}"
    with pytest.raises(ConfigError, match=r"batch_size=24, stages.pretrain.micro_batch_size=16: batch_size=24 with micro_batch_size=16"):
        load(tmp_path, text)


def test_a_combination_inside_a_grid_that_does_not_go_together_costs_that_trial_alone(tmp_path):
    text = "layouts: [4x3]\nsearch: {space: {model.hidden_size: [64, 96, 128], model.num_heads: [2, 3, 4]}}"
    specs = [spec for spec in expand(load(tmp_path, text, "model.hidden_size=96")) if spec.stratum == "4x3"]
    points = {spec.id: (spec.model.hidden_size, spec.model.num_heads) for spec in specs}
    assert (points["4x3-t0"], points["4x3-t3"], points["4x3-t8"]) == ((64, 2), (96, 2), (128, 4))
    assert sorted(set(range(9)) - {spec.index for spec in specs}) == [1, 7]  # three heads of 64 and of 128


def test_a_wide_range_of_whole_numbers_is_never_written_out(tmp_path):
    text = "layouts: [4x3]\nsampler: tpe\nsearch: {num_trials: 2, space: {stages.pretrain.tokens: {type: int, low: 1M, high: 1000G}}}"
    (tokens,) = load(tmp_path, text).search.space.values()
    assert tokens.probes() == [10**6, 10**12]
    assert (distribution(tokens).low, distribution(tokens).high) == (10**6, 10**12)


@pytest.mark.parametrize(
    ("space", "dense"),
    [
        ("layouts: [60x0, 4x3]", "60x0"),
        ("search: {space: {layout: [4x3, 60x0]}}", "60x0"),
        ("search: {space: {trees: [4], depth: {type: int, low: 0, high: 3}}}", "Kx0"),
        ("layouts: [4x3]", None),
        ("search: {space: {trees: [4], depth: {type: int, low: 1, high: 3}}}", None),
    ],
)
def test_figures_of_branches_are_no_objective_where_a_layout_has_none(tmp_path, space, dense):
    path = tmp_path / "searched.yaml"
    path.write_text(BASE.replace("params/total: minimize", "tree/dead_nodes: minimize") + space)
    if dense is None:
        assert "tree/dead_nodes" in load_config(path).objectives
        return
    with pytest.raises(ConfigError, match=f"objective tree/dead_nodes: layout {dense} has no branches to count"):
        load_config(path)


def test_a_searched_config_reads_back(tmp_path):
    config = load(tmp_path, GRID)
    assert type(config).model_validate(config.resolved()) == config


def test_lay_over_leaves_the_block_as_it_is():
    block = {"a": {"b": 1, "c": 2}, "d": 3}
    assert lay_over(block, "x", {"x.a.b": 5, "y.d": 6}) == {"a": {"b": 5, "c": 2}, "d": 3}
    assert block == {"a": {"b": 1, "c": 2}, "d": 3}


def test_steps_do_not_drift():
    search = Search.model_validate({"space": {"r": {"type": "float", "low": 0.1, "high": 0.7, "step": 0.1}}})
    assert search.space["r"].values() == [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7]


@pytest.mark.parametrize("text", ["params/total <= 1234567", "quality/avg >= 81.23456789", "quality_retention >= 0.96", "a <= 1e+06"])
def test_a_constraint_keeps_its_bound(text):
    assert parse_constraint(text).bound == float(text.split()[-1])
    assert parse_constraint(parse_constraint(text).text) == parse_constraint(text)
    assert parse_constraint("quality_retention>=.96").text == "quality_retention >= 0.96"
