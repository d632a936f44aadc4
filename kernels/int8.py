"""CMM with weights of 8 bits, opt-in and for inference alone: a quarter of the memory, and some tokens go down another path.

`python -m fffsweep.kernels.int8 --layout 1x11 --hidden 768 --tokens 4096` says how many, and how far outputs are off.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from fffsweep.kernels import library, torch_forms
from fffsweep.kernels.activations import ACTIVATIONS, activation_of
from fffsweep.kernels.layer import LayerWeights, random_layer
from fffsweep.kernels.shape import TreeShape, parse_layout

LEVELS = 127  # of each sign
TOKEN_LEVELS = 32767  # a token is rounded to 16 bits of its largest element; fewer where a 32-bit sum could overflow


@dataclass(frozen=True)
class Int8Weights:
    """One layer in 8 bits: w_in, w_out int8 [trees, nodes, hidden]; a row is its integers times its scale, float32 [trees, nodes].

    b_in float32 [trees, nodes] or None. Made by `quantise`.
    """

    w_in: Tensor
    scale_in: Tensor
    b_in: Tensor | None
    w_out: Tensor
    scale_out: Tensor
    shape: TreeShape
    activation: str = "gelu"

    def token_error(self, x: Tensor) -> Tensor:
        """The most that rounding moves an element of each token: x [tokens, hidden] -> float64 [tokens]."""
        # as native/int8.h at its narrowest vectors of 16 products, where most of them are summed in one lane
        levels = min(TOKEN_LEVELS, (2**31 - 1) // (256 * (x.shape[-1] // 16 + 1)))
        return x.detach().double().abs().amax(dim=-1) / levels / 2

    def dequantised(self) -> LayerWeights:
        """The layer that these integers stand for, in float32."""
        w_in, w_out = self.w_in * self.scale_in.unsqueeze(-1), self.w_out * self.scale_out.unsqueeze(-1)
        return LayerWeights(w_in, self.b_in, w_out, self.shape, self.activation)


def quantise(weights: LayerWeights) -> Int8Weights:
    """`weights` in 8 bits: each row symmetrically, its largest element becoming 127. Raises ValueError for a weight that is not finite."""
    activation_of(weights.activation)
    w_in, scale_in = _rows("w_in", weights.w_in)
    w_out, scale_out = _rows("w_out", weights.w_out)
    b_in = None if weights.b_in is None else weights.b_in.detach().float().clone()
    return Int8Weights(w_in, scale_in, b_in, w_out, scale_out, weights.shape, weights.activation)


def _rows(name: str, tensor: Tensor) -> tuple[Tensor, Tensor]:
    wide = tensor.detach().float()
    if not wide.isfinite().all():
        raise ValueError(f"{name} holds NaN or infinite elements: expected finite ones, 8 bits cannot express others")
    scale = wide.abs().amax(dim=-1) / LEVELS if wide.shape[-1] else wide.new_zeros(wide.shape[:-1])
    rounded = (wide / torch.where(scale > 0, scale, 1.0).unsqueeze(-1)).round().clamp(-LEVELS, LEVELS)
    return rounded.to(torch.int8), scale


def cmm_int8(x: Tensor, weights: Int8Weights, *, isa: str | None = None) -> Tensor:
    """As `fffsweep.kernels.cmm.cmm`, with weights of 8 bits: x [..., hidden], float32 or bfloat16, on the CPU -> as x.

    Tokens are rounded to 16 bits, products summed exactly in 32-bit integers, outputs combined in float32. A token with a NaN or
    an infinite element goes left everywhere and its output is NaN. `isa` forces an instruction set. Without the native library the
    portable form runs on the dequantised weights, after one warning.
    Raises ValueError if x does not fit, or wants a gradient: there is no backward pass.
    """
    return _run(x, weights, isa, leaves=False)[0]


def paths(x: Tensor, weights: Int8Weights, *, isa: str | None = None) -> Tensor:
    """Nodes that `cmm_int8` visits: x [tokens, hidden] -> int64 [tokens, trees, levels]."""
    visited = [_run(x, weights, isa, leaves=True)[1].long()]
    for _ in range(weights.shape.depth):
        visited.append((visited[-1] - 1) // 2)
    return torch.stack(visited[::-1], dim=2)


def _run(x: Tensor, weights: Int8Weights, isa: str | None, *, leaves: bool) -> tuple[Tensor, Tensor]:
    hidden = weights.w_in.shape[-1]
    if x.dim() == 0 or x.shape[-1] != hidden:
        raise ValueError(f"x has shape {list(x.shape)}: expected [..., {hidden}], the weights' hidden size")
    if x.dtype not in library.NATIVE_DTYPES:
        raise ValueError(f"x is {x.dtype}: expected torch.float32 or torch.bfloat16")
    if x.device.type != "cpu" or weights.w_in.device.type != "cpu":
        raise ValueError(f"x is on {x.device}, weights on {weights.w_in.device}: expected cpu; 8-bit weights run nowhere else")
    if x.requires_grad and torch.is_grad_enabled():
        raise ValueError("x requires a gradient: 8-bit weights have no backward pass; call under torch.no_grad() or train in float32")
    if library.why_missing() is not None:
        library.warn_if_missing()
        plain = weights.dequantised()
        arguments = (plain.w_in, plain.b_in)
        y = torch_forms.gather(x.float(), *arguments, plain.w_out, plain.shape, plain.activation).to(x.dtype)
        return y, torch_forms.paths(x, *arguments, plain.shape)[:, :, -1]
    code = -1 if isa is None else library.ISA_NAMES.index(isa)
    y, last = torch.ops.fffsweep.cmm_int8(
        x,
        weights.w_in,
        weights.scale_in,
        weights.b_in,
        weights.w_out,
        weights.scale_out,
        weights.shape.levels,
        ACTIVATIONS[weights.activation].code,
        leaves,
        code,
    )
    return y, last


def accuracy(weights: LayerWeights, x: Tensor) -> dict[str, float]:
    """What 8 bits cost on x [tokens, hidden]: percent of paths that flip, and errors relative to the root mean square of outputs.

    `error`: root mean square over all tokens; `error_same_path`: over the tokens that kept their path.
    """
    rounded = quantise(weights)
    exact = torch_forms.gather(x.double(), *_doubles(weights), weights.shape, weights.activation)
    kept = (paths(x, rounded) == torch_forms.paths(x.double(), *_doubles(weights)[:2], weights.shape)).all(dim=2)
    off, scale = (cmm_int8(x, rounded).double() - exact).square().mean(dim=1), exact.square().mean()
    same = kept.all(dim=1)
    return {
        "path_flips_percent": 100 * float((~kept).double().mean()),
        "error": float((off.mean() / scale).sqrt()),
        "error_same_path": float((off[same].mean() / scale).sqrt()),
    }


def _doubles(weights: LayerWeights) -> tuple[Tensor, Tensor | None, Tensor]:
    return weights.w_in.double(), None if weights.b_in is None else weights.b_in.double(), weights.w_out.double()


def main(argv: list[str] | None = None) -> int:
    """Print the accuracy of 8-bit weights for random or saved tokens; 2 for wrong arguments."""
    parser = argparse.ArgumentParser("python -m fffsweep.kernels.int8", description=main.__doc__)
    parser.add_argument("--layout", default="1x11")
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--tokens", type=int, default=4096)
    parser.add_argument("--activation", default="gelu")
    parser.add_argument("--activations", type=Path, help="saved tokens, a float tensor [any, hidden] written by torch.save")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(argv)
    try:
        weights = random_layer(parse_layout(options.layout), options.hidden, activation=options.activation, seed=options.seed)
        x = torch.randn(options.tokens, options.hidden, generator=torch.Generator().manual_seed(options.seed + 1))
        if options.activations:
            x = torch.load(options.activations, weights_only=True).float()[: options.tokens]
        found = accuracy(weights, x)
    except ValueError as error:
        print(f"fffsweep.kernels.int8: {error}", file=sys.stderr)
        return 2
    print(
        f"{options.layout}, hidden {options.hidden}, {len(x)} tokens: {found['path_flips_percent']:.2f} % of the paths differ from "
        f"float64's; outputs are off by {found['error']:.4f} of their root mean square, "
        f"by {found['error_same_path']:.4f} where the path is the same"
    )
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
