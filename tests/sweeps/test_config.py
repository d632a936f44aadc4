"""Sweep configs: what they resolve to, what they refuse, and that each refusal says where."""

import copy
import json
from pathlib import Path

import pytest
import yaml

from fffsweep.sweeps.config import ConfigError, SweepConfig, load_config
from fffsweep.sweeps.config_errors import nearest_first
from fffsweep.sweeps.plan import make_plan

BASE = {
    "model": {"hidden_size": 32, "num_layers": 2, "num_heads": 2},
    "layouts": ["16x0", "1x3"],
    "controls": ["reference_dense(16)", "none"],
    "stages": {
        "prepare": {"tasks": ["stsb", "sst2-like"]},
        "pretrain": {"tokens": 1000},
        "finetune": {"tasks": ["stsb", "sst2-like"], "epochs": 2, "overrides": {"stsb": {"epochs": 3}}},
        "benchmark_cpu": {"points": [{"tokens": 128}, {"tokens": 1, "mode": "hot"}]},
    },
    "objectives": {"quality/avg": "maximize", "ff/cpu/rel_time": "minimize"},
    "seeds": {"pretrain": 2, "finetune": 3},
}


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "little.yaml"
    path.write_text(yaml.safe_dump(BASE, sort_keys=False))
    return path


def test_a_config_resolves_and_reads_back(path):
    config = load_config(path)
    assert config.name == "little"
    resolved = json.loads(json.dumps(config.resolved()))
    assert resolved["stages"]["finetune"]["overrides"] == {"stsb": {"epochs": 3}}
    assert resolved["stages"]["pretrain"]["tokens"] == 1000
    assert SweepConfig.model_validate(resolved) == config
    assert config.task_names == ("stsb", "sst2-like")
    assert (config.seeds.pretrain, config.seeds.finetune) == (2, 3)


def test_stage_configs(path):
    config = load_config(path)
    assert (config.finetune_config("stsb").epochs, config.finetune_config("sst2-like").epochs) == (3, 2)
    assert config.finetune_config("stsb").task == "stsb"
    model = config.model_settings("fff", config.shapes[1])
    pretrain = config.pretrain_config(model)
    assert pretrain.model == model
    assert pretrain.tokens == 1000


def test_the_name_comes_from_the_option_the_config_or_the_file(path):
    assert load_config(path, ["name=other"]).name == "other"
    assert load_config(path, ["name=other"], name="<third>").name == "<third>"


@pytest.mark.parametrize("text", ["1e6", "1_000_000", "1M", "1000000", "1000k"])
def test_counts_in_overrides_and_yaml(path, text):
    assert load_config(path, [f"stages.pretrain.tokens={text}"]).stages.pretrain.tokens == 1_000_000
    path.write_text(path.read_text().replace("tokens: 1000\n", f"tokens: {text}\n"))
    assert load_config(path).stages.pretrain.tokens == 1_000_000


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["stages.pretrain.tokenz=1"], "stages.pretrain.tokenz: unknown key; expected one of tokens, "),
        (["modle={}"], "modle: unknown key; expected one of model, "),
        (["model.feedforward.depth=4"], "model.feedforward.depth: unknown key; expected one of "),
        (["stages.pretrain.tokens=-3"], "stages.pretrain.tokens=-3: expected an integer >= 1"),
        (["stages.pretrain.tokens=many"], "stages.pretrain.tokens=many: expected an integer"),
        (["stages.pretrain.tokens=1.5"], "stages.pretrain.tokens: 1.5: expected a whole number"),
        (["stages.pretrain.steps=10"], "stages.pretrain: budget: got tokens and steps"),
        (["stages.pretrain.learning_rate=0"], "stages.pretrain.learning_rate=0: expected a number > 0"),
        (["stages.pretrain.learning_rate=.inf"], "stages.pretrain.learning_rate=.inf: expected a number"),
        (["stages.pretrain.compile=1x"], "stages.pretrain.compile=1x: expected true or false"),
        (["stages.pretrain.schedule=cosin"], "stages.pretrain.schedule=cosin: expected one of cosine, "),
        (["stages.pretrain=3"], "stages.pretrain=3: expected a mapping of settings"),
        (["stages.finetune.tasks=[]"], "stages.finetune.tasks=[]: expected a list with at least 1 entry"),
        (
            ["stages.finetune.overrides.mrpc.epochs=4"],
            "stages.finetune.overrides.mrpc: expected one of the tasks of this sweep: stsb, sst2-like",
        ),
        (["stages.finetune.overrides.stsb.epochs=-4"], "stages.finetune.overrides.stsb.epochs=-4: expected an integer >= 1"),
        (["stages.finetune.overrides.stsb.epoch=4"], "stages.finetune.overrides.stsb.epoch: unknown key; expected one of epochs, "),
        (["stages.finetune.overrides.stsb.schedule=triangle"], "stages.finetune for task stsb: warmup=0.1 with schedule triangle"),
        (["stages.benchmark_cpu.points[1].mode=warm"], "stages.benchmark_cpu.points[1].mode=warm: expected one of "),
        (["stages.benchmark_cpu.layer=2"], "stages.benchmark_cpu.layer=2: expected a layer from 0 to 1"),
        (["controls=[none]"], "stages.benchmark_cpu without the control reference_dense"),
        (["controls[2]=reference_dense(8)"], "controls: more than one reference_dense"),
        (["controls[2]=none"], "controls[2]=none: given twice"),
        (
            ["model.feedforward.variant=original_fff", "controls[1]=random_routing"],
            "controls[1]=random_routing with model.feedforward.variant",
        ),
        (["model.feedforward.variant=original_fff"], "stages.benchmark_cpu with model.feedforward.variant original_fff"),
        (["model.feedforward.master_leaf=4"], "stages.benchmark_cpu with model.feedforward.variant fff, master_leaf 4"),
        (["controls[1]=non"], "controls[1]: control 'non': expected "),
        (["model.num_heads=5"], "model: hidden_size=32 with num_heads=5: heads must divide hidden_size; possible: 1, 2, 4, 8, 16, 32"),
        (["layouts=[1x]"], "layouts[0]: layout '1x': expected trees x depth"),
        (["layouts=[8]"], "layouts[0]: layout 8: expected trees x depth"),
        (["layouts=[0x8]"], "layouts[0]: trees=0: expected an integer >= 1"),
        (["layouts=[1x3, 1x3]"], "layouts[1]=1x3: given twice"),
        (["layouts=[]"], "layouts=[]: the space is empty"),
        (["layouts=null"], "layouts: missing, so the space is empty"),
        (["layouts=null", "depth=[]", "width=~15"], "depth=[]: the space is empty"),
        (["layouts=null", "depth=-1", "width=~15"], "depth=-1: expected an integer >= 0"),
        (["layouts=null", "depth=[2, -1]", "width=~15"], "depth[1]=-1: expected an integer >= 0"),
        (["layouts=null", "depth=[2]"], "depth alone: expected depth and width together"),
        (["layouts=null", "width=~15"], "width alone: expected depth and width together"),
        (["layouts=null", "depth=[2]", "width=15"], "width=15: expected ~ and a whole number"),
        (["layouts=null", "depth=[2, 4]", "width=~15"], "width ~15 at depth 4: no layout within 10 % below it"),
        (["depth=[2]", "width=~15"], "layouts together with depth and width"),
        (["sampler=tpee"], "sampler=tpee: expected one of tpe, "),
        (["objectives={}"], "objectives={}: expected"),
        (["objectives.quality/avg=maximise"], "objectives.quality/avg=maximise: expected one of maximize, minimize"),
        (
            ["objectives.quality/average=maximize"],
            "objective quality/average: no configured stage produces it; expected one of quality/avg, ",
        ),
        (["objectives.quality/validation_avg=maximize"], "objective quality/validation_avg: a validation split is only reported"),
        (["objectives={ff/gpu/rel_time: minimize}"], "objective ff/gpu/rel_time: no stage produces it, add stages.benchmark_gpu"),
        (["stages.benchmark_gpu.layer=2"], "stages.benchmark_gpu.layer=2: expected a layer from 0 to 1"),
        (["stages.benchmark_gpu.points=[{dtype: float64}]"], "stages.benchmark_gpu.points[0].dtype=float64: expected one of "),
        (["stages.benchmark_cpu=null", "stages.benchmark_gpu={}", "controls=[none]"], "stages.benchmark_gpu without the control reference"),
        (["stages.benchmark_cpu=null"], "objective ff/cpu/rel_time: no stage produces it, add stages.benchmark_cpu"),
        (["objectives.quality/avg=maximize", "retries=-1"], "retries=-1: expected an integer >= 0"),
        (["seeds.pretrain=0"], "seeds.pretrain=0: expected an integer or a mapping of settings >= 1"),
        (["name="], "name"),
        (["name=7"], "name=7: expected text"),
        (['name="a\\nb"'], "name='a"),
        ([f"name={'x' * 81}"], "name="),
    ],
)
def test_refusals_say_what_is_allowed_and_where(path, overrides, message):
    with pytest.raises(ConfigError) as error:
        load_config(path, overrides)
    text = str(error.value)
    assert text.startswith(message)
    assert "\n" not in text
    assert any(text.endswith(f"(--set {override})") for override in overrides) or "little.yaml, line" in text
    assert len(text) < 500


@pytest.mark.parametrize(
    ("before", "after", "message", "line"),
    [
        ("num_heads: 2", "num_heads: 2\n  num_head: 2", "model.num_head: unknown key; expected one of num_heads, ", 5),
        ("hidden_size: 32", "hidden_size: 33", "model: hidden_size=33 with num_heads=2: heads must divide", 2),
        ("- 1x3", "- 3", "layouts[1]: layout 3: expected trees x depth", 7),
        ("tokens: 1000", "tokens: {}", "stages.pretrain.tokens={}: expected an integer", 17),
        ("quality/avg: maximize", "quality/avg: up", "objectives.quality/avg=up: expected one of maximize, minimize", 32),
        ("model:", "model: null\nmodle:", "modle: unknown key; expected one of model, ", 2),
        ("pretrain:\n    tokens: 1000", "pretrain: {}", "stages.pretrain: budget: got none; expected exactly one of", 16),
    ],
)
def test_faults_in_the_file_name_their_line(path, before, after, message, line):
    text = path.read_text()
    assert text.count(before) == 1 or before == "model:"
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(ConfigError) as error:
        load_config(path)
    assert str(error.value).startswith(message)
    assert str(error.value).endswith(f"({path}, line {line})")


def test_what_is_missing_is_named(path):
    for name in ("model", "stages", "objectives"):
        values = copy.deepcopy(BASE)
        del values[name]
        path.write_text(yaml.safe_dump(values))
        with pytest.raises(ConfigError, match=f"^{name}: missing; expected a mapping"):
            load_config(path)


def test_nearest_first():
    assert nearest_first("tokenz", ["steps", "tokens", "seed"]).startswith("tokens, ")
    assert nearest_first("x", [str(number) for number in range(20)], most=3).endswith(" and 17 more")


SWEEPS = sorted((Path(__file__).parents[2] / "sweeps").glob("*.yaml"))


def test_there_are_sweeps():
    assert {path.stem for path in SWEEPS} >= {"quickstart", "tiny", "depth_width", "paper"}


@pytest.mark.parametrize("sweep", SWEEPS, ids=lambda path: path.stem)
def test_every_sweep_loads_and_opens_with_what_it_shows(sweep):
    config = load_config(sweep)
    assert config.name == sweep.stem
    assert config.description
    opening = sweep.read_text().split("\nname:")[0].lower()
    for word in ("shows", "cost", "expected"):
        assert word in opening, word


def test_the_published_table_is_trained_on_gpus(tmp_path):
    config = load_config(next(path for path in SWEEPS if path.stem == "paper"))
    found = {stage.stage: stage for stage in make_plan(config, tmp_path).stages}
    assert config.limits_of("pretrain").gpus == config.limits_of("finetune").gpus == 1
    assert found["pretrain"].seconds == 17 * 86_400
    assert found["finetune"].seconds < 10 * 86_400  # at a GPU's rate; at a core's it would be two years
    assert "not known" in found["prepare"].basis
