"""Training speed, on a size that takes a moment."""

import json
from dataclasses import replace

import pytest
import torch

from fffsweep.kernels.gate import passes
from fffsweep.pipeline import bench, bench_model
from fffsweep.pipeline.bench import main

ROW = {"tokens_per_s": 1.0, "speedup_vs_dense": 1.0, "speedup_vs_masked": 1.0, "peak_rss_bytes": 1, "peak_device_bytes": None}
SMALL = [
    "--layout=1x6",
    "--hidden=16",
    "--num-layers=1",
    "--num-heads=2",
    "--vocabulary=64",
    "--sequence-length=8",
    "--batch=2",
    "--threads=1",
    "--steps=2",
]


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.integration), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_every_variant(tmp_path, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    target = tmp_path / "deep" / "rows.json"
    assert main([*SMALL, f"--device={device}", "--precision=bf16", f"--json={target}"]) == 0
    rows = {(row["phase"], row["variant"]): row for row in json.loads(target.read_text())["rows"]}
    assert list(rows) == [(phase, variant) for phase in ("pretrain", "finetune") for variant in ("dense", "masked", "cmm")]
    for (phase, _), row in rows.items():
        assert row["verified"]
        assert row["tokens_per_s"] > 0
        assert row["peak_rss_bytes"] > 1 << 20
        assert (row["device"], row["precision"], row["peak_device_bytes"] is None) == (device, "bf16", device == "cpu")
        for peer in ("dense", "masked"):
            assert row[f"speedup_vs_{peer}"] == pytest.approx(row["tokens_per_s"] / rows[phase, peer]["tokens_per_s"])


@pytest.mark.parametrize("wrong", ["dense", "masked", "cmm"])
def test_a_variant_that_is_wrong_has_its_times_marked(wrong, monkeypatch, capsys):
    def broken(each, weights, x, dtype, **how):
        layer = "dense" if weights.shape.depth == 0 else "masked" if each.name == "masked" else "cmm"
        if layer == wrong:
            right = each.prepare
            each = replace(each, prepare=lambda weights: lambda x: right(weights)(x) * 1.01)
        return passes(each, weights, x, dtype, **how)

    monkeypatch.setattr(bench_model, "passes", broken)
    monkeypatch.setattr(bench, "_time_phase", lambda case, phase: [ROW | {"phase": phase, "variant": name} for name in bench.VARIANTS])
    assert main(SMALL) == 1
    marked = [line.split()[1] for line in capsys.readouterr().out.splitlines() if "GATE FAILED" in line]
    assert marked == [wrong] * 2


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("--layout=11", "expected trees x depth"),
        ("--device=gpu", "device='gpu': expected cpu or cuda"),
        ("--precision=fp16", "precision='fp16': expected float32 or bf16"),
    ],
)
def test_what_is_not_there_is_refused(option, message, capsys):
    assert main([option]) == 2
    assert message in capsys.readouterr().err


def test_a_gpu_that_is_not_there_is_refused(capsys, monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    assert main(["--device=cuda", "--precision=bf16"]) == 2
    assert "torch finds no CUDA device here" in capsys.readouterr().err
