"""A sweep of short real stages, what is seen of it from outside, and what must hold when it has ended."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fffsweep.pipeline.store import Store
from fffsweep.sweeps.config import SweepConfig, load_config
from fffsweep.sweeps.graph import build
from fffsweep.sweeps.space import expand
from tests.chaos.cluster import wait_for
from tests.sweeps.conftest import CONFIG, write_data

CHECKOUT = Path(__file__).resolve().parent.parent.parent
# What no two runs share; everything else is the same bit for bit.
MEASURED = ("time/", "memory/", "energy/", "ff/", "model/")
LIMIT_S = 240
_SLOWER = "{steps: 1000, batch_size: 32, evaluations: 4, validation_sequences: 8, checkpoint_minutes: 0.002}"


@dataclass(frozen=True)
class Running:
    """A stage run under way, as its lease tells."""

    key: str
    stage: str
    pid: int


def write_config(folder: Path) -> Path:
    """The sweep: three trials over made-up words, 13 stage runs, its pretrainings long enough to be hit."""
    write_data(folder)
    text = CONFIG.replace("PATH", str(folder)).replace("{steps: 4, batch_size: 4, evaluations: 1, validation_sequences: 8}", _SLOWER)
    path = folder / "chaos.yaml"
    path.write_text(text.replace("name: tiny-directory", "name: chaos") + "retries: 4\n")
    return path


class Sweep:
    """One results folder and the drivers started on it."""

    def __init__(self, config: Path, results: Path, address: str) -> None:
        self.path, self.results, self.address = config, results, address
        self.config: SweepConfig = load_config(config)
        self.stages = {stage.run.key: stage.run.stage for plan in build(self.config, expand(self.config)) for stage in plan.stages}
        self.output = results.parent / f"{results.name}.log"
        self._first_seen: dict[str, tuple[int, int]] = {}
        self._drivers: list[subprocess.Popen[str]] = []

    def adopt(self, stage: str, other: Sweep) -> None:
        """Take over the results of one stage that another sweep of the same config has made."""
        for key in (key for key, name in self.stages.items() if name == stage):
            for theirs in (other.store.manifest_path(key), *other.objects_of(key)):
                ours = self.store.root / theirs.relative_to(other.store.root)
                ours.parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(theirs, ours)

    def move(self, results: Path) -> None:
        """Lay the results elsewhere."""
        shutil.copytree(self.results, results)
        self.results = results
        self._first_seen.clear()

    @property
    def store(self) -> Store:
        return Store(self.results / "store")

    def objects_of(self, key: str) -> list[Path]:
        """Files of a result's artifacts."""
        return sorted({self.store.object_path(artifact.sha256) for artifact in self.store.get(key).artifacts.values()})

    def longest_s(self, stage: str) -> float:
        """Longest time that a run of `stage` took."""
        return max(self.store.get(key).duration_s for key, name in self.stages.items() if name == stage)

    def trial_states(self) -> list[str]:
        study = json.loads((self.results / "studies" / "chaos" / "study.json").read_text())
        return [trial["state"] for trial in study["trials"]]

    def start(self, *settings: str) -> subprocess.Popen[str]:
        """Start a driver with these settings replaced; its output goes to a file."""
        program = ["-P", "-c", "from fffsweep.cli import main; main()", "run", str(self.path)]
        command = [sys.executable, *program, "--results", str(self.results), "--address", self.address]
        command += [argument for setting in settings for argument in ("--set", setting)]
        environment = {**os.environ, "FFFSWEEP_FAULTS": ""}
        with self.output.open("a") as output:
            driver = subprocess.Popen(command, cwd=CHECKOUT, env=environment, stdout=output, stderr=output, text=True)
        self._drivers.append(driver)
        return driver

    def finish(self, driver: subprocess.Popen[str], code: int = 0, limit_s: float = LIMIT_S) -> str:
        """Wait for a driver's end; what all drivers printed so far."""
        driver.wait(limit_s)
        printed = self.output.read_text()
        assert driver.returncode == code, printed[-5000:]
        return printed

    def kill_drivers(self) -> None:
        for driver in self._drivers:
            if driver.poll() is None:
                driver.kill()
                driver.wait()

    def manifests(self) -> dict[str, tuple[int, int]]:
        """Key of every result -> what changes when its manifest is written again. Remembers the first sight of each."""
        found = {}
        for path in (self.results / "store" / "manifests").glob("*/*.json"):
            with contextlib.suppress(FileNotFoundError):
                found[path.stem] = (path.stat().st_ino, path.stat().st_mtime_ns)
        for key, identity in found.items():
            self._first_seen.setdefault(key, identity)
        return found

    def running(self, stage: str | None = None) -> list[Running]:
        """Stage runs that are under way now."""
        return [run for run in self._leases() if stage in (None, run.stage) and run.key not in self.manifests()]

    def _leases(self) -> Iterator[Running]:
        for path in (self.results / "store" / "work").glob("*/lease/epoch-*.json"):
            with contextlib.suppress(FileNotFoundError, ValueError):
                holder = json.loads(path.read_text())
                if not holder["released"]:
                    yield Running(path.parent.parent.name, self.stages[path.parent.parent.name], holder["pid"])

    def wait_running(self, driver: subprocess.Popen[str], stage: str | None, num_results: int = 0) -> Running:
        """The first run of `stage` seen under way once `num_results` results are there."""
        seen: list[Running] = []

        def look() -> bool:
            seen[:] = self.running(stage) if len(self.manifests()) >= num_results else []
            return bool(seen)

        wait_for(look, f"a running {stage or 'stage'} after {num_results} results", alive=driver)
        return seen[0]

    def events(self, kind: str) -> list[dict[str, Any]]:
        """Lines of the study's history of one kind."""
        path = self.results / "studies" / "chaos" / "events.jsonl"
        lines = [json.loads(line) for line in path.read_text().splitlines()]
        return [line for line in lines if line["event"] == kind]

    def table(self) -> dict[str, Any]:
        """Every trial with all that must be equal between two runs of the sweep."""
        from fffsweep.dashboards.formats import json as results_json
        from fffsweep.dashboards.queries import load_study

        def kept(values: dict[str, Any]) -> dict[str, Any]:
            return {name: value for name, value in values.items() if not name.startswith(MEASURED)}

        rows = json.loads(results_json(load_study(self.results, "chaos")))["trials"]
        return {row["trial"]: {**row, "metrics": kept(row["metrics"]), "intervals": kept(row["intervals"])} for row in rows}

    def _mlflow_runs(self) -> list[Any]:
        from mlflow.tracking import MlflowClient

        client = MlflowClient(tracking_uri=os.environ.get("FFFSWEEP_MLFLOW_URI") or f"sqlite:///{self.results}/mlflow.db")
        found = client.get_experiment_by_name("chaos")
        runs = client.search_runs([found.experiment_id], max_results=1000)
        return [run for run in runs if "fffsweep.trial" in run.data.tags]  # the report's is no trial's

    def _optuna_trials(self) -> list[Any]:
        import optuna

        storage = os.environ.get("FFFSWEEP_OPTUNA_URL") or f"sqlite:///{self.results}/optuna.db"
        return list(optuna.load_study(study_name="chaos", storage=storage).trials)

    def check(self, undisturbed: dict[str, Any] | None = None, remade: frozenset[str] = frozenset()) -> None:
        """What must hold of a sweep that has ended; `remade` are keys whose damaged results were made again."""
        from fffsweep.sweeps.verify import verify

        study = json.loads((self.results / "studies" / "chaos" / "study.json").read_text())
        assert Counter(trial["state"] for trial in study["trials"]) == {"complete": 3}, self.output.read_text()[-5000:]
        manifests = self.manifests()
        assert manifests.keys() == self.stages.keys()
        assert {key: self._first_seen[key] for key in manifests if key not in remade} == {
            key: identity for key, identity in manifests.items() if key not in remade
        }
        assert verify("chaos", self.results).problems == ()
        runs = self._mlflow_runs()
        parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
        assert Counter(run.info.status for run in runs)["RUNNING"] == 0
        assert Counter(run.info.status for run in runs)["FINISHED"] == 3 + sum(len(trial["stages"]) for trial in study["trials"])
        assert len(parents) == 3
        states = Counter(trial.state.name for trial in self._optuna_trials())
        assert states["COMPLETE"] == sum(trial["in_study"] for trial in study["trials"])
        assert states["RUNNING"] == 0
        assert not list((self.results / "store" / "work").glob("*/attempt-*"))
        if undisturbed is not None:
            assert self.table() == undisturbed
