"""What a sweep takes from an existing encoder, and what it refuses, before anything starts."""

import json

import pytest
from transformers import BertConfig, BertModel, DistilBertConfig, DistilBertModel

from fffsweep.pipeline.stage import stage_run
from fffsweep.sweeps.config import ConfigError, load_config
from fffsweep.sweeps.confirm import confirming
from fffsweep.sweeps.conversion import check_encoder
from fffsweep.sweeps.graph import build
from fffsweep.sweeps.space import expand

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a"]
TEXT = """
description: conversion
model: {hidden_size: 16, num_layers: 2, num_heads: 2}
layouts: LAYOUTS
controls: [unchanged]
stages:
  prepare: {source: wheels}
  convert: {encoder: FOLDER, tokens: 1000}
  finetune: {tasks: [stsb]}
objectives: {quality/avg: maximize, ff/active_width: minimize}
"""


@pytest.fixture
def folder(tmp_path):
    """A cased BERT."""
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 30, "vocab_size": 6}
    BertModel(BertConfig(**sizes)).save_pretrained(tmp_path / "encoder")
    (tmp_path / "encoder" / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    (tmp_path / "encoder" / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": False}))
    return tmp_path / "encoder"


def loaded(folder, *overrides, layouts="[2x3]", encoder=None):
    path = folder.parent / "sweep.yaml"
    path.write_text(TEXT.replace("FOLDER", str(encoder or folder)).replace("LAYOUTS", layouts))
    return load_config(path, overrides)


def checked(folder, *overrides, **rest):
    config = loaded(folder, *overrides, **rest)
    check_encoder(config)
    return config


def test_a_cased_encoder_is_read_as_cased_text(folder):
    config = checked(folder)
    assert config.stages.prepare.lowercase is False
    assert config.stages.prepare.vocabulary_file == str(folder / "vocab.txt")
    assert checked(folder, "stages.prepare.lowercase=false").stages.prepare.lowercase is False
    (folder / "tokenizer_config.json").write_text(json.dumps({"do_lower_case": True}))
    assert checked(folder).stages.prepare.lowercase is True


def test_a_contradiction_is_refused(folder, tmp_path):
    with pytest.raises(ValueError, match=r"stages.prepare.lowercase=true: expected false, as the encoder's own tokenizer has it; leave it"):
        checked(folder, "stages.prepare.lowercase=true")
    (tmp_path / "other.txt").write_text("\n".join([*PIECES[:-1], "b"]) + "\n")
    with pytest.raises(ValueError, match=r"stages.prepare.vocabulary_file=.*other.txt: expected the pieces of stages.convert.encoder"):
        checked(folder, f"stages.prepare.vocabulary_file={tmp_path / 'other.txt'}")
    (tmp_path / "copy.txt").write_text("\n".join(PIECES))
    checked(folder, f"stages.prepare.vocabulary_file={tmp_path / 'copy.txt'}")


def test_an_encoder_without_wordpiece_is_refused(folder):
    (folder / "vocab.txt").unlink()
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}}}))
    with pytest.raises(ValueError, match=r"no WordPiece vocabulary \(tokenizer: BPE\)"):
        checked(folder)


def test_figures_of_branches_are_an_objective_where_new_layers_have_them(folder):
    objectives = "objectives={quality/avg: maximize, tree/dead_nodes: minimize}"
    assert "tree/dead_nodes" in loaded(folder, objectives).objectives
    for layouts, why in (("[30x0]", "layout 30x0 has no branches to count"), ("[]", "no configured stage produces it")):
        with pytest.raises(ConfigError, match=f"objective tree/dead_nodes: {why}"):
            loaded(folder, objectives, layouts=layouts)


def distilbert(folder):
    model = DistilBertModel(DistilBertConfig(vocab_size=6, dim=16, n_layers=2, n_heads=2, hidden_dim=30))
    model.save_pretrained(folder)


def test_another_type_is_finetuned_as_it_is_and_not_converted(folder):
    distilbert(folder)
    config = checked(folder, layouts="[]")
    (plan,) = build(config, expand(config))
    assert plan.spec.id == "unchanged"
    assert [stage.label for stage in plan.stages] == ["prepare", "convert/0", "finetune/0/stsb/0", "collect"]
    for overrides in (["layouts=[2x3]"], ["controls=[unchanged, none]"]):
        with pytest.raises(ValueError, match=r"model type distilbert: expected bert, whose layers can be exchanged; to finetune another"):
            checked(folder, *overrides, layouts="[]")


def test_a_space_is_empty_where_no_encoder_is_left_as_it_is(folder):
    for override in ("controls=[none]", "stages.convert=null"):
        with pytest.raises(ConfigError):
            loaded(folder, override, layouts="[]")


def test_a_choice_of_the_encoder_as_it_is_is_confirmed_without_layouts(folder):
    distilbert(folder)
    config = checked(folder, layouts="[]")
    (spec,) = expand(config)
    trial = {"id": spec.id, "params": spec.params, "model": spec.model.resolved(), "controls": list(spec.controls), "layout": spec.layout}
    study = {"name": "asis", "config": config.resolved(), "trials": [trial]}
    again = confirming(study, trial, 1, 2)
    assert [each.id for each in expand(again)] == ["unchanged"]
    check_encoder(again)


def test_a_hub_s_encoder_brings_its_own_vocabulary_and_casing(folder, monkeypatch):
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", lambda name, file, revision: str(folder / file))
    (folder / "tokenizer.json").write_text("{}")
    config = checked(folder, encoder="owner/name@abc")
    assert config.stages.prepare.vocabulary_file == "owner/name@abc"
    assert config.stages.prepare.lowercase is False
    before = stage_run("prepare", config.stages.prepare).key
    assert before == stage_run("prepare", loaded(folder).stages.prepare).key
    (folder / "vocab.txt").write_text("\n".join([*PIECES, "b"]) + "\n")
    assert stage_run("prepare", config.stages.prepare).key != before

    def offline(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(ConfigError, match=r"owner/name@abc: not read \(no network\).*sweep.yaml, line 8"):
        loaded(folder, encoder="owner/name@abc")
