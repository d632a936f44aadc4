"""The GPU kernels without a GPU: computed by Triton's interpreter on CPU tensors, and compiled for a device that is not there.

The interpreter takes a tenth of a second and more a program, so cases are few and small; each exercises a path of its own.
"""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fffsweep.kernels import registry
from fffsweep.kernels.gpu import bench, cases, naive, plan, timing
from fffsweep.kernels.gpu import check as gpu_check
from fffsweep.kernels.layer import LayerWeights, random_layer
from fffsweep.kernels.registry import Implementation
from fffsweep.kernels.shape import parse_layout
from fffsweep.kernels.verify import verify

pytestmark = [pytest.mark.integration, pytest.mark.triton]

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
FORMS = ("triton_walk", "triton_grouped")


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """Memory that nobody writes is NaN, or an absurd number: an output or a count that a kernel forgets cannot pass for right."""
    if DEVICE == "cpu":
        from tests.kernels import interpreted

        assert interpreted.triton is not None
    with cases.poisoned(DEVICE):
        yield


def tokens(count: int, hidden: int, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(seed)).to(DEVICE, dtype)


def layer(layout: str, hidden: int, dtype: torch.dtype = torch.float32, **options: object) -> LayerWeights:
    made = random_layer(parse_layout(layout), hidden, dtype=dtype, **options)
    bias = None if made.b_in is None else made.b_in.to(DEVICE)
    return replace(made, w_in=made.w_in.to(DEVICE), b_in=bias, w_out=made.w_out.to(DEVICE))


def check(implementation: Implementation, weights: LayerWeights, x: Tensor, *, backward: bool | None = None) -> None:
    backward = implementation.supports_backward if backward is None else backward
    verdict = verify(implementation, weights, x, backward=backward)
    assert verdict.verified, verdict.reason


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    ("form", "layout", "hidden", "count"),
    [
        ("triton_walk", "1x3", 24, 3),
        ("triton_walk", "2x5", 40, 2),
        ("triton_grouped", "1x0", 20, 5),
        ("triton_grouped", "1x3", 24, 19),
        ("triton_grouped", "2x5", 40, 18),
        ("triton_grouped", "1x7", 33, 17),
    ],
)
def test_layouts(form: str, layout: str, hidden: int, count: int, dtype: str) -> None:
    check(registry.find(form), layer(layout, hidden, DTYPES[dtype]), tokens(count, hidden, DTYPES[dtype]))


def test_walks_take_fewer_levels_at_once_when_tokens_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    from fffsweep.kernels.gpu import launch

    for at_once in (1, 2, 4):
        monkeypatch.setattr(launch, "levels_at_once", lambda tokens, at_once=at_once: at_once)
        check(registry.find("triton_walk"), layer("1x4", 24), tokens(2, 24))


def test_walks_read_long_rows_in_a_loop() -> None:
    check(registry.find("triton_walk"), layer("1x2", 300), tokens(2, 300))
    check(registry.find("triton_walk"), layer("1x2", 2100), tokens(2, 2100))


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_three_groups_of_levels(dtype: str) -> None:
    """1x15 has 16 levels: groups of 6, 5 and 5 on tensor cores, 4 of 4 otherwise, and buckets by the thousand."""
    weights = layer("1x15", 16, DTYPES[dtype])
    check(registry.find("triton_walk"), weights, tokens(2, 16, DTYPES[dtype]))
    check(registry.find("triton_grouped"), weights, tokens(5, 16, DTYPES[dtype]), backward=False)


def test_gradients_of_a_deep_tree() -> None:
    check(registry.find("triton_grouped"), layer("1x8", 16), tokens(3, 16))


def test_crowded_and_empty_buckets(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of the tokens on one path: buckets of several tiles and chunks beside empty ones."""
    from fffsweep.kernels.gpu import launch

    monkeypatch.setattr(launch, "CHUNK", 16)
    x = torch.cat([tokens(1, 20).repeat(40, 1), tokens(30, 20)])
    for layout in ("1x5", "1x3"):
        check(registry.find("triton_grouped"), layer(layout, 20), x)


def test_scans_in_several_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    from fffsweep.kernels.gpu import launch

    monkeypatch.setattr(launch, "SCAN", 4)
    monkeypatch.setattr(plan, "MAX_BLOCK_T", 16)
    check(registry.find("triton_grouped"), layer("1x5", 17), tokens(100, 17))


@pytest.mark.parametrize("activation", ["identity", "relu", "leaky_relu", "silu", "gelu_tanh"])
def test_activations(activation: str) -> None:
    weights = layer("1x3", 17, activation=activation, bias=activation == "relu")
    check(registry.find("triton_walk"), weights, tokens(2, 17))
    check(registry.find("triton_grouped"), weights, tokens(16, 17))


@pytest.mark.parametrize(("hidden", "count"), [(1, 3), (7, 1), (65, 2), (257, 3), (12, 0)])
def test_odd_sizes(hidden: int, count: int) -> None:
    weights = layer("1x2", hidden)
    for form in FORMS:
        check(registry.find(form), weights, tokens(count, hidden))


@pytest.mark.parametrize("form", ["triton_tf32", "triton_tf32x3"])
def test_other_products_of_float32(form: str) -> None:
    check(registry.find(form), layer("1x6", 24), tokens(18, 24))


def test_leading_dimensions_and_strides() -> None:
    weights, x = layer("1x2", 12), tokens(24, 12)
    for form in FORMS:
        implementation = registry.find(form)
        call = implementation.prepare(weights)
        assert torch.equal(call(x[:6].view(2, 3, 12)).view(6, 12), call(x[:6]))
        check(implementation, weights, tokens(12, 8).t()[:8].t()[:, ::1].repeat(1, 2)[:, 1:13])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_and_infinity(value: float) -> None:
    x, weights = tokens(6, 20), layer("1x4", 20)
    x[3, 3] = value
    expected = registry.find("gather").prepare(weights)(x)
    clean = [0, 1, 2, 4, 5]
    for form in FORMS:
        y = registry.find(form).prepare(weights)(x)
        torch.testing.assert_close(y[clean], expected[clean])
        if value != value:
            assert y[3].isnan().all()
            assert registry.find(form).paths(weights, x)[3, 0].tolist() == [0, 1, 3, 7, 15]


def test_gradients_repeat_bit_for_bit_and_reach_only_visited_rows() -> None:
    weights, x = layer("1x5", 16), tokens(5, 16)
    found = []
    for _ in range(2):
        leaf = LayerWeights(*(each.clone().requires_grad_() for each in (weights.w_in, weights.b_in, weights.w_out)), weights.shape, "gelu")
        registry.find("triton").prepare(leaf)(x).square().sum().backward()
        found.append((leaf.w_in.grad, leaf.b_in.grad, leaf.w_out.grad))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
    visited = registry.find("triton_grouped").paths(weights, x).unique().tolist()
    untouched = [node for node in range(weights.shape.nodes) if node not in visited]
    assert untouched
    assert all(each[0, untouched].abs().max() == 0 for each in found[0])
    assert (found[0][0][0, visited].abs().sum(dim=1) > 0).all()


def test_operators_keep_torch_s_contract() -> None:
    """Shapes for tracing, schemas and autograd registrations, as torch.library checks them; and one compiled graph."""
    weights, x = layer("1x2", 16), tokens(3, 16)
    leaves = [each.requires_grad_() for each in (x, weights.w_in, weights.b_in, weights.w_out)]
    checks = ("test_schema", "test_autograd_registration", "test_faketensor")
    torch.library.opcheck(torch.ops.fffsweep_gpu.cmm_train.default, (*leaves, 3, 4, "ieee"), test_utils=checks)
    inputs = [each.detach() for each in leaves]
    torch.library.opcheck(torch.ops.fffsweep_gpu.cmm.default, (*inputs, 3, 4, "walk", "ieee"), test_utils=checks)
    from fffsweep.kernels.gpu import operator

    run = torch.compile(lambda *arguments: operator.cmm(*arguments, 3, 4), fullgraph=True, backend="aot_eager")
    grads = [torch.autograd.grad(call(*leaves).square().sum(), leaves) for call in (run, lambda *a: operator.cmm(*a, 3, 4))]
    for compiled, eager in zip(*grads, strict=True):
        torch.testing.assert_close(compiled, eager)


def test_a_second_derivative_is_refused() -> None:
    weights, x = layer("1x2", 16), tokens(3, 16).requires_grad_()
    y = registry.find("triton").prepare(weights)(x)
    (grad,) = torch.autograd.grad(y.square().sum(), x, create_graph=True)
    with pytest.raises(NotImplementedError, match="no second derivative"):
        torch.autograd.grad(grad.square().sum(), x)


def test_every_kernel_compiles_for_a_device_that_is_not_here() -> None:
    """By Triton's own compiler and assembler, as launched for 1x11 at hidden 768: within its registers and shared memory."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, "-m", "fffsweep.kernels.gpu.compile", "--dtype", "bfloat16"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, env=environment, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    kernels = set(re.findall(r"\w+_kernel", done.stdout))
    assert len(kernels) == 9, kernels


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs nvcc")
def test_the_naive_kernel_compiles(tmp_path: Path) -> None:
    library = naive.compile_library(tmp_path, "90")
    assert library.stat().st_size > 0
    assert naive.compile_library(tmp_path, "90") == library


def test_the_device_s_cases_are_all_there_and_the_few_pass() -> None:
    every = list(cases.all_cases())
    assert {case.dtype for case in every} == set(DTYPES.values())
    assert {case.layout for case in every} >= {"1x11", "1x15", "7x0"}
    assert {0, 1} <= {case.tokens for case in every}
    assert cases.run(cases.Case("1x3", 17, 5, torch.float32), seed=3, device=DEVICE) == []


def test_a_wrong_kernel_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = replace(registry.find("triton_walk"), prepare=lambda weights: lambda x: x + 1, paths=None)
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (wrong,))
    (line,) = cases.run(cases.Case("1x3", 17, 5, torch.float32), seed=3, device=DEVICE)
    assert line.startswith("triton_walk Case(layout='1x3'")


@pytest.mark.skipif(DEVICE == "cuda", reason="make gpu-check runs it on the device")
def test_the_benchmark_s_rows_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything but the clock: gate, rows, floors, ratios and the table; times are made up."""
    made_up = iter(range(1, 1000))
    monkeypatch.setattr(bench, "DEVICE", "cpu")
    monkeypatch.setattr(timing, "once", lambda call: call() is None or 1e-3)
    monkeypatch.setattr(timing, "graphed", lambda call, repeats: call)
    monkeypatch.setattr(timing, "interleave", lambda calls, **k: {name: timing.summarise([1e-6 * next(made_up)]) for name in calls})
    monkeypatch.setattr(timing, "bandwidth_bytes_per_s", lambda: 1e12)
    monkeypatch.setattr(timing, "operations_per_s", lambda kind: 1e14)
    rows = bench.run_case("1x3", 16, 3, "float32", "forward", bench._parse(["--seed", "5"]))
    assert [row["best"] for row in rows].count(True) == 1
    best = next(row for row in rows if row["best"])
    assert best["role"] == "cmm"
    assert best["dtype"] == "float32"
    assert best["verified"]
    assert best["memory_floor_ns"] == pytest.approx((2 * 16 * 3 + 2 * 12 * 16) * 4 / 1e12 * 1e9 / 3)
    assert best["times_the_floor"] == pytest.approx(best["ns_per_token"] / max(best["memory_floor_ns"], best["arithmetic_floor_ns"]))
    assert {row["dtype"] for row in rows} == {"float32", "tf32"}
    assert {"triton_walk", "triton_grouped", "gather", "torch_dense", "torch_dense_tf32"} <= {row["implementation"] for row in rows}
    text = gpu_check.table(rows)
    assert best["implementation"] in text
    assert len(text.splitlines()) == 2


def test_without_a_device_the_check_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available():
        pytest.skip("there is a device")
    assert gpu_check.main([]) == 2
    assert "there is no CUDA device" in capsys.readouterr().err
    assert bench.main(["--device", "cuda"]) == 2
