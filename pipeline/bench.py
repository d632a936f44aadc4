"""Training speed: steps of pretraining and of finetuning with a tree by CMM, by its masked form, and with a dense layer as wide.

`python -m fffsweep.pipeline.bench` times twelve layers of the published width and vocabulary; options make it smaller.
`--device cuda --precision bf16` trains on a GPU as the stages do there. What each variant's feedforward layer runs is gated first, forward
and backward. Each variant lives in a process of its own, so that its peak memory is its own; their steps alternate. Finetuning follows
when pretraining has ended: three models are in memory at a time.
"""

from __future__ import annotations

import argparse
import multiprocessing
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fffsweep.kernels.shape import TreeShape, parse_layout
from fffsweep.pipeline.machine import write_benchmark
from fffsweep.pipeline.stages.finetune import FinetuneRecipe
from fffsweep.pipeline.stages.pretrain import PretrainRecipe

Batch = Callable[[int], dict[str, Any]]


@dataclass(frozen=True)
class TrainingCase:
    """One size of model and batch. Defaults: the paper's width and vocabulary in twelve layers."""

    layout: str = "1x11"
    hidden: int = 768
    num_layers: int = 12
    num_heads: int = 12
    vocabulary: int = 32768
    sequence_length: int = 128
    batch: int = 32
    threads: int = 2
    steps: int = 3
    device: str = "cpu"
    precision: str = "float32"

    def __post_init__(self) -> None:
        parse_layout(self.layout)
        for name, value, allowed in (("device", self.device, ("cpu", "cuda")), ("precision", self.precision, ("float32", "bf16"))):
            if value not in allowed:
                raise ValueError(f"{name}={value!r}: expected {' or '.join(allowed)}")

    @property
    def shape(self) -> TreeShape:
        """Layout of the tree layer; the dense one is as wide."""
        return parse_layout(self.layout)

    def feedforward(self, name: str) -> dict[str, Any]:
        """Settings of `dense`, `masked` or `cmm`."""
        if name == "dense":
            return {"variant": "dense", "trees": self.shape.width}
        return {"variant": "fff", "trees": self.shape.trees, "depth": self.shape.depth, "execution": name}


VARIANTS = ("dense", "masked", "cmm")
PHASES = ("pretrain", "finetune")


def time_training(case: TrainingCase) -> list[dict[str, Any]]:
    """A row for each phase and variant: tokens a second of whole steps (forward, backward, AdamW), alternating, and peak memory.

    `verified`: what the variant's feedforward layer runs passed the gate of the kernels, on as many tokens as a step has.
    """
    verified = {name: _verified(case, name) for name in VARIANTS}
    return [row | {"verified": verified[row["variant"]]} for phase in PHASES for row in _time_phase(case, phase)]


def _verified(case: TrainingCase, name: str) -> bool:
    import torch

    from fffsweep.kernels.layer import random_layer
    from fffsweep.pipeline.bench_model import is_right

    weights = random_layer(TreeShape(case.shape.width, 0) if name == "dense" else case.shape, case.hidden)
    dtype, form = torch.bfloat16 if case.precision == "bf16" else torch.float32, "masked" if name == "masked" else ""
    return is_right(weights, case.batch * case.sequence_length, dtype, case.threads, form=form, backward=True, device=case.device)


def _time_phase(case: TrainingCase, phase: str) -> list[dict[str, Any]]:
    context = multiprocessing.get_context("spawn")
    workers = []
    for name in VARIANTS:
        here, there = context.Pipe()
        process = context.Process(target=_train, args=(case, phase, name, there), daemon=True)
        process.start()
        there.close()
        here.recv()  # built and warm before the next one starts
        workers.append((name, here, process))
    seconds: dict[str, list[float]] = {name: [] for name in VARIANTS}
    for _ in range(case.steps):
        for name, pipe, _process in workers:
            pipe.send(True)
            seconds[name].append(pipe.recv())
    memory = {}
    for name, pipe, process in workers:
        pipe.send(False)
        memory[name] = pipe.recv()
        process.join()
    tokens = case.batch * case.sequence_length
    speed = {name: tokens / median(times) for name, times in seconds.items()}
    return [
        {"suite": "training", "direction": "train", "phase": phase, "variant": name}
        | asdict(case)
        | {
            "tokens_per_s": speed[name],
            "q20": tokens / _quantile(seconds[name], 4),
            "q80": tokens / _quantile(seconds[name], 1),
            "speedup_vs_dense": speed[name] / speed["dense"],
            "speedup_vs_masked": speed[name] / speed["masked"],
        }
        | memory[name]
        for name in VARIANTS
    ]


def _has_cuda() -> bool:
    import torch

    return torch.cuda.is_available()


def _quantile(times: list[float], fifth: int) -> float:
    return quantiles(times, n=5, method="inclusive")[fifth - 1] if len(times) > 1 else times[0]


def _train(case: TrainingCase, phase: str, name: str, pipe: Connection) -> None:
    """Build a model, take two steps to warm up, then one whenever told, sending its seconds; at last the peak memory, by kind."""
    import torch

    from fffsweep.pipeline import optimisation
    from fffsweep.pipeline.memory import peak_rss_bytes

    torch.set_num_threads(case.threads)
    with optimisation.reproducible(0):
        model, recipe, batch = (_pretraining if phase == "pretrain" else _finetuning)(case, name)
        model.to(case.device)
        optimizer = optimisation.make_optimizer(model, recipe)

        def step(number: int) -> float:
            begun = time.perf_counter()
            inputs = {name: each.to(case.device) for name, each in batch(number).items()}
            with optimisation.autocast(case.precision, case.device):
                loss = model(**inputs).loss
            loss.backward()
            optimisation.apply_gradients(model, optimizer, recipe.learning_rate, recipe.clip)
            if case.device == "cuda":
                torch.cuda.synchronize()
            return time.perf_counter() - begun

        step(0)
        pipe.send(step(1))
        number = 1
        while pipe.recv():
            number += 1
            pipe.send(step(number))
        device_bytes = torch.cuda.max_memory_allocated() if case.device == "cuda" else None
        pipe.send({"peak_rss_bytes": peak_rss_bytes(), "peak_device_bytes": device_bytes})


def _pretraining(case: TrainingCase, name: str) -> tuple[Any, PretrainRecipe, Batch]:
    import torch

    from fffsweep.pipeline.masking import Masking
    from fffsweep.pipeline.model import FffForMaskedLM

    recipe, sequences = PretrainRecipe(steps=1), _sequences(case)
    masking = Masking(4, tuple(range(5)), case.vocabulary, recipe.mask_share)

    def batch(number: int) -> dict[str, Any]:
        inputs, positions, labels = (torch.from_numpy(each) for each in masking.apply(sequences, 0, number))
        return {"input_ids": inputs, "positions": positions, "labels": labels}

    return FffForMaskedLM(_model_config(case, name, dropout=0.0)), recipe, batch


def _finetuning(case: TrainingCase, name: str) -> tuple[Any, FinetuneRecipe, Batch]:
    import torch

    from fffsweep.pipeline.model import FffForSequenceClassification

    recipe, ids = FinetuneRecipe(), torch.from_numpy(_sequences(case))
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "labels": torch.arange(case.batch) % 2}
    return FffForSequenceClassification(_model_config(case, name, recipe.dropout)), recipe, lambda number: inputs


def _model_config(case: TrainingCase, name: str, dropout: float) -> Any:
    from fffsweep.pipeline.model import FffConfig

    return FffConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.num_layers,
        num_attention_heads=case.num_heads,
        max_position_embeddings=case.sequence_length,
        feedforward=case.feedforward(name),
        hidden_dropout_prob=dropout,
    )


def _sequences(case: TrainingCase) -> NDArray[np.int64]:
    return np.random.default_rng(0).integers(5, case.vocabulary, (case.batch, case.sequence_length))


def main(arguments: list[str] | None = None) -> int:
    """Print a table, and write rows with --json FILE; 0 if every variant passed the gate, 1 if not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="fffsweep bench --suite training", description=(__doc__ or "").splitlines()[0])
    for name, default in asdict(TrainingCase()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows with their provenance")
    options = vars(parser.parse_args(arguments))
    target = options.pop("json")
    try:
        case = TrainingCase(**options)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    if case.device == "cuda" and not _has_cuda():
        print("device='cuda': torch finds no CUDA device here; run where there is one, or leave --device out", file=sys.stderr)
        return 2
    rows = time_training(case)
    print(f"{'phase':8} {'variant':8} {'tokens/s':>10} {'vs dense':>9} {'vs masked':>10} {'peak MiB':>9}")
    for row in rows:
        figures = f"{row['tokens_per_s']:10.0f} {row['speedup_vs_dense']:9.2f} {row['speedup_vs_masked']:10.2f}"
        memory = (row["peak_device_bytes"] or row["peak_rss_bytes"]) / 2**20
        print(f"{row['phase']:8} {row['variant']:8} {figures} {memory:9.0f}{'' if row['verified'] else '  GATE FAILED'}")
    if target:
        write_benchmark(target, rows)
    return 0 if all(row["verified"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
