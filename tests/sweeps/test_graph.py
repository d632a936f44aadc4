"""From a config to keys: what is shared, what is measured against what, what a change makes anew."""

import re
from pathlib import Path

import pytest

from fffsweep.sweeps.config import ConfigError, load_config
from fffsweep.sweeps.confirm import confirming
from fffsweep.sweeps.conversion import check_encoder
from fffsweep.sweeps.graph import build
from fffsweep.sweeps.plan import make_plan
from fffsweep.sweeps.space import expand

TINY = Path(__file__).parents[2] / "sweeps" / "tiny.yaml"


def graph_of(*overrides):
    config = load_config(TINY, overrides)
    return {plan.spec.id: {stage.label: stage for stage in plan.stages} for plan in build(config, expand(config))}


@pytest.fixture(scope="module")
def graph():
    return graph_of()


def keys_of(graph):
    return {stage.run.key for stages in graph.values() for stage in stages.values()}


def test_every_trial_has_the_stages_of_its_seeds_and_collects_last():
    for stages in graph_of("seeds={pretrain: 2, finetune: 3}").values():
        assert [label.split("/")[0] for label in stages].count("finetune") == 2 * 2 * 3
        assert next(iter(stages)) == "prepare"
        assert list(stages)[-1] == "collect"
        assert set(stages["collect"].run.inputs) == set(stages) - {"prepare", "collect"}


def test_all_trials_share_one_prepare_run(graph):
    assert len({stages["prepare"].run.key for stages in graph.values()}) == 1
    assert len(keys_of(graph)) == 1 + len(graph) * 5


def test_inputs_come_before_whoever_reads_them(graph):
    seen = set()
    for stages in graph.values():
        for stage in stages.values():
            assert set(stage.run.inputs.values()) <= seen
            seen.add(stage.run.key)


def test_a_layer_may_be_timed_on_a_gpu_too(monkeypatch):
    with pytest.raises(ValueError, match="nvidia-smi lists no GPU"):
        graph_of("stages.benchmark_gpu={}")
    monkeypatch.setattr("fffsweep.pipeline.stages.benchmark_gpu.machine", lambda: {"gpus": ["NVIDIA H100"]})
    graph = graph_of("stages.benchmark_gpu={}")
    for stages in graph.values():
        timed = stages["benchmark_gpu/0"]
        assert timed.run.inputs == stages["benchmark_cpu/0"].run.inputs
        assert (timed.resources.gpus, timed.resources.exclusive) == (1.0, True)
        assert stages["collect"].run.inputs["benchmark_gpu/0"] == timed.run.key


def test_every_layer_is_timed_against_the_reference_of_the_same_replicate():
    graph = graph_of("seeds={pretrain: 2, finetune: 1}")
    for stages in graph.values():
        for replicate in (0, 1):
            inputs = stages[f"benchmark_cpu/{replicate}"].run.inputs
            assert inputs["reference"] == graph["60x0"][f"pretrain/{replicate}"].run.key
            assert inputs["pretrain"] == stages[f"pretrain/{replicate}"].run.key
        assert stages["pretrain/0"].run.key != stages["pretrain/1"].run.key


def test_seeds_pair_the_trials(graph):
    assert {stages["pretrain/0"].run.seed for stages in graph.values()} == {0}
    assert {stages["finetune/0/stsb/0"].run.seed for stages in graph.values()} == {0}


def finetuning_seeds(graph):
    """Seed by trial and label."""
    labelled = {trial: {name: stage for name, stage in stages.items() if stage.run.stage == "finetune"} for trial, stages in graph.items()}
    return {trial: {name: stage.run.seed for name, stage in stages.items()} for trial, stages in labelled.items()}


def test_every_finetuning_of_a_trial_has_a_seed_of_its_own_and_all_trials_have_the_same():
    for overrides in ("seeds={pretrain: 3, finetune: 1}", "seeds={pretrain: 4, finetune: 3}"):
        found = finetuning_seeds(graph_of(overrides))
        first = next(iter(found.values()))
        assert len(found) > 1
        assert all(seeds == first for seeds in found.values())
        of_one_task = [seed for name, seed in first.items() if name.split("/")[2] == "stsb"]
        assert len(set(of_one_task)) == len(of_one_task) > 2


def test_more_seeds_of_either_kind_leave_the_runs_that_are_there():
    before, after = (keys_of(graph_of(f"seeds={{pretrain: {p}, finetune: {f}}}")) for p, f in ((2, 2), (5, 4)))
    collected = {stages["collect"].run.key for stages in graph_of("seeds={pretrain: 2, finetune: 2}").values()}
    assert before - collected < after
    assert len(before - collected) > 20


def test_fresh_seeds_of_a_pick_finetune_with_seeds_that_the_choice_did_not_see():
    config = load_config(TINY, ["seeds={pretrain: 2, finetune: 3}"])
    study = {"name": config.name, "config": config.resolved(), "trials": [{"layout": "4x3"}]}
    chosen = next(spec for spec in expand(config) if spec.id == "4x3")
    trial = {"id": "4x3", "layout": "4x3", "params": {}, "controls": [], "model": chosen.model.resolved()}
    again = confirming(study, trial, 2, 2)
    plans = {plan.spec.id: {stage.label: stage for stage in plan.stages} for plan in build(again, expand(again))}
    seeds = finetuning_seeds(plans)["4x3"]
    known = finetuning_seeds(graph_of("seeds={pretrain: 2, finetune: 3}"))["4x3"]
    assert {name: seeds[name] for name in known} == known
    fresh = {seed for name, seed in seeds.items() if name not in known}
    assert len(fresh) == 2 * 3
    assert not fresh & set(known.values())


def test_a_timing_owns_its_node_and_belongs_to_its_machine(graph):
    benchmark = graph["4x3"]["benchmark_cpu/0"]
    assert benchmark.resources.exclusive
    assert "machine" in benchmark.run.fingerprints
    assert "machine" not in graph["4x3"]["pretrain/0"].run.fingerprints


@pytest.mark.parametrize(
    ("override", "stale"),
    [
        ("stages.finetune.max_rows=65", {"finetune", "collect"}),
        ("stages.benchmark_cpu.min_time_s=0.03", {"benchmark_cpu", "collect"}),
        ("stages.pretrain.tokens=21k", {"pretrain", "finetune", "benchmark_cpu", "collect"}),
        ("stages.prepare.max_corpus_bytes=600k", {"prepare", "pretrain", "finetune", "benchmark_cpu", "collect"}),
        ("layouts=[60x0, 4x3, 2x4]", set()),
        ("seeds={pretrain: 1, finetune: 2}", {"collect"}),
        ("description=other words", set()),
    ],
)
def test_a_change_makes_anew_what_depends_on_it_and_nothing_else(graph, override, stale):
    changed = graph_of(override)
    for trial, stages in graph.items():
        for label, stage in stages.items():
            same = stage.run.key == changed[trial][label].run.key
            assert same == (stage.run.stage not in stale), (trial, label)


def converting(tmp_path, **more):
    from transformers import BertConfig, BertModel

    folder = tmp_path / "encoder"
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 30, "vocab_size": 50}
    BertModel(BertConfig(**sizes)).save_pretrained(folder)
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]) + "\n")
    path = tmp_path / "converting.yaml"
    path.write_text(
        f"""
description: conversion
model: {{hidden_size: 16, num_layers: 2, num_heads: 2, feedforward: {{output_bias: true}}}}
layouts: [2x3, 30x0]
controls: [unchanged, none, dense_active]
stages:
  prepare: {{source: wheels}}
  convert: {{encoder: {folder}, tokens: 1000}}
  finetune: {{tasks: [stsb]}}
objectives: {{quality/avg: maximize, ff/active_width: minimize}}
seeds: {{pretrain: 2}}
"""
    )
    return load_config(path, more.get("overrides", ()))


def test_conversions_share_one_reading_and_controls_without_training_need_none(tmp_path):
    config = converting(tmp_path)
    check_encoder(config)
    assert config.stages.prepare.vocabulary_file == str(tmp_path / "encoder" / "vocab.txt")
    plans = {plan.spec.id: plan for plan in build(config, expand(config))}
    assert set(plans) == {"2x3", "30x0", "unchanged", "none", "dense_active(2x3)"}
    readings = {stage.run.key for plan in plans.values() for stage in plan.stages if stage.label == "activations"}
    assert len(readings) == 1
    for name, plan in plans.items():
        labels = [stage.label for stage in plan.stages]
        assert [label for label in labels if label.startswith("convert")] == ["convert/0", "convert/1"]
        assert ("activations" in labels) == (name not in ("unchanged", "none"))
        by_label = {stage.label: stage.run for stage in plan.stages}
        assert by_label["finetune/1/stsb/0"].inputs["pretrain"] == by_label["convert/1"].key
        assert set(by_label["collect"].inputs) == {"convert/0", "convert/1", "finetune/0/stsb/0", "finetune/1/stsb/0"}
        assert by_label["finetune/0/stsb/0"].seed != by_label["finetune/1/stsb/0"].seed, "the encoder of both may be the same"
    assert plans["unchanged"].spec.model.feedforward.active_width == 30
    make_plan(config, tmp_path / "results")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.pretrain={tokens: 1000}", "stages: got both of pretrain and convert"),
        ("stages.convert=null", "stages: got neither of pretrain and convert"),
        ("stages.benchmark_cpu={}", "stages.benchmark_cpu with convert"),
        ("stages.finetune.pooling=mean", "stages.finetune: pooling=mean, head_size=None with convert"),
    ],
)
def test_what_does_not_go_with_a_conversion_is_refused(override, message, tmp_path):
    with pytest.raises(ConfigError, match=re.escape(message)):
        converting(tmp_path, overrides=[override])


def test_the_model_must_be_the_encoder_s(tmp_path):
    with pytest.raises(ValueError, match=r"model.num_layers=3: expected 2, that of stages.convert.encoder"):
        check_encoder(converting(tmp_path, overrides=["model.num_layers=3"]))
    with pytest.raises(ValueError, match="there is no such folder"):
        check_encoder(converting(tmp_path, overrides=["stages.convert.encoder=nowhere"]))
