"""The JSON Schema that editors check sweep configs with."""

import copy
from pathlib import Path

import jsonschema
import pytest

from fffsweep.sweeps.schema import sweep_schema
from fffsweep.sweeps.yaml_source import parse_yaml

SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))


@pytest.fixture(scope="module")
def validator():
    schema = sweep_schema()
    jsonschema.Draft202012Validator.check_schema(schema)
    return jsonschema.Draft202012Validator(schema)


@pytest.fixture
def quickstart():
    return copy.deepcopy(parse_yaml(next(path for path in SWEEPS if path.stem == "quickstart").read_text(), "quickstart")[0])


@pytest.mark.parametrize("path", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_is_valid(validator, path):
    validator.validate(parse_yaml(path.read_text(), str(path))[0])


@pytest.mark.parametrize(
    "change",
    [
        {"name": "other"},
        {"layouts": None, "depth": [0, 3], "width": "~4095"},
        {"layouts": None, "depth": 3, "width": "~4k"},
        {"scale": {"stages": {"finetune": {"epochs": 2, "overrides": {"stsb": {"epochs": "1k"}}}}}},
        {"scale": None},
        {
            "search": {
                "space": {"layout": ["1x8", "8x5"], "stages.pretrain.clip": {"type": "float", "low": 0.1, "high": 1}},
                "num_trials": 3,
            }
        },
    ],
)
def test_what_people_write_is_valid(validator, quickstart, change):
    validator.validate({**quickstart, **change})


@pytest.mark.parametrize(
    "change",
    [
        {"modle": {}},
        {"layouts": ["1x"]},
        {"depth": -1},
        {"width": 4095},
        {"controls": ["dense"]},
        {"objectives": {"quality/avg": "up"}},
        {"sampler": "tpee"},
        {"search": {"space": {"stages.pretrain.clip": {"type": "flaot", "low": 0, "high": 1}}}},
        {"seeds": {"pretrain": "two"}},
        {"scale": {"stages": {"finetune": {"epoch": 2}}}},
        {"scale": {"model": {"num_layers": 0}}},
        {"model": {"feedforward": {"depth": 3}}},
    ],
)
def test_mistakes_are_not(validator, quickstart, change):
    with pytest.raises(jsonschema.ValidationError):
        validator.validate({**quickstart, **change})
