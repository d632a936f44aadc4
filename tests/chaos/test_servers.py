"""The MLflow server goes away and comes back: the driver must not fail, and nothing may be missing afterwards."""

from __future__ import annotations

import contextlib
import os
import time
from pathlib import Path
from random import Random
from typing import Any

import pytest

from fffsweep.sweeps.verify import verify
from tests.chaos.study import Sweep
from tests.integration.servers import free_port, mlflow_server

pytestmark = [pytest.mark.chaos, pytest.mark.slow, pytest.mark.timeout(900)]
AWAY_S = float(os.environ.get("FFFSWEEP_CHAOS_AWAY_S", "30"))
Table = dict[str, Any]


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
