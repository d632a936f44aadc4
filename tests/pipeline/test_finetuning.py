"""Finetuning: learning, determinism, exact resume, splits, baselines, predictions."""

import json

import numpy as np
import pytest
import torch

from fffsweep.pipeline import finetuning, optimisation
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.finetuning import Finetuning
from fffsweep.pipeline.glue import is_complete
from fffsweep.pipeline.model import FffConfig, FffForMaskedLM, FffForSequenceClassification
from fffsweep.pipeline.order import epoch_order, order_by_length
from fffsweep.pipeline.stage import StopRequested
from fffsweep.pipeline.stages.finetune import Finetune, FinetuneConfig, FinetuneRecipe
from fffsweep.pipeline.tasks import TASKS


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory):
    """A model that saw no text: what is asked of it here lies in the words alone."""
    folder = tmp_path_factory.mktemp("pretrained")
    torch.manual_seed(0)
    feedforward = {"variant": "fff", "trees": 2, "depth": 2}
    config = FffConfig(
        vocab_size=96, hidden_size=32, num_hidden_layers=1, num_attention_heads=4, max_position_embeddings=16, feedforward=feedforward
    )
    FffForMaskedLM(config).save_pretrained(folder / "model")
    return folder


@pytest.fixture
def context(new_context, pretrained):
    return lambda name="run", **rest: new_context(name, inputs={"pretrain": pretrained}, **rest)


def config_of(task="pair", **fields):
    return FinetuneConfig(**{"task": task, "epochs": 2, "learning_rate": 3e-3, "batch_size": 8, **fields})


def run(config, context):
    return {name: value for name, value in Finetune().run(config, context).items() if not name.startswith(("time/", "memory/"))}


def test_a_classification_is_learned_and_reported(context, tiny_data):
    splits = PreparedData(tiny_data).task("pair").splits
    here = context()
    metrics = run(config_of(epochs=8), here)
    for split in ("selection", "validation"):
        assert metrics[f"{split}/primary"] == metrics[f"{split}/f1"]
        assert metrics[f"{split}/accuracy"] > 0.6
        positive = splits[split].labels.mean()
        assert metrics[f"baseline/{split}_primary"] == pytest.approx(2 * positive / (1 + positive))
    curve = [json.loads(line) for line in (here.output / "curve.jsonl").read_text().splitlines()]
    assert [row["epoch"] for row in curve] == list(range(1, 9))
    assert curve[-1]["loss"] < curve[0]["loss"] - 0.2
    assert curve[-1]["selection/f1"] == metrics["selection/f1"]
    assert not (here.output / "model").exists()


def test_the_defaults_are_the_published_ones():
    """eval=GLUE_sane of the training code that arXiv 2212.14034 publishes, with its eval/optim=adam."""
    recipe = FinetuneRecipe()
    assert (recipe.epochs, recipe.batch_size, recipe.learning_rate, recipe.schedule, recipe.warmup) == (5, 16, 4e-5, "cosine", 0.1)
    assert (recipe.beta1, recipe.beta2, recipe.epsilon, recipe.weight_decay, recipe.clip) == (0.9, 0.98, 1e-6, 0.0, None)
    assert (recipe.pooling, recipe.dropout) == ("first", 0.1)


def test_predictions_are_what_was_scored(context, tiny_data):
    here = context()
    metrics = run(config_of("three"), here)
    for split in ("validation_matched", "validation_mismatched"):
        lines = (here.output / "predictions" / f"{split}.tsv").read_text().splitlines()
        assert lines[0] == "index\tprediction"
        names = [line.split("\t")[1] for line in lines[1:]]
        assert [line.split("\t")[0] for line in lines[1:]] == [str(row) for row in range(len(names))]
        labels = PreparedData(tiny_data).task("three").splits[split].labels
        hits = np.mean([("yes", "no", "maybe").index(name) == label for name, label in zip(names, labels, strict=True)])
        assert metrics[f"{split}/accuracy"] == hits
    mean = (metrics["validation_matched/accuracy"] + metrics["validation_mismatched/accuracy"]) / 2
    assert metrics["validation/primary"] == mean


def test_a_regression_is_learned_and_its_baseline_is_zero(context):
    here = context()
    metrics = run(config_of("value", epochs=10), here)
    assert metrics["validation/primary"] == metrics["validation/pearson"] > 0.3
    assert metrics["baseline/validation_primary"] == metrics["baseline/selection_primary"] == 0.0
    values = [float(line.split("\t")[1]) for line in (here.output / "predictions" / "validation.tsv").read_text().splitlines()[1:]]
    assert len(set(values)) > 20


def test_equal_runs_are_equal_to_the_bit_and_seeds_differ(context):
    first = run(config_of(), context("a"))
    assert run(config_of(), context("b")) == first
    assert run(config_of(), context("c", seed=1))["train/loss"] != first["train/loss"]


@pytest.mark.parametrize("grouped", [False, True])
def test_a_stopped_run_goes_on_to_the_same_bits(context, monkeypatch, grouped):
    config = config_of(group_by_length=grouped)
    expected = run(config, context("whole"))
    monkeypatch.setattr(finetuning, "STOP_POLL_S", -1)
    stops = iter([False] * 13 + [True])
    with pytest.raises(StopRequested):
        Finetune().run(config, context("halves", stop_requested=lambda: next(stops)))
    again = context("halves", stop_requested=lambda: False)
    resumed = Finetuning(config, again)
    resumed.resume()
    assert resumed.at.step == 14
    assert run(config, again) == expected


@pytest.mark.parametrize("layer", [{"variant": "original_fff", "depth": 2}, {"variant": "fff", "depth": 2, "load_balancing": 9.0}])
def test_a_penalty_is_trained_on_and_stands_beside_the_loss(layer, new_context, tmp_path, monkeypatch):
    torch.manual_seed(0)
    sizes = {"vocab_size": 96, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "max_position_embeddings": 16}
    FffForMaskedLM(FffConfig(**sizes, feedforward=layer)).save_pretrained(tmp_path / "model")
    config = config_of(epochs=1, learning_rate=1e-9)  # the weights stay where they are
    whole = new_context("whole", inputs={"pretrain": tmp_path})
    metrics = run(config, whole)
    row = json.loads((whole.output / "curve.jsonl").read_text())
    assert metrics["train/loss"] == row["loss"] == pytest.approx(np.log(2), abs=0.1)
    assert metrics["train/penalty"] == row["penalty"] > 0.1

    tuned = Finetuning(config_of(dropout=0.0), new_context("step", inputs={"pretrain": tmp_path}))
    tuned.model.train()
    gradients = []
    monkeypatch.setattr(optimisation, "apply_gradients", lambda model, *_: gradients.extend(p.grad.clone() for p in model.parameters()))
    loss, _ = tuned._step(0.5)
    tuned.model.zero_grad()
    rows = np.random.Generator(np.random.Philox(key=[0, 0])).permutation(tuned.rows)[:8]
    output = tuned.model(**tuned._padded(tuned.splits["train"], rows), labels=torch.from_numpy(tuned.splits["train"].labels[rows]))
    assert loss == output.task_loss.item()
    assert tuned.at.penalties == [output.penalty.item()]
    (output.task_loss + output.penalty).backward()
    assert gradients
    assert all(torch.equal(own, p.grad) for own, p in zip(gradients, tuned.model.parameters(), strict=True))


def test_max_rows_keeps_the_same_rows_for_every_seed(context):
    chosen = [Finetuning(config_of(max_rows=20), context(f"seed-{seed}", seed=seed)).rows for seed in (0, 1)]
    assert len(chosen[0]) == 20
    assert (chosen[0] == chosen[1]).all()
    everything = Finetuning(config_of(), context("all")).rows
    assert sorted(everything) == list(range(90))
    assert run(config_of(max_rows=20), context("few"))["data/train_rows"] == 20


def test_rows_are_put_in_order_once_an_epoch(context):
    epoch_order.cache_clear()
    tuned = Finetuning(config_of(max_rows=40), context())
    read, padded = [], tuned._padded
    tuned._padded = lambda split, rows: (read.append(rows) if split is tuned.splits["train"] else None, padded(split, rows))[1]
    tuned.train()
    assert epoch_order.cache_info().misses == 2
    expected = [np.random.Generator(np.random.Philox(key=[0, epoch])).permutation(tuned.rows) for epoch in range(2)]
    assert np.concatenate(read).tolist() == np.concatenate(expected).tolist()


def test_grouped_by_length_every_row_is_read_once_with_little_padding(context):
    lengths = np.random.default_rng(0).integers(3, 60, 8 * 130 + 5)
    orders = [order_by_length(lengths, 8, 0, epoch) for epoch in (0, 0, 1)]
    assert (orders[0] == orders[1]).all()
    assert (orders[0] != orders[2]).any()
    for order in orders:
        assert sorted(order) == list(range(len(lengths)))
        batches = lengths[order[: 8 * 130]].reshape(130, 8)
        assert (batches.max(1) * 8).sum() < 1.1 * batches.sum()
        assert np.ptp(batches.mean(1)[:10]) > 20  # short and long ones by turns
    assert sorted(order_by_length(lengths[:5], 8, 0, 0)) == list(range(5))
    tuned = Finetuning(config_of(group_by_length=True, max_rows=40), context())
    read, padded = [], tuned._padded
    tuned._padded = lambda split, rows: (read.append(rows) if split is tuned.splits["train"] else None, padded(split, rows))[1]
    tuned.train()
    assert all(sorted(np.concatenate(read[5 * epoch : 5 * epoch + 5])) == sorted(tuned.rows) for epoch in range(2))


def test_padding_and_order_do_not_change_predictions(context, tiny_data):
    tuned = Finetuning(config_of(), context())
    split = PreparedData(tiny_data).task("pair").splits["validation"]
    tuned.model.eval()
    alone = np.concatenate([tuned.model(torch.from_numpy(row.astype(np.int64))[None]).logits.detach().numpy() for row in split.input_ids])
    np.testing.assert_allclose(tuned.predict(split), alone, rtol=0, atol=1e-5)


def test_a_model_that_broke_in_its_last_step_publishes_nothing(context, monkeypatch):
    real = optimisation.apply_gradients

    def break_at_last(model, *rest):
        norm = real(model, *rest)
        if next(steps) == 11:
            torch.nn.init.constant_(model.classifier.bias, torch.nan)
        return norm

    steps = iter(range(12))  # 90 rows in batches of 8
    monkeypatch.setattr(optimisation, "apply_gradients", break_at_last)
    with pytest.raises(optimisation.DivergedError, match="step 12: predictions are not finite"):
        run(config_of("value", epochs=1), context())


def test_only_whole_glue_tasks_are_complete(context):
    rte = {"train": range(2241), "selection": range(249), "validation": range(277)}
    assert is_complete(TASKS["rte"], rte)
    assert not is_complete(TASKS["rte"], {**rte, "train": range(2240)})
    assert not is_complete(TASKS["rte-like"], rte)
    assert run(config_of(epochs=1), context())["data/complete"] == 0.0


def test_bad_rows_of_the_data_are_passed_on(context):
    here = context(metrics={"prepare": {"data/bad_rows": 3.0}})
    assert run(config_of(epochs=1), here)["data/bad_rows"] == 3.0


def test_kept_weights_load_again(context):
    here = context()
    run(config_of(keep_weights=True), here)
    model = FffForSequenceClassification.from_pretrained(here.output / "model")
    assert model.config.num_labels == 2


def test_a_task_that_was_not_prepared_is_refused(context):
    with pytest.raises(ValueError, match=r"'cola' was not prepared: expected one of few, pair, three, value"):
        Finetune().run(config_of("cola"), context())
