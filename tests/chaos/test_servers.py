"""MLflow and PostgreSQL go away and come back: the driver must not fail, and nothing may be missing afterwards."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fffsweep.sweeps.verify import verify
from tests.chaos.study import Sweep
from tests.integration.servers import Postgres, free_port, has_postgres, mlflow_server, postgres

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
AWAY_S = float(os.environ.get("FFFSWEEP_CHAOS_AWAY_S", "30"))
Table = dict[str, Any]


@pytest.fixture
def database() -> Iterator[Postgres]:
    if not has_postgres():
        pytest.skip("no PostgreSQL: apt-get install postgresql")
    with postgres() as running:
        yield running


def test_the_mlflow_server_is_gone(sweep: Sweep, expected: Table, chance: Random, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    backend, port = f"sqlite:///{tmp_path}/server.db", free_port()
    monkeypatch.setenv("FFFSWEEP_MLFLOW_URI", f"http://127.0.0.1:{port}")
    with contextlib.ExitStack() as server:
        server.enter_context(mlflow_server(backend, tmp_path, port))
        driver = sweep.start()
        sweep.wait_running(driver, "pretrain", chance.choice([1, 1, 2]))
        server.close()
        time.sleep(AWAY_S)
        assert driver.poll() is None or driver.returncode == 0, sweep.output.read_text()[-3000:]
        with mlflow_server(backend, tmp_path, port):
            if "MLflow was not told of" in sweep.finish(driver):  # it ended before the server was back: its last line says what to do
                assert verify("chaos", sweep.results, repair=True).problems
            sweep.check(expected)


@pytest.mark.postgres
def test_postgresql_is_restarted(
    sweep: Sweep, expected: Table, chance: Random, database: Postgres, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both MLflow's server and Optuna stand on it."""
    monkeypatch.setenv("FFFSWEEP_OPTUNA_URL", database.url("optuna"))
    with mlflow_server(database.url("mlflow"), tmp_path) as address:
        monkeypatch.setenv("FFFSWEEP_MLFLOW_URI", address)
        driver = sweep.start()
        sweep.wait_running(driver, None, chance.randrange(1, 6))
        database.stop()
        time.sleep(chance.uniform(0, 3))
        database.start()
        sweep.finish(driver)
        sweep.check(expected)
