"""Every implementation of CMM and of the dense layer it is compared with (DMM); tests and benchmarks walk this one list."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from fffsweep.kernels import dense, int8, library, naive, reference, torch_forms
from fffsweep.kernels.activations import ACTIVATIONS, nearest_first
from fffsweep.kernels.gpu import entries
from fffsweep.kernels.layer import LayerWeights

F32, BF16, F16, F64 = torch.float32, torch.bfloat16, torch.float16, torch.float64
EVERY = frozenset({F32, BF16, F16, F64})
BOTH = frozenset({"cpu", "cuda"})
Layer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Implementation:
    """One way to compute a layer.

    `prepare(weights)` does what may be done once (transposing, padding, compiling) and returns the layer, x [..., hidden] -> as x.
    `role`: "reference" is float64 loops, "cmm" computes trees, "dense" computes depth 0 alone, the baseline.
    `dtypes` are those of x and of the weights alike. `unavailable` gives the reason why it cannot run on this machine, or None;
    `refuses` the reason why it cannot take these weights, or None. `paths(weights, x)` gives the nodes it visits, where it can.
    `bits8` and `tf32` say that float32 is rounded to 8 bits or to TF32 on the way: such times are not those of float32.
    `stores(weights)` gives the weights as its user would keep and train them, such as padded ones.
    `rounds(weights)` gives the 8-bit weights that it computes with in their place: the gate then follows those.
    """

    name: str
    role: Literal["reference", "cmm", "dense"]
    prepare: Callable[[LayerWeights], Layer]
    devices: frozenset[str] = frozenset({"cpu"})
    dtypes: frozenset[torch.dtype] = frozenset({F32})
    supports_backward: bool = False
    unavailable: Callable[[], str | None] = lambda: None
    refuses: Callable[[LayerWeights], str | None] = lambda weights: None
    paths: Callable[[LayerWeights, Tensor], Tensor] | None = None
    variant_of: str | None = None
    slow: bool = False
    bits8: bool = False
    tf32: bool = False
    rounds: Callable[[LayerWeights], int8.Int8Weights] | None = None
    stores: Callable[[LayerWeights], LayerWeights] = lambda weights: weights

    def why_not(self, weights: LayerWeights, dtype: torch.dtype, device: str = "cpu", backward: bool = False) -> str | None:
        """Reason why this implementation does not apply, or None if it does."""
        if device not in self.devices:
            return f"{self.name} does not run on {device}"
        if dtype not in self.dtypes:
            return f"{self.name} does not take {dtype}"
        if backward and not self.supports_backward:
            return f"{self.name} has no backward pass"
        if self.role == "dense" and weights.shape.depth > 0:
            return f"{self.name} computes dense layers, and {weights.shape.layout} has depth"
        return self.unavailable() or self.refuses(weights)


def _native(isa: str | None) -> Implementation:
    code = -1 if isa is None else library.ISA_NAMES.index(isa)

    def prepare(weights: LayerWeights) -> Layer:
        activation = ACTIVATIONS[weights.activation].code
        arguments = (weights.w_in, weights.b_in, weights.w_out, weights.shape.levels, activation, code)
        return lambda x: library.operator(x, *arguments)

    def paths(weights: LayerWeights, x: Tensor) -> Tensor:
        arguments = (weights.w_in.detach(), None if weights.b_in is None else weights.b_in.detach(), weights.w_out.detach())
        code_of = ACTIVATIONS[weights.activation].code
        _, _, leaves = torch.ops.fffsweep.cmm_train(x.detach(), *arguments, weights.shape.levels, code_of, code)
        visited = [leaves.long()]
        for _ in range(weights.shape.depth):
            visited.append((visited[-1] - 1) // 2)
        return torch.stack(visited[::-1], dim=2)

    return Implementation(
        "native" if isa is None else f"native_{isa}",
        "cmm",
        prepare,
        dtypes=frozenset({F32, BF16}),
        supports_backward=True,
        unavailable=library.why_missing if isa is None else lambda: library.missing_isa(isa),
        paths=paths,
        variant_of=None if isa is None else "native",
    )


def _native_int8(isa: str | None) -> Implementation:
    def prepare(weights: LayerWeights) -> Layer:
        rounded = int8.quantise(weights)
        return lambda x: int8.cmm_int8(x, rounded, isa=isa)

    return Implementation(
        "native_int8" if isa is None else f"native_int8_{isa}",
        "cmm",
        prepare,
        unavailable=library.why_missing if isa is None else lambda: library.missing_isa(isa),
        paths=lambda weights, x: int8.paths(x.detach(), int8.quantise(weights), isa=isa),
        variant_of=None if isa is None else "native_int8",
        bits8=True,
        rounds=int8.quantise,
    )


def _torch_form(name: str, form: Callable[..., Tensor], paths: Callable[..., Tensor]) -> Implementation:
    return Implementation(
        name,
        "cmm",
        lambda weights: lambda x: form(x, weights.w_in, weights.b_in, weights.w_out, weights.shape, weights.activation),
        devices=BOTH,
        dtypes=EVERY,
        supports_backward=True,
        paths=lambda weights, x: paths(x, weights.w_in, weights.b_in, weights.shape),
    )


def _reference(weights: LayerWeights) -> Layer:
    def layer(x: Tensor) -> Tensor:
        y = reference.forward(weights, x.reshape(-1, x.shape[-1])).y
        return torch.from_numpy(y).to(x.dtype).reshape(x.shape)

    return layer


def _no_compiler() -> str | None:
    return None if shutil.which("g++") or shutil.which("clang++") else "torch.compile needs a C++ compiler"


def _no_int8() -> str | None:
    return None if torch.backends.quantized.engine != "none" else "this torch has no engine for 8-bit products"


IMPLEMENTATIONS: tuple[Implementation, ...] = (
    Implementation("reference", "reference", _reference, dtypes=frozenset({F32, BF16, F64})),
    _torch_form("masked", torch_forms.masked, torch_forms.masked_paths),
    _torch_form("gather", torch_forms.gather, torch_forms.paths),
    _native(None),
    *(_native(isa) for isa in library.ISA_NAMES),
    _native_int8(None),
    *(_native_int8(isa) for isa in library.ISA_NAMES),
    Implementation("blas_level1", "cmm", naive.level1, unavailable=naive.why_no_blas, paths=naive.level_paths),
    Implementation("blas_level2", "cmm", naive.level2, unavailable=naive.why_no_blas, paths=naive.level_paths),
    Implementation("sparse_coo", "cmm", naive.sparse(torch.sparse_coo), slow=True),
    Implementation("sparse_csr", "cmm", naive.sparse(torch.sparse_csr), slow=True),
    Implementation("torch_dense", "dense", dense.eager, BOTH, EVERY, supports_backward=True),
    Implementation(
        "torch_dense_padded", "dense", dense.padded, BOTH, EVERY, supports_backward=True, refuses=dense.why_not_padded, stores=dense.pad
    ),
    Implementation(
        "torch_dense_compiled",
        "dense",
        dense.compiled,
        BOTH,
        frozenset({F32, BF16, F16}),
        supports_backward=True,
        unavailable=_no_compiler,
        stores=dense.pad,
        slow=True,
    ),
    Implementation("numpy_sgemm", "dense", dense.numpy_sgemm),
    Implementation("torch_int8_dynamic", "dense", dense.int8_dynamic, unavailable=_no_int8, bits8=True),
    *(Implementation(**fields) for fields in entries.fields()),
)


def find(name: str) -> Implementation:
    """Implementation called `name`. Raises ValueError that lists the names, the nearest first."""
    for each in IMPLEMENTATIONS:
        if each.name == name:
            return each
    names = nearest_first(name, [each.name for each in IMPLEMENTATIONS])
    raise ValueError(f"implementation={name!r}: expected one of {', '.join(names)}")


def applicable(weights: LayerWeights, dtype: torch.dtype, device: str = "cpu", backward: bool = False) -> list[Implementation]:
    """Implementations, the reference aside, that can run these weights in `dtype` on `device`."""
    return [each for each in IMPLEMENTATIONS if each.role != "reference" and each.why_not(weights, dtype, device, backward) is None]
