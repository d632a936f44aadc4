"""A conversion sweep through the driver, on a toy BERT: every layout and control, stored, tabled, reported, exported."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import BertConfig, BertModel

from fffsweep.pipeline.encoders import feedforward_halves
from fffsweep.pipeline.store import Store
from tests.sweeps.conftest import write_data

pytestmark = pytest.mark.integration

CONFIG = """
name: convert_toy
model: {hidden_size: 16, num_layers: 2, num_heads: 2, sequence_length: 16, feedforward: {output_bias: true, init: fan}}
layouts: [4x1, 2x2]
controls: [unchanged, none, dense_active]
stages:
  prepare:
    source: directory
    path: PATH
    validation_share: 0.2
    tasks:
      - {name: pairs, path: PATH/pairs, text_columns: [text, other], num_labels: 2, metrics: [accuracy]}
  convert: {encoder: PATH/encoder, tokens: 4k, distinct_tokens: 400, validation_tokens: 160, batch_tokens: 80, learning_rate: 1e-2}
  finetune: {tasks: [pairs], epochs: 1, learning_rate: 1e-2}
objectives: {quality/avg: maximize, ff/active_width: minimize}
seeds: {pretrain: 2}
"""
TRIALS = {"4x1", "2x2", "unchanged", "none", "dense_active(4x1)", "dense_active(2x2)"}


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    folder = tmp_path_factory.mktemp("toy")
    write_data(folder)
    (folder / "pairs").mkdir()
    for split in ("train", "validation"):
        rows = [json.loads(line) for line in (folder / "rhyme" / f"{split}.jsonl").read_text().splitlines()]
        rows = [row | {"other": row["text"][::-1]} for row in rows]
        (folder / "pairs" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pieces = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefgh", *(f"##{letter}" for letter in "abcdefgh")]
    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 12, "max_position_embeddings": 32}
    torch.manual_seed(0)
    model = BertModel(BertConfig(vocab_size=len(pieces), **sizes))
    with torch.no_grad():
        model.embeddings.token_type_embeddings.weight.mul_(50)  # so that leaving them out shows
        for first, second in feedforward_halves(model):
            first.dense.weight.mul_(20)
            second.weight.mul_(20)
    model.save_pretrained(folder / "encoder")
    (folder / "encoder" / "vocab.txt").write_text("\n".join(pieces) + "\n")
    path = folder / "convert_toy.yaml"
    path.write_text(CONFIG.replace("PATH", str(folder)))
    return path


@pytest.fixture(scope="module")
def swept(config, tmp_path_factory, fffsweep):
    """Results folder; run by Ray."""
    folder = tmp_path_factory.mktemp("results")
    fffsweep("run", str(config), "--results", str(folder))
    return folder


def test_every_trial_ends_and_all_share_one_reading(swept, fffsweep):
    content = json.loads(fffsweep("results", "convert_toy", "--format", "json", "--results", str(swept)))
    rows = {row["trial"]: row for row in content["trials"]}
    assert set(rows) == TRIALS
    assert {row["state"] for row in rows.values()} == {"complete"}
    assert {row["trial"] for row in rows.values() if not row["control"]} == {"4x1", "2x2"}
    for name, row in rows.items():
        assert ("distill/unexplained" in row["metrics"]) == (name not in ("unchanged", "none"))
        assert {"quality/avg", "quality/validation_avg"} <= row["intervals"].keys()
    active = {name: row["metrics"]["ff/active_width"] for name, row in rows.items() if name != "none"}
    expected = {"4x1": 8, "2x2": 6, "unchanged": 12, "dense_active(4x1)": 8, "dense_active(2x2)": 6}
    assert active == expected
    record = json.loads((swept / "studies" / "convert_toy" / "study.json").read_text())
    keys = [stage["key"] for trial in record["trials"] for stage in trial["stages"] if stage["label"] == "activations"]
    assert (len(keys), len(set(keys))) == (4, 1)


def test_one_trial_alone_in_this_process_gives_the_same(config, swept, tmp_path, fffsweep):
    fffsweep("run", str(config), "--results", str(tmp_path), "--executor", "inline", "--only", "2x2")

    def metrics(folder):
        found = {path.stem: json.loads(path.read_text())["metrics"] for path in (folder / "store" / "manifests").glob("*/*.json")}
        return {
            key: {name: value for name, value in each.items() if not name.startswith(("time/", "memory/"))} for key, each in found.items()
        }

    ours, theirs = metrics(tmp_path), metrics(swept)
    assert len(ours) == 1 + 1 + 2 + 2 + 1  # prepare, activations, two conversions, two finetunings, collect
    assert ours == {key: theirs[key] for key in ours}


def test_the_report_sets_layouts_beside_their_controls(swept, tmp_path, fffsweep):
    for suffix, form in (("md", "md"), ("html", "html")):
        fffsweep("report", "convert_toy", "--format", form, "--output", str(tmp_path / f"report.{suffix}"), "--results", str(swept))
    table = (tmp_path / "report.md").read_text().replace("\\", "")
    assert {trial for trial in TRIALS if f"| {trial} |" in table} == TRIALS
    page = (tmp_path / "report.html").read_text()
    assert 'id="quality-active-width"' in page
    assert 'id="quality-depth"' in page


@pytest.mark.parametrize("trial", ["2x2", "unchanged"])
def test_what_is_exported_predicts_what_the_finetuning_did(trial, config, swept, tmp_path, fffsweep):
    """Sentence pairs, so that each token's text matters; and more text than the sequences of this sweep hold."""
    fffsweep("export", "convert_toy", trial, str(tmp_path / "out"), "--task", "pairs", "--results", str(swept))
    rows = [json.loads(line) for line in (config.parent / "pairs" / "validation.jsonl").read_text().splitlines()]
    told = fffsweep("predict", str(tmp_path / "out"), "--json", stdin="".join(f"{row['text']}\t{row['other']}\n" for row in rows))
    record = json.loads((swept / "studies" / "convert_toy" / "study.json").read_text())
    (key,) = (
        stage["key"]
        for each in record["trials"]
        if each["id"] == trial
        for stage in each["stages"]
        if stage["label"] == "finetune/0/pairs/0"
    )
    store = Store(swept / "store")
    stored = store.read(store.get(key), "predictions/validation.tsv").read_text().splitlines()[1:]
    assert [json.loads(line)["label"] for line in told.splitlines()] == [line.split("\t")[1] for line in stored]
    assert len(stored) == len(rows) == 20
