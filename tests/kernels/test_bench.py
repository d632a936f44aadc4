"""The benchmark's command line and the rows it writes."""

import json

import pytest

from fffsweep.kernels import bench, registry
from fffsweep.kernels.bench_report import compare

KEYS = [
    "suite",
    "layout",
    "hidden",
    "tokens",
    "dtype",
    "threads",
    "mode",
    "device",
    "direction",
    "role",
    "implementation",
    "ns_per_token",
    "q20",
    "q80",
    "speedup_vs_torch_dense",
    "speedup_vs_best_dense",
    "best_dense",
    "speedup_vs_same_dtype_dense",
    "macs_per_token",
    "flop_limit",
    "fraction_of_limit",
    "path_flips",
    "verified",
]


def test_a_run_writes_json_and_markdown(tmp_path, capsys) -> None:
    arguments = ["--layout", "2x3", "--hidden", "16", "--tokens", "5,40", "--min-time", "0.01"]
    files = {name: tmp_path / "deep" / f"out.{name}" for name in ("json", "markdown")}
    assert bench.main([*arguments, *(part for name, path in files.items() for part in (f"--{name}", str(path)))]) == 0
    result = json.loads(files["json"].read_text())
    assert result["schema"] == 1
    assert {"commit", "torch", "cpu", "command"} <= set(result["provenance"])
    assert all(set(KEYS) <= set(row) for row in result["rows"])
    for tokens in (5, 40):
        rows = [row for row in result["rows"] if row["tokens"] == tokens]
        assert [row["best"] for row in rows].count(True) == 1
        assert all(row["verified"] for row in rows if row["best"])
        assert {"cmm", "dense"} == {row["role"] for row in rows}
    assert files["markdown"].read_text().count("| 2x3 |") == 2
    assert "torch dense" in capsys.readouterr().out


def test_results_are_named_by_machine_and_date(tmp_path, capsys) -> None:
    assert bench.main(["--layout", "1x2", "--hidden", "8", "--tokens", "4", "--min-time", "0.01", "--results", str(tmp_path)]) == 0
    [table], [rows] = tmp_path.glob("cmm_cpu_*.md"), tmp_path.glob("cmm_cpu_*.json")
    assert table.stem == rows.stem
    assert table.stem.endswith(json.loads(rows.read_text())["provenance"]["date"][:10])
    assert str(table) in capsys.readouterr().out


def test_a_case_without_a_verified_implementation_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = registry.Implementation("wrong", "cmm", lambda weights: lambda x: x + 1)
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (wrong, registry.find("torch_dense")))
    assert bench.main(["--layout", "1x2", "--hidden", "8", "--tokens", "4", "--min-time", "0.01"]) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--layout", "eleven"], "layout 'eleven'"),
        (["--tokens", "0"], "--tokens 0: expected an integer >= 1"),
        (["--dtype", "float7"], "--dtype float7: expected one of float32"),
        (["--mode", "warm"], "--mode warm: expected one of hot, cold"),
    ],
)
def test_wrong_arguments_are_told(arguments: list[str], message: str, capsys) -> None:
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_speedups_are_against_the_right_dense_layers() -> None:
    def row(role: str, name: str, dtype: str, ns: float | None, verified: bool = True) -> dict:
        return {"role": role, "implementation": name, "dtype": dtype, "ns_per_token": ns, "verified": verified}

    rows = compare(
        [
            row("cmm", "native", "bfloat16", 10.0),
            row("cmm", "gather", "bfloat16", 40.0),
            row("dense", "torch_dense", "float32", 1000.0),
            row("dense", "torch_dense", "bfloat16", 500.0),
            row("dense", "padded", "bfloat16", 400.0),
            row("dense", "fast_but_wrong", "bfloat16", None, verified=False),
        ]
    )
    assert [each["best"] for each in rows] == [True, False, False, False, False, False]
    assert rows[0]["speedup_vs_torch_dense"] == 100
    assert rows[0]["speedup_vs_same_dtype_dense"] == 50
    assert (rows[0]["speedup_vs_best_dense"], rows[0]["best_dense"]) == (40, "padded")
