"""`verify` on a small real study: it finds each kind of damage, and what it mends is whole afterwards."""

import shutil
import sqlite3
from pathlib import Path

import optuna
import pytest

from fffsweep.pipeline.store import Store
from fffsweep.sweeps.config import ConfigError
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.optuna_study import sqlite_url
from fffsweep.sweeps.verify import verify


class Quiet:
    def update(self, record, num_running):
        pass

    def say(self, line):
        pass


@pytest.fixture(scope="module")
def swept(tmp_path_factory, tiny_directory_config):
    results = tmp_path_factory.mktemp("verified") / "results"
    assert run_sweep(tiny_directory_config, results, Quiet(), "inline").state == "complete"
    return results


@pytest.fixture
def results(swept, tmp_path):
    return Path(shutil.copytree(swept, tmp_path / "results"))


NAME = "tiny-directory"


def test_a_finished_study_is_sound(results):
    found = verify(NAME, results)
    assert found.problems == ()
    assert found.num_artifacts > found.num_stage_runs > 10


def test_a_damaged_artifact_is_named_and_its_result_withdrawn(results):
    store = Store(results / "store")
    manifest = next(m for m in map(store.get, store.keys()) if m.run.stage == "pretrain")
    store.object_path(manifest.artifacts["curve.jsonl"].sha256).write_text("{}")
    (problem,) = verify(NAME, results).problems
    assert "'curve.jsonl' of pretrain" in problem
    assert "damaged" in problem
    assert store.has(manifest.key)
    verify(NAME, results, repair=True)
    assert not store.has(manifest.key)


def test_lost_projections_are_rebuilt(results):
    with sqlite3.connect(results / "mlflow.db") as database:
        database.execute("update runs set status = 'RUNNING' where name = 'pretrain/0'")
        database.execute("delete from tags where key = 'fffsweep.key' and value in (select value from tags limit 1)")
    (results / "optuna.db").unlink()
    problems = verify(NAME, results).problems
    assert any("left RUNNING" in problem for problem in problems)
    assert any("Optuna holds None" in problem for problem in problems)
    verify(NAME, results, repair=True)
    assert verify(NAME, results).problems == ()
    (study,) = optuna.get_all_study_summaries(sqlite_url(results / "optuna.db"))
    assert study.n_trials == 2


def test_unknown_study(tmp_path):
    with pytest.raises(ConfigError, match="there is none"):
        verify("missing", tmp_path)
