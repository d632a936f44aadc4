"""Training speed, on a size that takes a moment."""

import json

import pytest
import torch

from fffsweep.pipeline.bench import main


@pytest.mark.parametrize("device", [pytest.param("cpu", marks=pytest.mark.integration), pytest.param("cuda", marks=pytest.mark.gpu)])
def test_rows_of_every_variant(capsys, device):
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("there is no CUDA device")
    sizes = {"layout": "1x6", "hidden": 16, "num-layers": 1, "num-heads": 2, "vocabulary": 64, "sequence-length": 8, "batch": 2}
    where = [f"--device={device}", "--precision=bf16"]
    assert main([*(f"--{name}={value}" for name, value in sizes.items()), *where, "--threads=1", "--steps=2", "--json"]) == 0
    rows = {(row["phase"], row["variant"]): row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == [(phase, variant) for phase in ("pretrain", "finetune") for variant in ("dense", "masked", "cmm")]
    for (phase, _), row in rows.items():
        assert row["tokens_per_s"] > 0
        assert row["peak_rss_bytes"] > 1 << 20
        assert (row["device"], row["precision"], row["peak_device_bytes"] is None) == (device, "bf16", device == "cpu")
        for peer in ("dense", "masked"):
            assert row[f"speedup_vs_{peer}"] == pytest.approx(row["tokens_per_s"] / rows[phase, peer]["tokens_per_s"])


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
