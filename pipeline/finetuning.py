"""Finetuning on one task: the recipe's epochs, the held-out selection rows, the official validation split, predictions."""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fffsweep.pipeline import optimisation, schedules
from fffsweep.pipeline.checkpoint import Checkpoints
from fffsweep.pipeline.data.prepared import PreparedData, Unlabelled
from fffsweep.pipeline.encoders import classifier_inputs, load_classifier
from fffsweep.pipeline.glue import is_complete
from fffsweep.pipeline.memory import memory_metrics
from fffsweep.pipeline.metrics import baseline, decide, scores
from fffsweep.pipeline.model import loss_parts
from fffsweep.pipeline.order import epoch_order, order_by_length
from fffsweep.pipeline.stage import Metrics, StageContext, StopRequested
from fffsweep.pipeline.stages.finetune import FinetuneConfig

EVALUATION_BATCH = 64
ROWS_SEED = 0  # `max_rows` keeps the same rows for every seed and every model
STOP_POLL_S = 0.5


def finetune(config: FinetuneConfig, context: StageContext) -> Metrics:
    """Run the stage: see `fffsweep.pipeline.stages.finetune.Finetune`. Raises DivergedError, StopRequested, ValueError."""
    with optimisation.reproducible(context.seed):
        run = Finetuning(config, context)
        run.resume()
        run.train()
        return run.publish()


@dataclass
class Progress:
    """What a checkpoint holds beside weights, optimiser and random numbers. losses, penalties: of the current epoch's steps."""

    step: int = 0
    elapsed_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    penalties: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


class Finetuning:
    """One run. Order, head and dropout come from the seed; the order of an epoch is a function of seed and epoch alone."""

    def __init__(self, config: FinetuneConfig, context: StageContext) -> None:
        self.config, self.context = config, context
        prepared = PreparedData(context.inputs["prepare"])
        found = prepared.task(config.task)
        self.task, self.splits, self.tests = found.task, found.splits, found.tests
        self.tokenizer = prepared.tokenizer()
        train = self.splits["train"]
        if len(train) == 0:
            raise ValueError(f"task {config.task}: no training rows; expected at least one")
        self.rows = np.random.default_rng(ROWS_SEED).permutation(len(train))[: config.max_rows]
        with optimisation.quiet_transformers():
            self.model = load_classifier(context.inputs["pretrain"] / "model", self.task.num_labels, config)
        self.model.to(context.device)  # type: ignore[arg-type]
        self.optimizer = optimisation.make_optimizer(self.model, config)
        self.guard = optimisation.LossGuard(math.inf)
        self.checkpoints = Checkpoints(context.work, 60 * config.checkpoint_minutes)
        self.steps_per_epoch = math.ceil(len(self.rows) / config.batch_size)
        self.selection_logits: NDArray[np.float32] | None = None
        self._order: tuple[int, NDArray[np.int64]] = -1, self.rows[:0]
        self.at = Progress()

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one."""
        state = self.checkpoints.load()
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            optimisation.restore_rng(state["rng"], self.context.device)
            self.at = Progress(**state["progress"])

    def save(self) -> None:
        """Write a checkpoint from which `resume` goes on to the same bits."""
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": optimisation.rng_state(self.context.device),
            "progress": asdict(self.at),
        }
        self.checkpoints.save(self.at.step, state)

    def train(self) -> None:
        """All epochs, the selection rows evaluated after each. Raises StopRequested, its state saved, if asked to stop."""
        at, total, asked = self.at, self.config.epochs * self.steps_per_epoch, time.monotonic()
        self.model.train()
        while at.step < total:
            begun = time.monotonic()
            loss, rate = self._step(at.step / total)
            at.step += 1
            self.guard.check(at.step, loss, *at.penalties[-1:])
            now = time.monotonic()
            at.elapsed_s += now - begun
            at.losses.append(loss)
            if at.step % self.steps_per_epoch == 0:
                self._close_epoch(rate)
            if now - asked > STOP_POLL_S:
                asked = now
                self.context.progress(at.step, total, "steps", loss=loss)
                if self.context.stop_requested():
                    self.save()
                    raise StopRequested
            if self.checkpoints.due():
                self.save()

    def _step(self, spent: float) -> tuple[float, float]:
        """One step of the optimiser, by the gradients of loss and penalty: loss, learning rate."""
        config = self.config
        epoch, place = divmod(self.at.step, self.steps_per_epoch)
        chosen = self.rows[self._order_of(epoch)[place * config.batch_size : (place + 1) * config.batch_size]]
        rate = config.learning_rate * schedules.factor(config.schedule, spent, config.warmup)
        train = self.splits["train"]
        labels = torch.from_numpy(np.asarray(train.labels)[chosen]).to(self.context.device)
        with optimisation.autocast(config.precision, self.context.device):
            output = self.model(**self._padded(train, chosen), labels=labels)
        output.loss.backward()
        optimisation.apply_gradients(self.model, self.optimizer, rate, config.clip)
        loss, penalty = loss_parts(output)
        if penalty is not None:
            self.at.penalties.append(float(penalty.detach()))
        return float(loss.detach()), rate

    def _order_of(self, epoch: int) -> NDArray[np.int64]:
        """Places in `rows` in the order of an epoch, computed once for all its steps."""
        if epoch != self._order[0]:
            if self.config.group_by_length:
                lengths = _lengths(self.splits["train"])[self.rows]
                self._order = epoch, order_by_length(lengths, self.config.batch_size, self.context.seed, epoch)
            else:
                self._order = epoch, epoch_order(len(self.rows), self.context.seed, epoch)
        return self._order[1]

    def _padded(self, split: Unlabelled, rows: NDArray[np.int64]) -> dict[str, Tensor]:
        sequences = [np.asarray(split.input_ids[int(row)]) for row in rows]
        inputs = classifier_inputs(sequences, self.tokenizer, self.model.config)
        return {name: each.to(self.context.device) for name, each in inputs.items()}

    def _close_epoch(self, rate: float) -> None:
        at = self.at
        row = {"step": at.step, "epoch": at.step // self.steps_per_epoch, "loss": sum(at.losses) / len(at.losses), "learning_rate": rate}
        if at.penalties:
            row["penalty"] = sum(at.penalties) / len(at.penalties)
        if len(self.splits["selection"]):
            self.selection_logits = self.predict(self.splits["selection"])
            predictions = decide(self.task, self.selection_logits)
            row |= {f"selection/{name}": value for name, value in scores(self.task, predictions, self.splits["selection"].labels).items()}
        at.losses, at.penalties = [], []
        at.curve.append(row)

    @torch.no_grad()
    def predict(self, split: Unlabelled) -> NDArray[np.float32]:
        """Logits [rows, num_labels] in the split's order; rows of like length are evaluated together. Raises DivergedError."""
        self.model.eval()
        order = np.argsort(_lengths(split), kind="stable")
        logits = np.empty((len(split), self.task.num_labels), dtype=np.float32)
        for start in range(0, len(order), EVALUATION_BATCH):
            rows = order[start : start + EVALUATION_BATCH]
            with optimisation.autocast(self.config.precision, self.context.device):
                logits[rows] = self.model(**self._padded(split, rows)).logits.float().cpu().numpy()
        self.model.train()
        if not np.isfinite(logits).all():  # of the last step, which no further loss tells of: it would score like a constant
            raise optimisation.DivergedError(f"step {self.at.step}: predictions are not finite; nothing is published; lower learning_rate")
        return logits

    def publish(self) -> Metrics:
        """Write the artifacts; the metrics of the run, all of the last epoch."""
        at, output = self.at, self.context.output
        (output / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in at.curve))
        metrics: Metrics = {
            "train/loss": at.curve[-1]["loss"],
            "time/train_s": at.elapsed_s,
            "data/train_rows": len(self.rows),
            "data/bad_rows": self.context.input_metrics.get("prepare", {}).get("data/bad_rows", 0.0),
            "data/complete": float(self.config.max_rows is None and is_complete(self.task, self.splits)),
        }
        if "penalty" in at.curve[-1]:
            metrics["train/penalty"] = at.curve[-1]["penalty"]
        primary: dict[str, list[float]] = {}
        constant = baseline(self.task, np.asarray(self.splits["train"].labels)[self.rows])
        for name, split in self.splits.items():
            if name == "train" or len(split) == 0:
                continue
            logits = self.selection_logits if name == "selection" else None  # those of the last epoch
            predictions = decide(self.task, self.predict(split) if logits is None else logits)
            self._write_predictions(name, predictions, split.index)
            found = scores(self.task, predictions, split.labels)
            metrics |= {f"{name}/{metric}": value for metric, value in found.items()}
            kind = "selection" if name == "selection" else "validation"
            primary.setdefault(f"{kind}/primary", []).append(found[self.task.metrics[0]])
            floor = scores(self.task, np.full(len(split), constant), split.labels)[self.task.metrics[0]]
            primary.setdefault(f"baseline/{kind}_primary", []).append(floor)
        metrics |= {name: sum(values) / len(values) for name, values in primary.items()}
        if self.config.submission:
            self._write_submission()
        if self.config.keep_weights:
            with optimisation.quiet_transformers():
                self.model.save_pretrained(output / "model")
        return metrics | memory_metrics(self.context.device)

    def _write_submission(self) -> None:
        """Predictions of the test splits that were prepared, in files called as the GLUE server has them."""
        for split, name in zip(self.task.test_splits, self.task.submission_names, strict=True):
            if split in self.tests:
                rows = self.tests[split]
                self._write_predictions(name, decide(self.task, self.predict(rows)), rows.index)

    def _write_predictions(self, name: str, predictions: NDArray[Any], index: NDArray[Any]) -> None:
        """`predictions/<name>.tsv` as the GLUE server takes it: each row's number and its prediction.

        A class goes by its name where it has one; a value lies within the task's labels.
        """
        folder = self.context.output / "predictions"
        folder.mkdir(exist_ok=True)
        if self.task.kind == "regression":
            low, high = self.task.label_range or (-math.inf, math.inf)
            shown = [f"{value:.6f}" for value in predictions.clip(low, high)]
        else:
            names = self.task.label_names
            shown = [names[value] if names else str(value) for value in predictions]
        lines = [f"{number}\t{value}\n" for number, value in zip(index, shown, strict=True)]
        (folder / f"{name}.tsv").write_text("index\tprediction\n" + "".join(lines))


def _lengths(split: Unlabelled) -> NDArray[np.int64]:
    return np.array([len(each) for each in split.input_ids], dtype=np.int64)
