"""The public entry: arguments, choice of implementation, NaN, threads, tracing."""

import os
import threading

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fffsweep.kernels import library, registry, torch_forms
from fffsweep.kernels.activations import ACTIVATIONS
from fffsweep.kernels.cmm import choose, cmm
from fffsweep.kernels.layer import random_layer
from fffsweep.kernels.shape import TreeShape, parse_layout

native = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))


def arguments(layout: str = "2x3", hidden: int = 12, count: int = 5, **options: object):
    weights = random_layer(parse_layout(layout), hidden, **options)
    x = torch.randn(count, hidden, generator=torch.Generator().manual_seed(3)).to(weights.w_in.dtype)
    return x, weights.w_in, weights.b_in, weights.w_out, weights.shape


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0][:, :5], *a[1:]), r"w_in has shape \[2, 15, 12\]: expected \[2, 15, 5\]"),
        (lambda a: (*a[:2], a[2][:, :3], *a[3:]), r"b_in has shape \[2, 3\]: expected \[2, 15\]"),
        (lambda a: (*a[:3], a[3][:1], a[4]), r"w_out has shape \[1, 15, 12\]"),
        # the operator alone would take these for a smaller layer
        (lambda a: (a[0], a[1][:1], a[2][:1], a[3][:1], a[4]), r"w_in has shape \[1, 15, 12\]: expected \[2, 15, 12\]"),
        (lambda a: (*a[:3], a[3].bfloat16(), a[4]), r"w_out is torch.bfloat16: expected torch.float32"),
        (lambda a: (a[0].double(), *a[1:]), r"w_in is torch.float32: expected torch.float64"),
        (lambda a: (a[0].long(), *a[1:]), r"x is torch.int64"),
        (lambda a: (*a[:3], a[3].to("meta"), a[4]), r"w_out is on meta: expected cpu"),
        (lambda a: (*a[:4], TreeShape(2, 4)), r"layout 2x4"),
    ],
)
def test_wrong_arguments_are_named(change, message) -> None:
    with pytest.raises(ValueError, match=message):
        cmm(*change(arguments()))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: (a[0].tolist(), *a[1:]), r"x is list: expected a torch tensor$"),
        (lambda a: (a[0], None, *a[2:]), r"w_in is NoneType: expected a torch tensor$"),
        (lambda a: (*a[:2], 1.0, *a[3:]), r"b_in is float: expected a torch tensor or None"),
        (lambda a: (*a[:3], a[3].numpy(), a[4]), r"w_out is ndarray: expected a torch tensor$"),
    ],
)
def test_what_is_no_tensor_is_named(change, message, autocast) -> None:
    with torch.autocast("cpu", enabled=autocast), pytest.raises(ValueError, match=message):
        cmm(*change(arguments()))


def test_unknown_names_list_the_choices_nearest_first() -> None:
    with pytest.raises(ValueError, match="activation='gelo': expected one of gelu,"):
        cmm(*arguments(), "gelo")
    with pytest.raises(ValueError, match="implementation='nativ': expected one of native,"):
        cmm(*arguments(), implementation="nativ")


@pytest.mark.parametrize("name", [each.name for each in registry.IMPLEMENTATIONS if each.role != "dense" and "cpu" in each.devices])
def test_implementation_forces_one(name: str) -> None:
    if registry.find(name).unavailable():
        pytest.skip("not available")
    expected = cmm(*arguments(), implementation="reference")
    slack = {"atol": 0.05, "rtol": 0.05} if registry.find(name).bits8 else {}
    torch.testing.assert_close(cmm(*arguments(), implementation=name), expected, **slack)


@pytest.mark.parametrize(
    ("name", "dtype", "grad", "message"),
    [
        # over a BLAS, bytes of another dtype would be read as float32
        ("blas_level1", torch.float64, False, "blas_level1 does not take torch.float64"),
        ("blas_level2", torch.bfloat16, False, "blas_level2 does not take torch.bfloat16"),
        ("blas_level1", torch.float32, True, r"blas_level1 has no backward pass.*torch.no_grad"),
        ("reference", torch.float32, True, "reference has no backward pass"),
        ("torch_dense", torch.float32, False, "torch_dense computes dense layers, and 2x3 has depth"),
        ("triton_walk", torch.float32, False, "triton_walk does not run on cpu"),
    ],
)
def test_a_forced_implementation_refuses_what_it_cannot_take(name: str, dtype: torch.dtype, grad: bool, message: str) -> None:
    x, w_in, *rest = arguments(dtype=dtype)
    with pytest.raises(ValueError, match=f"implementation='{name}': {message}"):
        cmm(x, w_in.requires_grad_(grad), *rest, implementation=name)
    if grad:
        with torch.no_grad():
            assert cmm(x, w_in, *rest, implementation=name).shape == x.shape


@native
@pytest.mark.parametrize(
    "change",
    [
        lambda a: (a[0][:, :5], *a[1:]),
        lambda a: (a[0].long(), *a[1:]),
        lambda a: (*a[:2], a[2][:, :3], a[3]),
        lambda a: (*a[:3], a[3].double()),
        lambda a: (*a[:3], a[3][:, :7]),
    ],
)
def test_wrong_arguments_are_named_where_tensors_are_fake(change) -> None:
    *right, shape = arguments()
    wrong = change(right)
    with FakeTensorMode() as mode:
        assert cmm(*map(mode.from_tensor, right), shape).shape == (5, 12)
        with pytest.raises(ValueError, match="expected"):
            cmm(*map(mode.from_tensor, wrong), shape)
    for operator in (torch.ops.fffsweep.cmm, torch.ops.fffsweep.cmm_train):
        with pytest.raises(ValueError, match="expected"):
            operator(*(each.to("meta") for each in wrong), shape.levels, 4)


@native
def test_rows_without_elements_have_shapes_too() -> None:
    x, w_in = torch.zeros(5, 0, device="meta"), torch.zeros(2, 15, 0, device="meta")
    y, logits, leaves = torch.ops.fffsweep.cmm_train(x, w_in, None, w_in, 4, 4)
    assert (y.shape, logits.shape, leaves.shape) == ((5, 0), (0, 2, 4), (0, 2))
    rounded, scales = w_in.to(torch.int8), torch.zeros(2, 15, device="meta")
    assert torch.ops.fffsweep.cmm_int8(x, rounded, scales, None, rounded, scales, 4, 4, True)[1].shape == (0, 2)


@native
@pytest.mark.parametrize("bias", [False, True])
def test_a_second_derivative_is_refused_where_it_is_asked_for(bias: bool) -> None:
    x, w_in, b_in, w_out, shape = arguments(bias=bias)
    leaves = [each.requires_grad_() for each in (x, w_in, b_in, w_out) if each is not None]
    first = torch.autograd.grad(cmm(x, w_in, b_in, w_out, shape).square().sum(), leaves)
    again = torch.autograd.grad(cmm(x, w_in, b_in, w_out, shape).square().sum(), leaves, create_graph=True)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))
    for each in again:
        with pytest.raises(NotImplementedError, match=r"no second derivative.*implementation='masked'"):
            torch.autograd.grad(each.square().sum(), leaves, retain_graph=True)
    masked = torch.autograd.grad(cmm(x, w_in, b_in, w_out, shape, implementation="masked").square().sum(), leaves, create_graph=True)
    assert torch.autograd.grad(masked[0].square().sum(), leaves)[0].abs().max() > 0


@native
def test_forward_mode_is_refused() -> None:
    x, *rest = arguments()

    def layer(x: torch.Tensor, **options: object) -> torch.Tensor:
        return cmm(x, *rest, **options)

    with pytest.raises(NotImplementedError, match=r"forward-mode.*implementation='masked'"):
        torch.func.jvp(layer, (x,), (x,))
    with torch.autograd.forward_ad.dual_level(), pytest.raises(NotImplementedError, match="forward-mode"), torch.no_grad():
        layer(torch.autograd.forward_ad.make_dual(x, x))
    assert torch.func.jvp(lambda x: layer(x, implementation="masked"), (x,), (x,))[1].abs().max() > 0


@native
@pytest.mark.parametrize("batch", [False, True])
def test_views_of_any_kind_are_taken(batch: bool) -> None:
    """Negated lazily, expanded, mapped over, with a gradient that is one number expanded: as their plain copies."""
    x, w_in, b_in, w_out, shape = arguments()
    lazy = torch.complex(x, x).conj().imag
    assert lazy.is_neg()
    plain = [-x, w_in[:1].repeat(2, 1, 1), b_in, w_out]
    views = [lazy, w_in[:1].expand(2, 15, 12), b_in, w_out]
    if batch:
        plain, views = [(-x)[:1].repeat(40, 1), *plain[1:]], [lazy[:1].expand(40, 12), *views[1:]]
    found = []
    for given in (plain, views):
        leaves = [each.detach().requires_grad_() for each in given]
        y = cmm(*leaves, shape)
        found.append([y.detach(), *torch.autograd.grad(y.sum(), leaves)])
    for a, b in zip(*found, strict=True):
        assert torch.equal(a, b)
    many = torch.stack([x, 2 * x])
    assert torch.equal(
        torch.func.vmap(lambda x: cmm(x, w_in, b_in, w_out, shape))(many),
        torch.stack([cmm(each, w_in, b_in, w_out, shape) for each in many]),
    )


@native
def test_choice() -> None:
    for dtype, layout, name in (
        (torch.float32, "2x3", "native"),
        (torch.bfloat16, "1x3", "native"),
        (torch.float64, "1x3", "gather"),
        (torch.float32, "9x0", "masked"),
    ):
        x, w_in, _, _, shape = arguments(layout, dtype=dtype)
        assert choose(x, w_in, shape) == name


def test_missing_library_is_told_once_and_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "MISSING", "it was not built")
    library.warn_if_missing.cache_clear()
    with pytest.warns(UserWarning, match="'gather' runs in their place: it was not built"):
        y = cmm(*arguments())
    torch.testing.assert_close(y, cmm(*arguments(), implementation="reference"))
    library.warn_if_missing.cache_clear()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("activation", list(ACTIVATIONS))
@pytest.mark.parametrize("count", [1, 40])
def test_nan_and_infinity(count: int, activation: str, value: float) -> None:
    """As the reference has it: NaN goes left and gives NaN, infinity what its activation gives; tokens beside it are left alone."""
    for dtype in (torch.float32, torch.bfloat16):
        x, *rest = arguments("2x4", 20, count, activation=activation, dtype=dtype)
        x[0, 3] = x[-1, 0] = value
        expected = cmm(x, *rest, activation, implementation="reference")
        assert not expected[[0, -1]].isfinite().all()
        for each in registry.IMPLEMENTATIONS:
            if each.role != "cmm" or "cpu" not in each.devices or each.unavailable() or dtype not in each.dtypes or each.bits8:
                continue
            y = cmm(x, *rest, activation, implementation=each.name)
            slack = 0.05 if dtype == torch.bfloat16 else 1e-4
            torch.testing.assert_close(
                y, expected, equal_nan=True, rtol=slack, atol=slack, msg=lambda told, name=each.name: f"{name}: {told}"
            )
            if value != value and each.paths:
                assert (each.paths(random_layer(parse_layout("2x4"), 20, dtype=dtype), x)[0] == torch.tensor([0, 1, 3, 7, 15])).all()


def test_forced_paths_are_followed_by_both_torch_forms() -> None:
    x, w_in, b_in, w_out, shape = arguments("2x3", 12, 6)
    forced = torch.zeros(6, 2, 4, dtype=torch.int64)
    for level in range(3):
        forced[:, :, level + 1] = 2 * forced[:, :, level] + 1 + torch.randint(0, 2, (6, 2), generator=torch.Generator().manual_seed(level))
    outputs = [form(x, w_in, b_in, w_out, shape, "gelu", paths=forced) for form in (torch_forms.masked, torch_forms.gather)]
    torch.testing.assert_close(*outputs)
    assert not torch.allclose(outputs[0], cmm(x, w_in, b_in, w_out, shape))
    with pytest.raises(ValueError, match="paths is"):
        torch_forms.gather(x, w_in, b_in, w_out, shape, "gelu", paths=forced[:, :1])


@native
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.integration)])
def test_compile_and_export_keep_one_graph(backend: str) -> None:
    x, w_in, b_in, w_out, shape = arguments("2x3", 12, 6)

    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w_in, self.b_in, self.w_out = (torch.nn.Parameter(each.clone()) for each in (w_in, b_in, w_out))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + cmm(2 * torch.tanh(x), self.w_in, self.b_in, self.w_out, shape)

    eager, compiled = Layer(), Layer()
    run = torch.compile(compiled, fullgraph=True, backend=backend)
    for count in (6, 9):
        batch = torch.randn(count, 12)
        torch.testing.assert_close(run(batch), eager(batch))
    run(x).square().sum().backward()
    eager(x).square().sum().backward()
    for name, parameter in eager.named_parameters():
        torch.testing.assert_close(dict(compiled.named_parameters())[name].grad, parameter.grad / 1)
    exported = torch.export.export(eager, (x,), dynamic_shapes=({0: torch.export.Dim("tokens")},))
    batch = torch.randn(11, 12)
    torch.testing.assert_close(exported.module()(batch), eager(batch))


@native
def test_operator_passes_opcheck() -> None:
    x, w_in, b_in, w_out, shape = arguments("2x2", 8, 7)
    leaves = [each.requires_grad_() for each in (x, w_in, b_in, w_out)]
    torch.library.opcheck(torch.ops.fffsweep.cmm.default, (*leaves, shape.levels, 4))
    torch.library.opcheck(torch.ops.fffsweep.cmm.default, (x, w_in, None, w_out, shape.levels, 4))


def test_threads_may_call_at_once() -> None:
    """Each with outputs from the pool of large ones, and with gradients."""
    x, w_in, b_in, w_out, shape = arguments("1x6", 256, 1100)
    results = {}

    def both() -> list[torch.Tensor]:
        leaves = [each.clone().requires_grad_() for each in (x, w_in, b_in, w_out)]
        y = cmm(*leaves, shape)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    def run(i: int) -> None:
        results[i] = [both() for _ in range(10)]

    expected = both()

    threads = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for each in threads:
        each.start()
    for each in threads:
        each.join()
    assert sum(len(each) for each in results.values()) == 40
    for found in (each for several in results.values() for each in several):
        assert torch.equal(found[0], expected[0])
        for got, want in zip(found[1:], expected[1:], strict=True):  # summed in another order where the threads differ in number
            torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


def test_autocast_casts_as_for_a_dense_layer() -> None:
    x, w_in, b_in, w_out, shape = arguments("2x3", 64, 70)
    weights = [each.clone().requires_grad_() for each in (w_in, b_in, w_out)]
    linear = torch.nn.Linear(64, 64)
    with torch.autocast("cpu", torch.bfloat16):
        got, after_another = cmm(x, *weights, shape), cmm(linear(x), *weights, shape)
        assert cmm(x.double(), *(each.double() for each in (w_in, b_in, w_out)), shape).dtype == torch.float64
        compiled = torch.compile(lambda x: cmm(x, *weights, shape), backend="aot_eager", fullgraph=True)
        assert torch.equal(compiled(x), got)
    assert got.dtype == after_another.dtype == torch.bfloat16
    torch.testing.assert_close(got, cmm(*(each.bfloat16() for each in (x, w_in, b_in, w_out)), shape), rtol=0, atol=0)
    (got.float().sum() + after_another.float().sum()).backward()
    for each in (*weights, linear.weight):
        assert each.grad is not None
        assert each.grad.dtype == torch.float32
        assert each.grad.abs().sum() > 0


@native
@pytest.mark.parametrize("layout", ["1x9", "2x3"])
@pytest.mark.parametrize("wanted", [("x",), ("x", "w_in"), ("w_out",), ("b_in",), ("x", "b_in", "w_out")])
def test_gradients_that_are_not_wanted_change_no_other(layout, wanted) -> None:
    x, w_in, b_in, w_out, shape = arguments(layout, 64, 600)

    def gradients(names):
        given = {"x": x, "w_in": w_in, "b_in": b_in, "w_out": w_out}
        given = {name: value.clone().requires_grad_(name in names) for name, value in given.items()}
        cmm(*given.values(), shape).sin().sum().backward()
        return {name: value.grad for name, value in given.items()}

    found, whole = gradients(wanted), gradients(("x", "w_in", "b_in", "w_out"))
    for name, value in found.items():
        assert (value is not None) == (name in wanted)
        assert value is None or torch.equal(value, whole[name])


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork")
def test_fork_after_use() -> None:
    arguments_ = arguments("1x5", 512, 700)  # large enough for both threads and for the pool of outputs
    expected = cmm(*arguments_)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)  # the parent's pool does not survive a fork, for any torch operator
        os._exit(0 if torch.equal(cmm(*arguments_), expected) else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@native
def test_leaves_of_another_tree_are_refused() -> None:
    x, w_in, b_in, w_out, shape = arguments("1x3", 12, 5)
    y, logits, leaves = torch.ops.fffsweep.cmm_train(x, w_in, b_in, w_out, shape.levels, 4)
    for wrong in (-1, 6, 15):
        leaves[2, 0] = wrong
        with pytest.raises(ValueError, match=f"leaf {wrong} is not one of a tree of 4 levels"):
            torch.ops.fffsweep.cmm_backward(y, x, w_in, b_in, w_out, logits, leaves, shape.levels, 4)


@native
def test_backward_repeats_itself_bit_for_bit() -> None:
    x, w_in, b_in, w_out, shape = arguments("2x5", 40, 900)

    def gradients() -> tuple[torch.Tensor, ...]:
        leaves = [each.clone().requires_grad_() for each in (x, w_in, b_in, w_out)]
        return torch.autograd.grad(cmm(*leaves, shape).square().sum(), leaves)

    first = gradients()
    for _ in range(3):
        assert all(torch.equal(a, b) for a, b in zip(first, gradients(), strict=True))
