"""Run one stage against a store: fetch its inputs, run it, publish what it made. Knows nothing of Ray, MLflow or Optuna."""

from __future__ import annotations

import contextlib
import json
import math
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from fffsweep.pipeline.lease import Claim, Lease, LeaseHeld
from fffsweep.pipeline.machine import provenance
from fffsweep.pipeline.settings import Settings
from fffsweep.pipeline.stage import Metrics, Stage, StageContext, StageRun, get_stage
from fffsweep.pipeline.store import DamagedArtifact, Manifest, Store

_SAVE_S = 30.0


class KeyBusy(RuntimeError):
    """Another process is at work on the same key."""


def execute(
    run: StageRun,
    store: Store,
    report: Callable[[dict[str, Any]], None] = lambda _: None,
    stop_requested: Callable[[], bool] = lambda: False,
    device: str = "cpu",
    claim: Claim | None = None,
    run_stage: Callable[[Stage, Settings, StageContext], Metrics] = lambda stage, config, context: stage.run(config, context),
) -> Manifest:
    """Result of `run`: the stored one if its key is known, else the stage is run here and published.

    A killed attempt's checkpoints wait in the key's work folder, which is removed when the result is published.
    `claim` says for whom it is run: a later attempt of the same sweep takes the key over from an earlier one, which may live on unseen
    on a host that was cut off; that one then ends without touching anything. `run_stage` does the work, elsewhere if it likes.
    Raises KeyBusy if another live process runs the same key, LeaseLost if one took it over, DamagedArtifact if an input is not what was
    stored, or is gone, StopRequested if the stage was asked to stop and saved itself, ValueError if the stage returned metrics that are
    not finite, and whatever the stage raises.
    """
    if store.has(run.key):
        return store.get(run.key)
    stage = get_stage(run.stage)
    config = stage.Config.model_validate(run.config)
    threads = stage.resources(config).cpus
    work = store.work_path(run.key)
    with _owning(work, claim) as lease:
        if store.has(run.key):
            shutil.rmtree(work, ignore_errors=True)
            return store.get(run.key)
        own = work / f"attempt-{lease.token}"
        upstream = {role: _input(store, role, key) for role, key in run.inputs.items()}
        inputs = {role: store.checkout(manifest, own / "inputs" / role) for role, manifest in upstream.items()}
        output = own / "output"
        output.mkdir(parents=True)

        def stop_or_lost() -> bool:
            lease.require()
            return stop_requested()

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
            stop_requested=stop_or_lost,
        )
        store.fetch_work(run.key)
        context.work.mkdir(exist_ok=True)
        with _torch_threads(threads), _naming_absent(upstream.values()), _saving(store, run.key):
            metrics = _finite(run_stage(stage, config, context), run.stage)
        duration_s = time.monotonic() - start
        lease.require(now=True)
        manifest = store.publish(run, metrics, output, where, started_at, duration_s)
        store.drop_work(run.key)
        shutil.rmtree(work, ignore_errors=True)
    return manifest


def read_curve(path: Path) -> list[dict[str, float]]:
    """Rows of a `curve.jsonl` artifact."""
    return [json.loads(line) for line in path.read_text().splitlines()]


def _data_fingerprint(run: StageRun, upstream: Iterable[Manifest]) -> str | None:
    """Fingerprint of the data that a result rests on: of its own source, or that of the results it reads."""
    own = run.fingerprints.get("data")
    return own or next((manifest.provenance["data"] for manifest in upstream if manifest.provenance.get("data")), None)


def _input(store: Store, role: str, key: str) -> Manifest:
    try:
        return store.get(key)
    except KeyError:  # another of its readers found it damaged, and it was withdrawn
        raise DamagedArtifact(f"input {role} {key} is gone: it was withdrawn, or deleted by hand", key) from None


@contextlib.contextmanager
def _owning(work: Path, claim: Claim | None = None) -> Iterator[Lease]:
    """Hold the work folder of a key, and clear it of what earlier attempts left but their checkpoints."""
    try:
        lease = Lease(work / "lease", claim)
    except LeaseHeld as error:
        raise KeyBusy(f"{work.name} is being run by {error}") from None
    try:
        for leftover in work.glob("attempt-*"):
            shutil.rmtree(leftover, ignore_errors=True)
        yield lease
    finally:
        lease.release()


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
def _saving(store: Store, key: str) -> Iterator[None]:
    """Have checkpoints brought where other machines find them: every half minute, and when a run ends before its result is there."""
    if type(store).save_work is Store.save_work:
        yield
        return
    ended = threading.Event()

    def save() -> None:
        while not ended.wait(_SAVE_S):
            with contextlib.suppress(OSError):  # a store that refuses for a while: the next round tries again
                store.save_work(key)

    thread = threading.Thread(target=save, name=f"save {key[:8]}", daemon=True)
    thread.start()
    try:
        yield
    except BaseException:
        with contextlib.suppress(OSError):
            store.save_work(key)
        raise
    finally:
        ended.set()
        thread.join()


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
