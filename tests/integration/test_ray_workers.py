"""A pretraining that two workers share through Ray Train, within a sweep."""

from __future__ import annotations

import json

import pytest

from tests.sweeps.conftest import CONFIG, write_data

pytestmark = pytest.mark.integration


def test_a_sweep_whose_pretraining_two_workers_share(tmp_path, fffsweep):
    write_data(tmp_path)
    config = tmp_path / "shared.yaml"
    config.write_text(CONFIG.replace("PATH", str(tmp_path)).replace("batch_size: 4,", "batch_size: 4, micro_batch_size: 2,"))
    found = {}
    for workers in (1, 2):
        results = tmp_path / f"results-{workers}"
        options = ["--set", f"resources.pretrain.workers={workers}", "--set", "stages.benchmark_cpu=null"]
        options += [
            "--set",
            "objectives={quality/avg: maximize, ff/active_width: minimize}",
            "--set",
            "layouts=[1x3]",
            "--set",
            "controls=[]",
        ]
        fffsweep("run", str(config), "--results", str(results), *options)
        manifests = [json.loads(path.read_text()) for path in (results / "store" / "manifests").glob("*/*.json")]
        found[workers] = {each["key"]: each["metrics"] for each in manifests if each["run"]["stage"] == "pretrain"}
        assert not list((results / "store").rglob("answer.json")), "what the workers left is not cleared up"
    assert len(found[1]) == 1
    assert found[1].keys() == found[2].keys()
    for key, metrics in found[1].items():
        for name in ("mlm/train_loss", "mlm/train_accuracy", "mlm/validation_loss", "mlm/tokens"):
            assert found[2][key][name] == pytest.approx(metrics[name], rel=1e-4)
