"""Existing encoders: read, converted layer by layer, finetuned as they are; a plain transformers loop beside the stage."""

import json

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoModelForSequenceClassification, BertConfig, BertModel

from fffsweep.pipeline import conversion
from fffsweep.pipeline.activations import Recorded
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.encoder_folder import encoder_sizes, fingerprint
from fffsweep.pipeline.encoders import ConvertedForSequenceClassification, ConvertedModel, converted, feedforward_halves
from fffsweep.pipeline.feedforward import auxiliary_loss
from fffsweep.pipeline.model_settings import FeedForward, ModelSettings
from fffsweep.pipeline.stage import StopRequested
from fffsweep.pipeline.stages.convert import Activations, Convert, ConvertConfig
from fffsweep.pipeline.stages.finetune import Finetune, FinetuneConfig
from tests.plain_finetuning import plain_loop

HIDDEN, LAYERS, WIDTH = 32, 2, 48
VARIANTS = {
    "dense": {"variant": "dense", "trees": 48, "output_bias": True, "init": "fan"},
    "fff": {"variant": "fff", "trees": 3, "depth": 3, "output_bias": True, "init": "fan"},
    "original": {"variant": "original_fff", "trees": 2, "depth": 2, "leaf_width": 4, "output_bias": True, "init": "fan"},
    "random": {"variant": "random_routing", "trees": 3, "depth": 3, "output_bias": True, "init": "fan"},
    "none": {"variant": "none"},
    "unchanged": {"variant": "unchanged", "trees": WIDTH},
}


@pytest.fixture(scope="module")
def encoder(tmp_path_factory):
    """Folder of a BERT whose feedforward layers do something worth learning."""
    folder = tmp_path_factory.mktemp("encoder")
    torch.manual_seed(1)
    config = BertConfig(
        vocab_size=96,
        hidden_size=HIDDEN,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        intermediate_size=WIDTH,
        max_position_embeddings=16,
    )
    model = BertModel(config)
    with torch.no_grad():
        for first, second in feedforward_halves(model):
            for half in (first.dense, second):
                half.weight.mul_(8)
                half.bias.normal_(std=0.3)
    model.save_pretrained(folder)
    return folder


def config_of(encoder, name="fff", **recipe):
    model = ModelSettings(hidden_size=HIDDEN, num_layers=LAYERS, num_heads=4, sequence_length=16, feedforward=VARIANTS[name])
    fields = {"encoder": str(encoder), "tokens": 20_000, "distinct_tokens": 1600, "validation_tokens": 320, "batch_tokens": 160}
    return ConvertConfig(model=model, **{**fields, "learning_rate": 1e-2, **recipe})


@pytest.fixture
def recorded(encoder, new_context):
    context = new_context("activations")
    Activations().run(config_of(encoder).activations, context)
    return context.output


@pytest.fixture
def context(new_context, recorded):
    return lambda name="convert", **rest: new_context(name, inputs={"activations": recorded}, **rest)


def test_what_the_layers_take_and_give_is_recorded(encoder, recorded, tiny_data):
    train, held_out = Recorded(recorded / "train"), Recorded(recorded / "validation")
    assert (len(train), len(held_out), train.num_layers, train.hidden_size) == (1600, 320, LAYERS, HIDDEN)
    sequences = train.token_ids.reshape(100, 16)
    corpus = {tuple(row) for row in PreparedData(tiny_data).corpus("train").tolist()}
    assert all(tuple(row) in corpus for row in sequences.tolist())
    model = AutoModel.from_pretrained(encoder).eval()
    taken, given = [], []
    first, second = feedforward_halves(model)[1]
    first.register_forward_pre_hook(lambda _, arguments: taken.append(arguments[0]))
    second.register_forward_hook(lambda _module, _arguments, result: given.append(result))
    with torch.no_grad():
        model(torch.from_numpy(sequences[:10].astype(np.int64)))
    inputs, outputs = train.layer(1, slice(0, 160))
    # float16 has 11 bits
    torch.testing.assert_close(inputs, taken[0].flatten(0, 1), rtol=2**-11, atol=1e-5)
    torch.testing.assert_close(outputs, given[0].flatten(0, 1), rtol=2**-11, atol=1e-5)


def test_left_unchanged_the_outputs_are_the_encoder_s(encoder, new_context):
    context = new_context()
    metrics = Convert().run(config_of(encoder, "unchanged"), context)
    ids = torch.randint(5, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    before, after = (AutoModel.from_pretrained(folder).eval()(ids) for folder in (encoder, context.output / "model"))
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert torch.equal(before.pooler_output, after.pooler_output)
    assert (metrics["ff/width"], metrics["ff/active_width"]) == (WIDTH, WIDTH)
    assert metrics["params/feedforward"] == LAYERS * (2 * HIDDEN * WIDTH + HIDDEN + WIDTH)


def test_converted_with_its_own_matrices_the_outputs_are_the_encoder_s(encoder, tmp_path):
    """The conversion itself changes nothing: a dense layer as wide as the old one, with its weights, stands in its place."""
    old = BertModel.from_pretrained(encoder).eval()
    new = converted(old, FeedForward.model_validate(VARIANTS["dense"] | {"trees": WIDTH}))
    with torch.no_grad():
        for (first, second), (_, place) in zip(feedforward_halves(old), feedforward_halves(new), strict=True):
            layer = place.feedforward
            drawn = layer.w_out.clone()
            layer.w_in.copy_(first.dense.weight.view_as(layer.w_in))
            layer.b_in.copy_(first.dense.bias.view_as(layer.b_in))
            layer.w_out.copy_(second.weight.t().reshape(layer.w_out.shape))
            layer.output_bias.copy_(second.bias)
            assert not torch.equal(layer.w_out, drawn)
    new.save_pretrained(tmp_path / "new")
    again = AutoModel.from_pretrained(tmp_path / "new").eval()
    assert isinstance(again, ConvertedModel)
    ids = torch.randint(5, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    mask = torch.arange(12) < torch.tensor([[12], [7], [3], [12]])
    with torch.no_grad():
        expected, found, loaded = (model(ids, attention_mask=mask).last_hidden_state for model in (old, new, again))
    assert torch.equal(found, loaded)
    # Equal to the bit where it was tried. The bias is added after the product, not in it, which another library may round otherwise:
    # sums of WIDTH terms, outputs of order one by the norm.
    torch.testing.assert_close(found, expected, rtol=0, atol=LAYERS * WIDTH * torch.finfo(torch.float32).eps)
    assert (expected - expected.mean(0)).abs().max() > 1


@pytest.mark.parametrize("name", ["dense", "fff", "original", "random"])
def test_layers_learn_what_the_old_ones_do(name, encoder, context):
    here = context()
    metrics = Convert().run(config_of(encoder, name), here)
    curve = [json.loads(line) for line in (here.output / "curve.jsonl").read_text().splitlines()]
    assert metrics["distill/tokens"] == 20_000
    assert len(curve) == 10
    assert metrics["distill/unexplained"] == curve[-1]["unexplained"] < (0.15 if name == "dense" else 0.7)
    assert curve[-1]["unexplained"] < curve[0]["unexplained"]
    model = AutoModel.from_pretrained(here.output / "model").eval()
    assert isinstance(model, ConvertedModel)
    # what stands in the model is what was trained: its held-out error is the one that was told
    held_out = Recorded(here.inputs["activations"] / "validation")
    model._ids.current = torch.from_numpy(held_out.token_ids.astype(np.int64)).view(-1, 16)
    for index, (_, place) in enumerate(feedforward_halves(model)):
        x, target = held_out.layer(index, slice(None))
        error = (place(x.view(-1, 16, HIDDEN)).flatten(0, 1) - target).square().mean() / target.var(0).mean()
        assert error.item() == pytest.approx(metrics[f"distill/layer_{index}/unexplained"], rel=1e-4)
    assert (here.output / "tree_health.json").exists() == ("tree/leaf_entropy" in metrics) == (name != "dense")
    if name == "fff":
        report = json.loads((here.output / "tree_health.json").read_text())
        assert (report["tokens"], [each["layer"] for each in report["layers"]]) == (320, list(range(LAYERS)))
        x, _ = held_out.layer(1, slice(None))
        leaves = feedforward_halves(model)[1][1].feedforward.paths(x, torch.from_numpy(held_out.token_ids.astype(np.int64)))[:, :, -1] - 7
        used = [torch.bincount(leaves[:, tree], minlength=8).tolist() for tree in range(3)]
        assert report["layers"][1]["leaf_usage"] == used


@pytest.mark.parametrize("name", ["dense", "fff", "original", "random"])
def test_nothing_is_made_on_another_device_than_the_layers_(name, encoder, context):
    """Torch's device `meta` stands for a GPU: a tensor of the CPU among its own is an error there too."""
    here = context()
    run = conversion.Distillation(config_of(encoder, name), here)
    run.layers.to("meta")
    here.device = "meta"
    for index in range(LAYERS):
        loss = run._unexplained(index, run.train_rows, slice(0, 160))
        penalty = auxiliary_loss(run.layers[index])
        (loss if penalty is None else loss + penalty).backward()
    gradients = [each.grad for each in run.layers.parameters()]
    assert gradients
    assert all(each is not None and each.device.type == "meta" for each in gradients)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_converted_can_be_finetuned(name, encoder, context):
    here = context()
    metrics = Convert().run(config_of(encoder, name, tokens=800), here)
    assert ("distill/unexplained" in metrics) == (name not in ("none", "unchanged"))
    tuned = context("tuned")
    tuned.inputs["pretrain"] = here.output
    settings = FinetuneConfig(task="pair", epochs=1, batch_size=8, learning_rate=1e-3, keep_weights=True)
    found = Finetune().run(settings, tuned)
    assert 0 <= found["validation/primary"] <= 1
    assert ("train/penalty" in found) == (name == "original")
    kept = AutoModelForSequenceClassification.from_pretrained(tuned.output / "model")
    assert isinstance(kept, ConvertedForSequenceClassification) == (name != "unchanged")


def test_everything_but_the_layers_is_the_encoder_s(encoder):
    model = BertModel.from_pretrained(encoder)
    new = converted(model, FeedForward.model_validate(VARIANTS["fff"]))
    theirs = {name: value for name, value in model.state_dict().items() if ".intermediate." not in name and ".output.dense." not in name}
    theirs |= {name: value for name, value in model.state_dict().items() if "attention.output.dense" in name}
    ours = new.state_dict()
    assert len(theirs) > 20
    assert all(torch.equal(ours[name], value) for name, value in theirs.items())


def test_equal_runs_are_equal_and_a_stopped_one_goes_on_to_the_same_bits(encoder, context, monkeypatch):
    config = config_of(encoder, "original", tokens=4000)
    whole, halves = context("whole"), context("halves")
    Convert().run(config, whole)
    monkeypatch.setattr(conversion, "STOP_POLL_S", -1)
    stops = iter([False] * 9 + [True])
    halves.stop_requested = lambda: next(stops)
    with pytest.raises(StopRequested):
        Convert().run(config, halves)
    again = context("halves")
    Convert().run(config, again)
    for path in ("model/model.safetensors", "curve.jsonl"):
        assert (again.output / path).read_bytes() == (whole.output / path).read_bytes()
    other = context("other", seed=1)
    Convert().run(config, other)
    assert (other.output / "model/model.safetensors").read_bytes() != (whole.output / "model/model.safetensors").read_bytes()


def test_the_stage_does_what_a_plain_transformers_loop_does(encoder, new_context, tiny_data):
    folder = new_context("unchanged")
    Convert().run(config_of(encoder, "unchanged"), folder)
    here = new_context("tuned", seed=3, inputs={"pretrain": folder.output})
    metrics = Finetune().run(FinetuneConfig(task="pair", epochs=3, batch_size=8, learning_rate=3e-3), here)
    loss, predictions = plain_loop(encoder, tiny_data, "pair", epochs=3, batch=8, peak=3e-3, seed=3)
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-6)
    lines = (here.output / "predictions" / "validation.tsv").read_text().splitlines()[1:]
    assert [int(line.split("\t")[1]) for line in lines] == predictions.tolist()
    labels = PreparedData(tiny_data).task("pair").splits["validation"].labels
    assert metrics["validation/accuracy"] == (predictions == labels).mean()


def test_what_does_not_fit_is_refused(encoder, new_context, tmp_path):
    other = tmp_path / "other"
    BertModel(BertConfig(vocab_size=80, hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8)).save_pretrained(
        other
    )
    with pytest.raises(ValueError, match=r"vocabulary of 96 pieces: expected the encoder's of 80; set stages.prepare.vocabulary_file"):
        Convert().run(config_of(other, "unchanged"), new_context())
    with pytest.raises(ValueError, match="there is no such folder"):
        encoder_sizes(str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match=r"expected config\.json and weights"):
        encoder_sizes(str(tmp_path))
    sizes = encoder_sizes(str(encoder))
    assert (sizes.hidden_size, sizes.num_layers, sizes.num_heads, sizes.feedforward) == (HIDDEN, LAYERS, 4, WIDTH)
    assert fingerprint(str(encoder)) != fingerprint(str(other))
    unchanged = new_context("unchanged")
    Convert().run(config_of(encoder, "unchanged"), unchanged)
    with pytest.raises(ValueError, match="pooling=mean, head_size=None: an existing encoder is finetuned with its own head"):
        Finetune().run(FinetuneConfig(task="pair", pooling="mean"), new_context("tuned", inputs={"pretrain": unchanged.output}))
