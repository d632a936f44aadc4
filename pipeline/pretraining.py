"""Masked-language-model pretraining under a budget, resumable to the bit."""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fffsweep.pipeline import optimisation, schedules, workers
from fffsweep.pipeline.checkpoint import Checkpoints
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.energy import EnergyMeter
from fffsweep.pipeline.feedforward import FeedForwardLayer
from fffsweep.pipeline.masking import MaskedBatch, Masking, Reading, unigram_loss
from fffsweep.pipeline.memory import memory_metrics
from fffsweep.pipeline.model import FffConfig, FffForMaskedLM, loss_parts
from fffsweep.pipeline.portable import load_state, save_state
from fffsweep.pipeline.stage import Metrics, StageContext, StopRequested
from fffsweep.pipeline.stages.pretrain import PretrainConfig
from fffsweep.pipeline.stages.rung import RungConfig
from fffsweep.pipeline.tree_health import publish_tree_health

VALIDATION_SEED = 0  # masks of the held-out sequences are the same in every run, whatever its seed
VALIDATION_BATCH = 32
STOP_POLL_S = 0.5


def pretrain(config: PretrainConfig, context: StageContext) -> Metrics:
    """Run the stage: see `fffsweep.pipeline.stages.pretrain.Pretrain`. Raises DivergedError, StopRequested, ValueError."""
    with optimisation.reproducible(context.seed):
        run = Pretraining(config, context)
        run.resume()
        run.train()
        return run.publish() if workers.rank() == 0 else {}


def pretrain_to_rung(config: RungConfig, context: StageContext) -> Metrics:
    """Run the stage: see `fffsweep.pipeline.stages.rung.Rung`. Raises what `pretrain` raises."""
    with optimisation.reproducible(context.seed):
        run = Pretraining(config, context, config.share)
        run.resume()
        branch = context.work / "branch"
        if not branch.exists():
            run.train((1 - schedules.WSD_DECAY) * config.share)
            save_state(run.state(), branch)
        run.train(config.share)
        loss, accuracy = run.validate()
        shutil.copytree(branch, context.output / "state")
        (context.output / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in run.at.curve))
        tokens = run.at.sequences * run.corpus.shape[1]
        metrics = {"mlm/validation_loss": loss, "mlm/validation_accuracy": accuracy, "mlm/tokens": tokens, "time/train_s": run.at.elapsed_s}
        return metrics | memory_metrics(context.device)


@dataclass
class Progress:
    """Everything of a run that a checkpoint holds beside weights, optimiser, guard and random numbers.

    energy_joules: by kind, before the attempt that goes on from here. window: losses since the last row of the curve, penalties left out;
    window_penalties: these, if layers leave any; window_s: seconds spent on the steps; window_hits, window_asked: masked tokens guessed
    right, and all of them; elapsed_s: seconds of training, evaluations not counted.
    """

    step: int = 0
    sequences: int = 0
    evaluated: int = 0
    elapsed_s: float = 0.0
    energy_joules: dict[str, float] = field(default_factory=dict)
    window: list[float] = field(default_factory=list)
    window_penalties: list[float] = field(default_factory=list)
    window_s: float = 0.0
    window_sequences: int = 0
    window_hits: float = 0.0
    window_asked: float = 0.0
    curve: list[dict[str, float]] = field(default_factory=list)


class Pretraining:
    """One run, up to `share` of its budget. Its batches depend on seed and position alone, so a checkpoint needs no data loader."""

    def __init__(self, config: PretrainConfig, context: StageContext, share: float = 1.0) -> None:
        self.config, self.context, self.share = config, context, share
        data = PreparedData(context.inputs["prepare"])
        self.tokenizer = data.tokenizer()
        self.corpus, self.held_out = _corpora(data, config.model.sequence_length, config.validation_sequences)
        vocabulary_size = len(self.tokenizer)
        self.model = FffForMaskedLM(FffConfig.of(config.model, vocabulary_size, self.tokenizer.pad_token_id))
        self.model.to(context.device)  # type: ignore[arg-type]
        self.forward = torch.compile(self.model) if config.compile else self.model
        self.optimizer = optimisation.make_optimizer(self.model, config, config.optimizer)
        self.guard = optimisation.LossGuard(config.spike_limit)
        self.checkpoints = Checkpoints(context.work, 60 * config.checkpoint_minutes)
        self.masking = Masking(self.tokenizer.mask_token_id, tuple(self.tokenizer.all_special_ids), vocabulary_size, config.mask_share)
        self.reading = Reading(self.corpus, context.seed)
        self.micro_batch = min(config.micro_batch_size, config.batch_size)
        self.validation = [
            self.masking.apply(self.held_out[start : start + VALIDATION_BATCH], VALIDATION_SEED, start)
            for start in range(0, len(self.held_out), VALIDATION_BATCH)
        ]
        self.at = Progress()
        self.meter = EnergyMeter(context.device)

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, or from the rung before, if there is one."""
        state = self.checkpoints.load()
        if state is None and "rung" in self.context.inputs:
            state = load_state(self.context.inputs["rung"] / "state")
        if state is not None:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.guard.restore(state["guard"])
            optimisation.restore_rng(state["rng"], self.context.device)
            self.at = Progress(**state["progress"])
            self.meter.only(self.at.energy_joules)

    def save(self) -> None:
        """Write a checkpoint, once for all workers."""
        if workers.rank() == 0:
            self.checkpoints.save(self.at.step, self.state())

    def state(self) -> dict[str, Any]:
        """What `resume` goes on from to the same bits."""
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "guard": self.guard.state(),
            "rng": optimisation.rng_state(self.context.device),
            "progress": {**asdict(self.at), "energy_joules": self._energy()},
        }

    def train(self, until: float = 1.0) -> None:
        """Spend the budget up to a share of it.

        Raises StopRequested, its state saved, if asked to stop; DivergedError if the loss runs away.
        """
        at, asked = self.at, time.monotonic()
        while (spent := self._spent()) < until:
            begun = time.monotonic()
            workers.seed_step(self.context.seed, at.step)
            loss, norm, rate = self._step(spent)
            self.guard.check(at.step, loss, *at.window_penalties[-1:])
            now = time.monotonic()
            stop = False
            if now - asked > STOP_POLL_S:
                asked, stop = now, self.context.stop_requested()
            took_s, stop_all = workers.agree([now - begun, stop], self.context.device)
            at.elapsed_s += took_s
            at.window_s += took_s
            at.window.append(loss)
            self._log(norm, rate)
            if stop_all:
                self.save()
                raise StopRequested
            if self.checkpoints.due():
                self.save()

    def _spent(self) -> float:
        """Share of the budget that is spent."""
        config, at = self.config, self.at
        if config.tokens is not None:
            return at.sequences * int(self.corpus.shape[1]) / config.tokens
        if config.steps is not None:
            return at.step / config.steps
        assert config.wall_clock_s is not None  # the config has exactly one budget
        return at.elapsed_s / config.wall_clock_s

    def _step(self, spent: float) -> tuple[float, float, float]:
        """One step of the optimiser, by the gradients of loss and penalty: loss, norm of the gradient, learning rate."""
        config, at, total, penalties, hits, asked = self.config, self.at, 0.0, list[float](), 0, 0
        rate = config.learning_rate * self._rate_factor(spent)
        micro_batches = self._micro_batches(spent)
        for index in range(micro_batches):
            if index % workers.count() == workers.rank():
                batch = self.masking.apply(self.reading.rows(at.sequences, self.micro_batch), self.context.seed, at.sequences)
                output = self._read(batch)
                (output.loss / micro_batches).backward()
                loss, penalty = loss_parts(output)
                total += float(loss.detach() / micro_batches)
                if penalty is not None:
                    penalties.append(float(penalty.detach() / micro_batches))
                hits, asked = hits + _hits(output.logits, batch), asked + len(batch.labels)
            at.sequences += self.micro_batch
        total, penalty_sum, all_hits, all_asked = workers.sum_gradients(self.model, total, sum(penalties), hits, asked)
        if penalties:
            at.window_penalties.append(penalty_sum)
        at.window_hits, at.window_asked = at.window_hits + all_hits, at.window_asked + all_asked
        norm = optimisation.apply_gradients(self.model, self.optimizer, rate, config.clip)
        at.step += 1
        return total, norm, rate

    def _rate_factor(self, spent: float) -> float:
        if self.share < 1:
            return schedules.rung_factor(spent, self.share, self.config.warmup)
        return schedules.factor(self.config.schedule, spent, self.config.warmup)

    def _micro_batches(self, spent: float) -> int:
        """Micro-batches in the next step: their number grows linearly until the ramp is over."""
        full = self.config.batch_size // self.micro_batch
        if spent >= self.config.batch_ramp:
            return full
        return max(1, math.ceil(full * spent / self.config.batch_ramp))

    def _read(self, batch: MaskedBatch) -> Any:
        """The model's output: `loss` with penalties, and `logits` of the asked positions."""
        inputs, positions, labels = (torch.from_numpy(each).to(self.context.device) for each in batch)
        with optimisation.autocast(self.config.precision, self.context.device):
            return self.forward(input_ids=inputs, positions=positions, labels=labels)

    def _log(self, norm: float, rate: float) -> None:
        """Add a row to the curve if one is due, with an evaluation if one is due."""
        at, length = self.at, self.corpus.shape[1]
        due = math.floor(min(1.0, self._spent()) * self.config.evaluations)
        if at.step % self.config.log_every and due <= at.evaluated:
            return
        row = {
            "step": at.step,
            "tokens": at.sequences * length,
            "loss": sum(at.window) / len(at.window),
            "accuracy": at.window_hits / max(1.0, at.window_asked),
            "learning_rate": rate,
            "grad_norm": norm,
            "tokens_per_s": (at.sequences - at.window_sequences) * length / at.window_s,
        }
        if at.window_penalties:
            row["penalty"] = sum(at.window_penalties) / len(at.window_penalties)
        at.window, at.window_penalties, at.window_s, at.window_hits, at.window_asked = [], [], 0.0, 0.0, 0.0
        at.window_sequences = at.sequences
        if due > at.evaluated:
            at.evaluated = due
            row["validation_loss"], row["validation_accuracy"] = self.validate()
        at.curve.append(row)
        total = self.config.tokens or self.config.steps or self.config.wall_clock_s or 1
        unit = "tokens" if self.config.tokens else "steps" if self.config.steps else "s"
        self.meter.total()  # read more often than its counters wrap
        if workers.rank() == 0:
            self.context.progress(min(1.0, self._spent()) * total, total, unit, loss=row["loss"], tokens_per_s=row["tokens_per_s"])

    def _energy(self) -> dict[str, float]:
        """Joules by kind, of earlier attempts too."""
        before = self.at.energy_joules
        return {kind: joules + before.get(kind, 0.0) for kind, joules in self.meter.total().items()}

    @torch.no_grad()
    def validate(self) -> tuple[float, float]:
        """Loss and accuracy on the held-out masked tokens. Raises DivergedError if the loss is not finite."""
        self.model.eval()
        loss, hits, asked = 0.0, 0, 0
        for batch in self.validation:
            output = self._read(batch)
            loss += float(output.loss) * len(batch.labels)
            hits += _hits(output.logits, batch)
            asked += len(batch.labels)
        self.model.train()
        optimisation.check_finite(self.at.step, "held-out loss", loss)
        return loss / asked, hits / asked

    def publish(self) -> Metrics:
        """Write the artifacts; the metrics of the run."""
        at, output = self.at, self.context.output
        with optimisation.quiet_transformers():
            self.model.save_pretrained(output / "model")
        self.tokenizer.save_pretrained(output / "model")
        (output / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in at.curve))
        labels = np.concatenate([batch.labels for batch in self.validation])
        last = at.curve[-1]
        metrics = {
            "mlm/train_loss": last["loss"],
            "mlm/train_accuracy": last["accuracy"],
            "mlm/validation_loss": last["validation_loss"],
            "mlm/validation_accuracy": last["validation_accuracy"],
            "mlm/unigram_loss": unigram_loss(self.corpus, labels, len(self.tokenizer), self.masking.special_ids),
            "mlm/tokens": at.sequences * self.corpus.shape[1],
            "params/total": sum(each.numel() for each in self.model.parameters()),
            "params/feedforward": sum(
                each.numel() for layer in self.model.modules() if isinstance(layer, FeedForwardLayer) for each in layer.parameters()
            ),
            "ff/width": self.config.model.feedforward.width,
            "ff/active_width": self.config.model.feedforward.active_width,
            "time/train_s": at.elapsed_s,
            "time/tokens_per_s": at.sequences * self.corpus.shape[1] / at.elapsed_s,
        }
        if "penalty" in last:
            metrics["mlm/train_penalty"] = last["penalty"]
        metrics |= memory_metrics(self.context.device)
        metrics |= {f"energy/{kind}_joules": joules for kind, joules in self._energy().items()}
        return metrics | publish_tree_health(self.model, self._read_unmasked, output)

    def _read_unmasked(self) -> None:
        """Let the encoder read the held-out sequences as they are."""
        for start in range(0, len(self.held_out), VALIDATION_BATCH):
            ids = torch.from_numpy(self.held_out[start : start + VALIDATION_BATCH].astype(np.int64))
            self.model.encoder(ids.to(self.context.device))


def _hits(logits: Tensor, batch: MaskedBatch) -> int:
    """Masked tokens whose most likely guess is right."""
    return int((logits.detach().argmax(1).cpu() == torch.from_numpy(batch.labels)).sum())


def _corpora(data: PreparedData, length: int, limit: int) -> tuple[NDArray[Any], NDArray[Any]]:
    """Training sequences, and the first `limit` held-out ones."""
    corpus, held_out = data.corpus("train"), data.corpus("validation")[:limit]
    if corpus.shape[1] != length:
        raise ValueError(
            f"sequence_length={length} of the model: expected {corpus.shape[1]}, that of the prepared corpus; give both stages the same"
        )
    if len(corpus) == 0 or len(held_out) == 0:
        raise ValueError(f"corpus of {len(corpus)} training and {len(held_out)} held-out sequences: expected at least one each")
    return corpus, held_out
