"""The work of stage `convert`: new feedforward layers learn what the encoder's own do, then stand in their place.

Layers are independent of each other: each reads the inputs that the encoder's own layer gets, so all are trained in one pass.
"""

from __future__ import annotations

import json
import math
import time
from dataclasses import asdict, dataclass, field

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fffsweep.pipeline import optimisation, schedules
from fffsweep.pipeline.activations import Recorded, check_vocabulary
from fffsweep.pipeline.checkpoint import Checkpoints
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.encoders import converted, feedforward_halves, load_encoder
from fffsweep.pipeline.feedforward import auxiliary_loss
from fffsweep.pipeline.memory import memory_metrics
from fffsweep.pipeline.order import epoch_order
from fffsweep.pipeline.stage import Metrics, StageContext, StopRequested
from fffsweep.pipeline.stages.convert import WITHOUT_ACTIVATIONS, ConvertConfig
from fffsweep.pipeline.tree_health import publish_tree_health
from fffsweep.pipeline.variants import make_feedforward

STOP_POLL_S = 0.5
EVALUATION_ROWS = 4096


def convert(config: ConvertConfig, context: StageContext) -> Metrics:
    """Run the stage: see `fffsweep.pipeline.stages.convert.Convert`. Raises StopRequested, ValueError."""
    data = PreparedData(context.inputs["prepare"])
    settings = config.model.feedforward
    with optimisation.reproducible(context.seed), optimisation.quiet_transformers():
        model = load_encoder(config.encoder)
        check_vocabulary(data, model, config.encoder)
        metrics: Metrics = {"ff/width": settings.width, "ff/active_width": settings.active_width}
        if settings.variant not in WITHOUT_ACTIVATIONS:
            run = Distillation(config, context)
            run.resume()
            run.train()
            metrics |= run.publish()
        if settings.variant != "unchanged":
            model = converted(model, settings)
            if settings.variant != "none":
                for (_, place), new in zip(feedforward_halves(model), run.layers, strict=True):
                    place.feedforward.load_state_dict(new.state_dict())  # type: ignore[union-attr]
        model.save_pretrained(context.output / "model")
        data.tokenizer().save_pretrained(context.output / "model")
    metrics["params/total"] = sum(each.numel() for each in model.parameters())
    metrics["params/feedforward"] = _feedforward_parameters(model, settings.width)
    return metrics | memory_metrics(context.device)


@dataclass
class Progress:
    """What a checkpoint holds beside weights and optimiser. losses: since the last row of the curve."""

    step: int = 0
    elapsed_s: float = 0.0
    losses: list[float] = field(default_factory=list)
    curve: list[dict[str, float]] = field(default_factory=list)


class Distillation:
    """One run. Blocks of recorded tokens are read in an order that follows from seed and epoch."""

    def __init__(self, config: ConvertConfig, context: StageContext) -> None:
        self.config, self.context = config, context
        self.train_rows = Recorded(context.inputs["activations"] / "train")
        self.held_out = Recorded(context.inputs["activations"] / "validation")
        hidden, num_layers = self.train_rows.hidden_size, self.train_rows.num_layers
        self.layers = nn.ModuleList(make_feedforward(config.model.feedforward, hidden, index) for index in range(num_layers))
        for layer in self.layers:
            layer.reset(0.02)  # type: ignore[operator]
        self.layers.to(context.device)
        self.optimizer = optimisation.make_optimizer(self.layers, config)
        self.checkpoints = Checkpoints(context.work, 60 * config.checkpoint_minutes)
        self.rows = min(config.batch_tokens, len(self.train_rows))
        self.steps = math.ceil(config.tokens / self.rows)
        self.variances = [float(self.held_out.layer(index, slice(None))[1].var(0).mean()) for index in range(num_layers)]
        self.at = Progress()

    def resume(self) -> None:
        """Go on from the newest sound checkpoint, if there is one."""
        state = self.checkpoints.load()
        if state is not None:
            self.layers.load_state_dict(state["layers"])
            self.optimizer.load_state_dict(state["optimizer"])
            optimisation.restore_rng(state["rng"], self.context.device)
            self.at = Progress(**state["progress"])

    def save(self) -> None:
        """Write a checkpoint from which `resume` goes on to the same bits."""
        state = {
            "layers": self.layers.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "rng": optimisation.rng_state(self.context.device),
            "progress": asdict(self.at),
        }
        self.checkpoints.save(self.at.step, state)

    def train(self) -> None:
        """Spend the budget. Raises StopRequested, its state saved, if asked to stop; DivergedError for a loss that is not finite."""
        at, guard, asked = self.at, optimisation.LossGuard(math.inf), time.monotonic()
        while at.step < self.steps:
            begun = time.monotonic()
            rate = self.config.learning_rate * schedules.factor(self.config.schedule, at.step / self.steps, self.config.warmup)
            loss = self._step(rate)
            at.step += 1
            guard.check(at.step, loss)
            now = time.monotonic()
            at.elapsed_s += now - begun
            at.losses.append(loss)
            share = self.config.evaluations / self.steps
            if math.floor(at.step * share) > math.floor((at.step - 1) * share) or at.step == self.steps:
                self._evaluate(rate)
            if now - asked > STOP_POLL_S:
                asked = now
                self.context.progress(at.step * self.rows, self.steps * self.rows, "tokens", loss=loss)
                if self.context.stop_requested():
                    self.save()
                    raise StopRequested
            if self.checkpoints.due():
                self.save()

    def _step(self, rate: float) -> float:
        """One step on one block: the layers' unexplained shares, mean over layers."""
        blocks = len(self.train_rows) // self.rows
        epoch, place = divmod(self.at.step, blocks)
        block = int(epoch_order(blocks, self.context.seed, epoch)[place])
        rows = slice(block * self.rows, (block + 1) * self.rows)
        losses = []
        for index in range(len(self.layers)):
            loss = self._unexplained(index, self.train_rows, rows) / len(self.layers)
            losses.append(loss.detach())
            penalty = auxiliary_loss(self.layers[index])
            (loss if penalty is None else loss + penalty).backward()
        optimisation.apply_gradients(self.layers, self.optimizer, rate, None)
        return sum(map(float, losses))  # asked for last: a GPU is then waited for once

    def _unexplained(self, index: int, recorded: Recorded, rows: slice) -> Tensor:
        """Squared error of one layer over the variance of its targets."""
        x, target = recorded.layer(index, rows, self.context.device)
        ids = torch.from_numpy(recorded.token_ids[rows].astype(np.int64)).to(self.context.device)
        error: Tensor = (self.layers[index](x, ids) - target).square().mean() / self.variances[index]
        return error

    @torch.no_grad()
    def _evaluate(self, rate: float) -> None:
        at = self.at
        self.layers.eval()
        row = {"step": at.step, "tokens": at.step * self.rows, "loss": sum(at.losses) / len(at.losses), "learning_rate": rate}
        for index in range(len(self.layers)):
            row[f"unexplained/{index}"] = self._held_out_error(index)
        row["unexplained"] = sum(row[f"unexplained/{index}"] for index in range(len(self.layers))) / len(self.layers)
        self.layers.train()
        at.losses = []
        at.curve.append(row)

    def _held_out_error(self, index: int) -> float:
        """What one layer leaves unexplained of the held-out tokens."""
        parts = [slice(start, start + EVALUATION_ROWS) for start in range(0, len(self.held_out), EVALUATION_ROWS)]
        sizes = [len(range(len(self.held_out))[part]) for part in parts]
        return float(np.average([float(self._unexplained(index, self.held_out, part)) for part in parts], weights=sizes))

    def _read_held_out(self) -> None:
        for index in range(len(self.layers)):
            self._held_out_error(index)

    def publish(self) -> Metrics:
        """Write the curve and how the trees are used; the metrics of the training."""
        at = self.at
        (self.context.output / "curve.jsonl").write_text("".join(json.dumps(row) + "\n" for row in at.curve))
        last = {"distill/unexplained": at.curve[-1]["unexplained"]}
        last |= {f"distill/layer_{index}/unexplained": at.curve[-1][f"unexplained/{index}"] for index in range(len(self.layers))}
        last |= publish_tree_health(self.layers, self._read_held_out, self.context.output)
        tokens = at.step * self.rows
        return last | {"distill/tokens": tokens, "time/train_s": at.elapsed_s, "time/tokens_per_s": tokens / at.elapsed_s}


def _feedforward_parameters(model: PreTrainedModel, width: int) -> int:
    """Parameters of the feedforward layers; of an encoder that is not built as BERT, those of its maps between hidden size and `width`."""
    if hasattr(model, "encoder") and hasattr(model.encoder, "layer"):
        layers: list[nn.Module] = [half for halves in feedforward_halves(model) for half in halves]
    else:
        sizes = sorted((model.config.hidden_size, width))
        layers = [each for each in model.modules() if isinstance(each, nn.Linear) and sorted(each.weight.shape) == sizes]
    return sum(each.numel() for layer in layers for each in layer.parameters())
