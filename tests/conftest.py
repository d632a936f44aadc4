"""What every test relies on: repeatable hypothesis runs, no hub, the shared data, and a guard against markers that ran nothing."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("MPLBACKEND", "agg")

if importlib.util.find_spec("hypothesis") is not None:  # a GPU machine may have pytest alone, and the kernels' tests need no more
    from hypothesis import settings

    settings.register_profile("repeatable", deadline=None, derandomize=True)
    settings.load_profile("repeatable")

CHECKOUT = Path(__file__).resolve().parent.parent
SHARED_DATA = Path(os.environ.get("FFFSWEEP_SHARED_DATA", CHECKOUT.parent / "shared" / "data"))


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--require-marker",
        action="append",
        default=[],
        metavar="NAME",
        help="fail unless a test with this marker ran: passed or failed, not skipped; may be repeated",
    )
    parser.addoption("--rounds", type=int, default=1, help="how often each chaos test is run, each time by other chances")


def pytest_configure(config: pytest.Config) -> None:
    required = config.getoption("--require-marker")
    known = {str(line).partition(":")[0].partition("(")[0].strip() for line in config.getini("markers")}
    if unknown := sorted(set(required) - known):
        raise pytest.UsageError(f"--require-marker {unknown[0]}: expected a marker of pyproject.toml")
    if required and not hasattr(config, "workerinput"):
        config.pluginmanager.register(MarkerGuard(required), "fffsweep-marker-guard")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    # The one sweep end to end is the longest module: begun first, it does not run alone at the end of a distributed session.
    items.sort(key=lambda item: item.get_closest_marker("e2e") is None)
    if not SHARED_DATA.is_dir():
        absent = pytest.mark.skip(reason=f"no shared data at {SHARED_DATA}; FFFSWEEP_SHARED_DATA names another folder")
        for item in items:
            if item.get_closest_marker("shared_data"):
                item.add_marker(absent)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[Any]:
    """Write the markers into the report: its keywords also hold folder names, and it is what a distributed run sends home."""
    report = yield
    report.marker_names = sorted({mark.name for mark in item.iter_markers()})
    return report


class MarkerGuard:
    """Fails the session when a required marker ran no test."""

    def __init__(self, required: list[str]) -> None:
        self.num_ran = dict.fromkeys(required, 0)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.outcome in ("passed", "failed"):
            for name in set(report.marker_names) & set(self.num_ran):
                self.num_ran[name] += 1

    @property
    def empty(self) -> list[str]:
        return [name for name, count in self.num_ran.items() if count == 0]

    def pytest_sessionfinish(self, session: pytest.Session, exitstatus: int) -> None:
        if self.empty and exitstatus == pytest.ExitCode.OK:
            session.exitstatus = pytest.ExitCode.TESTS_FAILED

    def pytest_terminal_summary(self, terminalreporter: Any) -> None:
        for name, count in self.num_ran.items():
            terminalreporter.write_line(f"marker {name}: {count} ran" + ("" if count else ", at least one was required"))


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Folder of the genuine GLUE tasks; a test that takes it bears the marker `shared_data`."""
    return SHARED_DATA
