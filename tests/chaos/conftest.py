"""One cluster and one undisturbed sweep for all faults; seeded chance for the moments at which they strike."""

from __future__ import annotations

import os
import random
import secrets
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.chaos.cluster import ThreeNodes
from tests.chaos.study import Sweep, write_config

FAULTS = Path(__file__).parent / "faults"


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run each test --rounds times, each time by other chances; FFFSWEEP_CHAOS_SEED gives all of them anew."""
    if "chance" in metafunc.fixturenames:
        seed = os.environ.get("FFFSWEEP_CHAOS_SEED", "0")
        rounds = range(metafunc.config.getoption("rounds"))
        name = metafunc.function.__name__
        metafunc.parametrize("chance", [random.Random(f"{seed} {name} {each}") for each in rounds], ids=[f"round{each}" for each in rounds])


@pytest.fixture(scope="session")
def faults(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder in which a file called after a stage orders its next run to misbehave."""
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="session")
def cluster(faults: Path) -> Iterator[ThreeNodes]:
    environment = {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_ENABLE_UV_RUN_RUNTIME_ENV": "0",
        "RAY_USAGE_STATS_ENABLED": "0",
        "PYTHONPATH": os.pathsep.join(filter(None, (str(FAULTS), os.environ.get("PYTHONPATH")))),
        "FFFSWEEP_FAULTS": str(faults),
        "OMP_NUM_THREADS": "1",
    }
    before = dict(os.environ)
    nodes = ThreeNodes(environment)
    yield nodes
    nodes.stop()
    os.environ.clear()
    os.environ.update(before)


@pytest.fixture(scope="session")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("words"))


@pytest.fixture(scope="session")
def undisturbed(cluster: ThreeNodes, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Sweep:
    """The sweep as it ends when nothing happens to it."""
    sweep = Sweep(config, tmp_path_factory.mktemp("undisturbed") / "results", cluster.address)
    sweep.finish(sweep.start())
    sweep.check()
    return sweep


@pytest.fixture(scope="session")
def expected(undisturbed: Sweep) -> dict[str, Any]:
    """Non-timing columns of the undisturbed sweep."""
    return undisturbed.table()


@pytest.fixture
def sweep(undisturbed: Sweep, cluster: ThreeNodes, config: Path, tmp_path: Path) -> Iterator[Sweep]:
    """A sweep that has not begun; the texts are prepared, as they would be in a results folder that other studies share."""
    fresh = Sweep(config, tmp_path / "results", cluster.address)
    fresh.adopt("prepare", undisturbed)
    yield fresh
    fresh.kill_drivers()
