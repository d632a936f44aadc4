"""Training speed, on a size that takes a moment."""

import json

import pytest

from fffsweep.pipeline.bench import main


@pytest.mark.slow
def test_rows_of_every_variant(capsys):
    sizes = {"layout": "1x3", "hidden": 16, "num-layers": 1, "num-heads": 2, "vocabulary": 64, "sequence-length": 8, "batch": 2}
    assert main([*(f"--{name}={value}" for name, value in sizes.items()), "--threads=1", "--steps=2", "--json"]) == 0
    rows = {row["variant"]: row for row in json.loads(capsys.readouterr().out)["rows"]}
    assert list(rows) == ["dense", "masked", "cmm"]
    for row in rows.values():
        assert row["tokens_per_s"] > 0
        assert row["peak_rss_bytes"] > 1 << 20
        assert row["speedup_vs_dense"] == pytest.approx(row["tokens_per_s"] / rows["dense"]["tokens_per_s"])
        assert row["speedup_vs_masked"] == pytest.approx(row["tokens_per_s"] / rows["masked"]["tokens_per_s"])


def test_a_bad_layout_is_refused(capsys):
    assert main(["--layout=11"]) == 2
    assert "expected trees x depth" in capsys.readouterr().err
