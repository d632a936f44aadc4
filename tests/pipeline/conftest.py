"""Tiny prepared data and stage contexts, for tests of training."""

import json
from dataclasses import asdict

import numpy as np
import pyarrow as pa
import pytest

from fffsweep.pipeline.stage import StageContext
from fffsweep.pipeline.tasks import Task

WORDS = 91
SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")
VOCABULARY = len(SPECIAL) + WORDS
LENGTH = 16


def write_batch(path, columns):
    path.parent.mkdir(parents=True, exist_ok=True)
    batch = pa.record_batch(columns)
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_file(sink, batch.schema) as writer:
        writer.write_batch(batch)


def write_tokenizer(folder):
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {token: index for index, token in enumerate((*SPECIAL, *(f"w{index}" for index in range(WORDS))))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    names = ("pad_token", "unk_token", "cls_token", "sep_token", "mask_token")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **dict(zip(names, SPECIAL, strict=True))).save_pretrained(folder)


def write_corpus(path, num_sequences, rng):
    """Chains in which each word decides the next but for a coin toss: there is something to learn from context."""
    words = np.empty((num_sequences, LENGTH), dtype=np.uint16)
    words[:, 0] = rng.integers(WORDS, size=num_sequences)
    for column in range(1, LENGTH):
        words[:, column] = (3 * words[:, column - 1] + rng.integers(2, size=num_sequences)) % WORDS
    ids = words + len(SPECIAL)
    ids[:, 0] = SPECIAL.index("[CLS]")
    flat = pa.FixedSizeListArray.from_arrays(pa.array(ids.ravel()), LENGTH)
    write_batch(path, {"input_ids": flat})


def write_task(folder, task, sizes, rng):
    """Rows whose first word, one of six, tells the label."""
    for split, size in sizes.items():
        rows, labels = [], []
        for _ in range(size):
            words = rng.integers(WORDS, size=rng.integers(3, LENGTH - 2))
            words[0] = rng.integers(6)
            rows.append([2, *(words + len(SPECIAL)).tolist(), 3])
            labels.append(words[0] if task.kind == "regression" else words[0] % task.num_labels)
        label = pa.array(labels, pa.float32() if task.kind == "regression" else pa.int64())
        columns = {"input_ids": pa.array(rows, pa.list_(pa.uint16())), "index": pa.array(range(size), pa.int64()), "label": label}
        write_batch(folder / f"{split}.arrow", columns)
    (folder / "task.json").write_text(json.dumps({"task": asdict(task)}))


@pytest.fixture(scope="session")
def tiny_data(tmp_path_factory):
    """Folder as stage `prepare` leaves it: 91 words, sequences of 16; `pair` (F1), `three` (two validation splits), `value`, `few`."""
    folder, rng = tmp_path_factory.mktemp("prepared"), np.random.default_rng(0)
    write_tokenizer(folder / "tokenizer")
    write_corpus(folder / "corpus" / "train.arrow", 300, rng)
    write_corpus(folder / "corpus" / "validation.arrow", 40, rng)
    sizes = {"train": 90, "selection": 20, "validation": 30}
    write_task(folder / "tasks" / "pair", Task("pair", "classification", 2, ("text",), ("f1", "accuracy")), sizes, rng)
    write_task(folder / "tasks" / "value", Task("value", "regression", 1, ("text",), ("pearson", "spearman")), sizes, rng)
    both = ("validation_matched", "validation_mismatched")
    names = ("yes", "no", "maybe")
    three = Task("three", "classification", 3, ("text",), ("accuracy",), label_names=names, validation_splits=both)
    write_task(folder / "tasks" / "three", three, {"train": 90, "selection": 20, both[0]: 30, both[1]: 25}, rng)
    few = Task("few", "classification", 2, ("text",), ("accuracy",))
    write_task(folder / "tasks" / "few", few, {"train": 8, "selection": 2, "validation": 3}, rng)
    return folder


@pytest.fixture
def new_context(tiny_data, tmp_path):
    """Makes contexts of one thread; equal names share the work folder, as attempts of one key do."""
    attempts = iter(range(1000))

    def make(name="run", seed=0, inputs=None, metrics=None, **rest):
        work, output = tmp_path / name / "work", tmp_path / name / f"output-{next(attempts)}"
        work.mkdir(parents=True, exist_ok=True)
        output.mkdir()
        folders = {"prepare": tiny_data, **(inputs or {})}
        return StageContext(seed=seed, inputs=folders, input_metrics=metrics or {}, output=output, work=work, **rest)

    return make


@pytest.fixture(autouse=True)
def _one_thread():
    """The order of sums, and with it the bits of a result, follow the number of threads."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


LAYERS = {
    "reference": {"variant": "dense", "trees": 127},
    "fff": {"variant": "fff", "trees": 1, "depth": 6},
    "random": {"variant": "random_routing", "trees": 1, "depth": 6},
    "none": {"variant": "none"},
}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """Encoders with each kind of layer, for timing: a folder each, by the names of LAYERS."""
    import torch

    from fffsweep.pipeline.model import FffConfig, FffForMaskedLM

    folder = tmp_path_factory.mktemp("models")
    for name, feedforward in LAYERS.items():
        torch.manual_seed(0)
        config = FffConfig(
            vocab_size=96, hidden_size=32, num_hidden_layers=3, num_attention_heads=4, max_position_embeddings=16, feedforward=feedforward
        )
        FffForMaskedLM(config).save_pretrained(folder / name / "model")
    return folder
