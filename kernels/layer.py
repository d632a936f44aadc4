"""The weights of one feedforward layer, and the rules that a call must keep."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fffsweep.kernels.activations import activation_of
from fffsweep.kernels.shape import TreeShape

FLOATING = (torch.float32, torch.bfloat16, torch.float64, torch.float16)


@dataclass(frozen=True)
class LayerWeights:
    """One layer: w_in, w_out [trees, nodes, hidden], b_in [trees, nodes] or None. Depth 0 is a dense layer of `trees` neurons."""

    w_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    shape: TreeShape
    activation: str = "gelu"

    @property
    def hidden(self) -> int:
        """Length of a token."""
        return int(self.w_in.shape[-1])

    def to(self, dtype: torch.dtype) -> LayerWeights:
        """The same layer in `dtype`, detached."""
        bias = None if self.b_in is None else self.b_in.detach().to(dtype)
        return replace(self, w_in=self.w_in.detach().to(dtype), b_in=bias, w_out=self.w_out.detach().to(dtype))

    def on(self, device: str) -> LayerWeights:
        """The same layer on `device`, detached."""
        bias = None if self.b_in is None else self.b_in.detach().to(device)
        return replace(self, w_in=self.w_in.detach().to(device), b_in=bias, w_out=self.w_out.detach().to(device))

    def copy(self) -> LayerWeights:
        """The same layer in memory of its own."""
        bias = None if self.b_in is None else self.b_in.detach().clone()
        return replace(self, w_in=self.w_in.detach().clone(), b_in=bias, w_out=self.w_out.detach().clone())


def random_layer(
    shape: TreeShape, hidden: int, *, activation: str = "gelu", bias: bool = True, dtype: torch.dtype = torch.float32, seed: int = 0
) -> LayerWeights:
    """Layer of normally distributed weights, scaled so that logits and outputs of normal tokens are of order one."""
    generator = torch.Generator().manual_seed(seed)
    w_in = torch.randn(shape.trees, shape.nodes, hidden, generator=generator) / hidden**0.5
    w_out = torch.randn(shape.trees, shape.nodes, hidden, generator=generator) / shape.active_width**0.5
    b_in = 0.1 * torch.randn(shape.trees, shape.nodes, generator=generator) if bias else None
    return LayerWeights(w_in, b_in, w_out, shape, activation).to(dtype)


def check_call(x: Tensor, w_in: Tensor, b_in: Tensor | None, w_out: Tensor, shape: TreeShape, activation: str) -> None:
    """Raise ValueError that names the argument, what it is and what it should be, unless a layer may be called with these."""
    activation_of(activation)
    given = {"w_in": w_in, "w_out": w_out, "b_in": b_in}
    for name, each in {"x": x, **given}.items():
        if not isinstance(each, Tensor) and not (name == "b_in" and each is None):
            raise ValueError(f"{name} is {type(each).__name__}: expected a torch tensor{' or None' if name == 'b_in' else ''}")
    if x.dim() == 0:
        raise ValueError("x has no dimension: expected [tokens, hidden] or [..., hidden]")
    hidden = x.shape[-1]
    expected = {"w_in": (shape.trees, shape.nodes, hidden), "w_out": (shape.trees, shape.nodes, hidden), "b_in": (shape.trees, shape.nodes)}
    if x.dtype not in FLOATING:
        raise ValueError(f"x is {x.dtype}: expected one of {', '.join(str(each) for each in FLOATING)}")
    for name, tensor in given.items():
        if tensor is None:
            continue
        if tuple(tensor.shape) != expected[name]:
            raise ValueError(
                f"{name} has shape {list(tensor.shape)}: expected {list(expected[name])} for layout {shape.layout} and "
                f"x of hidden size {hidden}"
            )
        if tensor.device != x.device:
            raise ValueError(f"{name} is on {tensor.device}: expected {x.device}, where x is")
        if tensor.dtype != w_in.dtype:
            raise ValueError(f"{name} is {tensor.dtype}: expected {w_in.dtype}, as w_in is")
    if w_in.dtype != x.dtype and (x.dtype, w_in.dtype) != (torch.float32, torch.bfloat16):
        raise ValueError(f"w_in is {w_in.dtype}: expected {x.dtype} as x is, or bfloat16 weights with a float32 x")
