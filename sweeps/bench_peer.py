"""The peer of the orchestration suite: Ray Tune with OptunaSearch and its MLflow callback, trials that report a few times each.

Run by `fffsweep bench --suite orchestration` as a program: `python -m fffsweep.sweeps.bench_peer TRIALS CORES REPORTS FOLDER`.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path
from typing import Any


def run(trials: int, cores: int, reports: int, folder: Path) -> float:
    """Seconds from starting Ray to the end of the last trial."""
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
    import ray
    from ray import tune
    from ray.air.integrations.mlflow import MLflowLoggerCallback
    from ray.tune.search.optuna import OptunaSearch

    def trial(config: dict[str, Any]) -> None:
        for step in range(reports):
            figures = {f"figure/{index}": float(step + index) for index in range(8)}
            tune.report({"quality": config["x"] * step, "loss": config["x"] - step, **figures})

    start = time.monotonic()
    ray.init(address="local", num_cpus=cores, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    tuner = tune.Tuner(
        tune.with_resources(trial, {"cpu": 1}),
        param_space={"x": tune.uniform(0.0, 1.0), "y": tune.randint(1, 100)},
        tune_config=tune.TuneConfig(
            search_alg=OptunaSearch(metric=["quality", "loss"], mode=["max", "min"]), num_samples=trials, max_concurrent_trials=cores
        ),
        run_config=tune.RunConfig(
            name="peer",
            storage_path=str(folder / "tune"),
            verbose=0,
            callbacks=[MLflowLoggerCallback(tracking_uri=f"sqlite:///{folder}/mlflow.db", experiment_name="peer")],
        ),
    )
    results = tuner.fit()
    wall_s = time.monotonic() - start
    if results.num_errors or len(results) != trials:
        raise RuntimeError(f"{len(results)} of {trials} trials, {results.num_errors} with errors: nothing was measured")
    ray.shutdown()
    return wall_s


if __name__ == "__main__":
    num_trials, num_cores, num_reports = map(int, sys.argv[1:4])
    print(json.dumps({"wall_s": run(num_trials, num_cores, num_reports, Path(sys.argv[4]))}))
