"""Which trials a config stands for: shared models, roles, order."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fffsweep.kernels.shape import TreeShape, parse_layout
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.controls import Control, parse_control
from fffsweep.sweeps.space import expand


def config_of(layouts, controls=(), **more):
    values = {
        "name": "test",
        "model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2},
        "layouts": layouts,
        "controls": list(controls),
        "stages": {"prepare": {"tasks": ["stsb"]}, "pretrain": {"tokens": 1000}, "finetune": {"tasks": ["stsb"]}},
        "objectives": {"quality/avg": "maximize"},
        **more,
    }
    return SweepConfig.model_validate(values)


def test_quickstart_shaped_space():
    trials = expand(config_of(["34x3", "512x0", "1x8"], ["none", "dense_active(1x8)", "reference_dense(512)", "random_routing(1x8)"]))
    assert [(t.id, t.controls, t.in_study) for t in trials] == [
        ("512x0", ("reference_dense",), True),
        ("34x3", (), True),
        ("1x8", (), True),
        ("none", ("none",), False),
        ("dense_active(1x8)", ("dense_active(1x8)",), False),
        ("random_routing(1x8)", ("random_routing(1x8)",), False),
    ]
    by_id = {t.id: t for t in trials}
    assert by_id["none"].layout is None
    assert by_id["none"].params == {}
    assert by_id["dense_active(1x8)"].model.feedforward.trees == 9
    assert by_id["dense_active(1x8)"].layout == "9x0"
    assert by_id["34x3"].params == {"trees": 34, "depth": 3}
    assert by_id["random_routing(1x8)"].model.feedforward.variant == "random_routing"
    assert by_id["512x0"].model.feedforward.variant == "dense"


def test_a_reference_that_is_no_layout_is_a_trial_of_its_own_and_first():
    trials = expand(config_of(["34x3"], ["none", "reference_dense(512)"]))
    assert [t.id for t in trials] == ["reference_dense", "34x3", "none"]
    assert not trials[0].in_study


def test_controls_for_every_layout():
    trials = expand(config_of(["512x0", "8x5", "1x8"], ["dense_active", "random_routing", "dense_active(1x8)"]))
    roles = {t.id: t.controls for t in trials}
    assert roles == {
        "512x0": (),  # a dense layer is its own active width, and has nothing to route
        "8x5": (),
        "1x8": (),
        "dense_active(8x5)": ("dense_active(8x5)",),
        "dense_active(1x8)": ("dense_active(1x8)",),
        "random_routing(8x5)": ("random_routing(8x5)",),
        "random_routing(1x8)": ("random_routing(1x8)",),
    }


def test_equal_controls_share_a_trial():
    assert TreeShape(3, 2).active_width == TreeShape(1, 8).active_width
    trials = expand(config_of(["3x2", "1x8", "9x0"], ["dense_active(3x2)", "dense_active(1x8)", "reference_dense(9)"]))
    assert (trials[0].id, trials[0].controls) == ("9x0", ("dense_active(3x2)", "dense_active(1x8)", "reference_dense"))
    assert len(trials) == 3


def test_feedforward_defaults_reach_every_trial():
    model = {"hidden_size": 32, "num_heads": 2, "feedforward": {"activation": "relu", "execution": "masked", "load_balancing": 0.1}}
    trials = expand(config_of(["4x0", "1x3"], ["none"], model=model))
    layers = {t.id: t.model.feedforward for t in trials}
    assert (layers["1x3"].activation, layers["1x3"].execution, layers["1x3"].load_balancing) == ("relu", "masked", 0.1)
    assert (layers["4x0"].activation, layers["4x0"].load_balancing) == ("relu", 0.0)
    assert layers["none"].activation == "gelu"  # what a model without the layer cannot have is no part of it


def test_depth_and_width():
    config = config_of(None, ["dense_active"], depth=[0, 3, 8, 11], width="~4095")
    assert [shape.layout for shape in config.shapes] == ["4095x0", "273x3", "8x8", "1x11"]
    assert len(expand(config)) == 7  # four layouts, three of them with trees


layouts = st.builds(TreeShape, trees=st.integers(1, 64), depth=st.integers(0, 8)).map(lambda shape: shape.layout)


@given(st.lists(layouts, min_size=1, max_size=6, unique=True), st.lists(layouts, max_size=4, unique=True))
def test_every_model_is_one_trial_and_every_role_is_played_once(study, controlled):
    controls = [form.format(layout) for layout in controlled for form in ("dense_active({})", "random_routing({})")]
    trials = expand(config_of(study, [*controls, "none", "reference_dense(64)"]))
    models = [t.model.model_dump_json() for t in trials]
    assert len(set(models)) == len(models)
    assert len({t.id for t in trials}) == len(trials)
    assert sorted(role for t in trials for role in t.controls) == sorted([*controls, "none", "reference_dense"])
    assert {t.layout for t in trials if t.in_study} == set(study)
    assert "reference_dense" in trials[0].controls
    for trial in trials:
        if trial.layout:
            assert trial.model.feedforward.shape == parse_layout(trial.layout)


@pytest.mark.parametrize(
    ("text", "control"),
    [
        ("none", Control("none")),
        (" reference_dense( 4k ) ", Control("reference_dense", width=4000)),
        ("dense_active", Control("dense_active")),
        ("dense_active(1 x 8)", Control("dense_active", layout="1x8")),
        ("random_routing(4x9)", Control("random_routing", layout="4x9")),
    ],
)
def test_controls_parse_and_print(text, control):
    assert parse_control(text) == control
    assert parse_control(control.text) == control


@pytest.mark.parametrize(
    "text",
    [
        "",
        "none()",
        "none(3)",
        "reference_dense",
        "reference_dense()",
        "reference_dense(0)",
        "reference_dense(1x8)",
        "dense_active()",
        "dense",
        "random_routing(8)",
        "none, none",
    ],
)
def test_what_is_no_control(text):
    with pytest.raises(ValueError, match=r"control .*expected"):
        parse_control(text)


def test_layouts_of_the_original_kind_and_controls_of_their_active_width():
    kind = {"variant": "original_fff", "leaf_width": 4, "master_leaf": 2}
    model = {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "feedforward": kind}
    original, active, none = expand(config_of(["2x3"], ["dense_active", "none"], model=model))
    assert (original.model.feedforward.variant, original.model.feedforward.leaf_width) == ("original_fff", 4)
    assert (active.id, active.model.feedforward.variant, active.model.feedforward.trees) == ("dense_active(2x3)", "dense", 2 * (3 + 4) + 2)
    assert none.model.feedforward.variant == "none"
