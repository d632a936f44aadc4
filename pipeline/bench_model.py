"""Time of a whole encoder whose feedforward layer is dense, a tree, or left out, alternating in one process.

`python -m fffsweep.pipeline.bench_model`, or `fffsweep bench --suite model`. Leaving it out bounds what any feedforward layer can
gain (Amdahl); `of the bound` says which part of that bound the tree reaches. Weights are random, so routing is close to even: the
worst case for caches.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fffsweep.kernels import registry, timing
from fffsweep.kernels.cmm import choose
from fffsweep.kernels.gate import passes
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.measure import DTYPES
from fffsweep.kernels.shape import parse_layout
from fffsweep.pipeline.feedforward import FeedForwardLayer
from fffsweep.pipeline.machine import write_benchmark
from fffsweep.pipeline.model import FffConfig, FffModel

VARIANTS = ("dense", "cmm", "none")


@dataclass(frozen=True)
class ModelCase:
    """One size of encoder. Defaults: BERT base with feedforward layers of 4,095 neurons, the width of 1x11."""

    layout: str = "1x11"
    hidden: int = 768
    num_layers: int = 12
    num_heads: int = 12
    vocabulary: int = 4096
    sequence_length: int = 128
    dtype: str = "float32"
    threads: int = 1

    def __post_init__(self) -> None:
        parse_layout(self.layout)
        if self.dtype not in ("float32", "bfloat16"):
            raise ValueError(f"dtype={self.dtype!r}: expected float32 or bfloat16")
        for name in ("hidden", "num_layers", "num_heads", "vocabulary", "sequence_length", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected an integer >= 1")
        if self.hidden % self.num_heads:
            raise ValueError(f"hidden={self.hidden}: expected a multiple of num_heads={self.num_heads}")

    def encoder(self, variant: str) -> FffModel:
        """Random encoder of a variant, ready for inference."""
        shape = parse_layout(self.layout)
        feedforward: dict[str, dict[str, Any]] = {
            "dense": {"variant": "dense", "trees": shape.width},
            "cmm": {"variant": "fff", "trees": shape.trees, "depth": shape.depth, "execution": "cmm"},
            "none": {"variant": "none"},
        }
        torch.manual_seed(0)
        config = FffConfig(
            vocab_size=self.vocabulary,
            hidden_size=self.hidden,
            num_hidden_layers=self.num_layers,
            num_attention_heads=self.num_heads,
            max_position_embeddings=self.sequence_length,
            feedforward=feedforward[variant],
        )
        encoder: FffModel = FffModel(config).eval().to(DTYPES[self.dtype])
        return encoder


def time_model(case: ModelCase, batches: list[int], *, min_time_s: float = 5.0, min_rounds: int = 3) -> list[dict[str, Any]]:
    """A row for each batch size and variant: milliseconds a forward pass, and the fraction of the bound that the tree reaches."""
    encoders = {name: case.encoder(name) for name in VARIANTS}
    tree = encoders["cmm"].layers[0].feedforward
    assert isinstance(tree, FeedForwardLayer), "the variant has one"
    weights, dtype = tree.weights().to(torch.float32), DTYPES[case.dtype]
    rows = []
    for batch in batches:
        verified = is_right(weights, batch * case.sequence_length, dtype, case.threads)
        ids = torch.randint(1, case.vocabulary, (batch, case.sequence_length), generator=torch.Generator().manual_seed(2))
        with timing.pinned(case.threads):
            load = timing.load()
            calls = {name: _call(encoder, ids) for name, encoder in encoders.items()}
            series = timing.interleave(calls, min_time_s=min_time_s, min_rounds=min_rounds)
        medians = {name: each.median_s for name, each in series.items()}
        for name, each in series.items():
            rows.append(
                {"suite": "model", "device": "cpu", "direction": "forward", "variant": name, "batch": batch}
                | asdict(case)
                | {
                    "ms": 1e3 * each.median_s,
                    "q20": 1e3 * each.q20_s,
                    "q80": 1e3 * each.q80_s,
                    "noisy": each.noisy,
                    "load": load,
                    "speedup_vs_dense": medians["dense"] / each.median_s,
                    "fraction_of_bound": medians["none"] / each.median_s,
                    "verified": verified if name == "cmm" else None,
                }
            )
    return rows


def is_right(
    weights: LayerWeights, num_tokens: int, dtype: torch.dtype, threads: int, *, form: str = "", backward: bool = False, device: str = "cpu"
) -> bool:
    """Whether the implementation `form`, by default the one that `cmm` chooses, passes the gate on so many random tokens."""
    tokens = torch.randn(num_tokens, weights.w_in.shape[-1], generator=torch.Generator().manual_seed(1))
    like = torch.empty(0, tokens.shape[-1], dtype=dtype, device=device)
    chosen = registry.find(form or choose(like, like, weights.shape))
    with timing.pinned(threads):
        return passes(chosen, weights, tokens, dtype, backward=backward, device=device).verified


def _call(encoder: FffModel, ids: Tensor) -> Callable[[], object]:
    def call() -> Tensor:
        with torch.inference_mode():
            hidden: Tensor = encoder(ids).last_hidden_state
            return hidden

    return call


def main(arguments: list[str] | None = None) -> int:
    """Print a table, and write rows with --json FILE; 0 if the tree's kernels passed the gate, 1 if not, 2 for wrong arguments."""
    parser = argparse.ArgumentParser(prog="fffsweep bench --suite model", description=(__doc__ or "").splitlines()[0])
    for name, default in asdict(ModelCase()).items():
        parser.add_argument("--" + name.replace("_", "-"), type=type(default), default=default)
    parser.add_argument("--batch", default="1,8,32", help="sequences at once, several by commas")
    parser.add_argument("--min-time", type=float, default=5.0, help="seconds of alternating samples a batch size")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows with their provenance")
    options = vars(parser.parse_args(arguments))
    target, min_time_s, batch = options.pop("json"), options.pop("min_time"), options.pop("batch")
    try:
        batches = [int(each) for each in batch.split(",")]
        if min(batches) < 1:
            raise ValueError(f"--batch {batch}: expected integers >= 1")
        case = ModelCase(**options)
    except ValueError as error:
        print(f"fffsweep bench: {error}", file=sys.stderr)
        return 2
    rows = time_model(case, batches, min_time_s=min_time_s)
    print(f"{'batch':>5} {'variant':8} {'ms':>9} {'q20-q80':>17} {'vs dense':>9} {'of the bound':>13}")
    for row in rows:
        spread = f"{row['q20']:.1f}-{row['q80']:.1f}{' noisy' if row['noisy'] else ''}"
        bound = f"{row['fraction_of_bound']:13.1%}" if row["variant"] == "cmm" else ""
        print(f"{row['batch']:5} {row['variant']:8} {row['ms']:9.1f} {spread:>17} {row['speedup_vs_dense']:8.2f}x {bound}")
    if target:
        write_benchmark(target, rows)
    return 0 if all(row["verified"] is not False for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
