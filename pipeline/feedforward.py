"""What every feedforward layer of the encoder shares: one interface, the master leaf, the output bias, penalties."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import initialization as init

from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.layer import LayerWeights
from fffsweep.pipeline.model_settings import FeedForward


class Fan(NamedTuple):
    """A weight, the bias drawn like it, and how many inputs of the weight a token uses."""

    weight: nn.Parameter
    bias: nn.Parameter | None
    inputs: int


class FeedForwardLayer(nn.Module, ABC):
    """Trees, what every token uses beside them, and a bias; subclasses add the trees.

    settings.master_leaf: that many neurons which every token uses; master_in, master_out [neurons, hidden], master_bias [neurons].
    A training forward may leave a penalty in `auxiliary`, to be added to the loss.
    """

    def __init__(self, settings: FeedForward, hidden_size: int, layer: int) -> None:
        super().__init__()
        if settings.shape is None:
            raise ValueError(f"variant {settings.variant} has no feedforward layer to build")
        self.settings, self.shape, self.layer, self.hidden_size = settings, settings.shape, layer, hidden_size
        self.auxiliary: Tensor | None = None
        self.master_in = self.master_bias = self.master_out = None
        if settings.master_leaf:
            self.master_in = nn.Parameter(torch.empty(settings.master_leaf, hidden_size))
            self.master_bias = nn.Parameter(torch.empty(settings.master_leaf)) if settings.input_bias else None
            self.master_out = nn.Parameter(torch.empty(settings.master_leaf, hidden_size))

    def forward(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Shapes: x [..., hidden]; token_ids, of x's leading shape, are read by random routing alone -> as x."""
        y = self.trees(x, token_ids)
        if self.master_in is not None and self.master_out is not None:
            hidden = functional.linear(x, self.master_in, self.master_bias)
            y = y + activation_of(self.settings.activation).apply(hidden) @ self.master_out
        return y

    @abstractmethod
    def trees(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Output without the master leaf; as `forward`."""

    @abstractmethod
    def paths(self, x: Tensor, token_ids: Tensor) -> Tensor:
        """Nodes that each token visits, int64 [tokens, trees, levels]; arguments as `forward`."""

    @abstractmethod
    def weights(self) -> LayerWeights:
        """The layer as the kernels take it, detached. Raises ValueError if no kernel computes it."""

    @abstractmethod
    def fans(self) -> list[Fan]:
        """Weights and biases that are drawn at first, master leaf left out."""

    @torch.no_grad()
    def reset(self, std: float) -> None:
        """Initial weights.

        `normal`: N(0, std) and zero biases, the same for every layout; it is what the published training code ends up with, whose
        encoder initialises all linear layers anew. `fan`: uniform within 1 / sqrt(inputs used for one token), biases as inputs.
        An output bias is zero at first.
        """
        fans = self.fans()
        if self.master_in is not None and self.master_out is not None:
            fans += [Fan(self.master_in, self.master_bias, self.master_in.shape[1]), Fan(self.master_out, None, self.settings.active_width)]
        for weight, bias, inputs in fans:
            bound = inputs**-0.5
            if self.settings.init == "normal":
                init.normal_(weight, mean=0.0, std=std)
            else:
                init.uniform_(weight, -bound, bound)
            if bias is not None and self.settings.init == "normal":
                init.zeros_(bias)
            elif bias is not None:
                init.uniform_(bias, -bound, bound)


def auxiliary_loss(model: nn.Module) -> Tensor | None:
    """Sum of the penalties that the last training forward left in the layers of `model`, taken out of them; None if there are none."""
    total: Tensor | None = None
    for module in model.modules():
        if isinstance(module, FeedForwardLayer) and module.auxiliary is not None:
            total = module.auxiliary if total is None else total + module.auxiliary
            module.auxiliary = None
    return total
