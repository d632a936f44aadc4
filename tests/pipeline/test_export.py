"""Exported models: they load through the Auto classes, compute what the trained one did, and say what texts they cannot read."""

from __future__ import annotations

import json

import pytest
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, BertConfig, BertModel

import fffsweep.pipeline.predict as predicting
from fffsweep.pipeline.data.vocabulary import make_tokenizer, save_tokenizer
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
    ],
    ids=lambda layer: layer["variant"],
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


def test_a_classifier_knows_its_task(store, tmp_path):
    _, manifest = trained(store, tmp_path / "made", {"variant": "fff", "trees": 1, "depth": 2}, "finetune")
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


@pytest.mark.parametrize("variant", ["fff", "unchanged"])
def test_a_converted_encoder_is_exported_with_its_classifier(store, tmp_path, variant):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 28, "max_position_embeddings": 12}
    plain = BertModel(BertConfig(vocab_size=len(WORDS), **sizes))
    encoder = converted(plain, FeedForward(variant="fff", trees=4, depth=2)) if variant == "fff" else plain
    made = tmp_path / "made"
    encoder.save_pretrained(made / "model")
    save_tokenizer(make_tokenizer(WORDS, True), made / "model", 12)
    origin = store.publish(StageRun("convert", 1, {}, 0, {}), {}, made, {}, 0.0, 1.0)
    model = AutoModelForSequenceClassification.from_pretrained(made / "model", num_labels=2).eval()
    model.save_pretrained(tmp_path / "tuned" / "model")
    run = StageRun("finetune", 1, {"task": "x"}, 0, {"pretrain": origin.key})
    tuned = store.publish(run, {}, tmp_path / "tuned", {}, 0.0, 1.0)
    folder = export(store, tuned, tmp_path / "out", {}, get_task("sst2-like"))
    again = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    ids = torch.tensor([[2, 5, 6, 3]])
    with torch.inference_mode():
        torch.testing.assert_close(again(ids).logits, model(ids).logits, rtol=1e-5, atol=1e-6)
    assert Predictor(folder).predict(["a good film"])[0].label in ("0", "1")
    with pytest.raises(ExportError, match="with --task"):
        export(store, origin, tmp_path / "bare", {})


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
