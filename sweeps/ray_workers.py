"""One stage run on several processes, through Ray Train: torch.distributed is initialised in each, and the stage does the rest.

The task that holds the run's lease and publishes its result starts them and waits. All must see the store's folder.
"""

from __future__ import annotations

import json
import os
import signal
import threading
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from fffsweep.pipeline.settings import Settings
from fffsweep.pipeline.stage import Metrics, Resources, Stage, StageContext, StopRequested, get_stage

_POLL_S = 0.5
_TERMINATED = threading.Event()  # of a worker's process


def on_workers(
    resources: Resources, label_selector: dict[str, str] | None, yield_flag: Callable[[str], Path]
) -> Callable[[Stage, Settings, StageContext], Metrics]:
    """What `execute` is to call in the place of a stage's `run`. yield_flag: file that says that the node of this id is being drained.

    One worker that gets SIGTERM, or whose node is being drained, has all of them save themselves. It raises StopRequested if the workers
    were asked to stop and saved themselves, ConnectionError if one of them died, and a stage's own error as RuntimeError with its
    traceback.
    """

    def run_stage(stage: Stage, config: Settings, context: StageContext) -> Metrics:
        from ray.train import RunConfig, ScalingConfig, WorkerGroupError
        from ray.train.torch import TorchTrainer

        aside = context.output.parent
        stop, answer = aside / "stop", aside / "answer.json"
        told = {
            "stage": stage.name,
            "config": config.resolved(),
            "context": replace(context, stop_requested=stop.exists),
            "answer": answer,
            "yield_flag": yield_flag,
        }
        where: dict[str, Any] = {} if label_selector is None else {"label_selector": label_selector}
        per_worker = {"CPU": resources.cpus} | ({"GPU": resources.gpus} if resources.gpus else {})
        trainer = TorchTrainer(
            _work,
            train_loop_config=told,
            scaling_config=ScalingConfig(
                num_workers=resources.workers,
                use_gpu=resources.gpus > 0,
                resources_per_worker=per_worker,
                **where,
            ),
            torch_config=_heedful("nccl" if resources.gpus else "gloo"),
            run_config=RunConfig(name="train", storage_path=str(aside)),
        )
        with _Watching(context.stop_requested, stop) as watching:
            try:
                trainer.fit()
            except WorkerGroupError as error:
                watching.check()
                own = [path.read_text() for path in sorted(aside.glob("error-*"))]
                if own:
                    raise RuntimeError(own[0]) from None
                raise ConnectionError(f"a worker died: {str(error).strip().splitlines()[-1]}") from None
        watching.check()
        found = json.loads(answer.read_text())
        if found["stopped"]:
            raise StopRequested
        metrics: Metrics = found["metrics"]
        return metrics

    return run_stage


class _Watching:
    """Hands a request to stop on to the workers; `check` raises what asking raised, as when the lease is lost."""

    def __init__(self, stop_requested: Callable[[], bool], stop: Path) -> None:
        self._stop_requested, self._stop = stop_requested, stop
        self._ended, self._error = threading.Event(), None  # type: tuple[threading.Event, BaseException | None]
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._ended.wait(_POLL_S):
            try:
                asked = self._stop_requested()
            except BaseException as error:
                self._error, asked = error, True
            if asked:
                self._stop.touch()
                return

    def __enter__(self) -> _Watching:
        self._thread.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._ended.set()
        self._thread.join()

    def check(self) -> None:
        if self._error is not None:
            raise self._error


def _heedful(backend: str) -> Any:
    """Ray's TorchConfig, whose workers take SIGTERM as a request to stop.

    Ray Train trains in a second thread of each process, and Python lets the first one alone set handlers: that one starts the backend.
    """
    from ray.train.torch import TorchConfig

    base: Any = TorchConfig().backend_cls

    class Backend(base):  # type: ignore[misc]
        def on_start(self, worker_group: Any, backend_config: Any) -> None:
            worker_group.execute(_heed_sigterm)
            super().on_start(worker_group, backend_config)

    class Config(TorchConfig):
        @property
        def backend_cls(self) -> Any:
            return Backend

    return Config(backend=backend)


def _heed_sigterm() -> None:
    signal.signal(signal.SIGTERM, lambda number, frame: _TERMINATED.set())


def _work(told: dict[str, Any]) -> None:
    """One worker's part. Worker 0 leaves the answer."""
    import ray
    import torch

    from fffsweep.pipeline import workers

    context: StageContext = told["context"]
    asked, drained = context.stop_requested, told["yield_flag"](ray.get_runtime_context().get_node_id())
    context = replace(context, stop_requested=lambda: _TERMINATED.is_set() or drained.exists() or asked())
    torch.set_num_threads(context.threads)
    if context.device == "cuda":
        from ray.train.torch import get_device

        torch.cuda.set_device(get_device())
    stage = get_stage(told["stage"])
    try:
        found = {"stopped": False, "metrics": stage.run(stage.Config.model_validate(told["config"]), context)}
    except StopRequested:
        found = {"stopped": True}
    except Exception as error:
        # an error in the exchange itself is but the echo of what became of another worker
        if "torch/distributed" not in traceback.extract_tb(error.__traceback__)[-1].filename:
            told["answer"].with_name(f"error-{workers.rank()}").write_text(traceback.format_exc())
        raise
    if workers.rank() == 0:
        aside = told["answer"].with_suffix(f".{os.getpid()}")
        aside.write_text(json.dumps(found))
        aside.replace(told["answer"])
