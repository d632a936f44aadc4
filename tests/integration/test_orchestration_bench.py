"""`fffsweep bench --suite orchestration`, small: every row is whole, and the study that it leaves is sound."""

import json

import pytest

from fffsweep.sweeps.bench import NUM_STAGES, main
from fffsweep.sweeps.bench_peer import run

pytestmark = [pytest.mark.integration, pytest.mark.slow]


def test_rows(tmp_path, capsys):
    assert main(["--trials", "4", "--no-peer", "--json", str(tmp_path / "rows.json"), "--results", str(tmp_path / "results")]) == 0
    answer = json.loads((tmp_path / "rows.json").read_text())
    (row,) = answer["rows"]
    assert (row["trials"], row["stages"]) == (4, 4 * NUM_STAGES + 1)
    assert row["overhead_ms_per_stage"] > 0
    assert row["driver_rss_bytes"] >= row["driver_rss_half_bytes"] > 10**7
    assert row["resume_s"] > 0
    assert answer["provenance"]["machine"]["cpu"]


def test_the_peer_runs(tmp_path):
    assert run(2, 2, 3, tmp_path) > 0
