"""The benchmark's command line and the rows it writes."""

import json

import pytest
import torch

from fffsweep.kernels import bench, registry
from fffsweep.kernels.bench_report import compare, median_run

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


def test_runs_pictures_saved_activations_and_forced_implementations(tmp_path) -> None:
    pytest.importorskip("matplotlib")
    torch.save(torch.randn(30, 16), tmp_path / "saved.pt")
    arguments = ["--layout", "1x3", "--hidden", "16", "--tokens", "1,40", "--dtype", "float32,int8", "--min-time", "0.01", "--runs", "3"]
    arguments += ["--activations", str(tmp_path / "saved.pt"), "--plot", str(tmp_path / "a.png"), "--json", str(tmp_path / "a.json")]
    assert bench.main(arguments) == 0
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert {row["run"] for row in rows} == {0, 1, 2}
    for tokens, dtype in ((1, "float32"), (40, "float32"), (1, "int8"), (40, "int8")):
        best = [row for row in rows if (row["tokens"], row["dtype"], row["best"]) == (tokens, dtype, True)]
        assert len(best) == 1
        runs = [row for row in rows if (row["tokens"], row["implementation"], row["dtype"]) == (tokens, best[0]["implementation"], dtype)]
        assert len(runs) == 3
    assert all(row["memory_limit"] > 0 for row in rows)
    assert all((row["flop_limit"] is None) == (row["dtype"] == "int8") for row in rows)
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    assert bench.main(["--layout", "1x3", "--hidden", "8", "--tokens", "4", "--implementation", "gather", "--min-time", "0.01"]) == 0


def test_the_yardstick_is_timed_however_slow_its_first_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench.timing, "shortlist", lambda calls, within: ([name for name in calls if "torch_dense/" not in name], {}))
    rows = bench.run_case(next(bench._cases(bench._parse(["--layout", "1x3", "--hidden", "16", "--tokens", "4"])[0])), min_time_s=0.01)
    assert all(row["speedup_vs_torch_dense"] > 0 for row in rows if row["ns_per_token"] is not None)
    assert any(row["best"] for row in rows)


def test_a_dtype_without_a_dense_layer_is_told(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path) -> None:
    without = tuple(each for each in registry.IMPLEMENTATIONS if each.name != "torch_int8_dynamic")
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", without)
    arguments = ["--layout", "1x2", "--hidden", "16", "--tokens", "4", "--dtype", "float64,int8", "--min-time", "0.01"]
    code = bench.main([*arguments, "--markdown", str(tmp_path / "a.md")])
    told = capsys.readouterr().out.splitlines()
    assert "float64" in told[0]
    assert "x torch_dense" in told[0]
    if registry.find("native_int8").unavailable() is None:
        assert code == 0
        assert "no dense layer of the dtype" in told[1]
        assert "| - |" in (tmp_path / "a.md").read_text()


def test_the_median_run_is_shown() -> None:
    def run(speedup: float | None) -> list[dict]:
        return [{"best": speedup is not None, "speedup_vs_torch_dense": speedup}]

    runs = [run(3.0), run(1.0), run(2.0)]
    assert median_run(runs) is runs[2][0]
    assert [rows[0]["best"] for rows in runs] == [False, False, True]
    unsound = [run(3.0), run(None)]
    assert median_run(unsound) is None
    assert not any(rows[0]["best"] for rows in unsound)


def test_every_suite_is_made_of_cases() -> None:
    for suite in bench.SUITES:
        groups = bench._parse(["--suite", suite, "--min-time", "3"])
        assert all(group.min_time == 3 for group in groups)
        assert len({case for group in groups for case in bench._cases(group)}) >= 3


def test_results_are_named_by_machine_and_date(tmp_path, capsys) -> None:
    assert bench.main(["--layout", "1x2", "--hidden", "8", "--tokens", "4", "--min-time", "0.01", "--results", str(tmp_path)]) == 0
    [table], [rows] = tmp_path.glob("cmm_cpu_*.md"), tmp_path.glob("cmm_cpu_*.json")
    assert table.stem == rows.stem
    assert table.stem.endswith(json.loads(rows.read_text())["provenance"]["date"][:10])
    assert str(table) in capsys.readouterr().out


def test_a_yardstick_that_fails_the_gate_is_told(monkeypatch: pytest.MonkeyPatch, capsys, tmp_path) -> None:
    wrong = registry.Implementation("torch_dense", "dense", lambda weights: lambda x: x + 1)
    monkeypatch.setattr(registry, "IMPLEMENTATIONS", (registry.find("gather"), wrong))
    files = ["--json", str(tmp_path / "a.json"), "--markdown", str(tmp_path / "a.md")]
    assert bench.main(["--layout", "1x2", "--hidden", "8", "--tokens", "4", "--min-time", "0.01", *files]) == 0
    assert "no verified torch dense float32, no dense layer of the dtype" in capsys.readouterr().out
    rows = json.loads((tmp_path / "a.json").read_text())["rows"]
    assert [(row["implementation"], row["verified"], row["speedup_vs_torch_dense"]) for row in rows] == [
        ("gather", True, None),
        ("torch_dense", False, None),
    ]
    assert "| - | - |" in (tmp_path / "a.md").read_text()


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
        (["--runs", "0"], "--runs 0: expected an integer >= 1"),
        (["--implementation", "nativ"], "implementation='nativ': expected one of native,"),
        (["--implementation", "torch_dense"], "--implementation torch_dense: it is a dense form; expected forms of CMM that can run here"),
    ],
)
def test_wrong_arguments_are_told(arguments: list[str], message: str, capsys) -> None:
    assert bench.main(arguments) == 2
    assert message in capsys.readouterr().err


def test_activations_of_another_size_are_refused(tmp_path, capsys) -> None:
    torch.save(torch.randn(30, 8), tmp_path / "saved.pt")
    assert bench.main(["--layout", "1x3", "--hidden", "16", "--tokens", "4", "--activations", str(tmp_path / "saved.pt")]) == 2
    assert "holds [30, 8], expected a tensor [any, 16], the size that --hidden says" in capsys.readouterr().err


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
