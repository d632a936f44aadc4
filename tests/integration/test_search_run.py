"""A search with rungs whose driver is killed again and again ends as the undisturbed one does, bit for bit but for times."""

import json
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

from fffsweep.dashboards.formats import json as results_json
from fffsweep.dashboards.queries import load_study
from fffsweep.pipeline.store import Store
from fffsweep.sweeps.config import SweepConfig
from fffsweep.sweeps.controller import run_sweep
from fffsweep.sweeps.verify import verify
from tests.chaos.study import MEASURED
from tests.sweeps.conftest import Heard

pytestmark = [pytest.mark.integration, pytest.mark.slow]
CHECKOUT = Path(__file__).resolve().parents[2]
NAME = "searched"
# Kills itself at the n-th result: just before it is there, or just after, when nobody has been told of it.
MORTAL = """
import os, sys
from fffsweep.pipeline.store import Store

when, left, publish = sys.argv.pop(1), int(sys.argv.pop(1)), Store.publish

def mortal(self, *arguments, **named):
    global left
    left -= 1
    if left == 0 and when == "before":
        os.kill(os.getpid(), 9)
    manifest = publish(self, *arguments, **named)
    if left == 0:
        os.kill(os.getpid(), 9)
    return manifest

Store.publish = mortal
from fffsweep.cli import main
main()
"""


@pytest.fixture
def config(sweep_config):
    values = sweep_config.resolved()
    values["stages"]["pretrain"] |= {"steps": 24, "schedule": "wsd"}
    rate = {"type": "float", "low": 1e-4, "high": 1e-2, "log": True}
    values |= {
        "name": NAME,
        "layouts": ["1x3"],
        "controls": ["reference_dense(15)"],
        "sampler": "tpe",
        "search": {"num_trials": 3, "space": {"stages.pretrain.learning_rate": rate}},
        "early_stopping": {"eta": 3, "rungs": 1},
        "objectives": {"quality/avg": "maximize", "ff/active_width": "minimize"},
    }
    return SweepConfig.model_validate(values)


def table(results):
    """Every trial, and the metrics of every stage run by its key: all but what was measured with a clock."""

    def kept(values):
        return {name: value for name, value in values.items() if not name.startswith(MEASURED) or name == "ff/active_width"}

    rows = json.loads(results_json(load_study(results, NAME)))["trials"]
    trials = {row["trial"]: {**row, "metrics": kept(row["metrics"]), "intervals": kept(row["intervals"])} for row in rows}
    store = Store(results / "store")
    return trials, {key: kept(store.get(key).metrics) for key in store.keys()}  # noqa: SIM118 - a store is no dict


def test_a_killed_search_ends_like_an_undisturbed_one(config, tmp_path):
    whole, killed, path = tmp_path / "whole", tmp_path / "killed", tmp_path / "searched.yaml"
    assert run_sweep(config, whole, Heard(), "inline").state == "complete"
    trials, metrics = table(whole)
    assert Counter(trial["state"] for trial in trials.values()) == {"complete": 3, "pruned": 4}

    path.write_text(json.dumps(config.resolved()))  # JSON is YAML
    for when, num_results in (("after", 4), ("before", 5), ("after", 5)):
        command = [sys.executable, "-P", "-c", MORTAL, when, str(num_results), "run", str(path), "--executor", "inline"]
        ended = subprocess.run([*command, "--results", str(killed)], cwd=CHECKOUT, capture_output=True, text=True, timeout=240)
        assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert len(list(Store(killed / "store").keys())) == 4 + 4 + 5
    assert run_sweep(config, killed, Heard(), "inline").state == "complete"
    assert table(killed) == (trials, metrics)


def test_a_search_asks_and_stops_while_others_run(config, tmp_path):
    """On Ray several trials are under way at once, and what is asked next depends on who ends first; what must hold does not."""
    outcome = run_sweep(config, tmp_path, Heard(), "ray")
    assert (outcome.state, outcome.num_reused, outcome.failed_trials) == ("complete", 0, ())
    trials, metrics = table(tmp_path)
    states = Counter(trial["state"] for trial in trials.values())
    assert states.total() == 7, "three points of the tree and three of the reference, beside the reference as it is"
    assert states.keys() == {"complete", "pruned"}
    assert len(metrics) == outcome.num_run
    assert verify(NAME, tmp_path).problems == ()
    again = run_sweep(config, tmp_path, Heard(), "ray")
    assert (again.state, again.num_run) == ("complete", 0)
    assert table(tmp_path) == (trials, metrics)
