"""Trees whose every node emits (2311.10770), dense and randomly routed layers, on the parameters that the kernels take."""

from __future__ import annotations

from itertools import accumulate

import torch
from torch import Tensor, nn
from torch.nn import functional

from fffsweep.kernels import torch_forms
from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.cmm import cmm
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.shape import TreeShape, child
from fffsweep.pipeline.feedforward import Fan, FeedForwardLayer
from fffsweep.pipeline.model_settings import FeedForward

_NODES_FOR_ONE = {"cpu": 32, "cuda": 512}  # see NodeTrees._is_whole


class NodeTrees(FeedForwardLayer):
    """w_in, w_out [trees, nodes, hidden]; b_in [trees, nodes] or None; output_bias [hidden] or None.

    A dense layer of n neurons is a tree layer of n trees with one node each. With `load_balancing`, a training forward leaves
    its penalty in `auxiliary`.
    Source: dense and tree as in Belcak & Wattenhofer 2023, arXiv 2311.10770.
    """

    def __init__(self, settings: FeedForward, hidden_size: int, layer: int) -> None:
        super().__init__(settings, hidden_size, layer)
        self.w_in = nn.Parameter(torch.empty(self.shape.trees, self.shape.nodes, hidden_size))
        self.b_in = nn.Parameter(torch.empty(self.shape.trees, self.shape.nodes)) if settings.input_bias else None
        self.w_out = nn.Parameter(torch.empty(self.shape.trees, self.shape.nodes, hidden_size))
        self.output_bias = nn.Parameter(torch.zeros(hidden_size)) if settings.output_bias else None

    def fans(self) -> list[Fan]:
        return [Fan(self.w_in, self.b_in, self.w_in.shape[-1]), Fan(self.w_out, None, self.settings.active_width)]

    def trees(self, x: Tensor, token_ids: Tensor) -> Tensor:
        y = self._without_bias(x, token_ids)
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    def _without_bias(self, x: Tensor, token_ids: Tensor) -> Tensor:
        settings = self.settings
        if settings.variant == "dense":
            return self._dense(x)
        weights = (self.w_in, self.b_in, self.w_out, self.shape, settings.activation)
        if settings.variant == "random_routing":
            form = torch_forms.masked if self._is_whole(x) else torch_forms.gather
            return form(x, *weights, paths=self.paths(x, token_ids))
        if settings.routing_gradient != "none" or (settings.load_balancing and self.training):
            return self._with_decisions(x)
        if settings.execution == "masked":
            return torch_forms.masked(x, *weights)
        return cmm(x, *weights)

    def _is_whole(self, x: Tensor) -> bool:
        """Whether every node is computed where no kernel will do: a product of all costs less than gathering the rows of some.

        A gathered row is moved for each token that needs it and used once; rows of a product are used by all tokens. On one thread of a
        CPU a gathered node took as long as forty others, hidden 128, forward and backward (8x8: 57 to one, gathered in two thirds of the
        time; 16x7: 32 to one, in one and a half times). On a GPU the bound is by arithmetic, not by measurement.
        """
        most = _NODES_FOR_ONE["cuda" if x.device.type == "cuda" else "cpu"]
        return self.settings.execution == "masked" or self.shape.width <= most * self.shape.active_width

    def paths(self, x: Tensor, token_ids: Tensor) -> Tensor:
        if self.settings.variant == "random_routing":
            return hashed_paths(token_ids, self.shape, self.layer, self.settings.routing_seed)
        return torch_forms.paths(x, self.w_in, self.b_in, self.shape)

    def weights(self) -> LayerWeights:
        if self.settings.master_leaf:
            raise ValueError(f"master_leaf={self.settings.master_leaf}: no kernel computes trees with a master leaf; expected 0")
        bias = None if self.b_in is None else self.b_in.detach()
        return LayerWeights(self.w_in.detach(), bias, self.w_out.detach(), self.shape, self.settings.activation)

    def _dense(self, x: Tensor) -> Tensor:
        bias = None if self.b_in is None else self.b_in.view(-1)
        hidden = activation_of(self.settings.activation).apply(functional.linear(x, self.w_in.flatten(0, 1), bias))
        return hidden @ self.w_out.flatten(0, 1)

    def _with_decisions(self, x: Tensor) -> Tensor:
        """The tree layer with its decisions in the graph: the same output, further gradients to the logits on the path.

        straight_through: what hangs below a decision is scaled by 1 + p - stop_gradient(p), p = sigmoid(±logit) being the soft
        probability of the turn that was taken; the factor is 1, its gradient that of the soft choice.
        """
        shape, tokens = self.shape, x.reshape(-1, x.shape[-1])
        flat_in, flat_out = self.w_in.flatten(0, 1), self.w_out.flatten(0, 1)
        bias = None if self.b_in is None else self.b_in.flatten()
        whole = self._is_whole(x)
        if whole:
            visited = torch_forms.masked_paths(tokens, self.w_in, self.b_in, shape)
            logits = functional.linear(tokens, flat_in, bias).view(-1, shape.trees, shape.nodes).gather(2, visited)
        else:
            visited = torch_forms.paths(tokens, self.w_in, self.b_in, shape)
            logits = torch_forms.visited_logits(tokens, self.w_in, self.b_in, shape, visited)
        decisions = logits[..., :-1]
        right = visited[..., 1:] == child(visited[..., :-1], torch.ones_like(decisions))
        values = activation_of(self.settings.activation).apply(logits)
        if self.settings.routing_gradient == "straight_through" and shape.depth:
            taken = torch.sigmoid(torch.where(right, decisions, -decisions))
            factors = 1 + (taken - taken.detach())
            # a loop: the gradient of cumprod is a cumsum, which has no repeatable form on a GPU
            gates = torch.stack(list(accumulate(factors.unbind(2), torch.mul)), dim=2)
            values = torch.cat([values[..., :1], values[..., 1:] * gates], dim=2)
        if self.settings.load_balancing and self.training:
            self.auxiliary = self.settings.load_balancing * imbalance(decisions, right, visited[..., :-1], shape)
        if whole:
            full = torch.zeros(len(tokens), shape.trees, shape.nodes, dtype=values.dtype, device=x.device)
            return (full.scatter(2, visited, values).flatten(1) @ flat_out).to(x.dtype).reshape(x.shape)
        return torch_forms.visited_sum(values, self.w_out, shape, visited).to(x.dtype).reshape(x.shape)


def imbalance(decisions: Tensor, right: Tensor, nodes: Tensor, shape: TreeShape) -> Tensor:
    """Penalty on one-sided nodes: 0 where every node sends half of its tokens each way, 1 where all go one way for sure.

    Shapes: decisions (logits), right, nodes [tokens, trees, depth]. For each node 2 (F P + (1 - F)(1 - P)) - 1, with F the share
    of its tokens that went right and P their mean soft probability of it; weighted by its tokens, mean over trees and levels.
    Source: the auxiliary loss of Fedus et al. 2021, arXiv 2101.03961, eq. 4, at each branch.
    """
    soft = torch.sigmoid(decisions.to(torch.promote_types(decisions.dtype, torch.float32)))
    visits, hard_right, soft_right = (
        torch.zeros(shape.trees, shape.nodes, dtype=soft.dtype, device=soft.device).scatter_add(1, index, value)
        for index in [nodes.transpose(0, 1).flatten(1)]
        for value in (each.transpose(0, 1).flatten(1) for each in (torch.ones_like(soft), right.to(soft.dtype), soft))
    )
    count = visits.clamp(min=1)
    share, probability = hard_right / count, soft_right / count
    agreement = 2 * (share * probability + (1 - share) * (1 - probability)) - 1
    return (agreement * visits).sum() / visits.sum().clamp(min=1)


def hashed_paths(token_ids: Tensor, shape: TreeShape, layer: int, seed: int) -> Tensor:
    """Paths by a hash of token id, layer, tree and seed: the same for a token wherever it stands. int64 [tokens, trees, levels].

    The hash is the finaliser of splitmix64 (Steele et al. 2014); one of its bits decides one level, so 30 levels at most.
    """
    ids = token_ids.reshape(-1, 1).to(torch.int64)
    trees = torch.arange(shape.trees, device=ids.device)
    bits = _mix(_mix(_mix(torch.tensor(seed, device=ids.device)) + layer) + trees)
    bits = _mix(bits + ids)
    visited = [torch.zeros_like(bits)]
    for level in range(shape.depth):
        visited.append(child(visited[-1], (bits >> level) & 1))
    return torch.stack(visited, dim=2)


def _mix(z: Tensor) -> Tensor:
    """splitmix64 on int64, whose products wrap; shifts made logical by masking the copies of the sign."""
    z = z + _signed(0x9E3779B97F4A7C15)
    z = (z ^ _shift(z, 30)) * _signed(0xBF58476D1CE4E5B9)
    z = (z ^ _shift(z, 27)) * _signed(0x94D049BB133111EB)
    return z ^ _shift(z, 31)


def _shift(z: Tensor, bits: int) -> Tensor:
    return (z >> bits) & ((1 << (64 - bits)) - 1)


def _signed(value: int) -> int:
    return value - (1 << 64) if value >= 1 << 63 else value
