"""What a stage is, and the key under which its result is stored.

A stage is pure in its inputs: its key hashes the stage's name and version, its config, its seed, the keys of the results it
reads and, where they matter, fingerprints of outside data and of the machine; never a path or a time. Two trials that need the
same thing therefore share one run of it.
"""

from __future__ import annotations

import hashlib
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, ClassVar, Protocol

from fffsweep.pipeline.settings import Settings, canonical_json

Metrics = dict[str, float]


@dataclass(frozen=True)
class Resources:
    """What one run of a stage occupies. `exclusive` asks for a node that runs nothing else meanwhile, as timings need.

    memory_bytes, timeout_s: a run that takes more is ended; None for no limit.
    workers: processes of one run, each with these CPUs and GPUs.
    """

    cpus: int = 1
    gpus: float = 0.0
    exclusive: bool = False
    memory_bytes: int | None = None
    timeout_s: float | None = None
    workers: int = 1


class StopRequested(Exception):
    """Raised by a stage that was asked to stop and has saved its checkpoint; it is run again from there later."""


@dataclass
class StageContext:
    """What a running stage sees of the outside.

    inputs: role -> folder of an upstream result's artifacts, checksums verified. Read only.
    input_metrics: role -> metrics of that result.
    output: empty folder; every file in it when `run` returns becomes an artifact of this result.
    work: private folder that outlives a killed attempt of the same key; checkpoints go here.
    threads: CPU threads the stage may use; torch is already set to it.
    device: "cpu" or "cuda".
    """

    seed: int
    inputs: Mapping[str, Path]
    input_metrics: Mapping[str, Metrics]
    output: Path
    work: Path
    threads: int = 1
    device: str = "cpu"
    report: Callable[[dict[str, Any]], None] = lambda _: None
    stop_requested: Callable[[], bool] = lambda: False

    def progress(self, done: float, total: float, unit: str, **figures: float) -> None:
        """Tell whoever watches how far this run is: `done` of `total` units, and figures such as `loss` or `tokens_per_s`."""
        self.report({"done": done, "total": total, "unit": unit, **figures})


class Stage(Protocol):
    """One kind of work. Modules of stages import light: whatever needs torch or transformers is imported inside `run`.

    name, version: part of the key; raise `version` whenever the same inputs would give another result.
    sources: further files, from the checkout's top, globs allowed, whose change can change the result; a test watches them.
    """

    name: ClassVar[str]
    version: ClassVar[int]
    sources: ClassVar[tuple[str, ...]]
    Config: ClassVar[type[Settings]]

    def resources(self, config: Any) -> Resources:
        """What one run occupies."""
        ...

    def fingerprints(self, config: Any) -> dict[str, str]:
        """Outside facts that the result depends on, such as `data` or `machine`; part of the key. Called when planning."""
        ...

    def run(self, config: Any, context: StageContext) -> Metrics:
        """Do the work, write artifacts to `context.output`, return finite metrics."""
        ...


@dataclass(frozen=True)
class StageRun:
    """One execution to be, fully determined and plain enough to be sent to another machine.

    `config` is all that the stage is given; `identity` is the part of it that the key hashes, None for all of it.
    """

    stage: str
    version: int
    config: dict[str, Any]
    seed: int
    inputs: dict[str, str] = field(default_factory=dict)
    fingerprints: dict[str, str] = field(default_factory=dict)
    identity: dict[str, Any] | None = None

    @cached_property
    def key(self) -> str:
        """40 hexadecimal digits of SHA-256 over everything above, `identity` in the place of `config`."""
        inputs, others = canonical_json(self.inputs), self._others
        return hashlib.sha256(f'{others[0]},"inputs":{inputs},"seed":{self.seed:d},{others[1]}'.encode()).hexdigest()[:40]

    @cached_property
    def _others(self) -> tuple[str, str]:
        """Canonical JSON of all that is hashed, before and after inputs and seed: large, and the same in many runs of a sweep."""
        hashed = {"config": self.config if self.identity is None else self.identity, "fingerprints": self.fingerprints}
        return canonical_json(hashed)[:-1], canonical_json({"stage": self.stage, "version": self.version})[1:]

    def again(self, seed: int, inputs: Mapping[str, str]) -> StageRun:
        """The same with another seed and other inputs."""
        run = StageRun(self.stage, self.version, self.config, seed, dict(inputs), self.fingerprints, self.identity)
        run.__dict__["_others"] = self._others
        return run


_STAGES = {
    "prepare": "fffsweep.pipeline.stages.prepare:Prepare",
    "rung": "fffsweep.pipeline.stages.rung:Rung",
    "pretrain": "fffsweep.pipeline.stages.pretrain:Pretrain",
    "activations": "fffsweep.pipeline.stages.convert:Activations",
    "convert": "fffsweep.pipeline.stages.convert:Convert",
    "finetune": "fffsweep.pipeline.stages.finetune:Finetune",
    "benchmark_cpu": "fffsweep.pipeline.stages.benchmark:BenchmarkCpu",
    "benchmark_gpu": "fffsweep.pipeline.stages.benchmark_gpu:BenchmarkGpu",
    "collect": "fffsweep.pipeline.stages.collect:Collect",
    "noop": "fffsweep.pipeline.stages.noop:Noop",
}


def stage_names() -> list[str]:
    """Names that `get_stage` knows, in the order a trial runs them."""
    return list(_STAGES)


def get_stage(name: str) -> Stage:
    """The stage called `name`. Raises ValueError with the choices if there is none."""
    if name not in _STAGES:
        raise ValueError(f"stage {name!r}: expected one of {', '.join(_STAGES)}")
    module, _, attribute = _STAGES[name].partition(":")
    stage: Stage = getattr(importlib.import_module(module), attribute)()
    return stage


def stage_run(name: str, config: Settings, seed: int = 0, inputs: Mapping[str, str] | None = None) -> StageRun:
    """The run of stage `name` with this config, seed and upstream keys (role -> key), fingerprints taken now."""
    stage = get_stage(name)
    return StageRun(name, stage.version, config.resolved(), seed, dict(inputs or {}), stage.fingerprints(config), config.identity())
