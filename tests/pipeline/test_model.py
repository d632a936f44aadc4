"""The encoder as transformers classes."""

import json

import pytest
import torch
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification

from fffsweep.pipeline.model import FffConfig, FffForMaskedLM, FffForSequenceClassification, FffModel

VARIANTS = {
    "dense": {"variant": "dense", "trees": 24},
    "fff": {"variant": "fff", "trees": 2, "depth": 3},
    "masked": {"variant": "fff", "trees": 2, "depth": 3, "execution": "masked"},
    "straight": {"variant": "fff", "trees": 2, "depth": 3, "routing_gradient": "straight_through"},
    "none": {"variant": "none"},
    "random": {"variant": "random_routing", "trees": 2, "depth": 3},
}
SIZES = {"vocab_size": 60, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 16}


def config_of(name="fff", **fields):
    return FffConfig(**{**SIZES, "feedforward": VARIANTS[name], **fields})


def masked_lm(name="fff", **fields):
    torch.manual_seed(0)
    return FffForMaskedLM(config_of(name, **fields)).eval()


def token_ids(rows=3, length=12, seed=1):
    return torch.randint(5, 60, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("name", VARIANTS)
def test_saved_and_loaded_again_it_is_the_same(name, tmp_path):
    model = masked_lm(name)
    model.save_pretrained(tmp_path)
    assert (tmp_path / "model.safetensors").exists()
    assert json.loads((tmp_path / "config.json").read_text())["feedforward"]["variant"] == VARIANTS[name]["variant"]
    assert isinstance(AutoConfig.from_pretrained(tmp_path), FffConfig)
    again = AutoModelForMaskedLM.from_pretrained(tmp_path).eval()
    assert isinstance(again, FffForMaskedLM)
    assert torch.equal(again(token_ids()).logits, model(token_ids()).logits)
    encoder = AutoModel.from_pretrained(tmp_path).eval()
    assert isinstance(encoder, FffModel)
    assert torch.equal(encoder(token_ids()).last_hidden_state, model.encoder(token_ids()).last_hidden_state)
    classifier = AutoModelForSequenceClassification.from_pretrained(tmp_path, num_labels=3, hidden_dropout_prob=0.1, pooling="mean")
    assert isinstance(classifier, FffForSequenceClassification)
    assert classifier(token_ids()).logits.shape == (3, 3)
    assert classifier.config.hidden_dropout_prob == 0.1
    assert all(torch.equal(a, b) for a, b in zip(classifier.encoder.parameters(), model.encoder.parameters(), strict=True))


def test_decoder_is_tied_and_only_norms_and_routers_have_biases():
    model = masked_lm()
    assert model.decoder.weight is model.encoder.embeddings.words.weight
    assert model.decoder.bias is None
    biases = [name for name, _ in model.named_parameters() if name.endswith("bias") or name.endswith("b_in")]
    assert len(biases) == 2 * 3 + 2  # two norms and the routers of two layers, norms of embeddings and output
    assert all("norm" in name or name.endswith("b_in") for name in biases)


def test_the_control_without_feedforward_has_none():
    model = masked_lm("none")
    assert not [name for name, _ in model.named_parameters() if "feedforward" in name]


def test_initial_weights():
    torch.manual_seed(0)
    model = FffForMaskedLM(config_of(vocab_size=5000, hidden_size=64, num_attention_heads=4))
    embeddings = model.encoder.embeddings
    assert float(embeddings.words.weight[1:].std().detach()) == pytest.approx(0.02, rel=0.01)
    assert float(embeddings.words.weight[0].abs().max().detach()) == 0  # padding
    assert embeddings.position_scale.item() == pytest.approx(64**-0.5)
    assert embeddings.sinusoids[3, 4].item() == pytest.approx(torch.sin(torch.tensor(3 * 10000 ** (-4 / 64))).item(), rel=1e-5)
    assert embeddings.sinusoids[3, 5].item() == pytest.approx(torch.cos(torch.tensor(3 * 10000 ** (-4 / 64))).item(), rel=1e-5)


def test_loss_of_masked_positions_is_that_of_the_full_logits():
    model, ids = masked_lm(), token_ids()
    labels = torch.full_like(ids, -100)
    labels[0, 2], labels[1, 5], labels[2, 11] = 7, 8, 9
    logits = model(ids).logits
    expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())
    out = model(ids, labels=labels)
    torch.testing.assert_close(out.loss, expected)
    torch.testing.assert_close(out.logits, torch.stack([logits[0, 2], logits[1, 5], logits[2, 11]]))
    flat = model(ids, labels=torch.tensor([7, 8, 9]), positions=torch.tensor([2, 17, 35]))
    assert torch.equal(flat.loss, out.loss)


@pytest.mark.parametrize("pooling", ["first", "mean"])
def test_padding_changes_nothing(pooling):
    torch.manual_seed(0)
    model = FffForSequenceClassification(config_of(num_labels=2, pooling=pooling)).eval()
    short, long = token_ids(1, 6), token_ids(1, 12, seed=2)
    padded = torch.zeros(2, 12, dtype=torch.int64)
    padded[0, :6], padded[1] = short, long
    mask = torch.ones(2, 12, dtype=torch.bool)
    mask[0, 6:] = False
    both = model(padded, attention_mask=mask).logits
    torch.testing.assert_close(both[0], model(short).logits[0])
    torch.testing.assert_close(both[1], model(long).logits[0])


def test_one_label_is_a_regression():
    model = FffForSequenceClassification(config_of(num_labels=1)).eval()
    out = model(token_ids(), labels=torch.tensor([0.0, 1.0, 2.0]))
    torch.testing.assert_close(out.loss, ((out.logits[:, 0] - torch.tensor([0.0, 1.0, 2.0])) ** 2).mean())


def test_random_routing_reads_the_tokens_and_nothing_else():
    model = masked_lm("random")
    layer, seen = model.encoder.layers[1].feedforward, []
    layer.register_forward_pre_hook(lambda layer, arguments: seen.append(layer.paths(*arguments)))
    ids = token_ids()
    model(ids)
    for parameter in model.parameters():
        parameter.data.mul_(-1.5)
    model.train()
    model(ids)
    assert torch.equal(seen[0], seen[1])
    assert torch.equal(seen[0], layer.paths(torch.empty(36, 32), ids))


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="17 tokens: expected at most 16"):
        masked_lm()(token_ids(length=17))
    with pytest.raises(ValueError, match="expected first or mean"):
        config_of(pooling="max")
    with pytest.raises(ValueError, match="variant"):
        config_of(feedforward={"variant": "tree"})
