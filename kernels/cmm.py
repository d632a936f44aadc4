"""The public entry: conditional matrix multiplication (CMM), the feedforward layer of which each token uses one path a tree."""

from __future__ import annotations

import torch
from torch import Tensor

from fffsweep.kernels import library, torch_forms
from fffsweep.kernels.activations import ACTIVATIONS
from fffsweep.kernels.gpu import availability, entries, operator
from fffsweep.kernels.layer import LayerWeights, check_call
from fffsweep.kernels.shape import TreeShape


def cmm(
    x: Tensor,
    w_in: Tensor,
    b_in: Tensor | None,
    w_out: Tensor,
    shape: TreeShape,
    activation: str = "gelu",
    *,
    implementation: str | None = None,
) -> Tensor:
    """Feedforward output of each token along its own path: the sum over its nodes n of act(x . w_in[n] + b_in[n]) w_out[n].

    Shapes: x [..., hidden]; w_in, w_out [trees, nodes, hidden]; b_in [trees, nodes] or None -> as x.
    Dtypes: all alike, or float32 x with bfloat16 weights; under autocast x and weights are cast first, as a dense layer's are. Native
    kernels take float32 and bfloat16, Triton's float16 too; both accumulate in float32.
    Gradients are those of the hard-routed layer, none through the decisions; a NaN logit goes left and makes the output NaN.
    `implementation` forces an entry of `fffsweep.kernels.registry`; by default `choose` takes one. Thread-safe.
    Raises ValueError that names the argument that does not fit, NotImplementedError where kernels of its own meet a second derivative or
    forward-mode differentiation.
    Source: Belcak & Wattenhofer 2023, arXiv 2311.10770, algorithm 1.
    """
    if not isinstance(x, Tensor):
        check_call(x, w_in, b_in, w_out, shape, activation)
    device = "cpu" if x.is_cpu else "cuda" if x.is_cuda else None  # x.device.type takes five times as long, a tenth of a token's call
    if device is not None and torch.is_autocast_enabled(device) and x.dtype != torch.float64:
        wanted = torch.get_autocast_dtype(device)
        x, w_in, w_out = (each.to(wanted) if isinstance(each, Tensor) else each for each in (x, w_in, w_out))
        b_in = b_in.to(wanted) if isinstance(b_in, Tensor) else b_in
    if implementation is None and not torch.compiler.is_compiling() and (y := _native(x, w_in, b_in, w_out, shape, activation)) is not None:
        return y
    check_call(x, w_in, b_in, w_out, shape, activation)
    name = implementation or choose(x, w_in, shape)
    if name == "native":
        taken: Tensor = torch.ops.fffsweep.cmm(x, w_in, b_in, w_out, shape.levels, ACTIVATIONS[activation].code)
        return taken
    if name == "triton":
        tokens, code = x.numel() // max(1, x.shape[-1]), ACTIVATIONS[activation].code
        return operator.cmm(x, w_in, b_in, w_out, shape.levels, code, entries.form_of(tokens, shape.trees, x.dtype))
    if name == "masked":
        return torch_forms.masked(x, w_in, b_in, w_out, shape, activation)
    if name == "gather":
        return torch_forms.gather(x, w_in, b_in, w_out, shape, activation)
    return _from_registry(name, x, LayerWeights(w_in, b_in, w_out, shape, activation))


def _native(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, shape: TreeShape, activation: str) -> Tensor | None:
    """What the native operator gives, None if it is not the one to take or refuses the call.

    It checks whatever memory depends on, in little of the time that `check_call` needs to say what is wrong: more than one token's walk.
    """
    try:
        on_cpu = x.is_cpu and w_in.is_cpu and w_out.is_cpu and (b_in is None or b_in.is_cpu)  # on `meta` would be a call for shapes
        if on_cpu and shape.depth and w_in.size(0) == shape.trees and library.why_missing() is None:
            return library.operator(x, w_in, b_in, w_out, shape.levels, ACTIVATIONS[activation].code)
    except (AttributeError, LookupError, RuntimeError, TypeError, ValueError):
        pass  # the checks that follow name the argument, and what the operator raises for another reason it raises again
    return None


def _from_registry(name: str, x: Tensor, weights: LayerWeights) -> Tensor:
    """Output of the entry `name`. Raises ValueError if it cannot take the call: some read memory as the dtype that they expect."""
    from fffsweep.kernels import registry

    found = registry.find(name)
    tensors = [each for each in (x, weights.w_in, weights.b_in, weights.w_out) if each is not None]
    backward = torch.is_grad_enabled() and any(each.requires_grad for each in tensors)
    for dtype in (x.dtype, weights.w_in.dtype):
        if reason := found.why_not(weights, dtype, x.device.type, backward):
            raise ValueError(
                f"implementation={name!r}: {reason}; expected one that takes {dtype} on {x.device.type}"
                f"{' and has a backward pass (or a call under torch.no_grad())' if backward else ''}, or none: `choose` finds one"
            )
    return found.prepare(weights)(x)


def choose(x: Tensor, w_in: Tensor, shape: TreeShape) -> str:
    """Name of the implementation that `cmm` takes: by device, dtype and depth. Warns once where native kernels are missing."""
    if shape.depth == 0:
        return "masked"  # a dense layer: its matrix product is the fastest form
    if x.device.type == "cpu" and w_in.dtype in library.NATIVE_DTYPES and x.dtype in library.NATIVE_DTYPES:
        if library.why_missing() is None:
            return "native"
        library.warn_if_missing()
    if x.device.type == "cuda" and x.dtype == w_in.dtype and x.dtype in entries.TRITON_DTYPES:
        return "triton" if availability.no_triton() is None and entries.suits(shape) else "masked"
    return "gather"
