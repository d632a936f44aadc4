"""The correctness gate: an implementation against the float64 reference, paths first, then outputs and gradients on the same paths."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from fffsweep.kernels import reference
from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.layer import LayerWeights
from fffsweep.kernels.reference import Array
from fffsweep.kernels.registry import Implementation
from fffsweep.kernels.shape import child

TF32_EPSILON = 2.0**-10
SLOPE_BOUND = 1.13  # the steepest activation of the table, gelu
SUM_ROUNDINGS = 32  # epsilons of a sum's dtype that the roundings of a long sum come to, typically
INT8_EPSILON, INT16_EPSILON = 2.0**-5, 2.0**-12  # what rounding to 8 bits of a tensor's range, and to 16 of a token's, amounts to
LIKELY = 8.0  # times the typical error: more than roundings that are independent of each other ever add up to
MANY = 1024  # elements of a gradient from which on its root mean square is told by chance no more; of fewer, each is held


@dataclass(frozen=True)
class Verdict:
    """Outcome of the gate: `verified`, tokens whose path left the reference's, the worst error over its tolerance, and why it failed."""

    verified: bool
    path_flips: int
    worst: float
    reason: str | None = None


def verify(
    implementation: Implementation, weights: LayerWeights, x: Tensor, *, backward: bool = False, exact: LayerWeights | None = None
) -> Verdict:
    """Hold `implementation` against the reference on x [tokens, hidden], whose dtype is the weights'.

    A path may turn against a logit only where that is within rounding of zero; outputs, and gradients if `backward`, are
    compared along the implementation's own paths; the reference of one that rounds weights to 8 bits takes the rounded ones.
    Tolerance: what rounding can do at worst (reduction length x epsilon x sum of absolute terms, plus the rounding of activations and
    outputs to the dtype), and no more than `LIKELY` times what it does typically, where the worst case would let anything pass.
    `path_flips` counts against `exact` weights (before any rounding), if given.
    """
    if backward:
        leaves = [each.detach().clone().requires_grad_() for each in (x, weights.w_in, weights.w_out)]
        bias = None if weights.b_in is None else weights.b_in.detach().clone().requires_grad_()
        weights, x = replace(weights, w_in=leaves[1], b_in=bias, w_out=leaves[2]), leaves[0]
    y = implementation.prepare(weights)(x)
    rounded = None if implementation.rounds is None else implementation.rounds(weights)
    if y.shape != x.shape or y.dtype != x.dtype:
        return Verdict(False, 0, float("inf"), f"output is {y.dtype} {list(y.shape)}, expected {x.dtype} {list(x.shape)}")
    stored = max(float(torch.finfo(x.dtype).eps), TF32_EPSILON if implementation.tf32 else 0.0)
    own = implementation.paths(weights, x) if implementation.paths else None
    if rounded is not None:
        weights, exact = rounded.dequantised(), weights if exact is None else exact
    expected = reference.forward(weights, x)
    paths = expected.paths if own is None else own.cpu().numpy()
    flips = int((paths != (expected.paths if exact is None else reference.forward(exact, x).paths)).any(axis=(1, 2)).sum())
    if (paths != expected.paths).any():
        if _strays(paths):
            return Verdict(False, flips, float("inf"), "paths leave the tree: expected the root, then a child at each level")
        expected = reference.forward(weights, x, torch.from_numpy(paths))
        token_error = None if rounded is None else rounded.token_error(x).numpy()
        unsound = _unsound_flips(expected, weights, stored, token_error)
        if unsound:
            return Verdict(False, flips, float("inf"), f"{unsound} paths leave the reference's at logits that are not within rounding of 0")
    error, tolerance = np.abs(y.detach().cpu().double().numpy() - expected.y), output_tolerance(weights, expected, stored)
    if rounded is not None:
        tolerance = tolerance + _token_rounding(weights, expected, rounded.token_error(x).numpy())
    elif implementation.bits8:
        tolerance = tolerance + quantisation_tolerance(weights, x, expected)
    typical = INT16_EPSILON if rounded is not None else INT8_EPSILON if implementation.bits8 else stored
    tolerance = np.minimum(tolerance, LIKELY * typical_error(weights, expected, typical) + 1e-30)
    worst, reason = _worst("output", error, tolerance)
    if backward and reason is None:
        grad_y = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)).to(x)
        y.backward(grad_y)
        worst, reason = _compare_gradients(weights, x, grad_y, expected, worst, stored)
    return Verdict(reason is None, flips, worst, reason)


def output_tolerance(weights: LayerWeights, done: reference.Forward, stored: float | None = None) -> Array:
    """Rounding error that outputs [tokens, hidden] may show: both reductions in float32 or better.

    stored: epsilon of the operands and outputs, by default that of the weights' dtype.
    """
    epsilon = _sum_epsilon(weights)
    stored = stored or float(torch.finfo(weights.w_in.dtype).eps)
    logits = SLOPE_BOUND * epsilon * (weights.hidden + 8) * done.y_logit_terms
    # torch rounds logits and activations to the dtype too
    rounding = 4 * stored * (done.y_terms + SLOPE_BOUND * done.y_logit_terms) if stored > epsilon else 0.0
    return np.asarray(logits + epsilon * (weights.shape.active_width + 8) * done.y_terms + rounding + 2 * stored * np.abs(done.y) + 1e-30)


def typical_error(weights: LayerWeights, done: reference.Forward, stored: float) -> Array:
    """Root mean square [tokens, 1] of the error that roundings to an epsilon of `stored` give outputs, each being independent."""
    per_term = max(stored, SUM_ROUNDINGS * _sum_epsilon(weights)) / weights.shape.active_width**0.5
    errors = per_term * (done.y_terms + SLOPE_BOUND * done.y_logit_terms / max(1, weights.hidden) ** 0.5)
    return np.asarray(_root_mean_square(errors, axis=1))


def _root_mean_square(values: Array, axis: int | None = None) -> Array:
    return np.asarray(np.sqrt(np.square(values).mean(axis=axis, keepdims=True))) if values.size else np.zeros_like(values)


def quantisation_tolerance(weights: LayerWeights, x: Tensor, done: reference.Forward) -> Array:
    """Error that dense outputs [tokens, hidden] may show when every tensor is rounded to 8 bits of its range."""
    w_in, w_out = (np.abs(each.detach().double().numpy()).reshape(-1, weights.hidden) for each in (weights.w_in, weights.w_out))
    tokens = np.abs(x.detach().double().numpy())
    act = activation_of(weights.activation).apply
    hidden = np.abs(act(torch.from_numpy(done.logits)).numpy().reshape(len(tokens), weights.shape.width))
    # half a step of a range of twice the largest; torch gives up a bit of the tokens' range, so that sums of products cannot overflow
    step_in, step_out, step_x, step_hidden = (float(each.max(initial=0)) / 127 for each in (w_in, w_out, 2 * tokens, 2 * hidden))
    logits = step_in * tokens.sum(axis=1, keepdims=True) + step_x * w_in.sum(axis=1)
    hidden_error = SLOPE_BOUND * logits + step_hidden
    return np.asarray(hidden_error @ w_out + step_out * (hidden + hidden_error).sum(axis=1, keepdims=True))


def _sum_epsilon(weights: LayerWeights) -> float:
    """Epsilon of sums: float32's, or that of a wider dtype."""
    return min(float(torch.finfo(weights.w_in.dtype).eps), float(torch.finfo(torch.float32).eps))


def _logit_rounding(weights: LayerWeights, done: reference.Forward, token_error: Array) -> Array:
    """How far logits [tokens, trees, levels] may move when each element of a token moves by its `token_error` [tokens]."""
    sums = np.abs(weights.w_in.double().numpy()).sum(axis=2)
    return np.asarray(token_error[:, None, None] * sums[np.arange(weights.shape.trees)[None, :, None], done.paths])


def _token_rounding(weights: LayerWeights, done: reference.Forward, token_error: Array) -> Array:
    """The same for outputs [tokens, hidden]."""
    rows = np.abs(weights.w_out.double().numpy())
    moved = SLOPE_BOUND * _logit_rounding(weights, done, token_error)
    trees = np.arange(weights.shape.trees)[:, None]
    return np.asarray([np.einsum("tl,tlh->h", each, rows[trees, path]) for each, path in zip(moved, done.paths, strict=True)]).reshape(
        done.y.shape
    )


def _strays(paths: np.ndarray) -> bool:
    """Whether a path [tokens, trees, levels] begins elsewhere than at the root, or goes on to what is no child."""
    step = paths[:, :, 1:] - 2 * paths[:, :, :-1]
    return bool((paths[:, :, 0] != 0).any() or ((step != 1) & (step != 2)).any())


def _unsound_flips(along: reference.Forward, weights: LayerWeights, stored: float, token_error: Array | None) -> int:
    """Paths that turn, at any of their nodes, against a logit that lies further from zero than rounding explains."""
    epsilon = _sum_epsilon(weights)
    worst = (epsilon * (weights.hidden + 8) + (4 * stored if stored > epsilon else 0.0)) * along.logit_terms
    # the worst case alone would leave decisions of bfloat16 free wherever a logit is below half of its usual size
    slack = np.minimum(worst, LIKELY * max(stored, SUM_ROUNDINGS * epsilon) * along.logit_terms / max(1, weights.hidden) ** 0.5)
    if token_error is not None:
        slack = slack + _logit_rounding(weights, along, token_error)
    logits = along.logits[:, :, :-1]
    turned = along.paths[:, :, 1:] != child(along.paths[:, :, :-1], logits)
    return int((turned & ~(np.abs(logits) <= slack[:, :, :-1])).any(axis=2).sum())


def _compare_gradients(
    weights: LayerWeights, x: Tensor, grad_y: Tensor, expected: reference.Forward, worst: float, stored: float
) -> tuple[float, str | None]:
    bias = None if weights.b_in is None else _gradient(weights.b_in)
    found = reference.Gradients(_gradient(x), _gradient(weights.w_in), bias, _gradient(weights.w_out))
    made = (reference.backward, reference.gradient_terms, reference.typical_terms)
    exact, terms, likely = (make(weights, x, grad_y, expected) for make in made)
    epsilon = _sum_epsilon(weights)
    for name in ("x", "w_in", "b_in", "w_out"):
        own = stored if name == "x" else max(stored, float(torch.finfo(weights.w_in.dtype).eps))
        scale = epsilon * (2 * weights.hidden + len(x) + weights.shape.active_width + 16) + (8 * own if own > epsilon else 0.0)
        got, want, bound, typical = (getattr(each, name) for each in (found, exact, terms, likely))
        if want is None:
            continue
        ratio, reason = _worst(f"gradient of {name}", np.abs(got - want), scale * bound + 2 * own * np.abs(want) + 1e-30)
        if reason is None:
            epsilons = LIKELY * max(own, SUM_ROUNDINGS * epsilon)
            if want.size >= MANY:
                slack = epsilons * _root_mean_square(want) + 1e-30
                overall, reason = _worst(f"gradient of {name}, root mean square", _root_mean_square(got - want), slack)
            else:
                overall, reason = _worst(f"gradient of {name}", np.abs(got - want), epsilons * typical + 1e-30)
            ratio = max(ratio, overall)
        worst = max(worst, ratio)
        if reason:
            return worst, reason
    return worst, None


def _gradient(tensor: Tensor) -> Array:
    assert tensor.grad is not None, "backward reached every leaf"
    return tensor.grad.cpu().double().numpy()


def _worst(what: str, error: Array, tolerance: Array) -> tuple[float, str | None]:
    if error.size == 0:
        return 0.0, None
    ratio = error / tolerance
    worst = float(ratio.max())
    if worst <= 1:
        return worst, None
    at = np.unravel_index(int(np.nanargmax(np.where(np.isnan(ratio), np.inf, ratio))), ratio.shape)
    return worst, f"{what}{[int(i) for i in at]} is off by {error[at]:.3g}, tolerance {tolerance[at]:.3g}"
