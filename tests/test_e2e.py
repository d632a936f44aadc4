"""One whole sweep through the command line, on Ray: run, asked about, run again, and killed half-way.

Needs the wheels that `make data` downloads; nothing here touches the network.
"""

from __future__ import annotations

import json
import math
import os
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

pytestmark = [pytest.mark.e2e, pytest.mark.slow, pytest.mark.timeout(3000)]

CHECKOUT = Path(__file__).resolve().parent.parent
CONFIG = CHECKOUT / "sweeps" / "tiny.yaml"
STUDY = "tiny"
LIMIT_S = 900  # a hang, not a slow machine: the sweep takes about two minutes on two idle cores
# What no two runs share; everything else is the same bit for bit.
MEASURED = ("time/", "memory/", "energy/", "ff/", "model/")


def command(*arguments: str) -> list[str]:
    return [sys.executable, "-P", "-c", "from fffsweep.cli import main; main()", *arguments]


def environment() -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("RAY_", "MLFLOW_", "OPTUNA_"))}
    return {**kept, "HF_HUB_OFFLINE": "1"}


def fffsweep(*arguments: str) -> str:
    """Standard output of a command that must succeed."""
    ended = subprocess.run(command(*arguments), cwd=CHECKOUT, env=environment(), capture_output=True, text=True, timeout=LIMIT_S)
    assert ended.returncode == 0, f"{ended.stdout}\n{ended.stderr}"
    return ended.stdout


def manifests(results: Path) -> dict[str, tuple[int, int]]:
    """Key of every finished stage run -> what changes when its manifest is written again."""
    found = (results / "store" / "manifests").glob("*/*.json")
    return {path.stem: (path.stat().st_ino, path.stat().st_mtime_ns) for path in found}


def table(results: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads(fffsweep("results", STUDY, "--format", "json", "--results", str(results)))
    return content


def reproducible(content: dict[str, Any]) -> dict[str, Any]:
    """The part of every row that must be equal between runs."""

    def kept(values: dict[str, Any]) -> dict[str, Any]:
        return {name: value for name, value in values.items() if not name.startswith(MEASURED)}

    return {row["trial"]: {**row, "metrics": kept(row["metrics"]), "intervals": kept(row["intervals"])} for row in content["trials"]}


@pytest.fixture(scope="module")
def swept(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Results folder of an undisturbed sweep, and what its command printed."""
    results = tmp_path_factory.mktemp("undisturbed") / "results"
    return results, fffsweep("run", str(CONFIG), "--results", str(results))


def test_results_hold_every_trial(swept: tuple[Path, str]) -> None:
    content = table(swept[0])
    assert content["schema"].startswith("fffsweep.results/")
    assert content["study"] == STUDY
    assert {row["state"] for row in content["trials"]} == {"complete"}
    study = json.loads((swept[0] / "studies" / STUDY / "study.json").read_text())
    assert [row["trial"] for row in content["trials"]] == [trial["id"] for trial in study["trials"]]
    assert any(row["control"] for row in content["trials"])
    assert any(not row["control"] for row in content["trials"])
    for row in content["trials"]:
        assert {"trial", "layout", "control", "state", "params", "metrics", "intervals"} <= row.keys()
        assert {"quality/avg", "quality/validation_avg", "mlm/validation_loss", "ff/cpu/rel_time"} <= row["metrics"].keys()
        assert all(math.isfinite(value) for value in row["metrics"].values())


def test_front_is_what_no_trial_beats(swept: tuple[Path, str]) -> None:
    content = json.loads(fffsweep("pareto", STUDY, "--json", "--results", str(swept[0])))
    assert content["schema"].startswith("fffsweep.pareto/")
    signs = {name: 1 if direction == "maximize" else -1 for name, direction in content["objectives"].items()}
    assert set(signs) == {"quality/avg", "ff/cpu/rel_time"}

    study = json.loads((swept[0] / "studies" / STUDY / "study.json").read_text())
    in_study = {trial["id"] for trial in study["trials"] if trial["in_study"]}
    rows = {row["trial"]: row["metrics"] for row in table(swept[0])["trials"] if row["trial"] in in_study}

    def beaten(trial: str) -> bool:
        mine = [sign * rows[trial][name] for name, sign in signs.items()]
        others = ([sign * rows[other][name] for name, sign in signs.items()] for other in rows)
        return any(other != mine and all(theirs >= own for theirs, own in zip(other, mine, strict=True)) for other in others)

    assert {entry["trial"] for entry in content["front"]} == {trial for trial in rows if not beaten(trial)}
    for entry in content["front"]:
        assert entry["values"] == {name: rows[entry["trial"]][name] for name in signs}
    assert {entry["trial"] for entry in content["controls"]}


class _References(HTMLParser):
    """Everything a page would load from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.loaded: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        loads = {"script": "src", "img": "src", "iframe": "src", "link": "href", "source": "src"}
        self.loaded += [value for name, value in attrs if name == loads.get(tag) and value and not value.startswith("data:")]


def test_report_stands_by_itself(swept: tuple[Path, str]) -> None:
    report = swept[0] / "reports" / f"{STUDY}.html"
    assert str(report) in swept[1]
    text = report.read_text()
    page = _References()
    page.feed(text)
    assert page.loaded == []
    for row in table(swept[0])["trials"]:
        assert row["trial"] in text


def test_run_ends_with_the_front_and_the_next_commands(swept: tuple[Path, str]) -> None:
    for entry in json.loads(fffsweep("pareto", STUDY, "--json", "--results", str(swept[0])))["front"]:
        assert entry["layout"] in swept[1]
    assert "fffsweep ui" in swept[1]
    assert "mlflow ui" in swept[1]


def test_projections_hold_every_run(swept: tuple[Path, str]) -> None:
    study = json.loads((swept[0] / "studies" / STUDY / "study.json").read_text())
    with sqlite3.connect(swept[0] / "optuna.db") as database:
        (num_complete,) = database.execute("select count(*) from trials where state = 'COMPLETE'").fetchone()
    assert num_complete == sum(trial["in_study"] for trial in study["trials"])
    with sqlite3.connect(swept[0] / "mlflow.db") as database:
        runs = database.execute("select status, count(*) from runs group by status").fetchall()
        parents = database.execute(
            "select count(distinct value) from tags where key = 'mlflow.parentRunId' and value in (select run_uuid from runs)"
        ).fetchone()
    assert [status for status, _ in runs] == ["FINISHED"]
    assert parents == (len(study["trials"]),)


def test_second_run_reuses_everything(swept: tuple[Path, str]) -> None:
    before, rows = manifests(swept[0]), table(swept[0])
    start = time.monotonic()
    printed = fffsweep("run", str(CONFIG), "--results", str(swept[0]))
    assert time.monotonic() - start < 45
    assert f"reused {len(before)} of {len(before)} stage runs" in printed
    assert "0 stage runs done" in printed
    assert manifests(swept[0]) == before
    assert table(swept[0]) == rows


@pytest.fixture
def driver(tmp_path: Path) -> Iterator[tuple[subprocess.Popen[str], Path]]:
    """A sweep under way in a fresh results folder."""
    results = tmp_path / "results"
    with (tmp_path / "output").open("w") as output:
        process = subprocess.Popen(
            command("run", str(CONFIG), "--results", str(results)), cwd=CHECKOUT, env=environment(), stdout=output, stderr=output, text=True
        )
        yield process, results
        process.kill()
        process.wait()


@pytest.mark.integration  # a second sweep: `make test` has time for one
def test_killed_sweep_goes_on_to_the_same_table(swept: tuple[Path, str], driver: tuple[subprocess.Popen[str], Path]) -> None:
    process, results = driver
    whole = manifests(swept[0])
    deadline = time.monotonic() + LIMIT_S
    while len(manifests(results)) < len(whole) // 2:
        assert process.poll() is None, (results.parent / "output").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finished = manifests(results)
    assert len(whole) // 2 <= len(finished) < len(whole)

    printed = fffsweep("run", str(CONFIG), "--results", str(results))
    after = manifests(results)
    assert after.keys() == whole.keys()
    assert {key: after[key] for key in finished} == finished
    assert "reused" in printed
    assert reproducible(table(results)) == reproducible(table(swept[0]))
