"""A whole sweep over made-up words, in seconds and from files alone."""

import json
import random
import shutil
from pathlib import Path

import pytest
from mlflow.tracking import MlflowClient

from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.config import load_config

CONFIG = """
name: tiny-directory
model: {hidden_size: 16, num_layers: 1, num_heads: 1, sequence_length: 16}
layouts: [15x0, 1x3]
controls: [reference_dense(15), none]
stages:
  prepare:
    source: directory
    path: PATH
    vocabulary_size: 256
    validation_share: 0.2
    tasks:
      - {name: rhyme, path: PATH/rhyme, text_columns: [text], num_labels: 2, metrics: [accuracy]}
  pretrain: {steps: 4, batch_size: 4, evaluations: 1, validation_sequences: 8}
  finetune: {tasks: [rhyme], epochs: 1}
  benchmark_cpu: {points: [{tokens: 4}], num_activation_tokens: 32, min_time_s: 0.001}
objectives: {quality/avg: maximize, ff/cpu/rel_time: minimize}
"""


def write_data(folder):
    """Texts and one labelled task for CONFIG, below `folder`."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefgh", k=rng.randint(2, 6))) for _ in range(200)]

    def sentence(length):
        return " ".join(rng.choices(words, k=length))

    (folder / "corpus").mkdir()
    (folder / "corpus" / "words.jsonl").write_text("".join(json.dumps({"text": sentence(40)}) + "\n" for _ in range(80)))
    (folder / "rhyme").mkdir()
    for split, size in (("train", 60), ("validation", 20)):
        rows = [{"text": sentence(6), "label": number % 2} for number in range(size)]
        (folder / "rhyme" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="session")
def tiny_directory_config(tmp_path_factory):
    """Config `tiny-directory`, its data written."""
    folder = tmp_path_factory.mktemp("directory")
    write_data(folder)
    path = folder / "tiny-directory.yaml"
    path.write_text(CONFIG.replace("PATH", str(folder)))
    return load_config(path)


class Heard:
    """A listener that keeps what was said."""

    def __init__(self):
        self.lines = []

    def update(self, record, num_running):
        pass

    def say(self, line):
        self.lines.append(line)


@pytest.fixture(scope="session")
def swept(tmp_path_factory, tiny_directory_config):
    """Results of `tiny-directory`, run in this process. Not to be changed: `results` is a copy."""
    from fffsweep.sweeps.controller import run_sweep

    folder = tmp_path_factory.mktemp("swept") / "results"
    assert run_sweep(tiny_directory_config, folder, Heard(), "inline").state == "complete"
    return folder


@pytest.fixture
def results(swept, tmp_path):
    return Path(shutil.copytree(swept, tmp_path / "results"))


@pytest.fixture(scope="session")
def empty_mlflow(tmp_path_factory):
    """Path of an MLflow database without experiments: making its tables takes seconds."""
    path = tmp_path_factory.mktemp("mlflow") / "mlflow.db"
    MlflowClient(tracking_uri=sqlite_url(path)).search_experiments()
    return path


@pytest.fixture
def here(empty_mlflow, tmp_path):
    """A results folder with nothing in it yet."""
    (tmp_path / "here").mkdir()
    shutil.copyfile(empty_mlflow, tmp_path / "here" / "mlflow.db")
    return tmp_path / "here"
