"""The operator as a function of Python: what it does is what torch.ops does, whatever watches or replaces the call."""

from __future__ import annotations

import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from fffsweep.kernels import library
from fffsweep.kernels.cmm import cmm
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.shape import TreeShape

SHAPE = TreeShape(2, 3)
HAS_HEADERS = Path(sysconfig.get_paths()["include"], "Python.h").exists()
pytestmark = pytest.mark.skipif(not HAS_HEADERS, reason="built without the headers of Python: calls go through torch.ops")


def arguments_of(tokens: int = 5, bias: bool = True) -> list[torch.Tensor | int | None]:
    weights = random_layer(SHAPE, 16, bias=bias)
    x = torch.randn(tokens, 16, generator=torch.Generator().manual_seed(1))
    return [x, weights.w_in, weights.b_in, weights.w_out, SHAPE.levels, 1]


def test_where_headers_are_the_binding_is() -> None:
    assert library.is_called_directly()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("isa", [(), (-1,), (0,)])
def test_outputs_and_gradients_are_those_of_torch_s_own_way(bias: bool, isa: tuple[int, ...]) -> None:
    found = []
    for operator in (library.operator, library._by_torch):
        arguments = [each.clone().requires_grad_() if isinstance(each, torch.Tensor) else each for each in arguments_of(bias=bias)]
        y = operator(*arguments, *isa)
        y.square().sum().backward()
        found.append([y.detach(), *(each.grad for each in arguments if isinstance(each, torch.Tensor))])
    assert len(found[0]) == 4 + bias
    assert all(torch.equal(ours, theirs) for ours, theirs in zip(*found, strict=True))


def test_modes_see_the_operator() -> None:
    calls: list[str] = []

    class Dispatched(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            calls.append(f"dispatched {func}")
            return func(*args, **(kwargs or {}))

    class Named(TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            calls.append(f"named {func}")
            return func(*args, **(kwargs or {}))

    for mode in (Dispatched(), Named()):
        with mode, torch.no_grad():
            cmm(*arguments_of()[:4], SHAPE)
    assert [call for call in calls if "fffsweep" in call] == ["dispatched fffsweep.cmm.default", "named fffsweep.cmm"]


def test_subclasses_and_fake_tensors_are_torch_s() -> None:
    class Marked(torch.Tensor):
        pass

    x, *others = arguments_of()
    assert type(library.operator(x.as_subclass(Marked), *others)) is Marked
    with FakeTensorMode() as mode:
        fakes = [mode.from_tensor(each) if isinstance(each, torch.Tensor) else each for each in arguments_of()]
        assert isinstance(library.operator(*fakes), FakeTensor)


def test_a_trace_holds_the_operator() -> None:
    _, *others = arguments_of()
    traced = make_fx(lambda x: library.operator(x, *others))(arguments_of()[0])
    assert "fffsweep.cmm" in traced.code


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({3: torch.zeros(2, 7, 15)}, ValueError, "w_out has shape"),
        ({4: 2**70}, OverflowError, "too (big|large)"),
        ({4: "3"}, RuntimeError, "levels"),
        ({1: None}, ValueError, "expected x"),
        ({5: 6}, ValueError, "activation is 6, expected a code from 0 to 5"),
        ({5: -1}, ValueError, "activation is -1, expected a code from 0 to 5"),
        ({6: 99}, ValueError, "no instruction set 99"),
        ({6: 2**32}, ValueError, "no instruction set 4294967296"),
    ],
)
def test_errors_are_raised_in_python(change: dict[int, object], error: type[Exception], message: str) -> None:
    arguments = dict(enumerate(arguments_of())) | change
    with pytest.raises(error, match=message):
        library.operator(*arguments.values())
    with pytest.raises(RuntimeError, match="w_out"):
        library.operator(*arguments_of()[:3])


def test_calls_keep_no_reference() -> None:
    arguments = arguments_of()
    tensors = [each for each in arguments if isinstance(each, torch.Tensor)]
    before = [sys.getrefcount(each) for each in tensors]
    for _ in range(100):
        y = library.operator(*arguments)
        with pytest.raises(ValueError, match="levels"):
            library.operator(*arguments[:4], 40, 1)
    assert [sys.getrefcount(each) for each in tensors] == before
    assert sys.getrefcount(y) == 2
