"""What a sweep costs beside its stages: trials of twelve stage runs that do nothing, on Ray, with the store, Optuna and MLflow all on.

`fffsweep bench --suite orchestration --trials 1000` runs them, then goes on with the same study, one trial larger, to see how long a
driver takes to its first new stage run; and it runs as many trials of twelve reports in Ray Tune, with its Optuna search and its
MLflow callback. Each of the three is a process of its own, all on the same cores.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from statistics import fmean
from typing import Any

import psutil

from fffsweep.pipeline.machine import write_benchmark

NUM_STAGES = 12  # of a trial's own; the `prepare` that all share comes on top
_TASKS = ("a", "b", "c")


@dataclass(frozen=True)
class DriverFigures:
    """What one driver saw. first_new_s: from the start of its process to the first stage run that it started."""

    wall_s: float
    first_new_s: float
    num_run: int
    state: str
    stage_s: float
    rss_peak_bytes: int
    rss_half_bytes: int


def measure(trials: int, folder: Path, with_peer: bool = True) -> list[dict[str, Any]]:
    """Rows of the suite: ours, and Ray Tune's. `folder` is left with the study's results."""
    cores = len(os.sched_getaffinity(0))
    first = _in_process(trials, folder)
    resumed = _in_process(trials + 1, folder)
    for figures, expected in ((first, trials * NUM_STAGES + 1), (resumed, NUM_STAGES)):
        if (figures.state, figures.num_run) != ("complete", expected):
            raise RuntimeError(f"the study ended {figures.state} after {figures.num_run} of {expected} stage runs: nothing was measured")
    common = {"suite": "orchestration", "trials": trials, "cores": cores}
    rows = [
        common
        | {
            "implementation": "fffsweep",
            "stages": first.num_run,
            "wall_s": first.wall_s,
            "s_per_trial": first.wall_s / trials,
            "overhead_ms_per_stage": 1e3 * (first.wall_s * cores - first.stage_s) / first.num_run,
            "driver_rss_bytes": first.rss_peak_bytes,
            "driver_rss_half_bytes": first.rss_half_bytes,
            "resume_s": resumed.first_new_s,
        }
    ]
    if with_peer:
        with tempfile.TemporaryDirectory() as peer:
            command = [sys.executable, "-m", "fffsweep.sweeps.bench_peer", str(trials), str(cores), str(NUM_STAGES), peer]
            answer = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout.splitlines()[-1]
        wall_s = float(json.loads(answer)["wall_s"])
        peer_row = {"implementation": "ray_tune", "stages": trials * NUM_STAGES, "wall_s": wall_s, "s_per_trial": wall_s / trials}
        rows.append(common | peer_row | {"overhead_ms_per_stage": 1e3 * wall_s * cores / (trials * NUM_STAGES)})
    return rows


def _in_process(trials: int, folder: Path) -> DriverFigures:
    here, there = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=_drive, args=(trials, folder, there, time.time()))
    process.start()
    there.close()
    try:
        figures: DriverFigures = here.recv()
    except EOFError:
        raise RuntimeError("the driver ended before its study did") from None
    finally:
        process.join()
    return figures


def _drive(trials: int, folder: Path, pipe: Connection, spawned_at: float) -> None:
    from fffsweep.sweeps.controller import Controller
    from fffsweep.sweeps.record import Lease, load, study_folder
    from fffsweep.sweeps.strategy import FixedTrials

    start = time.monotonic()
    config, plans = noop_study(trials)
    study = study_folder(folder, config.name)
    lease = Lease(study)
    memory = _Memory()
    outcome = Controller(config, FixedTrials(plans), folder, study, memory, "ray", None, load(study), lease).run()
    wall_s = time.monotonic() - start
    lease.release()
    events = [json.loads(line) for line in (study / "events.jsonl").read_text().splitlines()]
    submitted = [event["time"] for event in events if event["event"] == "submitted" and event["time"] > spawned_at]
    stage_s = sum(event["duration_s"] for event in events if event["event"] == "finished" and event["time"] > spawned_at)
    peak, half = memory.end()
    pipe.send(DriverFigures(wall_s, submitted[0] - spawned_at, outcome.num_run, outcome.state, stage_s, peak, half))


def noop_study(trials: int, pause_s: float = 0.0) -> tuple[Any, list[Any]]:
    """A study of this many layouts whose stage runs do nothing but return figures: its config, and its trials' plans."""
    from fffsweep.pipeline.stage import Resources, stage_run
    from fffsweep.pipeline.stages.noop import NoopConfig
    from fffsweep.sweeps.config import SweepConfig
    from fffsweep.sweeps.graph import PlannedStage, TrialPlan
    from fffsweep.sweeps.space import expand

    config = SweepConfig.model_validate(
        {
            "name": "orchestration",
            "model": {"hidden_size": 32, "num_layers": 1, "num_heads": 2, "sequence_length": 64},
            "layouts": [f"{1 + number // 8}x{number % 8}" for number in range(trials)],
            "stages": {
                "prepare": {"corpus": ["imdb"], "tasks": ["sst2-like"], "sequence_length": 64},
                "pretrain": {"tokens": 1000},
                "finetune": {"tasks": ["sst2-like"]},
            },
            "objectives": {"quality/avg": "maximize", "mlm/validation_loss": "minimize"},
        }
    )

    def planned(label: str, name: str, inputs: dict[str, str], metrics: dict[str, float]) -> PlannedStage:
        run = stage_run("noop", NoopConfig(name=name, metrics=metrics, pause_s=pause_s), 0, inputs)
        return PlannedStage(label, run, Resources(cpus=1))

    prepare = planned("prepare", "prepare", {}, {"data/rows": 1.0})
    plans = []
    for number, spec in enumerate(expand(config)):
        values = {f"figure/{index}": float(number + index) for index in range(8)}
        above = {"prepare": prepare.run.key}
        pretrain = planned("pretrain/0", f"{spec.id} pretrain", above, values)
        above["pretrain"] = pretrain.run.key
        finetunes = [
            planned(f"finetune/0/{task}/{seed}", f"{spec.id} {task} {seed}", above, {**values, "selection/primary": 0.5})
            for task in _TASKS
            for seed in range(3)
        ]
        timed = planned("benchmark_cpu/0", f"{spec.id} benchmark", above, values)
        stages = [pretrain, *finetunes, timed]
        objectives = {"quality/avg": float(number % 17), "mlm/validation_loss": float(number % 13)}
        collect = planned("collect", f"{spec.id} collect", {stage.label: stage.run.key for stage in stages}, {**values, **objectives})
        plans.append(TrialPlan(spec, (prepare, *stages, collect)))
    assert all(len(plan.stages) == NUM_STAGES + 1 for plan in plans)
    return config, plans


class _Memory:
    """Listener that watches its process's memory as the study goes on."""

    def __init__(self) -> None:
        self._samples: list[tuple[float, int]] = []
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def update(self, record: Any, num_running: int) -> None:
        pass

    def say(self, line: str) -> None:
        print(line, file=sys.stderr)

    def end(self) -> tuple[int, int]:
        """Highest resident bytes, and the mean around the middle of the run."""
        self._ended.set()
        self._thread.join()
        sizes = [size for _, size in self._samples]
        middle = sizes[len(sizes) * 2 // 5 : max(len(sizes) * 3 // 5, len(sizes) * 2 // 5 + 1)]
        return max(sizes), int(fmean(middle))

    def _watch(self) -> None:
        process = psutil.Process()
        while True:
            self._samples.append((time.monotonic(), process.memory_info().rss))
            if self._ended.wait(0.25):
                return


def main(arguments: Sequence[str]) -> int:
    """`fffsweep bench --suite orchestration`."""
    parser = argparse.ArgumentParser(prog="fffsweep bench --suite orchestration", description=__doc__)
    parser.add_argument("--trials", type=int, default=1000, help="of twelve stage runs each (default: 1000)")
    parser.add_argument("--no-peer", action="store_true", help="leave Ray Tune out")
    parser.add_argument("--results", type=Path, help="empty folder that keeps the study; without it nothing is kept")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows with their provenance")
    options = parser.parse_args(list(arguments))
    if options.trials < 1:
        raise ValueError(f"--trials {options.trials}: expected at least 1")
    if options.results is not None and options.results.exists() and any(options.results.iterdir()):
        raise ValueError(f"--results {options.results}: not empty, so cached stage runs would be measured; name a new folder")
    with tempfile.TemporaryDirectory() as aside:
        rows = measure(options.trials, options.results or Path(aside), not options.no_peer)
    if options.json:
        write_benchmark(options.json, rows)
    for row in rows:
        line = f"{row['implementation']:9}  {row['trials']} trials  {row['stages']} stages  {row['wall_s']:.1f} s"
        line += f"  {1e3 * row['s_per_trial']:.0f} ms a trial  {row['overhead_ms_per_stage']:.1f} ms a stage on {row['cores']} cores"
        if "resume_s" in row:
            line += f"  driver {row['driver_rss_bytes'] / 1e6:.0f} MB (half-way {row['driver_rss_half_bytes'] / 1e6:.0f})"
            line += f"  resumed in {row['resume_s']:.1f} s"
        print(line)
    return 0
