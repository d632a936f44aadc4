"""Run one stage against a store: fetch its inputs, run it, publish what it made. Knows nothing of Ray, MLflow or Optuna."""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fffsweep.pipeline.machine import provenance
from fffsweep.pipeline.stage import Metrics, StageContext, StageRun, get_stage
from fffsweep.pipeline.store import Manifest, Store


class KeyBusy(RuntimeError):
    """Another process is at work on the same key."""


def execute(
    run: StageRun,
    store: Store,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
    stop_requested: Callable[[], bool] = lambda: False,
    device: str = "cpu",
) -> Manifest:
    """Result of `run`: the stored one if its key is known, else the stage is run here and published.

    A killed attempt's checkpoints wait in the key's work folder, which is removed when the result is published.
    Raises KeyBusy if another live process runs the same key, StopRequested if the stage was asked to stop and saved itself,
    ValueError if the stage returned metrics that are not finite, and whatever the stage raises.
    """
    if store.has(run.key):
        return store.get(run.key)
    stage = get_stage(run.stage)
    config = stage.Config.model_validate(run.config)
    threads = stage.resources(config).cpus
    work = store.work_path(run.key)
    with _owning(work):
        if store.has(run.key):
            return store.get(run.key)
        inputs = {role: store.checkout(key, work / "inputs" / role) for role, key in run.inputs.items()}
        upstream = {role: store.get(key) for role, key in run.inputs.items()}
        output = work / "output"
        shutil.rmtree(output, ignore_errors=True)
        output.mkdir()
        started_at, start = time.time(), time.monotonic()
        where = {**provenance(), "data": _data_fingerprint(run, upstream.values()), "threads": threads, "device": device}
        context = StageContext(
            seed=run.seed,
            inputs=inputs,
            input_metrics={role: manifest.metrics for role, manifest in upstream.items()},
            output=output,
            work=work / "checkpoints",
            threads=threads,
            device=device,
            report=report,
            stop_requested=stop_requested,
        )
        context.work.mkdir(exist_ok=True)
        with _torch_threads(threads), _naming_absent(upstream.values()):
            metrics = _finite(stage.run(config, context), run.stage)
        duration_s = time.monotonic() - start
        manifest = store.publish(run, metrics, output, where, started_at, duration_s)
        shutil.rmtree(work)
    return manifest


def read_curve(path: Path) -> list[dict[str, float]]:
    """Rows of a `curve.jsonl` artifact."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _data_fingerprint(run: StageRun, upstream: Iterable[Manifest]) -> str | None:
    """Fingerprint of the data that a result rests on: of its own source, or that of the results it reads."""
    own = run.fingerprints.get("data")
    return own or next((manifest.provenance["data"] for manifest in upstream if manifest.provenance.get("data")), None)


@contextlib.contextmanager
def _owning(work: Path) -> Iterator[None]:
    """Hold the work folder of a key. The lock goes with the process, so a killed owner leaves none behind."""
    work.mkdir(parents=True, exist_ok=True)
    with (work.parent / f"{work.name}.lock").open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise KeyBusy(f"{work.name} is being run by another process") from None
        work.mkdir(parents=True, exist_ok=True)
        lock.write(str(os.getpid()))
        lock.flush()
        yield


@contextlib.contextmanager
def _torch_threads(threads: int) -> Iterator[None]:
    """Give torch exactly `threads` threads: their number decides the order of sums, hence the bits of a result."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def _naming_absent(upstream: Iterable[Manifest]) -> Iterator[None]:
    """Say which input has no bytes here if a file cannot be found."""
    absent = [f"{name!r} of {m.run.stage} {m.key}" for m in upstream for name, artifact in m.artifacts.items() if artifact.absent]
    try:
        yield
    except OSError as error:
        if not absent:
            raise
        more = f" and {len(absent) - 3} more" if len(absent) > 3 else ""
        raise RuntimeError(f"left behind where they were made: {', '.join(absent[:3])}{more}; import them with their weights") from error


def _finite(metrics: Mapping[str, float], stage: str) -> Metrics:
    bad = {name: value for name, value in metrics.items() if not math.isfinite(value)}
    if bad:
        raise ValueError(f"stage {stage}: metrics must be finite, got {bad}; nothing was published")
    return {name: float(metrics[name]) for name in sorted(metrics)}
