"""A machine with neither ray nor mlflow nor optuna, such as an air-gapped GPU box, runs a grid; its results are imported elsewhere."""

import json
import os
import subprocess
import sys
from pathlib import Path

import optuna
import pytest

from fffsweep.dashboards.queries import load_study
from fffsweep.sweeps.backends import sqlite_url
from fffsweep.sweeps.import_results import import_results
from fffsweep.sweeps.verify import verify

CHECKOUT = Path(__file__).resolve().parent.parent.parent
NAME = "tiny-directory"
WITHOUT = """
import sys
from importlib.machinery import PathFinder

gone, find = ("ray", "mlflow", "optuna"), PathFinder.find_spec
PathFinder.find_spec = staticmethod(lambda name, *where: None if name.partition(".")[0] in gone else find(name, *where))
from fffsweep.cli import main

try:
    main()
finally:
    assert not sys.modules.keys() & set(gone)
"""


def without_servers(config, results, *arguments):
    command = [sys.executable, "-P", "-c", WITHOUT, "run", str(config), "--executor", "inline", "--results", str(results), *arguments]
    return subprocess.run(command, cwd=CHECKOUT, env=dict(os.environ), text=True, capture_output=True, timeout=240)


@pytest.fixture
def config(tiny_directory_config, tmp_path):
    path = tmp_path / f"{NAME}.yaml"
    path.write_text(json.dumps(tiny_directory_config.resolved()))  # JSON is YAML
    return path


@pytest.mark.slow
def test_a_grid_runs_and_is_told_of_where_it_is_imported(config, swept, here, tmp_path):
    ran = without_servers(config, tmp_path / "there")
    assert ran.returncode == 0, ran.stderr
    assert "mlflow and optuna are not installed here" in ran.stdout + ran.stderr
    assert "mlflow ui" not in ran.stdout
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["reports", "store", "studies"]
    quality = {trial.id: trial.metrics["quality/avg"] for trial in load_study(swept, NAME).trials}
    assert import_results(tmp_path / "there", here).problems == ()
    assert {trial.id: trial.metrics["quality/avg"] for trial in load_study(here, NAME).trials} == quality
    assert verify(NAME, here).problems == ()
    (study,) = optuna.get_all_study_summaries(sqlite_url(here / "optuna.db"))
    assert study.n_trials == 2


def test_a_sampler_of_optuna_is_refused_before_anything_is_done(config, tmp_path):
    values = json.loads(config.read_text())
    space = {"stages.pretrain.learning_rate": {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}}
    config.write_text(json.dumps(values | {"sampler": "tpe", "search": {"num_trials": 2, "space": space}}))
    ran = without_servers(config, tmp_path / "there")
    assert ran.returncode == 2, ran.stderr
    assert ran.stderr.strip().splitlines()[-1] == (
        "sampler: tpe: optuna is not installed here; expected sampler: grid, or pip install optuna"
    )
    assert not (tmp_path / "there" / "studies").exists()
