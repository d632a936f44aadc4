"""The crammed-BERT encoder as transformers classes, its feedforward layer being one field of the config.

Source: Geiping & Goldstein 2022, arXiv 2212.14034: pre-norm layers, no biases in dense layers, scaled sinusoidal positions,
normalised embeddings, a final norm, a decoder tied to the embeddings and applied to masked positions alone. Importing this module
makes the classes known to AutoConfig and AutoModel*.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, PreTrainedConfig, PreTrainedModel
from transformers import initialization as init
from transformers.modeling_outputs import BaseModelOutput, MaskedLMOutput, SequenceClassifierOutput
from transformers.utils.generic import ModelOutput

from fffsweep.pipeline.feedforward import FeedForwardLayer, auxiliary_loss
from fffsweep.pipeline.model_settings import FeedForward, ModelSettings
from fffsweep.pipeline.variants import make_feedforward


@dataclass
class PenalisedMaskedLM(MaskedLMOutput):
    """`loss` is `task_loss` and `penalty` together; both are None where layers leave no penalty, as in evaluation."""

    task_loss: Tensor | None = None
    penalty: Tensor | None = None


@dataclass
class PenalisedClassifier(SequenceClassifierOutput):
    """As `PenalisedMaskedLM`."""

    task_loss: Tensor | None = None
    penalty: Tensor | None = None


Output = TypeVar("Output", PenalisedMaskedLM, PenalisedClassifier)


class FffConfig(PreTrainedConfig):
    """Config of the encoder. `feedforward` holds the fields of `FeedForward`, e.g. {"variant": "fff", "trees": 1, "depth": 11}.

    pooling: what the classification head reads, the first token or the mean over tokens; head_size: its width, None for hidden_size.
    """

    model_type = "fffsweep"

    vocab_size: int = 32768
    hidden_size: int = 768
    num_hidden_layers: int = 16
    num_attention_heads: int = 12
    max_position_embeddings: int = 128
    feedforward: dict[str, Any] | None = None
    hidden_dropout_prob: float = 0.0
    layer_norm_eps: float = 1e-12
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    pad_token_id: int | None = 0
    pooling: str = "first"
    head_size: int | None = None

    def __post_init__(self, **kwargs: Any) -> None:
        given = self.feedforward or {"variant": "dense", "trees": 4 * self.hidden_size}
        self.feedforward = FeedForward.model_validate(given).resolved()
        if self.pooling not in ("first", "mean"):
            raise ValueError(f"pooling={self.pooling!r}: expected first or mean")
        super().__post_init__(**kwargs)

    @staticmethod
    def of(settings: ModelSettings, vocab_size: int, pad_token_id: int) -> FffConfig:
        """Config of an encoder for a vocabulary."""
        return FffConfig(
            vocab_size=vocab_size,
            hidden_size=settings.hidden_size,
            num_hidden_layers=settings.num_layers,
            num_attention_heads=settings.num_heads,
            max_position_embeddings=settings.sequence_length,
            feedforward=settings.feedforward.resolved(),
            hidden_dropout_prob=settings.dropout,
            pad_token_id=pad_token_id,
        )


class Embeddings(nn.Module):
    """Word embeddings plus sinusoids times one learned factor, normalised. ids [batch, length] -> [batch, length, hidden]."""

    sinusoids: Tensor

    def __init__(self, config: FffConfig) -> None:
        super().__init__()
        self.words = nn.Embedding(config.vocab_size, config.hidden_size, padding_idx=config.pad_token_id)
        self.position_scale = nn.Parameter(torch.empty(1))
        self.register_buffer("sinusoids", torch.empty(config.max_position_embeddings, config.hidden_size), persistent=False)
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)

    def forward(self, input_ids: Tensor) -> Tensor:
        length, limit = input_ids.shape[1], self.sinusoids.shape[0]
        if length > limit:
            raise ValueError(f"sequence of {length} tokens: expected at most {limit}, the model's sequence_length; truncate it")
        x: Tensor = self.dropout(self.norm(self.words(input_ids) + self.position_scale * self.sinusoids[:length]))
        return x


class Attention(nn.Module):
    """Multi-head self-attention without biases. x [batch, length, hidden]; mask broadcastable to [batch, heads, length, length]."""

    def __init__(self, config: FffConfig) -> None:
        super().__init__()
        self.num_heads = config.num_attention_heads
        self.query_key_value = nn.Linear(config.hidden_size, 3 * config.hidden_size, bias=False)
        self.output = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, length, hidden = x.shape
        heads = self.query_key_value(x).view(batch, length, 3, self.num_heads, hidden // self.num_heads).permute(2, 0, 3, 1, 4)
        mixed = functional.scaled_dot_product_attention(heads[0], heads[1], heads[2], attn_mask=mask)
        y: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, length, hidden))
        return y


class Layer(nn.Module):
    """Pre-norm attention and feedforward, each with a residual; the control `none` leaves the second half out."""

    def __init__(self, config: FffConfig, index: int) -> None:
        super().__init__()
        settings = FeedForward.model_validate(config.feedforward)
        self.attention_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.feedforward: FeedForwardLayer | None = None
        if settings.variant != "none":
            self.feedforward_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
            self.feedforward = make_feedforward(settings, config.hidden_size, index)

    def forward(self, x: Tensor, mask: Tensor | None, input_ids: Tensor) -> Tensor:
        x = x + self.dropout(self.attention(self.attention_norm(x), mask))
        if self.feedforward is None:
            return x
        y: Tensor = x + self.dropout(self.feedforward(self.feedforward_norm(x), input_ids))
        return y


class FffPreTrainedModel(PreTrainedModel):
    """What the encoder and its heads share: weights N(0, 0.02), zero biases, positions scaled by 1 / sqrt(hidden) at first."""

    config_class = FffConfig
    base_model_prefix = "encoder"
    _supports_sdpa = True
    _no_split_modules = ["Layer"]  # noqa: RUF012

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, FeedForwardLayer):
            module.reset(self.config.initializer_range)
        elif isinstance(module, Embeddings):
            init.constant_(module.position_scale, self.config.hidden_size**-0.5)
            init.copy_(module.sinusoids, _sinusoids(module.sinusoids.shape[0], module.sinusoids.shape[1]))
        else:
            super()._init_weights(module)


class FffModel(FffPreTrainedModel):
    """Encoder: input_ids [batch, length], attention_mask [batch, length] with 0 at padding -> last_hidden_state."""

    def __init__(self, config: FffConfig) -> None:
        super().__init__(config)
        self.embeddings = Embeddings(config)
        self.layers = nn.ModuleList(Layer(config, index) for index in range(config.num_hidden_layers))
        self.norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.post_init()

    def get_input_embeddings(self) -> nn.Embedding:
        return self.embeddings.words

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings.words = value  # type: ignore[assignment]

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **kwargs: Any) -> BaseModelOutput:
        mask = None if attention_mask is None else attention_mask[:, None, None, :].bool()
        x = self.embeddings(input_ids)
        for layer in self.layers:
            x = layer(x, mask, input_ids)
        return BaseModelOutput(last_hidden_state=self.norm(x))


class FffForMaskedLM(FffPreTrainedModel):
    """Masked-language model; the decoder is the embedding matrix itself, without a bias."""

    _tied_weights_keys = {"decoder.weight": "encoder.embeddings.words.weight"}  # noqa: RUF012

    def __init__(self, config: FffConfig) -> None:
        super().__init__(config)
        self.encoder = FffModel(config)
        self.decoder = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def get_output_embeddings(self) -> nn.Linear:
        return self.decoder

    def set_output_embeddings(self, value: nn.Linear) -> None:
        self.decoder = value

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        positions: Tensor | None = None,
        **kwargs: Any,
    ) -> MaskedLMOutput:
        """Loss and logits.

        Without labels: logits [batch, length, vocabulary]. With labels [batch, length], -100 where nothing is asked, or with flat
        `positions` [asked] into batch x length and labels [asked]: the loss, and logits [asked, vocabulary] of those alone.
        """
        x = self.encoder(input_ids, attention_mask).last_hidden_state
        if labels is None:
            return MaskedLMOutput(logits=self.decoder(x))
        if positions is None:
            labels = labels.reshape(-1)
            positions = torch.nonzero(labels != -100).squeeze(1)
            labels = labels[positions]
        logits = self.decoder(x.flatten(0, 1).index_select(0, positions))
        loss = functional.cross_entropy(logits.float(), labels)
        return with_penalty(PenalisedMaskedLM(loss=loss, logits=logits), self)


class FffForSequenceClassification(FffPreTrainedModel):
    """Classifier, or regressor where num_labels is 1: pooled states, dense, tanh, dropout, linear."""

    def __init__(self, config: FffConfig) -> None:
        super().__init__(config)
        self.num_labels: int = config.num_labels or 2
        self.encoder = FffModel(config)
        head_size = config.head_size or config.hidden_size
        self.pooler = nn.Linear(config.hidden_size, head_size)
        self.dropout = nn.Dropout(config.hidden_dropout_prob)
        self.classifier = nn.Linear(head_size, self.num_labels)
        self.post_init()

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None, **kwargs: Any
    ) -> SequenceClassifierOutput:
        """logits [batch, num_labels]; labels int64 [batch] give cross-entropy, and float [batch] mean squared error."""
        x = self.encoder(input_ids, attention_mask).last_hidden_state
        if self.config.pooling == "first":
            pooled = x[:, 0]
        elif attention_mask is None:
            pooled = x.mean(1)
        else:
            kept = attention_mask.to(x.dtype).unsqueeze(2)
            pooled = (x * kept).sum(1) / kept.sum(1)
        logits = self.classifier(self.dropout(torch.tanh(self.pooler(pooled))))
        if labels is None:
            return SequenceClassifierOutput(logits=logits)
        if self.num_labels == 1:
            loss = functional.mse_loss(logits.float().squeeze(1), labels.float())
        else:
            loss = functional.cross_entropy(logits.float(), labels)
        return with_penalty(PenalisedClassifier(loss=loss, logits=logits), self)


def with_penalty(output: Output, model: nn.Module) -> Output:
    """`output` with the penalties that the last training forward left in the layers of `model` in its loss, the two parts beside it."""
    penalty = auxiliary_loss(model)
    if penalty is not None and output.loss is not None:
        output["task_loss"], output["penalty"], output["loss"] = output.loss, penalty, output.loss + penalty
    return output


def loss_parts(output: ModelOutput) -> tuple[Tensor, Tensor | None]:
    """What the task asks of the model, and the penalty or None: `output.loss` is their sum, which the gradients are of."""
    penalty = output.get("penalty")
    return (output["loss"], None) if penalty is None else (output["task_loss"], penalty)


def _sinusoids(length: int, hidden: int) -> Tensor:
    """Vaswani et al. 2017, section 3.5: sines in even columns, cosines in odd ones. [length, hidden]."""
    angles = torch.arange(length).unsqueeze(1) * torch.exp(torch.arange(0, hidden, 2) * (-math.log(10000.0) / hidden))
    return torch.stack([torch.sin(angles), torch.cos(angles)], dim=2).flatten(1)[:, :hidden]


AutoConfig.register(FffConfig.model_type, FffConfig, exist_ok=True)
AutoModel.register(FffConfig, FffModel, exist_ok=True)
AutoModelForMaskedLM.register(FffConfig, FffForMaskedLM, exist_ok=True)
AutoModelForSequenceClassification.register(FffConfig, FffForSequenceClassification, exist_ok=True)
