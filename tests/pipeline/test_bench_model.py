"""The whole-model benchmark: its rows, its bound and its refusals."""

import json

import pytest

from fffsweep.pipeline import bench_model

SMALL = ["--layout", "1x3", "--hidden", "16", "--num-layers", "1", "--num-heads", "2", "--vocabulary", "50", "--sequence-length", "8"]


def test_rows_name_the_bound(tmp_path, capsys) -> None:
    target = tmp_path / "deep" / "model.json"
    assert bench_model.main([*SMALL, "--batch", "1,2", "--min-time", "0.01", "--json", str(target)]) == 0
    rows = json.loads(target.read_text())["rows"]
    assert [(row["batch"], row["variant"]) for row in rows] == [(b, v) for b in (1, 2) for v in ("dense", "cmm", "none")]
    for row in rows:
        found = {each["variant"]: each["ms"] for each in rows if each["batch"] == row["batch"]}
        assert row["fraction_of_bound"] == pytest.approx(found["none"] / row["ms"])
        assert row["speedup_vs_dense"] == pytest.approx(found["dense"] / row["ms"])
    assert [row["verified"] for row in rows] == [None, True, None] * 2
    assert "of the bound" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], "--batch 0: expected integers >= 1"),
        (["--batch", "two"], "two"),
        (["--dtype", "float7"], "dtype='float7': expected float32 or bfloat16"),
        (["--hidden", "10", "--num-heads", "3"], "expected a multiple of num_heads=3"),
        (["--layout", "wide"], "layout 'wide'"),
    ],
)
def test_wrong_arguments_are_told(arguments: list[str], message: str, capsys) -> None:
    assert bench_model.main(arguments) == 2
    assert message in capsys.readouterr().err
