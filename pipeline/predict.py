"""What an exported model says of texts. Also the loader of the models that `fffsweep pick` registers in MLflow."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

from fffsweep.pipeline.data.packing import join_texts
from fffsweep.pipeline.data.text import normalise
from fffsweep.pipeline.encoders import classifier_inputs  # the module makes the classes known to the Auto classes
from fffsweep.pipeline.export import CARD
from fffsweep.pipeline.optimisation import quiet_transformers

_TOP = 5  # words offered for a mask


class PredictError(ValueError):
    """A folder or a text that cannot be used; the message says which and why."""


@dataclass(frozen=True)
class Prediction:
    """label: a class, a value, or the likeliest word of each mask; scores: probability of every class, or of the likeliest words."""

    label: str
    scores: dict[str, float]


class Predictor:
    """One exported model. Not thread-safe. Raises PredictError if `folder` holds none."""

    def __init__(self, folder: Path) -> None:
        folder = Path(folder)
        if not (folder / CARD).is_file() or not (folder / "config.json").is_file():
            raise PredictError(f"{folder}: no exported model; expected a folder that `fffsweep export STUDY TRIAL FOLDER` wrote")
        self.card: dict[str, Any] = json.loads((folder / CARD).read_text())
        self.task: dict[str, Any] | None = self.card["task"]
        auto = AutoModelForMaskedLM if self.task is None else AutoModelForSequenceClassification
        with quiet_transformers():
            self.tokenizer = AutoTokenizer.from_pretrained(str(folder))
            self.model = auto.from_pretrained(str(folder)).eval()
        # an encoder can often read more than the sequences that it was finetuned on
        self.length = min(self.tokenizer.model_max_length, self.model.config.max_position_embeddings)

    def check(self, texts: Sequence[str]) -> None:
        """Raise PredictError at the first text that is not what the model reads, with its line."""
        columns = ["text"] if self.task is None else self.task["text_columns"]
        for number, text in enumerate(texts, 1):
            parts = text.split("\t")
            if not text.strip():
                raise PredictError(f"line {number}: is empty; expected a text a line")
            if self.task is None and self.tokenizer.mask_token not in text:
                raise PredictError(
                    f"line {number}: no {self.tokenizer.mask_token}; expected a text with one or more, whose words are guessed"
                )
            if len(columns) != len(parts):
                raise PredictError(f"line {number}: {len(parts)} fields; the model reads {len(columns)}: {' TAB '.join(columns)}")

    @torch.inference_mode()
    def predict(self, texts: Sequence[str], batch_size: int = 32) -> list[Prediction]:
        """One prediction a text, in order; a pair's texts are separated by a tab. Longer ones are cut to the model's length."""
        self.check(texts)
        found: list[Prediction] = []
        for start in range(0, len(texts), batch_size):
            inputs = self._encoded(texts[start : start + batch_size])
            logits = self.model(**inputs).logits.float()
            found += self._rows(logits) if self.task is not None else list(map(self._word, logits, inputs["input_ids"]))
        return found

    def _encoded(self, texts: Sequence[str]) -> dict[str, torch.Tensor]:
        """The model's inputs [texts, longest], cleaned, joined and cut as the training data was.

        `[SEP]` and the like are text to a classifier, as they were in training; a masked-language model is asked by `[MASK]`.
        """
        tokenizer = self.tokenizer
        options = {"add_special_tokens": False, "split_special_tokens": self.task is not None, "verbose": False}
        rows = []
        for text in texts:
            parts = [np.array(tokenizer(normalise(part), **options)["input_ids"], dtype=np.uint32) for part in text.split("\t")]
            second = parts[1] if len(parts) > 1 else None
            rows.append(join_texts(parts[0], second, self.length, tokenizer.cls_token_id, tokenizer.sep_token_id))
        return classifier_inputs(rows, tokenizer, self.model.config)

    def _rows(self, logits: torch.Tensor) -> list[Prediction]:
        assert self.task is not None
        if self.task["kind"] == "regression":
            low, high = self.task["label_range"] or (-math.inf, math.inf)
            return [Prediction(f"{min(max(value, low), high):.4f}", {}) for value in logits.squeeze(1).tolist()]
        names = [self.model.config.id2label[index] for index in range(logits.shape[1])]
        rows = torch.softmax(logits, dim=1).tolist()
        return [Prediction(names[max(range(len(row)), key=row.__getitem__)], dict(zip(names, row, strict=True))) for row in rows]

    def _word(self, logits: torch.Tensor, ids: torch.Tensor) -> Prediction:
        places = torch.nonzero(ids == self.tokenizer.mask_token_id).flatten()
        if len(places) == 0:
            raise PredictError(f"a mask lies beyond the model's {self.length} tokens; shorten the text")
        chances = torch.softmax(logits[places], dim=1)
        best = [str(self.tokenizer.convert_ids_to_tokens(index)) for index in chances.argmax(1).tolist()]
        top = chances[0].topk(_TOP)
        words = self.tokenizer.convert_ids_to_tokens(top.indices.tolist())
        return Prediction(" ".join(best), dict(zip(words, top.values.tolist(), strict=True)))


class _Registered:
    """What `mlflow.pyfunc.load_model` hands out: `predict` takes a list of texts, or a table whose columns are the texts' parts."""

    def __init__(self, folder: Path) -> None:
        self._predictor = Predictor(folder)

    def predict(self, model_input: Any, params: dict[str, Any] | None = None) -> list[str]:
        rows = model_input.to_numpy().tolist() if hasattr(model_input, "to_numpy") else list(model_input)
        texts = [row if isinstance(row, str) else "\t".join(map(str, row)) for row in rows]
        return [prediction.label for prediction in self._predictor.predict(texts)]


def _load_pyfunc(path: str) -> _Registered:
    """Called by mlflow, which finds it by its name."""
    return _Registered(Path(path))
