"""The work of stage `activations`: an encoder reads text, and what its feedforward layers take and give is kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fffsweep.pipeline import optimisation
from fffsweep.pipeline.data.prepared import PreparedData
from fffsweep.pipeline.data.vocabulary import read_vocabulary, vocabulary_hash
from fffsweep.pipeline.encoder_folder import CONVERTIBLE, vocabulary_of, vocabulary_path
from fffsweep.pipeline.encoders import feedforward_halves, load_encoder
from fffsweep.pipeline.masking import Reading
from fffsweep.pipeline.stage import Metrics, StageContext, StopRequested
from fffsweep.pipeline.stages.convert import ActivationsConfig

BATCH = 32
Halves = NDArray[np.float16]


class Recorded:
    """One split of recorded activations, memory-mapped: token_ids [tokens]; `layer` gives float32 tensors."""

    def __init__(self, folder: Path) -> None:
        self.token_ids: NDArray[np.int32] = np.load(folder / "token_ids.npy", mmap_mode="r")
        num_layers = len(list(folder.glob("inputs-*.npy")))
        self._layers = [
            (np.load(folder / f"inputs-{index}.npy", mmap_mode="r"), np.load(folder / f"outputs-{index}.npy", mmap_mode="r"))
            for index in range(num_layers)
        ]

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def num_layers(self) -> int:
        """Feedforward layers of the encoder."""
        return len(self._layers)

    @property
    def hidden_size(self) -> int:
        """Length of an activation."""
        return int(self._layers[0][0].shape[1])

    def layer(self, index: int, rows: slice, device: torch.device | str = "cpu") -> tuple[Tensor, Tensor]:
        """Inputs and outputs [rows, hidden] of one layer, on `device`, where they become float32: half as much is carried there."""
        inputs, outputs = (torch.from_numpy(each[rows].copy()).to(device).float() for each in self._layers[index])
        return inputs, outputs


def record(config: ActivationsConfig, context: StageContext) -> Metrics:
    """Run the stage: see `fffsweep.pipeline.stages.convert.Activations`. Raises ValueError, StopRequested."""
    data = PreparedData(context.inputs["prepare"])
    with optimisation.reproducible(context.seed), optimisation.quiet_transformers(), torch.inference_mode():
        model = load_encoder(config.encoder)
        model.to(context.device)  # type: ignore[arg-type]
        if model.config.model_type not in CONVERTIBLE:
            raise ValueError(
                f"encoder: model type {model.config.model_type}: expected {' or '.join(CONVERTIBLE)}, whose layers can be exchanged"
            )
        check_vocabulary(data, model, config.encoder)
        metrics: Metrics = {}
        corpora = {"train": Reading(data.corpus("train"), context.seed), "validation": Reading(data.corpus("validation"), context.seed)}
        for split, wanted in (("train", config.distinct_tokens), ("validation", config.validation_tokens)):
            length = corpora[split].corpus.shape[1]
            # the corpus ends where it ends: no sequence is recorded twice
            num_sequences = min(-(-wanted // length), len(corpora[split].corpus))
            _record_split(model, corpora[split], num_sequences, context, context.output / split)
            metrics[f"distill/{split}_tokens"] = num_sequences * length
    return metrics


def check_vocabulary(data: PreparedData, model: Any, encoder: str) -> None:
    """Raise ValueError unless the prepared ids are the encoder's: the pieces are its own, or as many where it has no list of them.

    An encoder may know more ids than it has pieces.
    """
    ids = data.tokenizer().get_vocab()
    found, expected, own = len(ids), int(model.config.vocab_size), vocabulary_of(encoder)
    mend = "set stages.prepare.vocabulary_file to its vocab.txt"
    if own is not None:
        pieces = read_vocabulary(vocabulary_path(own))
        if vocabulary_hash(sorted(ids, key=ids.__getitem__)) != vocabulary_hash(pieces):
            raise ValueError(f"vocabulary of {found} pieces: expected the encoder's own {len(pieces)}, which are others; {mend}")
    if found > expected or (own is None and found < expected):
        raise ValueError(f"vocabulary of {found} pieces: expected the encoder's of {expected}; {mend}")


def _record_split(model: Any, reading: Reading, num_sequences: int, context: StageContext, folder: Path) -> None:
    folder.mkdir()
    halves = feedforward_halves(model)
    length, hidden = reading.corpus.shape[1], model.config.hidden_size
    shape = (num_sequences * length, hidden)

    def new(name: str, of: tuple[int, ...], dtype: Any) -> NDArray[Any]:
        return np.lib.format.open_memmap(folder / f"{name}.npy", mode="w+", dtype=dtype, shape=of)

    token_ids = new("token_ids", shape[:1], np.int32)
    kept = [(new(f"inputs-{index}", shape, np.float16), new(f"outputs-{index}", shape, np.float16)) for index in range(len(halves))]
    at = slice(0, 0)
    hooks = []
    for (first, second), (inputs, outputs) in zip(halves, kept, strict=True):
        hooks.append(first.register_forward_pre_hook(lambda _, arguments, into=inputs: _keep(arguments[0], into, at)))
        hooks.append(second.register_forward_hook(lambda _module, _arguments, result, into=outputs: _keep(result, into, at)))
    for start in range(0, num_sequences, BATCH):
        ids = reading.rows(start, min(BATCH, num_sequences - start)).astype(np.int64)
        at = slice(start * length, (start + len(ids)) * length)
        token_ids[at] = ids.ravel()
        model(torch.from_numpy(ids).to(context.device))
        context.progress(at.stop, shape[0], "tokens")
        if context.stop_requested():
            raise StopRequested
    for hook in hooks:
        hook.remove()


def _keep(values: Tensor, into: Halves, at: slice) -> None:
    rounded = values.detach().flatten(0, 1).to("cpu", torch.float16)
    if not bool(torch.isfinite(rounded).all()):
        raise ValueError("an activation does not fit float16: this encoder cannot be recorded")
    into[at] = rounded.numpy()
