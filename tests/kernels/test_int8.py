"""8-bit weights: rounding, what the kernel computes with them, refusals, and the accuracy that is told."""

from dataclasses import replace

import pytest
import torch

from fffsweep.kernels import int8, library, torch_forms
from fffsweep.kernels.layer import LayerWeights, random_layer
from fffsweep.kernels.shape import parse_layout

native = pytest.mark.skipif(library.why_missing() is not None, reason=str(library.why_missing()))


def layer(layout: str = "2x3", hidden: int = 24, **options: object):
    return random_layer(parse_layout(layout), hidden, **options)


def tokens(count: int, hidden: int = 24) -> torch.Tensor:
    return torch.randn(count, hidden, generator=torch.Generator().manual_seed(5))


def test_a_row_is_rounded_by_half_a_step_at_most() -> None:
    weights = layer()
    weights.w_out[1, 4] = 0
    rounded = int8.quantise(weights)
    plain = rounded.dequantised()
    for exact, found, scale in ((weights.w_in, plain.w_in, rounded.scale_in), (weights.w_out, plain.w_out, rounded.scale_out)):
        assert ((exact - found).abs() <= 0.5001 * scale.unsqueeze(-1)).all()
    assert rounded.w_in.abs().amax(dim=-1).eq(127).all()
    assert plain.w_out[1, 4].eq(0).all()
    with pytest.raises(ValueError, match="w_in holds NaN or infinite"):
        int8.quantise(replace(weights, w_in=weights.w_in / 0))


@native
@pytest.mark.parametrize("count", [0, 1, 2, 5, 70, 1500])
def test_bfloat16_tokens_and_leading_dimensions(count: int) -> None:
    rounded = int8.quantise(layer("1x7", 40))
    x = tokens(count, 40).bfloat16()
    y = int8.cmm_int8(x, rounded)
    assert y.dtype == torch.bfloat16
    wide = int8.cmm_int8(x.float(), rounded)  # the same paths: tokens are rounded alike
    torch.testing.assert_close(y.float(), wide, rtol=2**-7, atol=1e-6)
    assert torch.equal(int8.cmm_int8(x.view(-1, 1, 40), rounded).view(-1, 40), y)


@native
def test_sums_of_the_largest_products_do_not_overflow() -> None:
    """A long token of equal elements against rows of 127: the case in which 32-bit sums grow fastest."""
    shape, hidden = parse_layout("1x1"), 300_000
    ones = torch.ones(1, 3, hidden)
    rounded = int8.quantise(LayerWeights(ones, None, ones.clone(), shape, "identity"))
    for count in (1, 9):
        for isa in library.ISA_NAMES:
            if library.missing_isa(isa) is None:
                y = int8.cmm_int8(torch.ones(count, hidden), rounded, isa=isa)
                torch.testing.assert_close(y, torch.full_like(y, 2.0 * hidden), rtol=1e-3, atol=0)


@native
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_tokens_that_are_not_finite_go_left_and_become_nan(value: float) -> None:
    rounded, x = int8.quantise(layer("1x4")), tokens(40)
    expected = int8.cmm_int8(x, rounded)
    x[7, 3] = x[39, 23] = value
    y = int8.cmm_int8(x, rounded)
    clean = [i for i in range(40) if i not in (7, 39)]
    torch.testing.assert_close(y[clean], expected[clean])
    assert y[[7, 39]].isnan().all()
    assert (int8.paths(x, rounded)[[7, 39], 0] == torch.tensor([0, 1, 3, 7, 15])).all()
    assert int8.cmm_int8(x[7:8], rounded).isnan().all()


@pytest.mark.parametrize(
    ("x", "message"),
    [
        (torch.zeros(3, 5), r"x has shape \[3, 5\]: expected \[..., 24\]"),
        (torch.zeros(3, 24, dtype=torch.float64), "x is torch.float64: expected torch.float32 or torch.bfloat16"),
        (torch.zeros(3, 24, device="meta"), "x is on meta, weights on cpu: expected cpu"),
        (torch.zeros(3, 24, requires_grad=True), "x requires a gradient: 8-bit weights have no backward pass"),
    ],
)
def test_wrong_tokens_are_told(x: torch.Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        int8.cmm_int8(x, int8.quantise(layer()))


def test_without_the_library_the_portable_form_runs_after_a_warning(monkeypatch: pytest.MonkeyPatch) -> None:
    rounded, x = int8.quantise(layer()), tokens(9)
    monkeypatch.setattr(library, "MISSING", "it was not built")
    library.warn_if_missing.cache_clear()
    with pytest.warns(UserWarning, match="it was not built"):
        y = int8.cmm_int8(x, rounded)
    plain = rounded.dequantised()
    torch.testing.assert_close(y, torch_forms.masked(x, plain.w_in, plain.b_in, plain.w_out, plain.shape, plain.activation))
    library.warn_if_missing.cache_clear()


@native
def test_the_operator_is_traced_into_one_graph() -> None:
    rounded, x = int8.quantise(layer()), tokens(6)
    run = torch.compile(lambda x: int8.cmm_int8(x, rounded), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(run(x), int8.cmm_int8(x, rounded))
    arguments = (x, rounded.w_in, rounded.scale_in, rounded.b_in, rounded.w_out, rounded.scale_out, rounded.shape.levels, 4)
    for leaves in (False, True):
        torch.library.opcheck(torch.ops.fffsweep.cmm_int8.default, (*arguments, leaves))


def test_accuracy_is_told(capsys) -> None:
    found = int8.accuracy(layer("1x6", 64), tokens(500, 64))
    assert 0 < found["path_flips_percent"] < 10
    assert 0 < found["error_same_path"] < 0.03
    assert found["error_same_path"] < found["error"] < 0.6
    assert int8.main(["--layout", "1x3", "--hidden", "16", "--tokens", "100"]) == 0
    assert "% of the paths differ" in capsys.readouterr().out
    assert int8.main(["--layout", "three"]) == 2
