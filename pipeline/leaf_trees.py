"""The original fast feedforward layer (2308.14711): routers that only decide, and a small dense layer at every leaf."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from fffsweep.kernels import torch_forms
from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.shape import TreeShape, child
from fffsweep.pipeline.feedforward import Fan, FeedForwardLayer
from fffsweep.pipeline.model_settings import FeedForward


class LeafTrees(FeedForwardLayer):
    """Each tree's output is its leaves' mixed by the probabilities of reaching them; at inference that of the leaf walked to.

    router_in [trees, 2**depth - 1, hidden], router_bias [trees, 2**depth - 1]; leaf_in, leaf_out [trees, 2**depth, leaf_width, hidden],
    leaf_bias [trees, 2**depth, leaf_width], output_bias [trees, 2**depth, hidden]. A router turns right with probability
    sigmoid(logit), so the walk of `child` is the likelier turn at each. A training forward leaves `hardening` times the routers'
    entropy (nats, mean over tokens and routers) in `auxiliary`, and turns each decision round with chance `transposition`.
    Source: Belcak & Wattenhofer 2023, arXiv 2308.14711, algorithm 1 and section 3 (hardening, randomised child transposition); the
    paper sums the entropies, the mean keeps the weight's meaning over layouts and batches.
    """

    def __init__(self, settings: FeedForward, hidden_size: int, layer: int) -> None:
        super().__init__(settings, hidden_size, layer)
        trees, leaves, width = self.shape.trees, 2**self.shape.depth, settings.leaf_width
        self.routers = TreeShape(trees, self.shape.depth - 1)
        self.router_in = nn.Parameter(torch.empty(trees, leaves - 1, hidden_size))
        self.router_bias = nn.Parameter(torch.empty(trees, leaves - 1)) if settings.input_bias else None
        self.leaf_in = nn.Parameter(torch.empty(trees, leaves, width, hidden_size))
        self.leaf_bias = nn.Parameter(torch.empty(trees, leaves, width)) if settings.input_bias else None
        self.leaf_out = nn.Parameter(torch.empty(trees, leaves, width, hidden_size))
        self.output_bias = nn.Parameter(torch.zeros(trees, leaves, hidden_size)) if settings.output_bias else None

    def fans(self) -> list[Fan]:
        hidden, outputs = self.router_in.shape[-1], self.shape.trees * self.settings.leaf_width + self.settings.master_leaf
        return [
            Fan(self.router_in, self.router_bias, hidden),
            Fan(self.leaf_in, self.leaf_bias, hidden),
            Fan(self.leaf_out, None, outputs),
        ]

    def trees(self, x: Tensor, token_ids: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        if self.training:
            y = self._mixed(tokens, self._soft(tokens))
        elif self.settings.execution == "masked":
            leaves = self.paths(x, token_ids)[..., -1] - self.routers.nodes
            y = self._mixed(tokens, functional.one_hot(leaves, 2**self.shape.depth).to(x.dtype))
        else:
            step = max(1, torch_forms.CHUNK_ELEMENTS // (self.shape.trees * self.settings.leaf_width * x.shape[-1]))
            y = torch.cat([self._walked(tokens[start : start + step]) for start in range(0, max(1, len(tokens)), step)])
        return y.to(x.dtype).reshape(x.shape)

    @torch.no_grad()
    def paths(self, x: Tensor, token_ids: Tensor) -> Tensor:
        tokens = x.reshape(-1, x.shape[-1])
        visited = torch_forms.paths(tokens, self.router_in, self.router_bias, self.routers)
        last = visited[..., -1]
        logits = torch.empty(last.shape, dtype=x.dtype, device=x.device)
        step = max(1, torch_forms.CHUNK_ELEMENTS // (self.shape.trees * x.shape[-1]))
        for start in range(0, len(tokens), step):
            logits[start : start + step] = self._router_logits(tokens[start : start + step], last[start : start + step])
        return torch.cat([visited, child(last, logits).unsqueeze(2)], dim=2)

    def weights(self) -> LayerWeights:
        raise ValueError("variant original_fff: no kernel computes it; expected fff, dense or random_routing")

    def _router_logits(self, tokens: Tensor, routers: Tensor) -> Tensor:
        """Logit [tokens, trees] of one router of each tree."""
        rows = routers + self.routers.nodes * torch.arange(self.shape.trees, device=tokens.device)
        logits = torch.einsum("th,tkh->tk", tokens, functional.embedding(rows, self.router_in.flatten(0, 1)))
        return logits if self.router_bias is None else logits + self.router_bias.flatten()[rows]

    def _soft(self, tokens: Tensor) -> Tensor:
        """Probabilities [tokens, trees, leaves] of reaching each leaf; leaves the entropy of the decisions in `auxiliary`."""
        bias = None if self.router_bias is None else self.router_bias.flatten()
        logits = functional.linear(tokens, self.router_in.flatten(0, 1), bias).view(-1, self.shape.trees, self.routers.nodes)
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        right = torch.sigmoid(logits)
        if self.settings.hardening:
            # entropy of a coin with logit z is softplus(z) - z sigmoid(z)
            self.auxiliary = self.settings.hardening * (functional.softplus(logits) - logits * right).mean()
        if self.settings.transposition:
            turned = torch.rand_like(right) < self.settings.transposition
            right = torch.where(turned, 1 - right, right)
        reached = torch.ones_like(right[..., :1])
        for level in range(self.shape.depth):
            p = right[..., 2**level - 1 : 2 ** (level + 1) - 1]
            reached = torch.stack([reached * (1 - p), reached * p], dim=3).flatten(2)
        return reached

    def _mixed(self, tokens: Tensor, shares: Tensor) -> Tensor:
        """Every leaf's output times its share [tokens, trees, leaves], summed."""
        bias = None if self.leaf_bias is None else self.leaf_bias.flatten()
        hidden = activation_of(self.settings.activation).apply(functional.linear(tokens, self.leaf_in.flatten(0, 2), bias))
        weighed = hidden.view(*shares.shape, self.settings.leaf_width) * shares.unsqueeze(3).to(hidden.dtype)
        y = weighed.flatten(1) @ self.leaf_out.flatten(0, 2)
        return y if self.output_bias is None else y + shares.flatten(1).to(y.dtype) @ self.output_bias.flatten(0, 1)

    def _walked(self, tokens: Tensor) -> Tensor:
        """The leaf that each token walks to, alone."""
        leaves = self.paths(tokens, tokens)[..., -1] - self.routers.nodes
        rows = leaves + 2**self.shape.depth * torch.arange(self.shape.trees, device=tokens.device)
        w_in, w_out = (functional.embedding(rows, each.flatten(2).flatten(0, 1)) for each in (self.leaf_in, self.leaf_out))
        shape = (len(tokens), self.shape.trees, self.settings.leaf_width, tokens.shape[-1])
        logits = torch.einsum("th,tkwh->tkw", tokens, w_in.view(shape))
        if self.leaf_bias is not None:
            logits = logits + functional.embedding(rows, self.leaf_bias.flatten(0, 1))
        y = torch.einsum("tkw,tkwh->th", activation_of(self.settings.activation).apply(logits), w_out.view(shape))
        return y if self.output_bias is None else y + functional.embedding(rows, self.output_bias.flatten(0, 1)).sum(1)
