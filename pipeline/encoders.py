"""Existing encoders: loaded, and with their feedforward layers exchanged, as transformers classes of their own.

Importing this module makes the classes known to AutoConfig and AutoModel*.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForSequenceClassification,
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.modeling_outputs import SequenceClassifierOutput

from fffsweep.pipeline.feedforward import FeedForwardLayer
from fffsweep.pipeline.model import FffConfig, FffForSequenceClassification, PenalisedClassifier, with_penalty
from fffsweep.pipeline.model_settings import FeedForward
from fffsweep.pipeline.variants import make_feedforward

# of embeddings and layers, and of the head; DistilBERT has the latter two
_DROPOUTS = ("hidden_dropout_prob", "classifier_dropout", "dropout", "seq_classif_dropout")


class HeadSettings(Protocol):
    """Fields of a recipe that `load_classifier` reads."""

    @property
    def dropout(self) -> float: ...
    @property
    def pooling(self) -> str: ...
    @property
    def head_size(self) -> int | None: ...


class ConvertedConfig(BertConfig):
    """A BERT whose feedforward layers are others; `feedforward` holds the fields of `FeedForward`."""

    model_type = "fffsweep-bert"

    feedforward: dict[str, Any] | None = None


class _TokenIds:
    """The ids that the encoder reads just now; layers that route by token look them up here."""

    current: Tensor | None = None


class _InPlace(nn.Module):
    """Stands where BERT has the second matrix of its feedforward layer and computes all of the new one; zeros without one."""

    def __init__(self, feedforward: FeedForwardLayer | None, ids: _TokenIds) -> None:
        super().__init__()
        self.feedforward, self._ids = feedforward, ids

    def forward(self, x: Tensor) -> Tensor:
        if self.feedforward is None:
            return torch.zeros_like(x)
        ids = self._ids.current
        y: Tensor = self.feedforward(x, x.new_zeros(x.shape[:-1], dtype=torch.int64) if ids is None else ids)
        return y


class ConvertedModel(BertModel):
    """BERT encoder with other feedforward layers; as BertModel otherwise."""

    config_class = ConvertedConfig

    def __init__(self, config: ConvertedConfig, add_pooling_layer: bool = True) -> None:
        super().__init__(config, add_pooling_layer)
        settings = FeedForward.model_validate(config.feedforward)
        self._ids = _TokenIds()
        layers: Any = self.encoder.layer
        for index, layer in enumerate(layers):
            new = None if settings.variant == "none" else make_feedforward(settings, config.hidden_size, index)
            layer.intermediate, layer.output.dense = nn.Identity(), _InPlace(new, self._ids)
        self.post_init()

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any) -> Any:
        self._ids.current = input_ids
        return super().forward(input_ids, attention_mask=attention_mask, **kwargs)

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FeedForwardLayer):
            module.reset(self.config.initializer_range)
        else:
            super()._init_weights(module)


class ConvertedForSequenceClassification(BertForSequenceClassification):
    """BERT's own classifier on the converted encoder."""

    config_class = ConvertedConfig

    def __init__(self, config: ConvertedConfig) -> None:
        super().__init__(config)
        self.bert = ConvertedModel(config)
        self.post_init()

    def forward(self, *args: Any, **kwargs: Any) -> SequenceClassifierOutput:
        return with_penalty(PenalisedClassifier(**super().forward(*args, **kwargs)), self)


AutoConfig.register(ConvertedConfig.model_type, ConvertedConfig, exist_ok=True)
AutoModel.register(ConvertedConfig, ConvertedModel, exist_ok=True)
AutoModelForSequenceClassification.register(ConvertedConfig, ConvertedForSequenceClassification, exist_ok=True)


def load_encoder(encoder: str) -> PreTrainedModel:
    """The encoder of a folder, or of `owner/name@revision`, in float32 and evaluation mode."""
    if Path(encoder).expanduser().is_dir():
        name, revision = str(Path(encoder).expanduser()), None
    else:
        name, _, revision = encoder.partition("@")
    model: PreTrainedModel = AutoModel.from_pretrained(name, revision=revision, dtype=torch.float32)
    model.eval()
    return model


def feedforward_halves(model: PreTrainedModel) -> list[tuple[nn.Module, nn.Module]]:
    """The two halves of each feedforward layer of a BERT: the first takes the layer's input, the second gives its output."""
    return [(layer.intermediate, layer.output.dense) for layer in model.encoder.layer]  # type: ignore[union-attr]


def converted(model: PreTrainedModel, settings: FeedForward) -> ConvertedModel:
    """A BERT with new feedforward layers, freshly drawn, and everything else its own."""
    config = ConvertedConfig(**{**model.config.to_dict(), "feedforward": settings.resolved(), "architectures": None})
    new = ConvertedModel(config)
    missing, unexpected = new.load_state_dict(model.state_dict(), strict=False)
    strange = [name for name in missing if ".output.dense.feedforward." not in name]
    strange += [name for name in unexpected if ".intermediate.dense." not in name and ".output.dense." not in name]
    assert not strange, f"weights that did not find their place: {strange}"
    new.eval()
    return new


def load_classifier(folder: Path, num_labels: int, recipe: HeadSettings) -> PreTrainedModel:
    """Classifier on the encoder of a `model/` folder. Our own takes all of `recipe`; another keeps its own head and attention dropout.

    Raises ValueError for pooling or head_size where the head is the encoder's own, and for an encoder whose dropout cannot be set.
    """
    config = AutoConfig.from_pretrained(folder)
    if isinstance(config, FffConfig):
        return FffForSequenceClassification.from_pretrained(
            folder, num_labels=num_labels, hidden_dropout_prob=recipe.dropout, pooling=recipe.pooling, head_size=recipe.head_size
        )
    if recipe.pooling != "first" or recipe.head_size is not None:
        raise ValueError(
            f"pooling={recipe.pooling}, head_size={recipe.head_size}: an existing encoder is finetuned with its own head; "
            "expected first and null: leave both out"
        )
    dropouts = [name for name in _DROPOUTS if hasattr(config, name)]
    if not dropouts:
        raise ValueError(f"model type {config.model_type}: its config has none of {', '.join(_DROPOUTS)}; expected one to set dropout by")
    model: PreTrainedModel = AutoModelForSequenceClassification.from_pretrained(
        folder, num_labels=num_labels, dtype=torch.float32, **dict.fromkeys(dropouts, recipe.dropout)
    )
    return model


def classifier_inputs(rows: Sequence[NDArray[Any]], tokenizer: PreTrainedTokenizerBase, config: PreTrainedConfig) -> dict[str, Tensor]:
    """Inputs of an encoder with this config [rows, longest of them]: ids, attention mask and, if it knows types, each token's text."""
    lengths = np.array([len(row) for row in rows])
    ids = np.full((len(rows), lengths.max()), tokenizer.pad_token_id, dtype=np.int64)
    for index, row in enumerate(rows):
        ids[index, : len(row)] = row
    mask = np.arange(ids.shape[1]) < lengths[:, None]
    inputs = {"input_ids": ids, "attention_mask": mask}
    if getattr(config, "type_vocab_size", 0) > 1:
        ended = ids == tokenizer.sep_token_id
        inputs["token_type_ids"] = (np.cumsum(ended, axis=1) - ended) * mask
    return {name: torch.from_numpy(each) for name, each in inputs.items()}
