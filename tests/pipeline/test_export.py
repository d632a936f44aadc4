"""Exported models: they load through the Auto classes, compute what the trained one did, and say what texts they cannot read."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

import fffsweep.pipeline.predict as predicting
from fffsweep.pipeline.data.packing import join_texts
from fffsweep.pipeline.data.text import normalise
from fffsweep.pipeline.data.vocabulary import Encoder, make_tokenizer, save_tokenizer
from fffsweep.pipeline.encoders import converted
from fffsweep.pipeline.export import CARD, ExportError, export
from fffsweep.pipeline.model import FffConfig, FffForMaskedLM, FffForSequenceClassification
from fffsweep.pipeline.model_settings import FeedForward
from fffsweep.pipeline.predict import PredictError, Predictor
from fffsweep.pipeline.stage import StageRun
from fffsweep.pipeline.store import Store
from fffsweep.pipeline.tasks import get_task

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *"abcdefghij", "good", "bad", "film"]


def trained(store, folder, layer, stage="pretrain", num_labels=2):
    """A finished run whose model has random weights."""
    torch.manual_seed(0)
    config = FffConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=12,
        feedforward=FeedForward(**layer).resolved(),
        num_labels=num_labels,
    )
    model = (FffForMaskedLM if stage == "pretrain" else FffForSequenceClassification)(config).eval()
    folder.mkdir()
    model.save_pretrained(folder / "model")
    inputs = {}
    if stage == "pretrain":
        save_tokenizer(make_tokenizer(WORDS, True), folder / "model", 12)
    else:
        inputs["pretrain"] = trained(store, folder.with_name("origin"), layer)[1].key
    run = StageRun(stage, 1, {"task": "x"}, 0, inputs)
    return model, store.publish(run, {"loss": 1.0}, folder, {"commit": "c"}, 0.0, 1.0)


@pytest.fixture
def store(tmp_path):
    return Store(tmp_path / "store")


@pytest.mark.parametrize(
    "layer",
    [
        {"variant": "fff", "trees": 2, "depth": 2, "execution": "masked", "routing_gradient": "straight_through"},
        {"variant": "dense", "trees": 8},
        {"variant": "none"},
        {"variant": "random_routing", "trees": 2, "depth": 2},
        {"variant": "original_fff", "trees": 2, "depth": 2, "leaf_width": 3, "output_bias": True, "transposition": 0.2},
        {"variant": "original_fff", "trees": 2, "depth": 2, "leaf_width": 3, "master_leaf": 2, "execution": "masked"},
    ],
    ids=lambda layer: "-".join(map(str, layer.values())),
)
def test_a_masked_language_model_keeps_its_outputs(store, tmp_path, layer):
    model, manifest = trained(store, tmp_path / "made", layer)
    folder = export(store, manifest, tmp_path / "out", {"study": "s", "trial": "t"})
    again = AutoModelForMaskedLM.from_pretrained(folder).eval()
    ids = AutoTokenizer.from_pretrained(folder)(["a good [MASK]", "b c d e"], return_tensors="pt", padding=True)["input_ids"]
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    if layer["variant"] == "fff":
        assert again.config.feedforward["execution"] == "cmm"
        assert again.config.feedforward["routing_gradient"] == "none"
    card = json.loads((folder / CARD).read_text())
    assert (card["study"], card["key"], card["metrics"]) == ("s", manifest.key, {"loss": 1.0})
    prediction = Predictor(folder).predict(["a good [MASK]"])[0]
    assert prediction.label in WORDS
    assert len(prediction.scores) == 5


def test_trees_run_on_the_operator(store, tmp_path, monkeypatch):
    _, manifest = trained(store, tmp_path / "made", {"variant": "fff", "trees": 2, "depth": 2, "execution": "masked"})
    model = AutoModelForMaskedLM.from_pretrained(export(store, manifest, tmp_path / "out", {})).eval()
    with torch.profiler.profile() as profile, torch.inference_mode():
        model(torch.tensor([[2, 5, 3]]))
    assert any("fffsweep::" in event.key for event in profile.key_averages())


@pytest.mark.parametrize("variant", ["fff", "original_fff"])
def test_a_classifier_knows_its_task(store, tmp_path, variant):
    _, manifest = trained(store, tmp_path / "made", {"variant": variant, "trees": 1, "depth": 2}, "finetune")
    folder = export(store, manifest, tmp_path / "out", {}, get_task("qnli-like"))
    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert again.config.id2label == {0: "entailment", 1: "not_entailment"}
    texts = ["a good film\tb c", "bad\t" + "d " * 40, "a\tb"]
    found = Predictor(folder).predict(texts, batch_size=2)
    alone = [Predictor(folder).predict([text])[0] for text in texts]
    assert [each.label for each in found] == [each.label for each in alone]
    for each in found:
        assert sum(each.scores.values()) == pytest.approx(1)
        assert each.scores[each.label] == max(each.scores.values())
    table = predicting._load_pyfunc(str(folder)).predict([text.split("\t") for text in texts])
    assert table == [each.label for each in found]


def tuned_bert(store, folder, variant):
    """A converted encoder and a classifier on it whose random weights make much of a token's type; both read 12 of 32 possible tokens."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 28, "max_position_embeddings": 32}
    encoder = BertModel(BertConfig(vocab_size=len(WORDS), **sizes))
    with torch.no_grad():
        encoder.embeddings.token_type_embeddings.weight.normal_()
        for layer in encoder.modules():
            if isinstance(layer, torch.nn.Linear):
                layer.weight.mul_(10)
    if variant != "unchanged":
        encoder = converted(encoder, FeedForward(variant=variant, trees=4, depth=2))
    encoder.save_pretrained(folder / "encoder" / "model")
    save_tokenizer(make_tokenizer(WORDS, True), folder / "encoder" / "model", 12)
    model = AutoModelForSequenceClassification.from_pretrained(folder / "encoder" / "model", num_labels=2).eval()
    with torch.no_grad():
        model.classifier.weight.mul_(10)
    model.save_pretrained(folder / "tuned" / "model")
    origin = store.publish(StageRun("convert", 1, {}, 0, {}), {}, folder / "encoder", {}, 0.0, 1.0)
    run = StageRun("finetune", 1, {"task": "x"}, 0, {"pretrain": origin.key})
    return model, origin, store.publish(run, {}, folder / "tuned", {}, 0.0, 1.0)


@pytest.mark.parametrize("variant", ["fff", "original_fff", "unchanged"])
def test_a_converted_encoder_reads_as_its_finetuning_did(store, tmp_path, variant):
    model, origin, tuned = tuned_bert(store, tmp_path, variant)
    folder = export(store, tuned, tmp_path / "out", {}, get_task("qnli-like"))
    # [CLS] a good film [SEP] b c [SEP], and a pair of more than 12 tokens
    ids = torch.tensor([[2, 5, 15, 17, 3, 6, 7, 3, 0, 0, 0, 0], [2, 5, 5, 5, 5, 5, 3, 6, 6, 6, 6, 3]])
    types = torch.tensor([[0] * 5 + [1] * 3 + [0] * 4, [0] * 7 + [1] * 5])
    with torch.inference_mode():
        expected = torch.softmax(model(ids, attention_mask=(ids != 0).long(), token_type_ids=types).logits, 1)
        without_types = torch.softmax(model(ids, attention_mask=(ids != 0).long()).logits, 1)
    found = Predictor(folder).predict(["a good film\tb c", "a " * 20 + "\t" + "b " * 20])
    scores = torch.tensor([list(each.scores.values()) for each in found])
    torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
    assert (scores - without_types).abs().max() > 1e-3  # twenty times the tolerance
    # as the exported README has it
    tokenizer = AutoTokenizer.from_pretrained(folder)
    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    with torch.inference_mode():
        plain = torch.softmax(again(**tokenizer("a good film", "b c", return_tensors="pt")).logits, 1)
    torch.testing.assert_close(plain, expected[:1], rtol=1e-4, atol=1e-5)
    with pytest.raises(ExportError, match="with --task"):
        export(store, origin, tmp_path / "bare", {})


@pytest.mark.parametrize("text", ["a [SEP] b\tc", "a\x0cb [MASK]\tc [CLS]", "cafe\u0301 a\u200b\tb", " a  b \t" + "c [PAD] " * 20])
def test_a_text_is_read_as_the_same_row_of_a_task_is(store, tmp_path, text):
    _, manifest = trained(store, tmp_path / "made", {"variant": "none"}, "finetune")
    pieces = [*WORDS, "[", "]", "sep", "mask", "cls", "pad", "caf\u00e9", "cafe\u0301", "##b"]
    tokenizer = make_tokenizer(pieces, lowercase=False)
    predictor = Predictor(export(store, manifest, tmp_path / "out", {}, get_task("qnli-like")))
    save_tokenizer(tokenizer, tmp_path / "cased", 12)
    predictor.tokenizer = AutoTokenizer.from_pretrained(tmp_path / "cased")
    encoder = Encoder(tokenizer)
    parts = encoder.encode_each([normalise(part) for part in text.split("\t")])
    row = join_texts(*parts, 12, encoder.cls, encoder.sep)
    assert predictor._encoded([text])["input_ids"].tolist() == [row.tolist()]


def test_a_regression_stays_in_its_range(store, tmp_path):
    _, manifest = trained(store, tmp_path / "made", {"variant": "dense", "trees": 4}, "finetune", num_labels=1)
    folder = export(store, manifest, tmp_path / "out", {}, get_task("stsb"))
    (found,) = Predictor(folder).predict(["a\tb"])
    assert 0 <= float(found.label) <= 5


@pytest.mark.parametrize(
    ("text", "said"), [("", "line 2: is empty"), ("no mask", "no .MASK."), ("a [MASK]\tb", "2 fields; the model reads 1")]
)
def test_texts_that_cannot_be_read_are_named(store, tmp_path, text, said):
    _, manifest = trained(store, tmp_path / "made", {"variant": "none"})
    predictor = Predictor(export(store, manifest, tmp_path / "out", {}))
    with pytest.raises(PredictError, match=said):
        predictor.predict(["a [MASK]", text])
    with pytest.raises(PredictError, match="lies beyond"):
        predictor.predict(["a " * 40 + "[MASK]"])


def test_nothing_is_overwritten_and_nothing_half_written(store, tmp_path):
    _, manifest = trained(store, tmp_path / "made", {"variant": "none"})
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "file").touch()
    with pytest.raises(ExportError, match="absent or empty"):
        export(store, manifest, taken, {})
    store.object_path(manifest.artifacts["model/model.safetensors"].sha256).write_bytes(b"damaged")
    before = sorted(path.name for path in tmp_path.iterdir())
    with pytest.raises(RuntimeError, match="damaged"):
        export(store, manifest, tmp_path / "out", {})
    assert sorted(path.name for path in tmp_path.iterdir()) == before
    with pytest.raises(PredictError, match="no exported model"):
        Predictor(taken)
