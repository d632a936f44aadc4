"""The operators fffsweep_gpu::cmm, cmm_train and cmm_backward over the Triton kernels, with shapes for tracing and with autograd.

Importing this module needs no Triton; calling an operator does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fffsweep.kernels.gpu.plan import plan_groups, product_precision

LAYER = "Tensor x, Tensor w_in, Tensor? b_in, Tensor w_out"
LIBRARY = torch.library.Library("fffsweep_gpu", "DEF")
LIBRARY.define(f"cmm({LAYER}, int levels, int activation, str form, str precision) -> Tensor")
LIBRARY.define(f"cmm_train({LAYER}, int levels, int activation, str precision) -> (Tensor, Tensor, Tensor, Tensor, Tensor)")
LIBRARY.define(
    f"cmm_backward(Tensor grad_y, {LAYER}, Tensor logits, Tensor leaves, Tensor order, Tensor starts, int levels, int activation, "
    "str precision) -> (Tensor, Tensor, Tensor, Tensor)"
)


def cmm(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, levels: int, activation: int, form: str = "grouped", precision: str = ""
) -> Tensor:
    """CMM by the Triton kernels, differentiable. form: "walk" or "grouped"; with gradients wanted, always "grouped".

    Shapes and dtypes as `fffsweep.kernels.cmm.cmm`, x and weights of one dtype: float32, bfloat16 or float16. precision: see `plan`.
    """
    precision = product_precision(x.dtype, precision)  # now, so that the backward pass takes the same
    leaves = [each for each in (x, w_in, b_in, w_out) if each is not None and each.requires_grad]
    if leaves and torch.is_grad_enabled():
        y: Tensor = torch.ops.fffsweep_gpu.cmm_train(x, w_in, b_in, w_out, levels, activation, precision)[0]
        return y
    inferred: Tensor = torch.ops.fffsweep_gpu.cmm(x, w_in, b_in, w_out, levels, activation, form, precision)
    return inferred


def contiguous(*tensors: Tensor | None) -> list[Any]:
    """The tensors as the kernels want them."""
    return [None if each is None else each.contiguous() for each in tensors]


def _infer(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, levels: int, activation: int, form: str, precision: str) -> Tensor:
    from fffsweep.kernels.gpu import launch

    x, w_in, b_in, w_out = contiguous(x, w_in, b_in, w_out)
    if form == "walk":
        return launch.run_walk(x, w_in, b_in, w_out, levels, activation)[0]
    return launch.run_grouped(x, w_in, b_in, w_out, levels, activation, precision)[0]


def _train(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, levels: int, activation: int, precision: str) -> tuple[Tensor, ...]:
    from fffsweep.kernels.gpu import launch

    x, w_in, b_in, w_out = contiguous(x, w_in, b_in, w_out)
    return launch.run_grouped(x, w_in, b_in, w_out, levels, activation, precision)


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Nine tensors, then levels, activation and precision, in the schema's order, which is that of `launch.run_backward`."""
    from fffsweep.kernels.gpu import launch

    return launch.run_backward(*contiguous(*arguments[:9]), *arguments[9:])


def _infer_shape(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, *settings: Any) -> Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _train_shape(
    x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, levels: int, activation: int, precision: str
) -> tuple[Tensor, ...]:
    tokens, trees = x.numel() // x.shape[-1], w_in.shape[0]
    # the number of groups follows from levels and dtype, not from the tokens
    groups = plan_groups(levels, 1, product_precision(x.dtype, precision))
    integers: dict[str, Any] = {"dtype": torch.int32, "device": x.device}
    return (
        torch.empty_like(x, memory_format=torch.contiguous_format),
        torch.empty(tokens, trees, levels, device=x.device),
        torch.empty(tokens, trees, **integers),
        torch.empty(trees, tokens if len(groups) > 1 else 0, **integers),
        torch.empty(trees, 2 ** groups[-1].base + 1, **integers),
    )


def _backward_shape(
    grad_y: Tensor, x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, *saved: Any
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    kept: dict[str, Any] = {"memory_format": torch.contiguous_format}
    bias = torch.empty(0, dtype=w_in.dtype, device=x.device) if b_in is None else torch.empty_like(b_in, **kept)
    return torch.empty_like(x, **kept), torch.empty_like(w_in, **kept), bias, torch.empty_like(w_out, **kept)


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x, w_in, b_in, w_out, *ctx.settings = inputs
    ctx.save_for_backward(x, w_in, b_in, w_out, *output[1:])
    ctx.set_materialize_grads(False)


def _gradients(ctx: Any, grad_y: Tensor | None, *unused: Any) -> tuple[Tensor | None, ...]:
    none = (None,) * len(ctx.settings)
    if grad_y is None:
        return (None, None, None, None, *none)
    tensors = ctx.saved_tensors
    grad_x, grad_in, grad_bias, grad_out = torch.ops.fffsweep_gpu.cmm_backward(grad_y, *tensors, *ctx.settings)
    return (grad_x, grad_in, None if tensors[2] is None else grad_bias, grad_out, *none)


def _no_second_derivative(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    raise NotImplementedError(
        "cmm: its gradients were differentiated, and Triton's kernels have no second derivative: "
        "expected one backward pass alone, or implementation='masked', which has them all"
    )


for _name, _kernel, _shape in (
    ("cmm", _infer, _infer_shape),
    ("cmm_train", _train, _train_shape),
    ("cmm_backward", _backward, _backward_shape),
):
    for _device in ("CUDA", "CPU"):  # the CPU's tensors are for the interpreter
        LIBRARY.impl(_name, _kernel, _device)
    torch.library.register_fake(f"fffsweep_gpu::{_name}", _shape, lib=LIBRARY)
torch.library.register_autograd("fffsweep_gpu::cmm_train", _gradients, setup_context=_keep, lib=LIBRARY)
torch.library.register_autograd("fffsweep_gpu::cmm_backward", _no_second_derivative, lib=LIBRARY)
