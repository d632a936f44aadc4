"""What an existing encoder's files say: sizes, vocabulary, casing; from a folder and from a hub; and encoders of other types than BERT."""

import json
from pathlib import Path

import pytest
import torch
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    BertTokenizer,
    DistilBertConfig,
    DistilBertModel,
    ElectraConfig,
    ElectraModel,
)

from fffsweep.pipeline.data.vocabulary import make_tokenizer, read_vocabulary, vocabulary_hash
from fffsweep.pipeline.encoder_folder import (
    casing_of,
    check_as_it_is,
    check_tokenizer,
    encoder_sizes,
    vocabulary_of,
    vocabulary_path,
)
from fffsweep.pipeline.encoders import load_classifier
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.stages.convert import Convert, ConvertConfig
from fffsweep.pipeline.stages.finetune import Finetune, FinetuneConfig

PIECES = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "a", "##b", "A"]
HUB = "owner/encoder@abc"
HIDDEN, WIDTH = 16, 24


def small(kind, **more):
    """A model of 96 ids: BERT, or another type."""
    torch.manual_seed(0)
    common = {"vocab_size": 96, "max_position_embeddings": 16, **more}
    if kind == "distilbert":
        return DistilBertModel(DistilBertConfig(dim=HIDDEN, n_layers=2, n_heads=2, hidden_dim=WIDTH, **common))
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": WIDTH, **common}
    if kind == "electra":
        return ElectraModel(ElectraConfig(embedding_size=8, **sizes))
    return BertModel(BertConfig(**sizes))


@pytest.fixture(params=["vocab.txt", "tokenizer.json"])
def written(request, tmp_path):
    """Writes PIECES into a folder, as older and as newer transformers do; the folder."""
    (tmp_path / "pieces.txt").write_text("\n".join(PIECES) + "\n")

    def write(**settings):
        folder = tmp_path / "encoder"
        folder.mkdir()
        if request.param == "vocab.txt":
            (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
            (folder / "tokenizer_config.json").write_text(json.dumps(settings))
        else:
            BertTokenizer(vocab=str(tmp_path / "pieces.txt"), **settings).save_pretrained(folder)
            assert not (folder / "vocab.txt").exists()
        return folder

    return write


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A folder in the place of HUB; the names of files that were asked for."""
    import huggingface_hub
    from huggingface_hub.errors import RemoteEntryNotFoundError

    folder, asked = tmp_path / "hub", []
    folder.mkdir()

    def download(name, file, revision=None):
        assert (name, revision) == ("owner/encoder", "abc")
        asked.append(file)
        if not (folder / file).exists():
            raise RemoteEntryNotFoundError.__new__(RemoteEntryNotFoundError)
        return str(folder / file)

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return folder, asked


@pytest.mark.parametrize("lowercase", [True, False])
def test_vocabulary_and_casing_are_the_encoder_s(written, lowercase):
    folder = written(do_lower_case=lowercase)
    assert read_vocabulary(vocabulary_path(vocabulary_of(str(folder)))) == PIECES
    assert casing_of(str(folder)) == lowercase
    check_tokenizer(str(folder))
    text = "A ab Ab"
    ours = make_tokenizer(PIECES, casing_of(str(folder))).encode(text).ids
    assert ours == BertTokenizer.from_pretrained(folder)(text)["input_ids"]


def test_a_hub_gives_its_own(hub):
    folder, asked = hub
    (folder / "vocab.txt").write_text("\n".join(PIECES) + "\n")
    (folder / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    small("bert").config.save_pretrained(folder)
    assert vocabulary_of(HUB) == HUB
    assert read_vocabulary(vocabulary_path(HUB)) == PIECES
    assert casing_of(HUB) is False
    assert encoder_sizes(HUB).feedforward == WIDTH
    assert {"config.json", "vocab.txt", "tokenizer_config.json"} <= set(asked)
    (folder / "vocab.txt").unlink()
    assert vocabulary_of(HUB) is None


def test_a_hub_that_does_not_answer_is_an_error(monkeypatch):
    import huggingface_hub
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*_, **__):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    for of in (vocabulary_of, casing_of, encoder_sizes):
        with pytest.raises(ValueError, match=r"owner/encoder@abc: not read \(offline\); check name, revision and network"):
            of(HUB)


def test_what_is_not_said_is_not_known(tmp_path):
    (tmp_path / "vocab.txt").write_text("\n".join(PIECES))
    assert casing_of(str(tmp_path)) is None
    check_tokenizer(str(tmp_path))
    assert vocabulary_of(str(tmp_path / "nowhere")) is None


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, r"no WordPiece vocabulary \(tokenizer: none found\); expected vocab.txt"),
        ({"tokenizer.json": {"model": {"type": "BPE", "vocab": {}}}}, r"\(tokenizer: BPE\).*BPE and SentencePiece.* are not supported"),
        ({"tokenizer.json": "no object"}, r"tokenizer.json is no JSON object"),
        (
            {"vocab.txt": None, "tokenizer_config.json": {"do_lower_case": True, "strip_accents": False}},
            r"its tokenizer has strip_accents=False with lower-casing True; expected BERT's own way",
        ),
        ({"vocab.txt": None, "tokenizer_config.json": {"tokenize_chinese_chars": False}}, "its tokenizer has handle_chinese_chars=False"),
    ],
)
def test_tokenizers_that_cannot_be_followed_are_named(files, message, tmp_path):
    for name, content in files.items():
        (tmp_path / name).write_text("\n".join(PIECES) if content is None else json.dumps(content))
    with pytest.raises(ValueError, match=message) as caught:
        check_tokenizer(str(tmp_path))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["bert", "distilbert", "electra"])
def test_sizes_are_read_whatever_they_are_called(kind, tmp_path):
    small(kind).save_pretrained(tmp_path)
    sizes = encoder_sizes(str(tmp_path))
    assert (sizes.model_type, sizes.hidden_size, sizes.num_layers, sizes.num_heads) == (kind, HIDDEN, 2, 2)
    assert (sizes.feedforward, sizes.longest_sequence) == (WIDTH, 16)
    check_as_it_is(str(tmp_path), kind)


def test_a_type_without_classifier_is_named():
    with pytest.raises(ValueError, match=r"model type vit: transformers has no classifier of it .* expected an encoder such as BERT"):
        check_as_it_is("folder", "vit")


def config_of(encoder):
    layer = {"variant": "unchanged", "trees": WIDTH}
    model = ModelSettings(hidden_size=HIDDEN, num_layers=2, num_heads=2, sequence_length=16, feedforward=layer)
    return ConvertConfig(model=model, encoder=str(encoder))


@pytest.mark.parametrize("kind", ["distilbert", "electra"])
def test_an_encoder_of_another_type_is_finetuned_as_it_is(kind, new_context, tmp_path):
    model = small(kind).eval()
    model.save_pretrained(tmp_path / "encoder")
    here = new_context("convert")
    metrics = Convert().run(config_of(tmp_path / "encoder"), here)
    assert metrics["params/feedforward"] == 2 * (2 * HIDDEN * WIDTH + HIDDEN + WIDTH)
    assert metrics["params/total"] == sum(each.numel() for each in model.parameters())
    ids = torch.randint(5, 96, (4, 12), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert torch.equal(AutoModel.from_pretrained(here.output / "model").eval()(ids)[0], model(ids)[0])
    tuned = new_context("tuned", inputs={"pretrain": here.output})
    settings = FinetuneConfig(task="pair", epochs=10, batch_size=8, learning_rate=1e-2, keep_weights=True)
    metrics = Finetune().run(settings, tuned)
    assert metrics["train/loss"] < 0.6
    kept = AutoModelForSequenceClassification.from_pretrained(tuned.output / "model")
    assert kept.config.model_type == kind


def test_the_recipe_s_dropout_is_that_of_every_type(tmp_path):
    of_heads = {"bert": {"classifier_dropout": 0.5}, "distilbert": {}, "electra": {"classifier_dropout": 0.5}}
    for kind, more in of_heads.items():
        small(kind, **more).save_pretrained(tmp_path / kind)
        model = load_classifier(tmp_path / kind, 2, FinetuneConfig(task="pair", dropout=0.25))
        rates = {name: each.p for name, each in model.named_modules() if isinstance(each, torch.nn.Dropout)}
        attention = {name for name in rates if "attention" in name and "output" not in name}
        assert len(rates) > len(attention)
        assert {rates[name] for name in rates.keys() - attention} == {0.25}, kind


@pytest.mark.parametrize("other", ["another piece", "another order", "fewer"])
def test_a_vocabulary_of_other_pieces_is_refused_whatever_its_size(other, new_context, tiny_data, tmp_path):
    ids = json.loads((Path(tiny_data) / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    pieces = sorted(ids, key=ids.__getitem__)
    small("bert").save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(pieces) + "\n")
    Convert().run(config_of(tmp_path), new_context("same"))
    changed = {"another piece": [*pieces[:-1], "else"], "another order": [*pieces[:-2], *pieces[:-3:-1]], "fewer": pieces[:-1]}[other]
    assert vocabulary_hash(changed) != vocabulary_hash(pieces)
    (tmp_path / "vocab.txt").write_text("\n".join(changed) + "\n")
    with pytest.raises(ValueError, match=r"vocabulary of 96 pieces: expected the encoder's own .* which are others; set stages.prepare"):
        Convert().run(config_of(tmp_path), new_context("other"))


def test_an_encoder_may_know_more_ids_than_pieces(new_context, tiny_data, tmp_path):
    ids = json.loads((Path(tiny_data) / "tokenizer" / "tokenizer.json").read_text())["model"]["vocab"]
    small("bert", vocab_size=128).save_pretrained(tmp_path)
    (tmp_path / "vocab.txt").write_text("\n".join(sorted(ids, key=ids.__getitem__)) + "\n")
    Convert().run(config_of(tmp_path), new_context())
